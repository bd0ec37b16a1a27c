"""`python -m pipelines.branches` (`scripts/bench_branches`): what each method of selection buys, at equal tokens.

For each case and seed: one stage 1, and from its state one branch per method and temperature. Branches share initial
state, schedule, lr and seed of the batch order; they differ in their data only. Each finished branch is kept, so an
interrupted bench continues.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

from curate.core.artifacts import SIGN, write_json
from curate.core.config import parse_command, run_command
from curate.core.lock import locked
from curate.core.progress import start_logging
from pipelines.branches.config import (
    GENERAL_LIMIT,
    SCORED,
    TARGETLESS,
    BenchMethod,
    BranchesConfig,
    default_temperature,
    small,
)
from pipelines.branches.rows import BASE, against_constant, at_equal_kl, at_limit, best_within_limit, token_speedup

if TYPE_CHECKING:
    from curate.mixture.constraints import Schedule
    from pipelines.branches.branch import Arena
    from pipelines.branches.rows import Row

_log = logging.getLogger(__name__)


def bench(config: BranchesConfig) -> dict[str, Any]:
    """Run what is missing, and gather rows and tables.

    Returns:
        `rows` as the losses were reported; `tuning`, the same rows with the losses that temperatures are chosen by;
        `equal_kl`, `best`, `at_limit` and `schedules`, see `pipelines.branches.rows`; `branch_test`, how domain scores
        agree with what a little more of one domain does.

    Raises:
        UserError: bad corpus or settings.
    """
    from pipelines.branches.branch import domain_agreement, open_arena
    from pipelines.branches.pools import make_pools

    data = make_pools(config)
    rows: list[Row] = []
    tuning: list[Row] = []
    tested: list[Row] = []
    for seed in config.seeds:
        for name in config.cases:
            _log.info("-- seed %d, case %s", seed, name)
            arena = open_arena(config, config.case(name), seed, data)
            for row, tuned in _branches(arena):
                rows.append(row)
                tuning.append(tuned)
            tested += domain_agreement(arena, [method for method in SCORED if method in config.methods])
    return {
        "rows": rows, "tuning": tuning, "equal_kl": at_equal_kl(rows),
        "best": best_within_limit(rows, tuning, GENERAL_LIMIT), "at_limit": at_limit(rows, tuning, GENERAL_LIMIT),
        "schedules": against_constant(rows), "branch_test": tested,
    }  # fmt: skip


def _branches(arena: Arena) -> list[tuple[Row, Row]]:
    """Rows of a case and seed, proportional first."""
    from pipelines.branches.branch import case_losses, continued

    config = arena.config
    along = [losses["target_report"] for losses in continued(arena)]
    found = []
    methods: list[BenchMethod] = sorted(config.methods, key=lambda method: method != BASE)
    for method, temperature, schedule in (one for each in methods for one in _settings(arena, each)):
        branch = _one(arena, method, temperature, schedule)
        losses = case_losses(arena, branch)
        shared = {
            "case": arena.case.name, "model": config.model.stem, "method": method, "seed": arena.seed,
            "temperature": temperature, "kl_to_prior": branch["kl_to_prior"], "schedule": schedule,
            "is_default": (temperature, schedule) == (default_temperature(method), "constant"),
        }  # fmt: skip
        row = {
            **shared, "target_loss": losses["target_report"], "general_loss": losses["general_report"],
            "tokens": branch["tokens"], "token_speedup": token_speedup(losses["target_report"], along),
            "selection_cost_units": branch["selection_cost_units"], "stage_cost_units": float(config.branch_steps),
        }  # fmt: skip
        tuned = {**shared, "target_loss": losses["target_tune"], "general_loss": losses["general_tune"]}
        found.append((row, tuned))
    return found


def _settings(arena: Arena, method: BenchMethod) -> Iterator[tuple[BenchMethod, float, Schedule]]:
    """Method, temperature and schedule of each of its branches."""
    default = default_temperature(method)
    clean = method == "oracle" and arena.case.pool == "noisy"
    for temperature in [default] if clean else arena.config.sweep(method):
        yield method, temperature, "constant"
    for schedule in arena.config.schedules if method == "curate" else ():
        yield method, default, schedule


def _one(arena: Arena, method: BenchMethod, temperature: float, schedule: Schedule) -> dict[str, Any]:
    from pipelines.branches.branch import clean_branch, run_branch
    from pipelines.branches.oracle import oracle_weights

    if method in TARGETLESS:
        return run_branch(arena, arena.shared / method, method)
    folder = arena.folder / f"{method}-{temperature:g}{'' if schedule == 'constant' else f'-{schedule}'}"
    if method != "oracle":
        return run_branch(arena, folder, method, temperature, schedule=schedule)
    if arena.case.pool == "noisy":
        return clean_branch(arena)
    return run_branch(arena, folder, "proportional", weights=oracle_weights(arena, temperature))


def show(result: dict[str, Any], write: Callable[[str], object] = sys.stdout.write) -> None:
    """Print the tables: differences from proportional in nats per token, with 95 % t intervals over seeds."""
    for name, where in (("best", "temperature"), ("at_limit", "place of its curve")):
        write(f"target loss minus proportional's, at each method's best {where} within the limit on general loss\n")
        write(
            f"{'case':10}{'method':14}{'T':>6}{'KL':>7}{'target':>10}{'+-':>8}{'general':>9}{'seeds':>6}"
            f"{'minus curate':>16}{'+-':>8}\n"
        )
        for row in sorted(result[name], key=lambda row: (row["case"], row["target"]["mean"])):
            temperature = "-" if row["temperature"] is None else f"{row['temperature']:g}"
            apart = row.get("minus_curate")
            write(
                f"{row['case']:10}{row['method']:14}{temperature:>6}{row['kl_to_prior']:7.3f}"
                f"{row['target']['mean']:+10.4f}{_width(row['target']):>8}{100 * row['general_share']['mean']:+8.2f}%"
                f"{row['seeds']:6}" + (f"{apart['mean']:+16.4f}{_width(apart):>8}\n" if apart else "\n")
            )
    write("the same at the KL that curate has by default\n")
    for row in sorted(result["equal_kl"], key=lambda row: (row["case"], row["target"]["mean"])):
        write(
            f"{row['case']:10}{row['method']:14}{'':6}{row['kl_to_prior']:7.3f}{row['target']['mean']:+10.4f}"
            f"{_width(row['target']):>8}{row['general']['mean']:+9.4f}{row['seeds']:6}\n"
        )

    write("a schedule's share of the gain that the same mixture has at a constant one\n")
    for row in result["schedules"]:
        write(
            f"{row['case']:10}{row['method']:14}{row['schedule']:14}gain {row['gain']['mean']:+.4f} +- "
            f"{_width(row['gain'])}, constant {row['constant']['mean']:+.4f} +- {_width(row['constant'])}\n"
        )

    write("Spearman of domain scores with what a little more of one domain did to the target, by seed\n")
    tested = result["branch_test"]
    for case, method in dict.fromkeys((row["case"], row["method"]) for row in tested):
        own = [row for row in tested if (row["case"], row["method"]) == (case, method)]
        write(f"{case:10}{method:14}{_each(own, 'spearman')}\n")
    for case in dict.fromkeys(row["case"] for row in tested):
        own = list({row["seed"]: row for row in tested if row["case"] == case}.values())
        write(f"{case:10}{'(no error)':14}{_each(own, 'ceiling')}\n")


def _each(rows: Sequence[Row], name: str) -> str:
    """A number of each row."""
    return "  ".join("    -" if row[name] is None else f"{row[name]:+.2f}" for row in rows)


def _width(found: dict[str, float | None]) -> str:
    return "-" if found["half_width"] is None else f"{found['half_width']:.4f}"


def main() -> None:
    """Entry point."""
    config = parse_command(
        BranchesConfig, "python -m pipelines.branches", "What each method of selection buys, at equal tokens."
    )
    start_logging()
    config = small(config) if config.small else config
    with locked(config.folder):
        result = bench(config)
    show(result)
    from curate.report.branches import branches_page

    target = config.out or config.folder / "branches.json"
    write_json(target, {"sign": SIGN, **result})
    branches_page(target.with_suffix(".html"), result)
    _log.info("wrote %s and %s", target, target.with_suffix(".html"))


if __name__ == "__main__":
    run_command(main)
