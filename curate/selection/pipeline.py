"""From a finished stage and a target to the next stage's data: `select`, one call per step.

resolve             every "auto" of the config decided, once
load_plan_targets   the targets, and what must be retained
open_source         what the next stage draws from: streams, catalogue, usable samples
measure             values of measured samples for every target
score_domains       values rolled up to domains, with intervals
score_samples       one value of every sample for all targets together
filter_samples      each sample that is not good enough gets its reason
solve_mixture       weights of domains, and which samples the stage takes
_finish             tables, data and report, written and sealed
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING

import polars as pl

from curate.core.arrays import write_table
from curate.core.artifacts import begin, check_can_begin, check_contents, finalize, fingerprint, is_complete, making
from curate.domains.scores_file import write_scores
from curate.mixture.decide import NOTHING_RETAINED
from curate.mixture.record import write_mixture
from curate.output.export import export
from curate.output.layout import SELECTIONS, SelectionFolder
from curate.selection.domains import score_domains
from curate.selection.identity import check_samples, identity_of
from curate.selection.mixture import filter_samples, solve_mixture
from curate.selection.resolve import Resolved, resolve
from curate.selection.samples import score_samples
from curate.selection.source import Source, open_source
from curate.selection.values import Cost, Values, measure
from curate.training.target import Targets, load_targets
from curate.training.token_accounting import domains_seen

if TYPE_CHECKING:
    from curate.core.artifacts import Json
    from curate.mixture.record import Mixture
    from curate.output.plan import SamplePlan
    from curate.selection.config import SelectConfig
    from curate.selection.domains import Domains
    from curate.selection.mixture import Kept
    from curate.selection.samples import SampleScores
    from curate.training.run import Run

_log = logging.getLogger(__name__)


def select(config: SelectConfig, run: Run) -> Path:
    """Select the next stage's data into a folder, see `output.layout`; a complete one is returned as it is.

    Raises:
        UserError: bad run, target or settings, an infeasible mixture, or a folder made with other settings.
    """
    plan = resolve(config, run)
    targets = load_plan_targets(plan)
    source = open_source(plan)
    with _selection(plan, targets, source) as job:
        if job.is_missing:
            values = measure(plan, source, targets)
            domains = score_domains(plan, source, targets, values)
            samples = score_samples(plan, source, targets, values, domains)
            kept = filter_samples(plan, source, samples)
            mixture, chosen = solve_mixture(plan, source, domains, kept)
            _finish(job, _Result(targets, source, values, domains, samples, kept, mixture, chosen))
    return job.folder.root


def is_selected(config: SelectConfig, run: Run) -> bool:
    """Whether `config.out` holds this selection already.

    Raises:
        UserError: it holds one that was made with other settings (names them).
    """
    assert config.out is not None
    plan = resolve(config, run)
    return is_complete(config.out, identity_of(plan, load_plan_targets(plan)))


def load_plan_targets(plan: Resolved) -> Targets:
    """Read the targets and what must be retained, once.

    Raises:
        UserError: see `curate.training.target.load_targets`.
    """
    config = plan.config
    paths = [config.target, *map(Path, config.more_targets)]
    return load_targets(paths, config.retain, plan.run.spec, config.values.min_target_tokens)


@dataclass(frozen=True, kw_only=True)
class _Job:
    """A selection that is being made, or that is there already."""

    plan: Resolved
    folder: SelectionFolder
    identity: Json  # settings and parents that decide the bytes
    source_fingerprint: str  # of the samples that are drawn from
    is_missing: bool
    started: float  # seconds, by `perf_counter`


@dataclass(frozen=True)
class _Result:
    """What the steps of `select` returned, in their order."""

    targets: Targets
    source: Source
    values: Values
    domains: Domains
    samples: SampleScores
    kept: Kept
    mixture: Mixture
    chosen: SamplePlan


@contextmanager
def _selection(plan: Resolved, targets: Targets, source: Source) -> Iterator[_Job]:
    """The selection's folder, locked; a complete one is held against its settings and samples."""
    started, identity, source_fingerprint = perf_counter(), identity_of(plan, targets), source.fingerprint
    name = f"{targets.main.name}-{fingerprint({**identity, 'data': source_fingerprint})[:8]}"
    out = plan.config.out or plan.run.folder / SELECTIONS / name
    # asked before anything is measured: `begin` would refuse such a folder too, but only hours later
    if not is_complete(out, identity):
        check_can_begin(out, identity)
    with making(out, identity) as missing:
        if not missing:
            check_contents(out)
            # the samples are no part of the identity: a re-sharded stream has the same ones, and the same selection
            check_samples(out, source_fingerprint)
            _log.info("this selection is complete already")
        elif plan.config.is_valued and plan.config.retain is None:
            _log.warning("%s: give such text with --retain FILE", NOTHING_RETAINED)
        yield _Job(
            plan=plan,
            folder=SelectionFolder(out),
            identity=identity,
            source_fingerprint=source_fingerprint,
            is_missing=missing,
            started=started,
        )


def _finish(job: _Job, result: _Result) -> None:
    """Write the tables, the data, the mixture and the report, and finalize the folder."""
    plan, folder = job.plan, job.folder
    tables = _tables(plan, result)
    begin(folder.root, job.identity)  # only now: what fails while it measures leaves nothing that looks begun
    write_scores(folder.scores, result.values.frame)
    for name, table in tables.items():
        write_table(folder.table(name), table)
    data = export(
        folder,
        result.source.samples,
        plan.run.spec,
        result.mixture,
        result.chosen,
        mode=plan.config.mode,
        scheduled=plan.mixture.schedule != "constant",
        seed=plan.config.seed,
        shard_bytes=plan.config.output.shard_bytes,
    )
    # after the data was read back and compared: a mixture.yaml never promises what is not there
    write_mixture(folder.mixture, result.mixture)
    # a baseline without values has nothing that a report would show
    if plan.config.is_valued:
        _report(job, result, tables, data)
    facts = {
        # how far the values and the weights may be trusted, without opening a table
        "residuals": result.values.residuals,
        "mixture_fingerprint": fingerprint(result.mixture.model_dump(mode="json")),
    }
    # last: the manifest is what makes the folder complete
    finalize(folder.root, "selection", job.identity, data=job.source_fingerprint, **facts)
    _log.info("selected in %.0f seconds", perf_counter() - job.started)


def _tables(plan: Resolved, result: _Result) -> dict[str, pl.DataFrame]:
    """Every table of the selection but its costs, by the name of its file."""
    roll_ups = result.domains.roll_ups
    tables: dict[str, pl.DataFrame] = {"domains": result.domains.table}
    tables |= {} if roll_ups is None else roll_ups.of_main_target
    tables["seen"] = domains_seen(result.source.samples, plan.uses)
    tables["contamination"] = result.kept.contamination
    if result.samples.quality is not None:
        tables["predicted"] = result.samples.quality
    rows, chosen_by = result.values.rows, result.samples.trust
    if rows is not None:
        # the last rows are those that samples are chosen by
        tables["trust"] = pl.concat([rows.trust, *([] if chosen_by is None else [chosen_by])])
    return tables


def _report(job: _Job, result: _Result, tables: Mapping[str, pl.DataFrame], data: Mapping[str, Path]) -> None:
    # plotting takes a second to import, and selections of baselines do without
    from curate.report.track import publish
    from curate.selection.report import cost_table, selection_report

    measured = result.samples.measured
    phases = [cost for values in result.values.by_source.values() for cost in values.costs]
    if measured is not None:
        phases.append(
            Cost(phase="measure samples", folder=measured.folder, seconds=measured.seconds, passes=measured.passes)
        )
    # selecting itself: what measuring took is a phase of its own, with the time of earlier, interrupted calls
    selecting_seconds = perf_counter() - result.values.finished - result.samples.measuring_seconds
    costs = cost_table(job.plan.run, phases, job.folder.root, selecting_seconds)
    # after the others: their bytes are a row of it
    write_table(job.folder.table("costs"), costs)
    report = selection_report(
        job.plan, result.source, result.targets.main, result.values, result.mixture, {**tables, "costs": costs}, data
    )
    publish(job.folder, report, job.plan.config.output.tracking)
