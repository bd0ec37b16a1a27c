"""`python -m curate.select --target domain.jsonl`: the main job, run between two training stages.

Which of the data that the last stage trained on moved the model towards the target, and what should the next stage
train on? In order: target, embeddings (made where they are missing), search, scores, mixture, data, report.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING, Any

from curate.artifacts import check_startable, fingerprint, is_complete, replacing, seal, start
from curate.config import parse_command, run_command
from curate.embed import embed, embed_others, index_folder, other_targets, read_target
from curate.errors import UserError
from curate.pools.open import leaves_out_old, open_pool
from curate.pools.values import POOL, value_pool
from curate.progress import start_logging
from curate.scores.methods import VALUED
from curate.selection import SelectConfig, aims_of, sample_weights, settings_of
from curate.shards.deliver import deliver
from curate.shards.grain import divide, mixture_of_parts
from curate.trajectory.ledger import consumed, domain_ledger, stages, uses
from curate.trajectory.run import Run, find_run
from curate.trajectory.samples import fresh_shares, trained_tokens

if TYPE_CHECKING:
    import polars as pl

    from curate.artifacts import Json
    from curate.embeddings.store import Embedding
    from curate.mixture.record import Mixture
    from curate.pools.open import Pool
    from curate.pools.values import PoolValues
    from curate.report.data import ReportData
    from curate.shards.grain import Grain
    from curate.shards.plan import Plan
    from curate.target import Target

_log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class _Stock:
    """What the next stage draws from: the run's own data, parts of its domains, or a pool.

    Attributes:
        config: the settings, with what the others imply.
        run: the run as if it had these streams.
        trained: stored tokens of each of its domains.
    """

    config: SelectConfig
    run: Run
    trained: Mapping[str, int]
    pool: Pool | None = None
    grain: Grain | None = None


def select(config: SelectConfig, run: Run) -> Path:
    """Select the next stage's data.

    Returns:
        The selection's folder: mixture.yaml, data/, scores.parquet, domains.parquet, shards.parquet, documents.parquet,
        report.html; a method that values no samples leaves an empty scores.parquet and no report. A complete one made
        with the same settings is returned as it is.

    Raises:
        UserError: bad run, target or settings, an infeasible mixture, or a folder made with other settings.
    """
    from curate.mixture.record import write_mixture
    from curate.report.collect import cost_table
    from curate.report.track import publish
    from curate.scores.values import combined_values

    begin = perf_counter()
    target = _target(config, run)
    settings = settings_of(config, run, target)
    out = config.out or run.folder / "selections" / f"{target.name}-{fingerprint(settings)[:8]}"
    if is_complete(out, settings):
        _log.info("this selection is complete already")
        return out
    check_startable(out, settings)
    valued, ledger = config.method in VALUED, uses(stages(run, config.earlier))
    stock = _stock(config, run, consumed(ledger))
    config = stock.config
    found = _found(stock, run, target) if valued else {}
    embedded = perf_counter()
    every, tables, keys = _scored(stock, run, target, found)
    facts: dict[str, Any] = {"residuals": _residuals(found)}
    if config.branch_test:
        facts["branch_test"] = _branch_test(config, run, target, stock.trained, tables["domains"])
        config = _with_mixture(config, temperature=facts["branch_test"]["temperature"])
        stock = replace(stock, config=config)
    tables["ledger"] = domain_ledger(stock.run, ledger)
    weights = sample_weights(config, target)
    values = every if isinstance(found, dict) else found.chosen_by(weights)
    values = combined_values(values.filter(window=config.mixture.window), weights)
    if valued and stock.pool is None and config.mode != "reweight" and config.shards.unvalued == "predict":
        values, tables["predicted"] = _predicted(stock, run, values, target)
    mixture, plan, tables["leaks"] = _mix(stock, values, tables["domains"], consumed(ledger), target, keys)
    start(out, settings)
    _write_tables(out, every, tables)
    data = deliver(
        out / "data", stock.run, mixture, plan, mode=config.mode, scheduled=config.schedule.kind != "throughout",
        seed=config.seed, shard_bytes=config.shards.shard_bytes,
    )  # fmt: skip
    write_mixture(out / "mixture.yaml", mixture)
    if valued:
        costs = cost_table(run, found if isinstance(found, dict) else {POOL: found}, out, perf_counter() - embedded)
        shown = every.filter(target=target.name)
        publish(out, _report(stock, target, mixture, tables, shown, found, costs, data), config.tracking)
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
    return is_complete(config.out, settings_of(config, run, _target(config, run)))


def _target(config: SelectConfig, run: Run) -> Target:
    target = read_target(config, run)
    assert target is not None  # the config requires one
    return target


def _residuals(found: dict[str, Embedding] | PoolValues) -> dict[str, float]:
    """Window -> relative residual, where the target was solved into anchors."""
    parts = found.items() if isinstance(found, dict) else ()
    return {window: part.residual for window, part in parts if part.residual is not None}


def _stock(config: SelectConfig, run: Run, used: pl.DataFrame) -> _Stock:
    """Open what the next stage draws from.

    Raises:
        UserError: settings that do not go together, or a bad pool.
    """
    from curate.shards.sift import check_reweighted

    if config.pool is None and config.mixture.window not in config.window_names:
        raise UserError(
            f"mixture.window {config.mixture.window!r} is not among the valued windows {config.window_names}; "
            "set window or mixture.window"
        )
    if config.mode != "filter":
        check_reweighted(config.shards)
    trained = trained_tokens(run)
    config = config.model_copy(update={"budget_tokens": _budget(config, trained)})
    if config.method not in VALUED:  # weights are no gains: they hold as they are
        config = _with_mixture(config, decay_epochs=math.inf, harm_share=1.0)
    if config.pool is not None:
        pool = open_pool(config.pool, run, used, config.probe.overlap)
        once = leaves_out_old(pool, config.probe.overlap, filtered=config.mode == "filter")
        shards = config.shards.model_copy(update={"consume_once": once})
        config = _with_mixture(config.model_copy(update={"shards": shards}), window=POOL)
        return _Stock(config=config, run=pool.stock, trained=pool.tokens, pool=pool)
    if config.grain.by == "domains":
        return _Stock(config=config, run=run, trained=trained)
    grain = divide(run, trained, config.grain, config.seed)
    config = config.model_copy(update={"mixture": mixture_of_parts(config.mixture, grain)})
    return _Stock(config=config, run=grain.stock, trained=grain.trained, grain=grain)


def _with_mixture(config: SelectConfig, **settings: Any) -> SelectConfig:
    return config.model_copy(update={"mixture": config.mixture.model_copy(update=settings)})


def _found(stock: _Stock, run: Run, target: Target) -> dict[str, Embedding] | PoolValues:
    """What was valued: the windows of the run, or the pool for every target."""
    config = stock.config
    if stock.pool is None:
        return embed(config, run, target)
    return value_pool(
        run, stock.pool, [target, *other_targets(config, run, target)], config.probe, adjoint=config.adjoint,
        seed=config.seed, device=config.device, batch_size=config.target_batch_size, tolerance=config.tolerance,
    )  # fmt: skip


def _scored(
    stock: _Stock, run: Run, target: Target, found: dict[str, Embedding] | PoolValues
) -> tuple[pl.DataFrame, dict[str, pl.DataFrame], pl.DataFrame | None]:
    """Values of every target, their roll-ups, and the keys by which a method draws samples, where it does."""
    from curate.scores.methods import scores_without_values
    from curate.scores.rollup import roll_ups
    from curate.scores.schema import no_scores
    from curate.scores.shards import between_shards

    config, trained, grain = stock.config, stock.trained, stock.grain
    if config.method not in VALUED:
        domains, keys = scores_without_values(
            config.method, stock.run, target, config.weights, trained=trained, window=config.mixture.window,
            budget=_budget(config, trained), temperature=config.mixture.temperature,
            importance_temperature=config.importance_temperature, seed=config.seed,
        )  # fmt: skip
        return no_scores(), {"domains": domains}, keys
    every = _every_value(config, run, target, found) if isinstance(found, dict) else found.probed
    own = every if grain is None else grain.of_parts(every)
    parents = None if grain is None else grain.parents
    tables = roll_ups(own, target.name, trained, fresh_shares(stock.run), config.seed, parents)
    if config.grain.by == "shards":  # whether they differ at all is asked of domains
        tables["between_shards"] = between_shards(every.filter(target=target.name))
        for domain, verdict in tables["between_shards"].select("domain", "verdict").unique().sort("domain").iter_rows():
            _log.info("%s: %s", domain, verdict)
    if not isinstance(found, dict):
        tables |= {"pool": found.domains, "pool_values": found.every}
    return own, tables, None


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


def _predicted(stock: _Stock, run: Run, values: pl.DataFrame, target: Target) -> tuple[pl.DataFrame, pl.DataFrame]:
    """The values with predicted ones of samples outside the window, and how good these are."""
    from curate.shards.predict import predict_rest

    config = stock.config
    weights = sample_weights(config, target)
    targets = [one for one in (target, *other_targets(config, run, target)) if one.name in weights]
    found, judged = predict_rest(stock.run, values, targets, config.probe.min_rank_correlation, config.seed)
    for row in judged.iter_rows(named=True):
        told = "not defined" if row["spearman"] is None else f"{row['spearman']:.2f}"
        _log.info(
            "%s: %s of %s samples valued, held-out rank correlation %s; the rest: %s",
            row["domain"], f"{row['probed']:,}", f"{row['samples']:,}", told, row["used"],
        )  # fmt: skip
    return found, judged


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
        with replacing(out / f"{name}.parquet") as part:
            table.write_parquet(part)


def _mix(
    stock: _Stock,
    values: pl.DataFrame,
    domains: pl.DataFrame,
    used: pl.DataFrame,
    target: Target,
    keys: pl.DataFrame | None,
) -> tuple[Mixture, Plan, pl.DataFrame]:
    """Choose among the samples, solve the mixture and turn it into whole samples; also what the screen found.

    `keys` say which samples, where the method draws them.
    """
    import polars as pl

    from curate.mixture.record import with_tokens
    from curate.mixture.schedule import decide_stage
    from curate.scores.importance import keep_best
    from curate.shards.plan import make_plan, make_pool, supply_of
    from curate.shards.sift import read_held_out, sift

    config, run, trained = stock.config, stock.run, stock.trained
    catalogues = {str(domain): table for (domain,), table in run.catalogue.group_by("domain")}
    known = {domain: catalogues[domain] for domain in trained}
    pool = make_pool(known, values, used, consume_once=config.shards.consume_once)
    aimed = [config.target, *map(Path, config.more_targets), *([config.guard] if config.guard else [])]
    held = read_held_out(aimed, config.shards.screen, run.spec)
    grain, mixing = stock.grain, config.mixture
    pool, leaks = sift(
        pool, run.streams, held, config.shards, filtered=config.mode != "reweight", seed=config.seed,
        parents=None if grain is None else grain.parents,
    )  # fmt: skip
    prior, supply = {domain: float(tokens) for domain, tokens in trained.items()}, supply_of(pool)
    if grain is not None:
        spent = grain.spent([part for part, own in supply.items() if own.samples])
        if spent:
            _log.info("nothing is left of %s; their shares go to other parts of their domain", ", ".join(spent))
        prior = grain.without(spent, prior)
        general = tuple(part for part in mixing.replay_domains if part not in spent)
        mixing = mixing.model_copy(update={"prior": grain.without(spent, mixing.prior), "replay_domains": general})
        supply = {part: supply[part] for part in prior}
        domains = domains.filter(pl.col("domain").is_in(list(prior)))
    budget = _budget(config, trained)
    mixture = decide_stage(domains, prior, supply, budget, mixing, config.schedule, aims_of(config, target))
    samples = {**dict.fromkeys(trained, 0), **{domain: part.samples for domain, part in mixture.domains.items()}}
    if keys is not None and config.mode != "reweight":
        pool = keep_best(pool, keys, samples)
    plan = make_plan(pool, samples, config.seed)
    return with_tokens(mixture, {**dict.fromkeys(mixture.domains, 0), **plan.tokens()}), plan, leaks


def _budget(config: SelectConfig, trained: Mapping[str, int]) -> int:
    return sum(trained.values()) if config.budget_tokens is None else int(config.budget_tokens)


def _report(
    stock: _Stock,
    target: Target,
    mixture: Mixture,
    tables: dict[str, pl.DataFrame],
    values: pl.DataFrame,
    found: dict[str, Embedding] | PoolValues,
    costs: pl.DataFrame,
    data: dict[str, Path],
) -> ReportData:
    from curate.embeddings.store import horizon_name
    from curate.report.selection import selection_report

    config, windows = stock.config, isinstance(found, dict)
    horizons = dict.fromkeys(found, horizon_name(config.horizon)) if isinstance(found, dict) else {}
    return selection_report(
        stock.run, target, mixture, tables, values=values, costs=costs, data=data,
        found=_examples(config, found, values, target), residuals=_residuals(found),
        estimator=config.estimator if windows else "probes",
        horizons=horizons or {POOL: f"{config.probe.steps}_steps_on"}, settings=config.model_dump(mode="json"),
    )  # fmt: skip


def _examples(
    config: SelectConfig, found: dict[str, Embedding] | PoolValues, values: pl.DataFrame, target: Target
) -> dict[tuple[str, str], list[int]]:
    """The rows of each window of largest and of smallest value, by the FAISS index where there is one."""
    import numpy as np

    from curate.index.open import extremes
    from curate.report.collect import EXAMPLES

    if not isinstance(found, dict):
        order = values["value"].arg_sort(descending=True).to_list()
        return {(POOL, "most"): order[:EXAMPLES], (POOL, "least"): order[::-1][:EXAMPLES]}
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
    run = Run(config.run or find_run(config.runs_root), config.streams)
    out = select(config, run)
    say_mixture(out)


if __name__ == "__main__":
    run_command(main)
