"""Which sample is used how often in the next stage, and why a sample is not used. Tables in, tables out.

`make_pool` lists every sample, `filter` gives reasons, `supply_of` tells the mixture what is left, `make_plan` takes
whole samples.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import dataframely as dy
import numpy as np
import numpy.typing as npt
import polars as pl

from curate.core.errors import UserError
from curate.core.rng import generator
from curate.mixture.constraints import Supply
from curate.stats.sums import row_sum
from curate.tables import (
    VALUES_PER_TOKEN,
    VALUES_TOTAL,
    Catalogue,
    DroppedSamples,
    NgramRatios,
    PlannedUses,
    SamplePool,
    SampleUses,
    SampleValues,
)


@dataclass(frozen=True, kw_only=True)
class SamplePlan:
    """What is written.

    Args:
        uses: one row per sample that is used, by domain and index, with how often.
        dropped: one row per sample that is not, by domain and index, with its `reason` (see `filter.choose`).
    """

    uses: dy.DataFrame[PlannedUses]
    dropped: dy.DataFrame[DroppedSamples]

    def tokens(self) -> dict[str, int]:
        """Stored tokens by domain, repeats counted; only domains that are used."""
        sums = self.uses.group_by("domain").agg((pl.col("stored_tokens") * pl.col("uses")).sum())
        return dict(sums.sort("domain").iter_rows())


def make_pool(
    catalogue: dy.DataFrame[Catalogue],
    values: dy.DataFrame[SampleValues],
    seen: dy.DataFrame[SampleUses],
    *,
    ngram_ratios: dy.DataFrame[NgramRatios] | None = None,
    unseen_only: bool = False,
) -> dy.DataFrame[SamplePool]:
    """Every sample of the streams with its value per token, and whether it may be used.

    Args:
        catalogue: of the domains that are drawn from.
        values: of one source.
        seen: how often each sample was trained on so far.
        ngram_ratios: see `domains.ngram_scores.sample_ratios`; None: not known.
        unseen_only: leave out what was trained on.

    Returns:
        One row per sample, by domain and index. Values are per predicted token, over all uses of a sample.

    Raises:
        UserError: the values are of other samples than the streams hold.
    """
    if values.select("source", "target").n_unique() > 1:
        raise ValueError("values of one source and one target are needed")
    samples = catalogue.select("domain", "index", "sample_id", "stored_tokens")
    _check_same(samples, values.select("domain", "index", "sample_id").unique())
    tokens = pl.col("predicted_tokens").sum()
    per_token = [
        pl.when(tokens > 0).then(row_sum(pl.col(total)) / tokens).alias(name)
        for name, total in zip(VALUES_PER_TOKEN, VALUES_TOTAL, strict=True)
    ]
    measured = values.group_by("sample_id").agg(per_token)
    pool = samples.join(measured, on="sample_id", how="left")  # copies of a sample share its value
    if ngram_ratios is None:
        pool = pool.with_columns(ngram_ratio=pl.lit(None, pl.Float64))
    else:
        pool = pool.join(ngram_ratios.select("sample_id", "ngram_ratio"), on="sample_id", how="left")  # copies share it
    counted = pool.join(seen.select("sample_id", "uses"), on="sample_id", how="left").sort("domain", "index")
    uses = pl.col("uses").fill_null(0)
    marked = counted.with_columns(
        # uses are of a text: copies of it would count them once more each in the supply
        uses_so_far=pl.when(pl.col("sample_id").is_first_distinct()).then(uses).otherwise(0),
        # here, before any other reason: `filter.choose` gives a reason only where there is none
        reason=pl.when(pl.lit(unseen_only) & (uses > 0)).then(pl.lit("seen")),
        detail=pl.lit(None, pl.String),
    )
    return SamplePool.validate(marked.with_columns(kept=pl.col("reason").is_null()))


def _check_same(samples: pl.DataFrame, measured: pl.DataFrame) -> None:
    """Refuse values of other samples than the streams hold: a domain and index must have the content id it had."""
    # by index, which the recorded steps have; the content id says whether it is still the same sample
    both = measured.join(samples, on=["domain", "index"], how="left", suffix="_stored")
    other = both.filter(pl.col("sample_id").ne_missing(pl.col("sample_id_stored"))).sort("domain", "index")
    if other.height:
        domain, index = other.select("domain", "index").row(0)
        raise UserError(
            f"sample {index} of {domain} is not the one the run trained on ({other.height} differ): the stream was "
            "rewritten since; restore it or record the run again"
        )


def supply_of(pool: dy.DataFrame[SamplePool]) -> dict[str, Supply]:
    """What the kept samples of a pool supply to the mixture; see `make_pool`."""
    kept = pl.col("kept")
    sums = pool.group_by("domain").agg(
        samples=kept.sum(),
        tokens=pl.col("stored_tokens").filter(kept).sum(),
        seen_tokens=(pl.col("stored_tokens") * pl.col("uses_so_far")).filter(kept).sum(),
    )
    return {
        domain: Supply(samples=samples, tokens=tokens, seen_tokens=seen_tokens)
        for domain, samples, tokens, seen_tokens in sums.sort("domain").iter_rows()
    }


def make_plan(pool: dy.DataFrame[SamplePool], samples: Mapping[str, int], seed: int) -> SamplePlan:
    """Use every kept sample equally often, and a random part of them once more, until each domain has its samples.

    The part drawn depends on the samples' content ids, not on their order in the shards.

    Args:
        pool: see `make_pool`.
        samples: how many the stage takes of each domain, repeats counted.
        seed: of the draw.

    Raises:
        UserError: a domain must deliver samples and has none.
    """
    uses_by_domain = []
    for (domain,), table in pool.group_by("domain", maintain_order=True):
        kept = table.filter("kept").sort("sample_id", "index")
        if kept.is_empty() and samples[str(domain)]:
            raise UserError(
                f"{domain} has no samples left to deliver: loosen what filter leaves out, such as drop_fraction"
            )
        # ordered by content above, so that the draw of repeats does not depend on shards
        counts = _uses(kept.height, samples[str(domain)], generator(seed, "uses", str(domain)))
        uses_by_domain.append(kept.with_columns(uses=pl.Series(counts, dtype=pl.Int64)))
    uses = pl.concat(uses_by_domain).select("domain", "index", "stored_tokens", "uses")
    planned = pool.join(uses, on=["domain", "index"], how="left").sort("domain", "index")
    unused = planned.filter(pl.col("uses").fill_null(0) == 0)
    return SamplePlan(
        uses=PlannedUses.validate(uses.filter(pl.col("uses") > 0).sort("domain", "index")),
        # good enough, but of a domain that needs fewer samples than it keeps
        dropped=DroppedSamples.validate(unused.with_columns(pl.col("reason").fill_null("not_sampled"))),
    )


def _uses(kept: int, wanted: int, random: np.random.Generator) -> npt.NDArray[np.int64]:
    """How often each of `kept` samples is used, int64 [kept]: all equally, `wanted` in all, the rest drawn."""
    if kept == 0:
        return np.zeros(0, np.int64)
    rounds, rest = divmod(wanted, kept)
    uses = np.full(kept, rounds, np.int64)
    uses[random.choice(kept, rest, replace=False)] += 1
    return uses
