"""Which samples of a domain are good enough to be used: each that is not gets its reason. Tables in, tables out.

Reasons are given in this order, each among the samples that have none yet:

    seen             by `output.plan.make_pool`, where asked for
    contamination    `choose`: shares text with a held-out document
    near_duplicate   `choose`: repeats a better sample of its domain
    low_value        `choose`: loses the draw of what is left out
    not_sampled      `top_k`, when it is known how many samples the stage takes
"""

from collections.abc import Mapping

import dataframely as dy
import numpy as np
import polars as pl
from pydantic import Field

from curate.core.config import Config, FileName
from curate.core.rng import generator
from curate.filter.overlap import OverlapScan, near_duplicates
from curate.stats.deviation import EQUAL
from curate.tables import VALUES_PER_TOKEN, DrawKeys, RankedPool, SamplePool

# What samples are chosen by and how, part of a selection's identity.
CHOICE = ("n-grams: Dirichlet, deviations over all domains", "Gumbel top-k for what is left out and for what is taken")
NOISE = 0.1
"""Noise of the Gumbel top-k (its temperature), in standard deviations of a sample within its domain."""
_SHARP = 1e-9  # deviations that a noise of 0 still tells apart; what is nearer is a tie, drawn by lot
_FAR = 1.0  # deviations below the domain's mean from which both halves of a target call a sample bad
_FEW = 8  # n-grams, of those that are kept, from which a sample can be compared


class FilterConfig(Config):
    """Which samples the data holds."""

    drop_fraction: float | None = Field(default=0.2, ge=0, lt=1)
    """Share of each domain's samples to leave out, the worst, even where the rest must be repeated. null: as many as
    both halves of the target find worse than their domain's mean by more than a standard deviation (values at the
    current state know no halves: as many as they find so themselves). Of what is left a
    stage that needs fewer takes the best."""
    duplicate_overlap: float = Field(default=0.8, gt=0, le=1)
    """A sample of whose 13-grams a better one of its domain has at least this share is left out; 1 with exact copies
    only."""
    unseen_only: bool | None = None
    """Use no sample that this stage or an earlier one trained on (with `mixture.max_epochs 1` none twice in the next
    either); none: only of candidates."""
    held_out: tuple[FileName, ...] = ()
    """Held-out documents besides the targets and the retention target, such as the benchmarks that the model is tested
    on."""
    contamination_overlap: float | None = Field(default=0.2, gt=0, le=1)
    """A sample is contaminated where it shares at least this share of its own 13-grams of tokens, or of a held-out
    document's, with that document: it is left out, and reported. none: contamination is not looked for."""


def choose(
    pool: dy.DataFrame[SamplePool],
    scan: OverlapScan,
    contaminated: pl.DataFrame,
    config: FilterConfig,
    seed: int,
    *,
    ngram_share: float,
    noise: float = NOISE,
) -> dy.DataFrame[RankedPool]:
    """Give every sample that is not good enough its reason.

    Nothing depends on the order of shards: ties and draws go by the samples' content ids.

    Args:
        pool: see `output.plan.make_pool`.
        scan: the pass over the pool's samples.
        contaminated: `row`, `file` and `id`; see `overlap.contamination`.
        config: what is left out.
        seed: of the draws.
        ngram_share: share of the n-gram log-likelihood ratio in what samples compete by, the rest is value's.
        noise: of the draws, in deviations; 0: exactly the lowest are left out and the highest taken.

    Returns:
        The pool with `reason`, `detail`, `kept` and `key` (see `top_k`).
    """
    ranked = _ranked(pool, ngram_share, noise, seed)
    # `contaminated` has the document with most in common first
    documents = contaminated.unique("row", keep="first").select("row", detail=pl.format("{}: {}", "file", "id"))
    ranked = _mark(ranked, documents, "contamination")
    repeats = near_duplicates(scan, _comparable(ranked, scan), config.duplicate_overlap)
    names = ranked.select(of="row", detail=pl.format("sample {}", "sample_id"))
    ranked = _mark(ranked, repeats.join(names, on="of").select("row", "detail"), "near_duplicate")
    # texts of few n-grams are not compared: of these only exact copies are found
    ranked = _mark(ranked, _copies(ranked), "near_duplicate")
    ranked = _mark(ranked, _low(ranked, config.drop_fraction), "low_value")
    return RankedPool.validate(ranked.sort("row").with_columns(kept=pl.col("reason").is_null()))


def with_keys(pool: dy.DataFrame[RankedPool], keys: dy.DataFrame[DrawKeys]) -> dy.DataFrame[RankedPool]:
    """A pool with other keys, which are its values too.

    Args:
        pool: see `choose`.
        keys: see `domains.importance.gumbel_keys`.
    """
    keyed = pool.drop("key").join(keys.select("domain", "index", "key"), on=["domain", "index"], how="left")
    return RankedPool.validate(keyed.with_columns(pl.col("key").alias("value_per_token")))


def top_k(pool: dy.DataFrame[RankedPool], samples: Mapping[str, int]) -> dy.DataFrame[RankedPool]:
    """Keep as many samples of each domain as the stage takes, those of the largest keys.

    Args:
        pool: see `output.plan.make_pool`, with `key`: the k samples of largest key are a draw of k without replacement.
        samples: how many the stage takes of each domain.

    Returns:
        The pool with the reason "not_sampled" for what is not drawn.
    """
    wanted = pl.col("domain").replace_strict(dict(samples), default=0, return_dtype=pl.Int64)
    key = pl.when(pl.col("kept")).then(pl.col("key"))  # null, so without a rank, where there is a reason already
    standing = key.rank("ordinal", descending=True).over("domain")
    drawn = pool.with_columns(
        reason=pl.when(pl.col("kept") & (standing > wanted)).then(pl.lit("not_sampled")).otherwise(pl.col("reason"))
    )
    return RankedPool.validate(drawn.with_columns(kept=pl.col("reason").is_null()))


def length_correlation(pool: dy.DataFrame[RankedPool]) -> float | None:
    """Rank correlation, inside domains, of what the samples of a pool are drawn by (`key`) with their stored tokens.

    None where the samples of each domain are of one length. Far from 0, what is taken is shorter or longer than the
    rest.
    """
    ranks = (
        pl.col(name).rank().over("domain") - (pl.len().over("domain") + 1) / 2 for name in ("key", "stored_tokens")
    )
    key, length = (column.to_numpy() for column in pool.filter("kept").select(*ranks).iter_columns())
    scale = float(np.sqrt((key**2).sum() * (length**2).sum()))
    return float((key * length).sum()) / scale if scale > 0 else None


def _ranked(pool: pl.DataFrame, ngram_share: float, noise: float, seed: int) -> pl.DataFrame:
    """The pool with `row`, `z` (deviations from the domain's mean) and `key`, by which samples compete.

    Gumbel top-k: the k largest of `z / noise + Gumbel variable` are a draw without replacement with probabilities
    proportional to exp(z / noise) (Kool, van Hoof and Welling, arXiv 1903.06059). A sample without a value stands
    for the mean of values.
    """
    numbered = pool.with_row_index("row").with_columns(pl.col("row").cast(pl.Int64))
    share = ngram_share if pool["ngram_ratio"].is_not_null().any() else 0.0
    z = combined_z(share)
    if share > 0:  # a sample without a ratio predicts no token, or was seen: it comes last
        z = pl.when(pl.col("ngram_ratio").is_null()).then(-np.inf).otherwise(z)
    scored = numbered.with_columns(z=z).sort("domain", "sample_id", "index")
    # one generator per domain, in the order of content: no other domain and no shard order changes a draw
    gumbel = np.concatenate(
        [
            generator(seed, "top-k", str(domain)).gumbel(size=count)
            for domain, count in scored.group_by("domain", maintain_order=True).len().iter_rows()
        ]
    )
    return scored.with_columns(key=pl.col("z") / max(noise, _SHARP) + pl.Series(gumbel))


def combined_z(ngram_share: float) -> pl.Expr:
    """`value_per_token` and `ngram_ratio`, each in its deviations within the domain, added by their shares.

    Divided by the deviation that the sum would have if they were independent.
    """
    mixed = (1 - ngram_share) * _deviations("value_per_token") + ngram_share * _deviations("ngram_ratio")
    z: pl.Expr = mixed / ((1 - ngram_share) ** 2 + ngram_share**2) ** 0.5
    return z


def _deviations(name: str) -> pl.Expr:
    """How far each sample lies from its domain's mean; 0 where it is not known or varies by rounding only."""
    values = pl.col(name)
    spread, largest = values.std().over("domain"), values.abs().max().over("domain")
    return pl.when(spread > EQUAL * largest).then((values - values.mean().over("domain")) / spread).fill_null(0.0)


def _mark(ranked: pl.DataFrame, marked: pl.DataFrame, reason: str) -> pl.DataFrame:
    """Give the rows of `marked` that have no reason yet this one, with its detail."""
    joined = ranked.join(
        marked.rename({"detail": "why"}).with_columns(here=True), on="row", how="left", maintain_order="left"
    )
    new = pl.col("here").fill_null(value=False) & pl.col("reason").is_null()
    return joined.with_columns(
        reason=pl.when(new).then(pl.lit(reason)).otherwise("reason"),
        detail=pl.when(new).then("why").otherwise("detail"),
    ).drop("why", "here")


def _without_reason(ranked: pl.DataFrame) -> pl.DataFrame:
    """The samples that may still be used."""
    return ranked.filter(pl.col("reason").is_null())


def _comparable(ranked: pl.DataFrame, scan: OverlapScan) -> pl.DataFrame:
    """The samples whose text is compared, by `rank`: those with a value first, the best of them first."""
    # a share of three n-grams is chance
    enough = scan.grams.group_by("row").len().filter(pl.col("len") >= _FEW)
    candidates = _without_reason(ranked).join(enough, on="row", how="semi")
    ordered = candidates.sort(
        ["value_per_token", "sample_id", "index"], descending=[True, False, False], nulls_last=True
    )
    return ordered.with_row_index("rank").select("row", "domain", pl.col("rank").cast(pl.Int64))


def _copies(ranked: pl.DataFrame) -> pl.DataFrame:
    """Exact copies but for one, however short."""
    ordered = _without_reason(ranked).sort("domain", "sample_id", "index")
    copies = ordered.filter(~pl.struct("domain", "sample_id").is_first_distinct())
    return copies.select("row", detail=pl.format("sample {}", "sample_id"))


def _low(ranked: pl.DataFrame, drop_fraction: float | None) -> pl.DataFrame:
    """The measured samples that lose the draw, as many of each domain as are to be left out."""
    known = _without_reason(ranked).filter(
        pl.col("value_per_token").is_not_null() | pl.col("ngram_ratio").is_not_null()
    )
    if drop_fraction is None:
        # both halves: what one calls bad is noise in about every sixth sample
        far = [_deviations(half) < -_FAR for half in VALUES_PER_TOKEN[1:]]
        count = pl.all_horizontal(far).fill_null(value=False).sum().over("domain")
    else:
        # 1e-9: a product such as .2 x 5 must not fall below its whole number by rounding
        count = (pl.len().over("domain") * drop_fraction + 1e-9).floor().cast(pl.Int64)
    standing = pl.int_range(pl.len()).over("domain")
    worst = known.sort("domain", "key", "sample_id", "index").filter(standing < count)
    return worst.select("row", detail=pl.format("{} deviations from its domain's mean", pl.col("z").round(2)))
