"""`python -m curate.select --target domain.jsonl`: the main job, run between two training stages.

Which of the data that the last stage trained on moved the model towards the target, and what should the next stage
train on? In order: target, embeddings (made where they are missing), search, scores, mixture, data, report.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING, Any

from curate.artifacts import check_contents, check_startable, fingerprint, is_complete, making, seal, start
from curate.callable_module import calls_module
from curate.choice import Choice, Known, choice_of, likeness_of, next_step_of
from curate.config import parse_command, run_command
from curate.embed import embed, embed_others, index_folder, other_targets, read_target
from curate.pools.slopes import NEXT
from curate.pools.values import POOL, value_pool
from curate.progress import start_logging
from curate.scores.methods import VALUED
from curate.selection import SelectConfig, check_data, settings_of
from curate.shards.deliver import deliver
from curate.stock import Stock, budget_of, left_of, open_stock, pool_of, solve, with_mixture
from curate.trajectory.ledger import consumed, domain_ledger, stages, uses
from curate.trajectory.run import Run, find_run
from curate.trajectory.samples import fresh_shares, samples_fingerprint
from curate.writing import replacing

if TYPE_CHECKING:
    import polars as pl

    from curate.artifacts import Json
    from curate.embeddings.store import Embedding
    from curate.mixture.record import Mixture
    from curate.pools.slopes import NextStep
    from curate.pools.values import PoolValues
    from curate.report.collect import Costed
    from curate.report.data import ReportData
    from curate.shards.plan import Plan
    from curate.target import Target

_log = logging.getLogger(__name__)
_UNEVEN = 0.05  # of the budget that samples of uneven length may miss it by in silence


@calls_module
def select(config: SelectConfig, run: Run) -> Path:
    """Select the next stage's data.

    Returns:
        The selection's folder: mixture.yaml, data/, scores.parquet, domains.parquet, shards.parquet, documents.parquet,
        report.html; a method that values no samples leaves an empty scores.parquet and no report. A complete one made
        with the same settings is returned as it is.

    Raises:
        UserError: bad run, target or settings, an infeasible mixture, or a folder made with other settings.
    """
    target = _target(config, run)
    settings = settings_of(config, run, target)
    data = None if config.pool is not None else samples_fingerprint(run.catalogue.sort("domain", "sample_id"))
    out = config.out or run.folder / "selections" / f"{target.name}-{fingerprint({**settings, 'data': data})[:8]}"
    if not is_complete(out, settings):
        check_startable(out, settings)
    with making(out, settings) as missing:
        if missing:
            _make(config, run, target, out, settings, data)
        else:
            check_contents(out)
            check_data(out, data)
            _log.info("this selection is complete already")
    return out


def _make(config: SelectConfig, run: Run, target: Target, out: Path, settings: Json, data: str | None) -> None:
    """Everything from the values to the manifest."""
    from curate.mixture.record import write_mixture
    from curate.report.collect import cost_table
    from curate.report.track import publish
    from curate.scores.likeness import with_likeness

    begin = perf_counter()
    valued, ledger = config.method in VALUED, uses(stages(run, config.earlier))
    used = consumed(ledger)
    stock = open_stock(config, run, used)
    config = stock.config
    targets = [target, *other_targets(config, run, target)]
    found = _found(stock, run, targets) if valued else {}
    ahead = next_step_of(stock, run, targets, used)
    embedded = perf_counter()
    every, tables, keys = _scored(stock, run, targets, found, ahead)
    like = likeness_of(stock, targets)
    mixing = config.mixture.likeness_share
    tables["domains"] = with_likeness(tables["domains"], like if mixing > 0 else None, mixing)
    facts: dict[str, Any] = {"residuals": _residuals(found)}
    if config.branch_test:
        facts["branch_test"] = _branch_test(config, run, target, stock.trained, tables["domains"])
        stock = replace(stock, config=with_mixture(config, temperature=facts["branch_test"]["temperature"]))
    tables["ledger"] = domain_ledger(stock.run, ledger)
    known = Known(every=every, domains=tables["domains"], pool=None if isinstance(found, dict) else found, ahead=ahead)
    choice = choice_of(stock, run, targets, known, like, used)
    embedded += choice.slopes_seconds
    tables |= {} if choice.predicted is None else {"predicted": choice.predicted}
    mixture, plan, tables["leaks"] = _mix(stock, choice, tables["domains"], used, target, keys)
    start(out, settings)
    _write_tables(out, every, tables)
    delivered = deliver(
        out / "data", stock.run, mixture, plan, mode=config.mode, scheduled=config.schedule.kind != "throughout",
        seed=config.seed, shard_bytes=config.shards.shard_bytes,
    )  # fmt: skip
    write_mixture(out / "mixture.yaml", mixture)
    if valued:
        made = _costed(found) | {"next step": ahead, "slopes": choice.slopes}
        tables["costs"] = cost_table(run, made, out, perf_counter() - embedded)
        _write_table(out, "costs", tables["costs"])
        shown = every.filter(target=target.name)
        publish(out, _report(stock, target, mixture, tables, shown, found, delivered), config.tracking)
    facts["mixture_fingerprint"] = fingerprint(mixture.model_dump(mode="json"))
    seal(out, "selection", settings, data=data, **facts)
    _log.info("selected in %.0f seconds", perf_counter() - begin)


def is_selected(config: SelectConfig, run: Run) -> bool:
    """Whether `config.out` holds this selection already.

    Raises:
        UserError: it holds one that was made with other settings (names them).
    """
    assert config.out is not None
    return is_complete(config.out, settings_of(config, run, _target(config, run)))


def _target(config: SelectConfig, run: Run) -> Target:
    target = read_target(config, run)
    assert target is not None  # the config requires one
    return target


def _residuals(found: dict[str, Embedding] | PoolValues) -> dict[str, float]:
    """Window -> relative residual, where the target was solved into anchors."""
    parts = found.items() if isinstance(found, dict) else ()
    return {window: part.residual for window, part in parts if part.residual is not None}


def _costed(found: dict[str, Embedding] | PoolValues) -> dict[str, Costed | None]:
    """What was valued, by the phase that it is."""
    if isinstance(found, dict):
        return {f"embed {window}": part for window, part in found.items()}
    return {"probe pool": found}


def _found(stock: Stock, run: Run, targets: Sequence[Target]) -> dict[str, Embedding] | PoolValues:
    """What was valued: the windows of the run, or the pool for every target."""
    config = stock.config
    if stock.pool is None:
        return embed(config, run, targets[0])
    rest = "none" if config.mode == "reweight" else config.probe.rest
    probe = config.probe.model_copy(update={"rest": rest})
    return value_pool(
        run, stock.pool, targets, probe, adjoint=config.adjoint,
        seed=config.seed, device=config.device, batch_size=config.target_batch_size, tolerance=config.tolerance,
    )  # fmt: skip


def _scored(
    stock: Stock,
    run: Run,
    targets: Sequence[Target],
    found: dict[str, Embedding] | PoolValues,
    ahead: NextStep | None,
) -> tuple[pl.DataFrame, dict[str, pl.DataFrame], pl.DataFrame | None]:
    """Values of every target, their roll-ups, and the keys by which a method draws samples, where it does."""
    import polars as pl

    from curate.scores.methods import scores_without_values
    from curate.scores.rollup import roll_ups
    from curate.scores.schema import no_scores
    from curate.scores.shards import between_shards

    config, trained, grain, target = stock.config, stock.trained, stock.grain, targets[0]
    if config.method not in VALUED:
        domains, keys = scores_without_values(
            config.method, stock.run, target, config.weights, trained=trained, window=config.mixture.window,
            budget=budget_of(config, trained), temperature=config.mixture.temperature,
            importance_temperature=config.importance_temperature, seed=config.seed,
        )  # fmt: skip
        return no_scores(), {"domains": domains}, keys
    if isinstance(found, dict):
        frames = _every_value(config, run, targets, found) if found else []
        every = pl.concat([*frames, *([] if ahead is None else [ahead.values])])
    else:
        every = found.probed
    own = every if grain is None else grain.of_parts(every)
    parents = None if grain is None else grain.parents
    tables = roll_ups(own, target.name, trained, fresh_shares(stock.run), config.seed, parents)
    tables["reliability"] = tables["reliability"].filter(pl.col("window") != NEXT)  # which knows no halves
    if config.grain.by == "shards":  # whether they differ at all is asked of domains
        tables["between_shards"] = between_shards(every.filter(target=target.name))
        for domain, verdict in tables["between_shards"].select("domain", "verdict").unique().sort("domain").iter_rows():
            _log.info("%s: %s", domain, verdict)
    if not isinstance(found, dict):
        tables |= {"pool": found.domains, "pool_values": found.every}
    return own, tables, None


def _every_value(
    config: SelectConfig, run: Run, targets: Sequence[Target], embeddings: dict[str, Embedding]
) -> list[pl.DataFrame]:
    """The values of every target, one after the other, the guard last."""
    from curate.scores.methods import shuffled
    from curate.scores.values import embedded_values

    target, *others = targets
    frames = [embedded_values(embeddings, target)]
    if others:
        opened = embed_others(config, run, target)
        frames += [embedded_values(part, other) for part, other in zip(opened, others, strict=True)]
    return [shuffled(frame, config.seed) for frame in frames] if config.method == "shuffled" else frames


def _branch_test(
    config: SelectConfig, run: Run, target: Target, trained: Mapping[str, int], domains: pl.DataFrame
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
        _write_table(out, name, table)


def _write_table(out: Path, name: str, table: pl.DataFrame) -> None:
    with replacing(out / f"{name}.parquet") as part:
        table.write_parquet(part)


def _mix(
    stock: Stock,
    choice: Choice,
    domains: pl.DataFrame,
    used: pl.DataFrame,
    target: Target,
    keys: pl.DataFrame | None,
) -> tuple[Mixture, Plan, pl.DataFrame]:
    """Choose among the samples, solve the mixture and turn it into whole samples; also what the screen found.

    Where a method draws samples, its `keys` alone say which are best.
    """
    from curate.mixture.record import with_tokens
    from curate.scores.reliability import LENGTH_BIAS
    from curate.shards.choose import keep_best, length_correlation, with_keys
    from curate.shards.plan import make_plan
    from curate.shards.sift import read_held_out, sift

    config, run, trained = stock.config, stock.run, stock.trained
    pool = pool_of(stock, choice.values, used, choice.likeness)
    aimed = [config.target, *map(Path, config.more_targets), *([config.guard] if config.guard else [])]
    held = read_held_out(aimed, config.shards.screen, run.spec)
    grain = stock.grain
    pool, leaks = sift(
        pool, run.streams, held, config.shards, filtered=config.mode != "reweight", seed=config.seed,
        parents=None if grain is None else grain.parents,
    )  # fmt: skip
    budget = budget_of(config, trained)
    mixture = solve(stock, domains, target, left_of(stock, pool))
    samples = {**dict.fromkeys(trained, 0), **{domain: part.samples for domain, part in mixture.domains.items()}}
    if config.mode != "reweight":
        pool = pool if keys is None else with_keys(pool, keys)
        bias = length_correlation(pool)
        if bias is not None and abs(bias) > LENGTH_BIAS:
            _log.warning("inside domains the choice goes with length too (rank correlation %+.2f)", bias)
        pool = keep_best(pool, samples, config.shards.cluster_quota)
    plan = make_plan(pool, samples, config.seed)
    delivered = plan.tokens()
    if abs(sum(delivered.values()) / budget - 1) > _UNEVEN:
        _log.warning(
            "samples differ in length, and those chosen have %s tokens, not %s: pack samples to one length, or change "
            "budget_tokens by as much", f"{sum(delivered.values()):,}", f"{budget:,}",
        )  # fmt: skip
    return with_tokens(mixture, {**dict.fromkeys(mixture.domains, 0), **delivered}), plan, leaks


def _report(
    stock: Stock,
    target: Target,
    mixture: Mixture,
    tables: dict[str, pl.DataFrame],
    values: pl.DataFrame,
    found: dict[str, Embedding] | PoolValues,
    data: dict[str, Path],
) -> ReportData:
    from curate.embeddings.store import horizon_name
    from curate.report.selection import selection_report

    config = stock.config
    ahead = f"{config.probe.steps}_steps_on"
    horizons = dict.fromkeys(found, horizon_name(config.horizon)) if isinstance(found, dict) else {POOL: ahead}
    if NEXT in tables["domains"]["window"]:
        horizons[NEXT] = ahead
    return selection_report(
        stock.run, target, mixture, tables, values=values, costs=tables["costs"], data=data,
        found=_examples(config, found, values, target), residuals=_residuals(found),
        estimator=config.estimator if isinstance(found, dict) else "probes", horizons=horizons,
        settings=config.model_dump(mode="json"),
    )  # fmt: skip


def _examples(
    config: SelectConfig, found: dict[str, Embedding] | PoolValues, values: pl.DataFrame, target: Target
) -> dict[tuple[str, str], list[int]]:
    """The rows of each window of largest and of smallest value, by the FAISS index where there is one."""
    import numpy as np

    from curate.index.open import extremes
    from curate.report.collect import EXAMPLES

    if not found or not isinstance(found, dict):
        order = values["value"].arg_sort(descending=True).to_list()
        window = values["window"][0]
        return {(window, "most"): order[:EXAMPLES], (window, "least"): order[::-1][:EXAMPLES]}
    rows_of = {}
    for window, embedding in found.items():
        assert embedding.targets is not None
        query = np.asarray(target.half_weights, np.float32) @ embedding.targets
        for kind, rows in extremes(index_folder(embedding, config.index), query, EXAMPLES).items():
            rows_of[window, kind] = rows
    return rows_of


def main() -> None:
    """Entry point."""
    from curate.report.summary import say_mixture

    config = parse_command(
        SelectConfig,
        "python -m curate.select",
        "Select the next stage's data: which of the data trained on helped the target?",
    )
    start_logging()
    run = Run(config.run or find_run(config.runs_root), config.streams, config.tokenizer)
    out = select(config, run)
    say_mixture(out)


if __name__ == "__main__":
    run_command(main)
