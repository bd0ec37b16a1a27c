"""`python -m pipelines.fidelity.every --scores SELECTION/scores.parquet`: what valuing every n-th step loses.

The values of the valued steps are those of the whole window (each is computed from all later steps either way), so a
selection over whole windows holds every sub-sample too: each offset is one.
"""

from __future__ import annotations

import sys
from pathlib import Path
from statistics import mean
from typing import Annotated

import polars as pl
from pydantic import Field

from curate.config import Config, parse_command, run_command
from curate.errors import UserError
from curate.progress import start_logging
from curate.sums import row_sum


class EveryConfig(Config):
    """Which values."""

    scores: Path
    """`scores.parquet` of a selection over whole windows."""
    every: tuple[Annotated[int, Field(ge=1)], ...] = (1, 2, 4, 8)
    """Numbers n: every n-th step is kept."""


def domain_values(values: pl.DataFrame) -> pl.DataFrame:
    """Value per predicted token of each domain: domain, value; sorted."""
    sums = values.group_by("domain").agg(value=row_sum(pl.col("value")) / pl.col("tokens").sum())
    return sums.sort("domain")


def fidelity(values: pl.DataFrame, every: int) -> pl.DataFrame:
    """Every n-th step of one window against all of them.

    Args:
        values: of one window: step, domain, sample_id, tokens, value.
        every: n.

    Returns:
        One row per offset: offset, spearman (of the domains' values with those of the whole window; NaN below three
        domains), domains (share that has samples), samples (share of the distinct samples).
    """
    whole, first = domain_values(values), values["step"].min()
    rows = []
    for offset in range(every):
        kept = values.filter((pl.col("step") - first) % every == offset)
        both = whole.join(domain_values(kept), on="domain", suffix="_kept")
        rows.append(
            {
                "offset": offset,
                "spearman": both.select(pl.corr("value", "value_kept", method="spearman")).item(),
                "domains": len(both) / len(whole),
                "samples": kept["sample_id"].n_unique() / values["sample_id"].n_unique(),
            }
        )
    return pl.DataFrame(rows)


def main() -> None:
    """Entry point."""
    config = parse_command(
        EveryConfig, "python -m pipelines.fidelity.every", "What valuing every n-th step of a window loses."
    )
    start_logging()
    try:
        scores = pl.read_parquet(config.scores)
    except (OSError, pl.exceptions.PolarsError) as error:
        raise UserError(f"{config.scores} cannot be read as a selection's scores ({error})") from None
    for (window, target), values in scores.group_by("window", "target", maintain_order=True):
        for every in config.every:
            found = fidelity(values, every)
            ranks = found["spearman"].to_list()
            sys.stdout.write(
                f"{window}, {target}, every {every}: Spearman of domain values {mean(ranks):.3f} "
                f"({min(ranks):.3f} to {max(ranks):.3f} over {every} offsets), "
                f"{100 * mean(found['samples'].to_list()):.0f} % of the samples, "
                f"{100 * min(found['domains'].to_list()):.0f} % of the domains\n"
            )


if __name__ == "__main__":
    run_command(main)
