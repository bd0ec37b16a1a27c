"""`python -m curate.select --target domain.jsonl`: the main job, run between two training stages.

Which of the data that the last stage trained on moved the model towards the target, and what should the next stage
train on? In order: target, embeddings (made where they are missing), search, scores, mixture, data, report.
"""

from __future__ import annotations

import logging
import math
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING, Any

from pydantic import Field, model_validator

from curate.artifacts import (
    check_startable,
    file_fingerprint,
    fingerprint,
    is_complete,
    replacing,
    seal,
    start,
)
from curate.config import TokenCount, parse_command, run_command
from curate.embed import EmbedConfig, embed, embed_others, index_folder, other_targets, read_target
from curate.errors import UserError
from curate.fidelity.branches import BranchTestConfig
from curate.mixture.constraints import MixtureConfig
from curate.mixture.schedule import StageSchedule
from curate.pools.open import leaves_out_old, open_pool, pool_fingerprint, pool_streams
from curate.pools.values import POOL, ProbeConfig, value_pool
from curate.progress import start_logging
from curate.scores.methods import VALUED, Method, estimator_of
from curate.shards.choose import ShardsConfig
from curate.shards.deliver import Mode, deliver
from curate.tracking import TrackingConfig
from curate.trajectory.ledger import consumed, domain_ledger, ledger_identity, stages, uses
from curate.trajectory.run import Run, find_run
from curate.trajectory.samples import fresh_shares, trained_tokens

if TYPE_CHECKING:
    import polars as pl

    from curate.artifacts import Json
    from curate.embeddings.store import Embedding
    from curate.mixture.decide import Aims
    from curate.mixture.record import Mixture
    from curate.pools.open import Pool
    from curate.pools.values import PoolValues
    from curate.shards.plan import Plan
    from curate.target import Target

_log = logging.getLogger(__name__)
# What does not change what is selected.
_ELSEWHERE: dict[str, Any] = {
    **dict.fromkeys(("run", "runs_root", "streams", "target", "out", "device", "tracking", "earlier"), True),
    **dict.fromkeys(("more_targets", "guard", "pool", "probe"), True),
    **dict.fromkeys(("tolerance", "target_batch_size"), True),
    "adjoint": {"memory_bytes", "disk_bytes", "at_once", "save_seconds"},
    "dvemb": {"rows_per_block"},
    "dvemb_adam": {"rows_per_block"},
}


class SelectConfig(EmbedConfig):
    """A selection: everything but the target has a default."""

    target: Path
    """Target documents (JSONL): what the next stage should get better at."""
    budget_tokens: TokenCount | None = None
    """Tokens of the next stage, e.g. 50M; none: as many as the last stage."""
    out: Path | None = None
    """Folder to write to; none: a folder inside the run."""
    method: Method = "curate"
    """Where scores come from. curate: values by the estimator. Baselines: proportional (what was trained on), uniform
    (over domains), random (samples), dsir (importance resampling over hashed n-grams), grad-dot, less and shapley
    (gradient dot products), shuffled (values dealt anew: a null control), given (the weights of `weights`)."""
    weights: dict[str, float] = {}
    """Weight of every domain, for method given."""
    importance_temperature: float = Field(default=1.0, gt=0)
    """Of method dsir: samples are drawn in proportion to importance ** (1 / importance_temperature)."""
    mode: Mode = "reweight"
    """reweight: `streams.yaml`, the streams there are with an integer `choose` each; nothing is copied. filter: new MDS
    folders with exactly the mixture's samples, without those of lowest value. both: the same mixture in both forms.
    With phases (`schedule.kind`) each form has a `schedule.yaml` instead of `streams.yaml` or beside the folders."""
    earlier: tuple[Path, ...] | None = None
    """Runs of the stages before the run, whose samples count as consumed; none: those that the runs name themselves."""
    pool: Path | None = None
    """Data that was never trained on, which the next stage draws from instead (MDS folders of domains, or a
    streams.yaml): a part of it is probed from the run's last state, the rest predicted."""
    probe: ProbeConfig = ProbeConfig()
    """How the pool is valued."""
    branch_test: bool = False
    """Before the mixture, train short branches with a little more of one domain each, and stay near the prior where the
    scores do not predict what they do to the target."""
    branches: BranchTestConfig = BranchTestConfig()
    """Length and number of those branches."""
    seed: int = 0
    """Seed of bootstrap intervals and sample draws."""
    mixture: MixtureConfig = MixtureConfig()
    """From scores to weights."""
    schedule: StageSchedule = StageSchedule()
    """Where in the next stage these weights hold."""
    shards: ShardsConfig = ShardsConfig()
    """How data is written."""
    tracking: TrackingConfig = TrackingConfig()
    """Weights & Biases."""

    @model_validator(mode="before")
    @classmethod
    def _estimator_of_method(cls, given: dict[str, Any]) -> dict[str, Any]:
        method = given.get("method", "curate")
        if bool(given.get("weights")) != (method == "given"):
            raise ValueError("weights are for method given, which needs them; set both or neither")
        if given.get("pool") is not None and (given.get("branch_test") or method in set(VALUED) - {"curate"}):
            raise ValueError("a pool is valued by its probes: leave out branch_test, and methods that value a window")
        return {**given, "estimator": estimator_of(method, given.get("estimator", "adjoint"))}


def select(config: SelectConfig, run: Run) -> Path:
    """Select the next stage's data.

    Returns:
        The selection's folder: mixture.yaml, data/, scores.parquet, domains.parquet, shards.parquet, documents.parquet,
        report.html; a method that values no samples leaves an empty scores.parquet and no report. A complete one made
        with the same settings is returned as it is.

    Raises:
        UserError: bad run, target or settings, an infeasible mixture, or a folder made with other settings.
    """
    from curate.embeddings.store import horizon_name
    from curate.mixture.record import write_mixture
    from curate.report.collect import cost_table
    from curate.report.selection import selection_report
    from curate.report.track import publish

    begin = perf_counter()
    target = _target(config, run)
    settings = _settings(config, run, target)
    out = config.out or run.folder / "selections" / f"{target.name}-{fingerprint(settings)[:8]}"
    if is_complete(out, settings):
        _log.info("this selection is complete already")
        return out
    check_startable(out, settings)
    valued, ledger = config.method in VALUED, uses(stages(run, config.earlier))
    pool = None if config.pool is None else open_pool(config.pool, run, consumed(ledger), config.probe.overlap)
    stock, trained = (run, trained_tokens(run)) if pool is None else (pool.stock, dict(pool.tokens))
    config = config if pool is None else _of_pool(config, run, pool)
    embeddings = embed(config, run, target) if valued and pool is None else {}
    worth = _worth(config, run, pool, target) if valued and pool is not None else None
    embedded = perf_counter()
    every, tables, keys = _scored(config, stock, target, worth or embeddings, trained)
    if not valued:  # weights are no gains that repetition could take from
        endless = config.mixture.model_copy(update={"decay_epochs": math.inf})
        config = config.model_copy(update={"mixture": endless})
    facts: dict[str, Any] = {"residuals": _residuals(embeddings)}
    if config.branch_test:
        facts["branch_test"] = _branch_test(config, run, target, trained, tables["domains"])
        allowed = config.mixture.model_copy(update={"temperature": facts["branch_test"]["temperature"]})
        config = config.model_copy(update={"mixture": allowed})
    tables["ledger"] = domain_ledger(stock, ledger)
    aims, values = _aims(config, target), every if worth is None else worth.chosen_by()
    mixture, plan, tables["leaks"] = _mix(
        stock, values, tables["domains"], trained, consumed(ledger), config, aims, keys
    )
    start(out, settings)
    _write_tables(out, every, tables)
    shard_bytes, scheduled = config.shards.shard_bytes, config.schedule.kind != "throughout"
    data = deliver(
        out / "data", stock, mixture, plan, mode=config.mode, scheduled=scheduled, seed=config.seed,
        shard_bytes=shard_bytes,
    )  # fmt: skip
    write_mixture(out / "mixture.yaml", mixture)
    if valued:
        made = embeddings if worth is None else {POOL: worth}
        costs = cost_table(run, made, out, perf_counter() - embedded)
        horizons = dict.fromkeys(embeddings, horizon_name(config.horizon))
        report = selection_report(
            stock, target, mixture, tables, values=every.filter(target=target.name), costs=costs, data=data,
            found=_examples(config, embeddings, worth, target), residuals=facts["residuals"],
            estimator="probes" if worth else config.estimator,
            horizons=horizons or {POOL: f"{config.probe.steps}_steps_on"}, settings=config.model_dump(mode="json"),
        )  # fmt: skip
        publish(out, report, config.tracking)
    facts["mixture_fingerprint"] = fingerprint(mixture.model_dump(mode="json"))
    seal(out, "selection", settings, **facts)
    _log.info("selected in %.0f seconds", perf_counter() - begin)
    return out


def is_selected(config: SelectConfig, run: Run) -> bool:
    """Whether `config.out` holds this selection already.

    Raises:
        UserError: it holds one that was made with other settings (names them).
    """
    assert config.out is not None
    return is_complete(config.out, _settings(config, run, _target(config, run)))


def _target(config: SelectConfig, run: Run) -> Target:
    target = read_target(config, run)
    assert target is not None  # the config requires one
    return target


def _settings(config: SelectConfig, run: Run, target: Target) -> Json:
    chosen = config.model_dump(mode="json", exclude=_ELSEWHERE)
    files = config.adjoint.anchor_files
    chosen["adjoint"]["anchor_files"] = [file_fingerprint(path) if path.is_file() else str(path) for path in files]
    screened = config.shards.screen.files
    chosen["shards"]["screen"]["files"] = [file_fingerprint(Path(path)) for path in screened if Path(path).is_file()]
    earlier = ledger_identity(stages(run, config.earlier)[:-1])
    weights: list[float | str] = [*config.more_targets.values(), *([] if config.guard is None else ["guard"])]
    others = [other.fingerprint for other in other_targets(config, run, target)]
    more: dict[str, Any] = {"more_targets": dict(zip(others, weights, strict=True))} if others else {}
    if config.pool is not None:
        more |= {"pool": pool_fingerprint(pool_streams(config.pool)), "probe": config.probe.model_dump()}
    return {"run": run.fingerprint, "target": target.fingerprint, "earlier": earlier, **more, **chosen}


def _aims(config: SelectConfig, target: Target) -> Aims:
    from curate.mixture.decide import Aims

    weights = {target.name: 1.0} | {Path(path).stem: weight for path, weight in config.more_targets.items()}
    return Aims(targets=weights, guard=None if config.guard is None else config.guard.stem)


def _residuals(embeddings: dict[str, Embedding]) -> dict[str, float]:
    """Window -> relative residual, where the target was solved into anchors."""
    return {window: part.residual for window, part in embeddings.items() if part.residual is not None}


def _of_pool(config: SelectConfig, run: Run, pool: Pool) -> SelectConfig:
    """The settings that a pool implies."""
    once = leaves_out_old(pool, config.probe.overlap, filtered=config.mode == "filter")
    mixture = config.mixture.model_copy(update={"window": POOL})
    shards = config.shards.model_copy(update={"consume_once": once})
    budget = _budget(config, trained_tokens(run))
    return config.model_copy(update={"mixture": mixture, "shards": shards, "budget_tokens": budget})


def _worth(config: SelectConfig, run: Run, pool: Pool, target: Target) -> PoolValues:
    """The values of a pool for every target."""
    return value_pool(
        run, pool, [target, *other_targets(config, run, target)], config.probe, adjoint=config.adjoint,
        seed=config.seed, device=config.device, batch_size=config.target_batch_size, tolerance=config.tolerance,
    )  # fmt: skip


def _scored(
    config: SelectConfig, run: Run, target: Target, found: dict[str, Embedding] | PoolValues, trained: dict[str, int]
) -> tuple[pl.DataFrame, dict[str, pl.DataFrame], pl.DataFrame | None]:
    """Values of every target, their roll-ups, and the keys by which a method draws samples, where it does."""
    from curate.scores.methods import scores_without_values
    from curate.scores.rollup import roll_ups
    from curate.scores.schema import no_scores

    if config.method in VALUED:
        every = _every_value(config, run, target, found) if isinstance(found, dict) else found.probed
        tables = roll_ups(every, target.name, trained, fresh_shares(run), config.seed)
        if not isinstance(found, dict):
            tables |= {"pool": found.domains, "pool_values": found.every}
        return every, tables, None
    domains, keys = scores_without_values(
        config.method, run, target, config.weights, trained=trained, window=config.mixture.window,
        budget=_budget(config, trained), temperature=config.mixture.temperature,
        importance_temperature=config.importance_temperature, seed=config.seed,
    )  # fmt: skip
    return no_scores(), {"domains": domains}, keys


def _every_value(config: SelectConfig, run: Run, target: Target, embeddings: dict[str, Embedding]) -> pl.DataFrame:
    """The values of every target, one after the other, the guard last."""
    import polars as pl

    from curate.scores.methods import shuffled
    from curate.scores.values import embedded_values

    frames = [embedded_values(embeddings, target)]
    others = other_targets(config, run, target)
    if others:
        opened = embed_others(config, run, target)
        frames += [embedded_values(part, other) for part, other in zip(opened, others, strict=True)]
    return pl.concat([shuffled(frame, config.seed) for frame in frames] if config.method == "shuffled" else frames)


def _branch_test(
    config: SelectConfig, run: Run, target: Target, trained: dict[str, int], domains: pl.DataFrame
) -> Json:
    """What the branch test found, with the temperature that it allows."""
    from curate.fidelity.branches import check_scores
    from curate.trajectory.replay import Replay

    return check_scores(
        Replay(run, config.device, config.tolerance), target, trained, config.branches,
        domains=domains.filter(window=config.mixture.window, target=target.name),
        temperature=config.mixture.temperature, seed=config.seed, batch_size=config.target_batch_size,
    )  # fmt: skip


def _write_tables(out: Path, values: pl.DataFrame, tables: dict[str, pl.DataFrame]) -> None:
    from curate.scores.schema import write_scores

    write_scores(out / "scores.parquet", values)
    for name, table in tables.items():
        with replacing(out / f"{name}.parquet") as part:
            table.write_parquet(part)


def _mix(
    run: Run,
    values: pl.DataFrame,
    domains: pl.DataFrame,
    trained: dict[str, int],
    used: pl.DataFrame,
    config: SelectConfig,
    aims: Aims,
    keys: pl.DataFrame | None,
) -> tuple[Mixture, Plan, pl.DataFrame]:
    """Choose among the samples, solve the mixture and turn it into whole samples; also what the screen found.

    `keys` say which samples, where the method draws them.
    """
    from curate.mixture.record import with_tokens
    from curate.mixture.schedule import decide_stage
    from curate.scores.importance import keep_best
    from curate.scores.values import combined_values
    from curate.shards.plan import make_plan, make_pool, supply_of
    from curate.shards.sift import check_reweighted, read_held_out, sift

    if config.pool is None and config.mixture.window not in config.window_names:
        raise UserError(
            f"mixture.window {config.mixture.window!r} is not among the valued windows {config.window_names}; "
            "set window or mixture.window"
        )
    if config.mode != "filter":
        check_reweighted(config.shards)
    catalogues = {str(domain): table for (domain,), table in run.catalogue.group_by("domain")}
    wanted = combined_values(values.filter(window=config.mixture.window), aims.targets)
    known = {domain: catalogues[domain] for domain in trained}
    pool = make_pool(known, wanted, used, consume_once=config.shards.consume_once)
    aimed = [config.target, *map(Path, config.more_targets), *([config.guard] if config.guard else [])]
    held = read_held_out(aimed, config.shards.screen, run.spec)
    pool, leaks = sift(pool, run.streams, held, config.shards, filtered=config.mode != "reweight", seed=config.seed)
    budget = _budget(config, trained)
    prior = {domain: float(tokens) for domain, tokens in trained.items()}
    mixture = decide_stage(domains, prior, supply_of(pool), budget, config.mixture, config.schedule, aims)
    samples = {domain: part.samples for domain, part in mixture.domains.items()}
    if keys is not None and config.mode != "reweight":
        pool = keep_best(pool, keys, samples)
    plan = make_plan(pool, samples, config.seed)
    return with_tokens(mixture, {**dict.fromkeys(trained, 0), **plan.tokens()}), plan, leaks


def _budget(config: SelectConfig, trained: dict[str, int]) -> int:
    return sum(trained.values()) if config.budget_tokens is None else int(config.budget_tokens)


def _examples(
    config: SelectConfig, embeddings: dict[str, Embedding], worth: PoolValues | None, target: Target
) -> dict[tuple[str, str], list[int]]:
    """The rows of each window of largest and of smallest value, by the FAISS index where there is one."""
    import numpy as np

    from curate.index.open import extremes
    from curate.report.collect import EXAMPLES

    if worth is not None:
        order = worth.probed.filter(target=target.name)["value"].arg_sort(descending=True).to_list()
        return {(POOL, "most"): order[:EXAMPLES], (POOL, "least"): order[::-1][:EXAMPLES]}
    found = {}
    for window, embedding in embeddings.items():
        assert embedding.targets is not None
        query = np.asarray(target.half_weights, np.float32) @ embedding.targets
        for kind, rows in extremes(index_folder(embedding, config.index), query, EXAMPLES).items():
            found[window, kind] = rows
    return found


def main() -> None:
    """Entry point."""
    from curate.report.summary import say_mixture

    config = parse_command(
        SelectConfig,
        "python -m curate.select",
        "Select the next stage's data: which of the data trained on helped the target?",
    )
    start_logging()
    run = Run(config.run or find_run(config.runs_root), config.streams)
    out = select(config, run)
    say_mixture(out)


if __name__ == "__main__":
    run_command(main)
