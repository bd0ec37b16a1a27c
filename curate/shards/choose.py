"""Which samples of a domain are good enough to be used: each that is not gets its reason. Tables in, tables out.

In this order, each among what the ones before it left: consumed (where asked), leak, near_duplicate, not_valued (where
asked), low_value, cluster_quota; and when it is known how many the stage takes, over_quota.
"""

from collections.abc import Mapping
from typing import Literal

import numpy as np
import polars as pl
from pydantic import Field

from curate.config import Config, FileName
from curate.deviation import EQUAL
from curate.index.clusters import clusters
from curate.rng import generator
from curate.shards.scan import Scan, near_duplicates

# What samples are chosen by and how, part of a selection's identity.
CHOICE = ("n-grams: Dirichlet, deviations over all domains", "Gumbel top-k for what is left out and for what is taken")
_SHARP = 1e-9  # deviations that a temperature of 0 still tells apart; what is nearer is a tie, drawn by lot
_FAR = 1.0  # deviations below the domain's mean from which both halves of a target call a sample bad
_FEW = 8  # n-grams, of those that are kept, from which a sample can be compared


class ScreenConfig(Config):
    """What must not be trained on."""

    files: tuple[FileName, ...] = ()
    """Held-out documents besides the targets and the guard, such as the benchmarks that the model is tested
    on."""
    overlap: float = Field(default=0.2, gt=0, le=1)
    """A sample is a leak where it shares at least this share of its own 13-grams of tokens, or of a held-out
    document's, with that document."""
    mode: Literal["remove", "report", "none"] = "remove"
    """remove: leaks are left out of filtered data and reported. report: only reported. none: not looked for."""


class ShardsConfig(Config):
    """Which samples filtered data holds, and how it is written."""

    drop_fraction: float | None = Field(default=0.2, ge=0, lt=1)
    """Share of each domain's samples to leave out, the worst, even where the rest must be repeated: of those with a
    value, or with likeness (`likeness_share`), of all. none: as many as both halves of the target find worse than their
    domain's mean by more than a standard deviation (slopes say the same of both). Of what is left a stage
    that needs fewer takes the best."""
    likeness_share: float = Field(default=0.5, ge=0, le=1)
    """Share of n-gram likeness to the targets and the guard in both choices, the rest is value's; of method curate.
    Both count in their deviations inside the domain; predicted values lie closer together than those that are known,
    so that these count for more. Samples without a value are told apart by their likeness alone."""
    sample_temperature: float = Field(default=0.1, ge=0)
    """Randomness of both choices (Gumbel top-k), in standard deviations of a sample within its domain; 0: exactly the
    lowest are left out and the highest taken."""
    guard_weight: float = Field(default=1.0, ge=0)
    """Weight of the guard's values in that choice, the targets' together being 1: where no sample of a domain does much
    for the target, which are best for what the guard keeps."""
    unvalued: Literal["slopes", "predict", "keep", "drop"] = "slopes"
    """Samples outside the valued window. slopes: samples are chosen by what one more use of each would do now, inside
    the window as outside, predicted from its n-grams (method curate with estimator adjoint; others predict). predict:
    the window's values are, from n-grams too, but sample by sample. Either in domains where held-out samples are ranked
    well enough (`probe.min_rank_correlation`); elsewhere, and with keep, they stand for the domain's mean. drop: leave
    them out."""
    slopes_per_sample: float = Field(default=1.25, ge=0)
    """How many samples of a domain have slopes of their own, by two forward passes over each, for each one that the
    stage takes of it, as far as `slopes_passes` allows: those that are the most promising by what is predicted."""
    slopes_passes: float = Field(default=100.0, ge=0)
    """Forward+backward passes of a training batch that these slopes may cost, so that what a selection costs does not
    grow with the stage."""
    duplicate_overlap: float = Field(default=0.8, gt=0, le=1)
    """A sample of whose 13-grams a better one of its domain has at least this share is left out; 1 with exact copies
    only."""
    clusters: int = Field(default=0, ge=0)
    """Clusters of similar text (FAISS k-means) in each domain; 0: none."""
    cluster_quota: float = Field(default=2.0, ge=1)
    """No cluster of a domain keeps more samples than this many times an even share of the domain's, nor gives more of
    those that the stage takes while others have some left."""
    consume_once: bool = False
    """Use no sample that this stage or an earlier one trained on (with `mixture.max_epochs 1` none twice in the next
    either); mode filter only."""
    screen: ScreenConfig = ScreenConfig()
    """Held-out text."""
    shard_bytes: int = Field(default=1 << 26, ge=1 << 10)
    """Size limit of a shard that is written."""


def choose(
    pool: pl.DataFrame,
    found: Scan,
    hits: pl.DataFrame,
    config: ShardsConfig,
    seed: int,
    parents: Mapping[str, str] | None = None,
) -> pl.DataFrame:
    """Give every sample that is not good enough its reason.

    Nothing depends on the order of shards: ties and draws go by the samples' content ids.

    Args:
        pool: see `plan.make_pool`.
        found: the pass over the pool's samples.
        hits: leaks, `place`, `file` and `id`; see `scan.leaks`. Empty where they are only reported.
        config: what is left out.
        seed: of the draws and the clusters.
        parents: the larger domain of each one, where they are parts: near-duplicates are looked for in it.

    Returns:
        The pool with `reason`, `detail`, `kept`, `key` and `cluster` (see `keep_best`).
    """
    ranked = _ranked(pool, config, seed)
    ranked = _mark(ranked, hits.unique("place", keep="first").select("place", detail=_source()), "leak")
    doubles = near_duplicates(found, _comparable(ranked, found, parents or {}), config.duplicate_overlap)
    names = ranked.select(of="place", detail=pl.format("sample {}", "sample_id"))
    ranked = _mark(ranked, doubles.join(names, on="of").select("place", "detail"), "near_duplicate")
    ranked = _mark(ranked, _copies(ranked), "near_duplicate")
    if config.unvalued == "drop":
        ranked = _mark(
            ranked,
            ranked.filter(pl.col("value").is_null()).select("place", detail=pl.lit(None, pl.String)),
            "not_valued",
        )
    ranked = _mark(ranked, _low(ranked, config), "low_value")
    ranked = _clustered(ranked, found, config, seed)
    if config.clusters:
        ranked = _mark(ranked, _crowded(ranked, config), "cluster_quota")
    return ranked.sort("place").with_columns(kept=pl.col("reason").is_null()).select(*pool.columns, "key", "cluster")


def with_keys(pool: pl.DataFrame, keys: pl.DataFrame) -> pl.DataFrame:
    """A pool with other keys, which are its values too.

    Args:
        pool: see `choose`.
        keys: see `scores.importance.gumbel_keys`.
    """
    keyed = pool.drop("key").join(keys.select("domain", "index", "key"), on=["domain", "index"], how="left")
    return keyed.with_columns(value="key")


def keep_best(pool: pl.DataFrame, samples: Mapping[str, int], quota: float) -> pl.DataFrame:
    """A pool of which each domain keeps as many samples as it must deliver, those of the largest keys.

    No cluster gives more than its quota of them while others have some left.

    Args:
        pool: see `plan.make_pool`, with `key`: the k samples of largest key are a draw of k without replacement; and
            `cluster` in its domain, or null.
        samples: how many each domain delivers.
        quota: most of a cluster, in even shares of what its domain delivers.

    Returns:
        The pool with the reason "over_quota" for what is not drawn.
    """
    wanted = pl.col("domain").replace_strict(dict(samples), default=0, return_dtype=pl.Int64)
    key = pl.when(pl.col("kept")).then(pl.col("key"))
    clusters = pl.col("cluster").filter(pl.col("kept")).drop_nulls().n_unique().over("domain")
    in_cluster = key.rank("ordinal", descending=True).over("domain", "cluster")
    crowded = pl.col("cluster").is_not_null() & (in_cluster > (quota * wanted / clusters).ceil())
    order = key.rank("ordinal", descending=True).over("domain")
    place = pl.when(crowded).then(order + pl.len()).otherwise(order).rank("ordinal").over("domain")
    drawn = pool.with_columns(
        reason=pl.when(pl.col("kept") & (place > wanted)).then(pl.lit("over_quota")).otherwise(pl.col("reason"))
    )
    return drawn.with_columns(kept=pl.col("reason").is_null())


def length_correlation(pool: pl.DataFrame) -> float | None:
    """Rank correlation, inside domains, of what the samples of a pool are drawn by (`key`) with their stored tokens.

    None where the samples of each domain are of one length. Far from 0, what is taken is shorter or longer than the
    rest.
    """
    ranks = (pl.col(name).rank().over("domain") - (pl.len().over("domain") + 1) / 2 for name in ("key", "length"))
    key, length = (column.to_numpy() for column in pool.filter("kept").select(*ranks).iter_columns())
    scale = float(np.sqrt((key**2).sum() * (length**2).sum()))
    return float((key * length).sum()) / scale if scale > 0 else None


def _source() -> pl.Expr:
    return pl.format("{}: {}", "file", "id")


def _ranked(pool: pl.DataFrame, config: ShardsConfig, seed: int) -> pl.DataFrame:
    """The pool with `place`, `z` (deviations from the domain's mean) and `key`, by which samples compete.

    Gumbel top-k: the k largest of `z / temperature + Gumbel noise` are a draw without replacement with probabilities
    proportional to exp(z / temperature) (Kool, van Hoof and Welling, arXiv 1903.06059). A sample without a value stands
    for the mean of values.
    """
    placed = pool.with_row_index("place").with_columns(pl.col("place").cast(pl.Int64))
    share = config.likeness_share if pool["likeness"].is_not_null().any() else 0.0
    z = standing(share)
    if share > 0:  # without likeness: predicts no token
        z = pl.when(pl.col("likeness").is_null()).then(-np.inf).otherwise(z)
    scored = placed.with_columns(z=z).sort("domain", "sample_id", "index")
    noise = np.concatenate(
        [
            generator(seed, "top-k", str(domain)).gumbel(size=count)
            for domain, count in scored.group_by("domain", maintain_order=True).len().iter_rows()
        ]
    )
    key = pl.col("z") / max(config.sample_temperature, _SHARP) + pl.Series(noise)
    return scored.with_columns(key=key)


def standing(share: float) -> pl.Expr:
    """`value` and `likeness`, each in its deviations within the domain, added by their shares.

    Divided by the deviation that the sum would have if they were independent.

    Args:
        share: of likeness.
    """
    mixed = (1 - share) * _deviations("value") + share * _deviations("likeness")
    found: pl.Expr = mixed / ((1 - share) ** 2 + share**2) ** 0.5
    return found


def _deviations(name: str) -> pl.Expr:
    """How far each sample lies from its domain's mean; 0 where it is not known or varies by rounding only."""
    own = pl.col(name)
    spread, largest = own.std().over("domain"), own.abs().max().over("domain")
    return pl.when(spread > EQUAL * largest).then((own - own.mean().over("domain")) / spread).fill_null(0.0)


def _mark(ranked: pl.DataFrame, found: pl.DataFrame, reason: str) -> pl.DataFrame:
    """Give the places of `found` that have no reason yet this one, with its detail."""
    joined = ranked.join(
        found.rename({"detail": "why"}).with_columns(here=True), on="place", how="left", maintain_order="left"
    )
    new = pl.col("here").fill_null(value=False) & pl.col("reason").is_null()
    return joined.with_columns(
        reason=pl.when(new).then(pl.lit(reason)).otherwise("reason"),
        detail=pl.when(new).then("why").otherwise("detail"),
    ).drop("why", "here")


def _open(ranked: pl.DataFrame) -> pl.DataFrame:
    return ranked.filter(pl.col("reason").is_null())


def _comparable(ranked: pl.DataFrame, found: Scan, parents: Mapping[str, str]) -> pl.DataFrame:
    """The samples whose text is compared, by `rank`: those with a value first, the best of them first."""
    enough = found.grams.group_by("place").len().filter(pl.col("len") >= _FEW)
    rest = _open(ranked).join(enough, on="place", how="semi")
    ordered = rest.sort(["value", "sample_id", "index"], descending=[True, False, False], nulls_last=True)
    whole = pl.col("domain").replace(parents)
    return ordered.with_row_index("rank").select("place", whole, pl.col("rank").cast(pl.Int64))


def _copies(ranked: pl.DataFrame) -> pl.DataFrame:
    """Exact copies but for one, however short."""
    rest = _open(ranked).sort("domain", "sample_id", "index")
    again = rest.filter(~pl.struct("domain", "sample_id").is_first_distinct())
    return again.select("place", detail=pl.format("sample {}", "sample_id"))


def _low(ranked: pl.DataFrame, config: ShardsConfig) -> pl.DataFrame:
    """The valued samples that lose the draw, as many of each domain as are to be left out."""
    valued = _open(ranked).filter(pl.col("value").is_not_null() | pl.col("likeness").is_not_null())
    if config.drop_fraction is None:
        far = [_deviations(half) < -_FAR for half in ("value_a", "value_b")]
        count = pl.all_horizontal(far).fill_null(value=False).sum().over("domain")
    else:
        count = (pl.len().over("domain") * config.drop_fraction + 1e-9).floor().cast(pl.Int64)
    place = pl.int_range(pl.len()).over("domain")
    worst = valued.sort("domain", "key", "sample_id", "index").filter(place < count)
    return worst.select("place", detail=pl.format("{} deviations from its domain's mean", pl.col("z").round(2)))


def _clustered(ranked: pl.DataFrame, found: Scan, config: ShardsConfig, seed: int) -> pl.DataFrame:
    """The pool with `cluster`, by text, of what is left of each domain; null where there are none."""
    parts = [pl.DataFrame(schema={"place": pl.Int64, "cluster": pl.Int64})]
    if config.clusters:
        assert found.features is not None
        ordered = _open(ranked).sort("domain", "sample_id", "index")
        for _, rest in ordered.group_by("domain", maintain_order=True):
            labels = clusters(found.features[rest["place"].to_numpy()], config.clusters, seed)
            parts.append(rest.select("place", cluster=pl.Series(labels, dtype=pl.Int64)))
    return ranked.join(pl.concat(parts), on="place", how="left", maintain_order="left")


def _crowded(ranked: pl.DataFrame, config: ShardsConfig) -> pl.DataFrame:
    """The samples of lowest key in each cluster that has more than its quota."""
    named = _open(ranked).sort(
        ["domain", "cluster", "key", "sample_id", "index"], descending=[False, False, True, False, False]
    )
    most = (config.cluster_quota * pl.len().over("domain") / pl.col("cluster").n_unique().over("domain")).ceil()
    over = named.filter(pl.int_range(pl.len()).over("domain", "cluster") >= most)
    return over.select("place", detail=pl.format("cluster {} of {}", "cluster", "domain"))
