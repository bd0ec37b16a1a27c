"""Which sample is used how often in the next stage, and why a sample is not used. Tables in, tables out."""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import polars as pl

from curate.core.errors import UserError
from curate.core.rng import generator
from curate.mixture.constraints import Supply
from curate.stats.sums import row_sum

VALUES = ("value", "value_a", "value_b")


@dataclass(frozen=True, kw_only=True)
class SamplePlan:
    """What is written.

    Args:
        uses: one row per sample that is used, sorted: `domain`, `index`, `length`, `uses` (how often).
        dropped: one row per sample that is not, sorted: `domain`, `index`, `sample_id`, `reason` (one of
            `filter.choose`, or "not_sampled"), `detail` of it, `value` (per token; null where it is not known).
    """

    uses: pl.DataFrame
    dropped: pl.DataFrame

    def tokens(self) -> dict[str, int]:
        """Stored tokens delivered per domain (only of domains that are used)."""
        sums = self.uses.group_by("domain").agg((pl.col("length") * pl.col("uses")).sum())
        return dict(sums.sort("domain").iter_rows())


def make_pool(
    catalogues: Mapping[str, pl.DataFrame],
    values: pl.DataFrame,
    consumed: pl.DataFrame,
    *,
    ngram_ratios: pl.DataFrame | None = None,
    unseen_only: bool = False,
) -> pl.DataFrame:
    """Every sample of the streams with its value per token, and whether it may be used.

    Args:
        catalogues: `MdsStream.catalogue()` of each domain.
        values: the values frame of one source and one target.
        consumed: how often each sample was trained on so far, see `training.ledger.consumed`.
        ngram_ratios: see `domains.ngram_scores.sample_ratios`; None: not known.
        unseen_only: leave out what was trained on.

    Returns:
        One row per sample, sorted: `domain`, `index`, `sample_id`, `length` (stored tokens), `value`, `value_a`,
        `value_b` (for the target and its halves, per predicted token, summed over its uses; null where it was not
        valued), `ngram_ratio` (null where it is not known), `consumed` (uses so far; those of a sample with copies
        count at its first place), `reason` not to use it ("seen" or null), `detail` (null), `kept` (no reason).

    Raises:
        UserError: the values are of other samples than the streams hold.
    """
    if values.select("source", "target").n_unique() > 1:
        raise ValueError("values of one source and one target are needed")
    columns = ["domain", "index", "sample_id", "length"]
    samples = pl.concat([table.with_columns(domain=pl.lit(name)).select(columns) for name, table in catalogues.items()])
    _check_same(samples, values.select("domain", "index", "sample_id").unique())
    per_token = [
        pl.when(pl.col("tokens").sum() > 0).then(row_sum(pl.col(name)) / pl.col("tokens").sum()).alias(name)
        for name in VALUES
    ]
    valued = values.group_by("sample_id").agg(per_token)
    pool = samples.join(valued, on="sample_id", how="left")  # copies of a sample share its value
    if ngram_ratios is None:
        pool = pool.with_columns(ngram_ratio=pl.lit(None, pl.Float64))
    else:
        pool = pool.join(ngram_ratios.select("sample_id", "ngram_ratio"), on="sample_id", how="left")  # copies share it
    counted = pool.join(consumed.select("sample_id", "uses"), on="sample_id", how="left").sort("domain", "index")
    seen = pl.col("uses").fill_null(0)
    return counted.select(
        *("domain", "index", "sample_id", "length", *VALUES, "ngram_ratio"),
        consumed=pl.when(pl.col("sample_id").is_first_distinct()).then(seen).otherwise(0),
        reason=pl.when(pl.lit(unseen_only) & (seen > 0)).then(pl.lit("seen")),
        detail=pl.lit(None, pl.String),
    ).with_columns(kept=pl.col("reason").is_null())


def _check_same(samples: pl.DataFrame, valued: pl.DataFrame) -> None:
    both = valued.join(samples, on=["domain", "index"], how="left", suffix="_stored")
    other = both.filter(pl.col("sample_id").ne_missing(pl.col("sample_id_stored"))).sort("domain", "index")
    if other.height:
        domain, index = other.select("domain", "index").row(0)
        raise UserError(
            f"sample {index} of {domain} is not the one the run trained on ({other.height} differ): the stream was "
            "rewritten since; restore it or record the run again"
        )


def supply_of(pool: pl.DataFrame) -> dict[str, Supply]:
    """What the kept samples of a pool supply to the mixture; see `make_pool`."""
    kept = pl.col("kept")
    sums = pool.group_by("domain").agg(
        samples=kept.sum(),
        tokens=pl.col("length").filter(kept).sum(),
        consumed_tokens=(pl.col("length") * pl.col("consumed")).filter(kept).sum(),
    )
    return {
        domain: Supply(samples=samples, tokens=tokens, consumed_tokens=consumed_tokens)
        for domain, samples, tokens, consumed_tokens in sums.sort("domain").iter_rows()
    }


def make_plan(pool: pl.DataFrame, samples: Mapping[str, int], seed: int) -> SamplePlan:
    """Use every kept sample equally often, and a random part of them once more, until each domain has its samples.

    The part drawn depends on the samples' content ids, not on their order in the shards.

    Args:
        pool: see `make_pool`.
        samples: how many each domain delivers, repeats counted.
        seed: of the draw.

    Raises:
        UserError: a domain must deliver samples and has none.
    """
    parts = []
    for (domain,), table in pool.group_by("domain", maintain_order=True):
        kept = table.filter("kept").sort("sample_id", "index")
        if kept.is_empty() and samples[str(domain)]:
            raise UserError(
                f"{domain} has no samples left to deliver: loosen what filter leaves out, such as drop_fraction"
            )
        counts = _uses(kept.height, samples[str(domain)], generator(seed, "uses", str(domain)))
        parts.append(kept.with_columns(uses=pl.Series(counts, dtype=pl.Int64)))
    uses = pl.concat(parts).select("domain", "index", "length", "uses")
    planned = pool.join(uses, on=["domain", "index"], how="left").sort("domain", "index")
    dropped = planned.filter(pl.col("uses").fill_null(0) == 0).select(
        "domain",
        "index",
        "sample_id",
        reason=pl.col("reason").fill_null("not_sampled"),
        detail="detail",
        value="value",
    )
    return SamplePlan(uses=uses.filter(pl.col("uses") > 0).sort("domain", "index"), dropped=dropped)


def _uses(kept: int, wanted: int, random: np.random.Generator) -> npt.NDArray[np.int64]:
    """How often each of `kept` samples is used, int64 [kept]: all equally, `wanted` in all, the rest drawn."""
    if kept == 0:
        return np.zeros(0, np.int64)
    rounds, rest = divmod(wanted, kept)
    uses = np.full(kept, rounds, np.int64)
    uses[random.choice(kept, rest, replace=False)] += 1
    return uses
