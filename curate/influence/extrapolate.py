"""From the values of measured samples to values of all: judge the predictor, and use it where it is good enough."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import polars as pl

from curate.core.progress import progress
from curate.ngrams.ratios import mean_log_ratios, ngram_features
from curate.stats.rank_correlation import spearman, spearman_interval
from curate.stats.rank_ridge import cross_validated_scores, fit
from curate.tables import VALUES_PER_TOKEN

if TYPE_CHECKING:
    import numpy.typing as npt

    from curate.data.mds import Sample

    Floats = npt.NDArray[np.floating[Any]]

# What predictions are made from and how, part of their identity.
PREDICTOR = ("n-grams", "n-gram ratios", "ridge: leave-one-out with domain means")
_BLOCK = 4096  # samples whose features are held at once


def blocks_of(samples: pl.DataFrame) -> list[pl.DataFrame]:
    """The samples in consecutive parts."""
    return list(samples.iter_slices(_BLOCK))


class FeatureReader:
    """Features of samples, a part at a time.

    Args:
        samples: all that are valued.
        read: gives the samples of a table in its order, some at a time.
        ratios: (T, V) of the targets, see `ngrams.ratios.log_ratios`.
    """

    def __init__(
        self,
        samples: pl.DataFrame,
        read: Callable[[pl.DataFrame], Iterable[list[Sample]]],
        ratios: npt.NDArray[np.float64],
    ) -> None:
        self._blocks, self._read, self._ratios = blocks_of(samples), read, ratios

    def of_measured(self, measured: pl.DataFrame) -> list[Floats]:
        """Features (n, F_b) of some of the samples, in their order."""
        chosen = [block.join(measured, on=["domain", "sample_id"], how="semi") for block in self._blocks]
        blocks = [self._features(rows) for rows in chosen if len(rows)]
        return [np.concatenate(columns) for columns in zip(*blocks, strict=True)]

    def of_all(self, domains: Collection[str]) -> Iterator[tuple[pl.DataFrame, Floats]]:
        """Parts of some domains of the samples with their features (N, F)."""
        for whole in progress(self._blocks, total=len(self._blocks), what="predict", unit="block"):
            block = whole.filter(pl.col("domain").is_in(list(domains)))
            if not block.is_empty():
                yield block, np.concatenate(self._features(block), axis=1)

    def _features(self, rows: pl.DataFrame) -> list[Floats]:
        # a batch is read once for both blocks of features
        texts = [[ngram_features(batch), mean_log_ratios(batch, self._ratios)] for batch in self._read(rows)]
        return [np.concatenate(columns) for columns in zip(*texts, strict=True)]


def extrapolate(
    samples: pl.DataFrame,
    measured: pl.DataFrame,
    values: Floats,
    reader: FeatureReader,
    seed: int,
    least: float | None = None,
) -> tuple[pl.DataFrame, pl.DataFrame]:
    """Values of every sample, and how good predictions are; see `with_fallback` for what is made of them.

    Args:
        samples: by domain and content id.
        measured: some of them in that order.
        values: (n, 3 T) of the measured: `VALUES_PER_TOKEN` for each target.
        reader: of features.
        seed: of folds and intervals.
        least: only domains are predicted that `with_fallback` will use at this threshold; None: all.

    Returns:
        `of` (position of the target), `domain`, `sample_id`, `VALUES_PER_TOKEN` (predicted, but of measured ones) and
        `origin` (measured or predicted) of every target and sample.
        `of`, `domain`, `samples`, `measured`, `spearman`, `low`, `high`, and the mean of each value over the tokens of
        measured ones (`mean_value_per_token` and so on), of every target and domain.
    """
    features, domains = reader.of_measured(measured), measured["domain"].to_numpy().astype(str)
    quality = _quality(samples, measured, values, cross_validated_scores(features, values, domains, seed), seed)
    predictor, targets = fit(features, values, domains), range(values.shape[1] // len(VALUES_PER_TOKEN))
    # reading and hashing texts is the cost: domains that will fall back to their mean are not read
    wanted = quality if least is None else quality.filter(_good(least))
    # the first part has no rows, so that there is a table where nothing is predicted
    parts = [_rows(position, measured.clear(), values[:0]) for position in targets]
    for block, block_features in reader.of_all(wanted["domain"].unique().to_list()):
        names, predicted = block["domain"].to_numpy().astype(str), np.empty((len(block), values.shape[1]))
        for name in map(str, np.unique(names)):
            predicted[names == name] = predictor.predict(block_features[names == name], name)
        parts += [_rows(position, block, predicted) for position in targets]
    return _with_measured(parts, measured, values), quality


def from_fit(
    samples: pl.DataFrame, measured: pl.DataFrame, values: Floats, predicted: Floats, cross_validated: Floats, seed: int
) -> tuple[pl.DataFrame, pl.DataFrame]:
    """As `extrapolate`, with predictions for one target that were made elsewhere; its halves have the same.

    Args:
        samples: by domain and content id.
        measured: some of them in that order.
        values: (n,) of the measured, per token.
        predicted: (N,) of all samples.
        cross_validated: (n,) of the measured by fits without them; NaN where there is none.
        seed: of intervals.
    """
    # the whole value stands for both halves too, so that one form of table serves both kinds of predictor
    whole, of_all, without = (
        np.repeat(column[:, None], len(VALUES_PER_TOKEN), axis=1) for column in (values, predicted, cross_validated)
    )
    every = _with_measured([_rows(0, samples, of_all)], measured, whole)
    return every, _quality(samples, measured, whole, without, seed)


def _with_measured(parts: Sequence[pl.DataFrame], measured: pl.DataFrame, values: Floats) -> pl.DataFrame:
    """Tables of `_rows`, where what was measured has its own values; see `extrapolate`."""
    targets = range(values.shape[1] // len(VALUES_PER_TOKEN))
    known = pl.concat(_rows(position, measured, values) for position in targets).with_columns(is_measured=True)
    keys = ["of", "domain", "sample_id"]
    both = pl.concat(parts).join(known, on=keys, how="left", suffix="_measured", maintain_order="left")
    is_measured = pl.col("is_measured").is_not_null()
    every = both.select(
        *keys,
        *(pl.when(is_measured).then(f"{name}_measured").otherwise(name).alias(name) for name in VALUES_PER_TOKEN),
        origin=pl.when(is_measured).then(pl.lit("measured")).otherwise(pl.lit("predicted")),
    )
    return every.sort(keys)


def with_fallback(every: pl.DataFrame, domains: pl.DataFrame, least: float) -> tuple[pl.DataFrame, pl.DataFrame]:
    """Use predictions where they are good enough, the domain's mean elsewhere.

    Args:
        every: see `extrapolate`.
        domains: see `extrapolate`.
        least: held-out rank correlation from which a domain's predictions are used, if it is certainly positive.

    Returns:
        `every` with the means of domains, and the origin "domain mean", where predictions are not used.
        `domains` with `used` instead of the means.
    """
    weak = pl.when(_good(least)).then(pl.lit("predictor")).otherwise(pl.lit("domain mean"))
    used = pl.when(pl.col("measured") == pl.col("samples")).then(pl.lit("measured")).otherwise(weak)
    quality = domains.with_columns(used=used)
    means = [f"mean_{name}" for name in VALUES_PER_TOKEN]
    joined = every.join(quality.select("of", "domain", "used", *means), on=["of", "domain"], maintain_order="left")
    falls = (pl.col("origin") == "predicted") & (pl.col("used") == "domain mean")
    values = [pl.when(falls).then(f"mean_{name}").otherwise(name).alias(name) for name in VALUES_PER_TOKEN]
    origin = pl.when(falls).then("used").otherwise("origin")
    return joined.with_columns(*values, origin=origin).drop("used", *means), quality.drop(means)


def _good(least: float) -> pl.Expr:
    """Whether held-out ranks agree well enough, and certainly at all; an undefined correlation is not good."""
    return ((pl.col("spearman") >= least) & (pl.col("low") > 0)).fill_null(value=False)


def _rows(position: int, samples: pl.DataFrame, values: Floats) -> pl.DataFrame:
    """The samples with their values (N, 3 T) for one target."""
    first = len(VALUES_PER_TOKEN) * position
    columns = {name: pl.Series(values[:, first + at]) for at, name in enumerate(VALUES_PER_TOKEN)}
    return samples.select(pl.lit(position, pl.Int64).alias("of"), "domain", "sample_id").with_columns(**columns)


def _quality(
    samples: pl.DataFrame, measured: pl.DataFrame, values: Floats, cross_validated: Floats, seed: int
) -> pl.DataFrame:
    """How well cross-validated predictions rank the measured of each domain, and their means; see `extrapolate`."""
    sizes = dict(samples.group_by("domain").len().iter_rows())
    domains, tokens = measured["domain"].to_numpy().astype(str), measured["predicted_tokens"].to_numpy()
    rows: list[dict[str, Any]] = []
    for position in range(values.shape[1] // len(VALUES_PER_TOKEN)):
        # the whole value's column judges; halves would only add noise
        first = len(VALUES_PER_TOKEN) * position
        for name in map(str, np.unique(domains)):
            in_domain = domains == name
            known = in_domain & np.isfinite(cross_validated[:, first])
            truth, predicted = values[known, first], cross_validated[known, first]
            r = spearman(predicted, truth)
            # every sample is a step of its own: single samples are resampled
            steps = np.arange(len(predicted))
            low, high = (None, None) if r is None else spearman_interval(predicted, truth, steps, seed)
            columns = values[in_domain, first : first + len(VALUES_PER_TOKEN)]
            means = np.average(columns, axis=0, weights=tokens[in_domain])
            row = {"of": position, "domain": name, "samples": sizes[name], "measured": int(in_domain.sum())}
            correlation = {"spearman": r, "low": low, "high": high}
            by_name = {f"mean_{column}": float(means[at]) for at, column in enumerate(VALUES_PER_TOKEN)}
            rows.append(row | correlation | by_name)
    floats = ("spearman", "low", "high", *(f"mean_{name}" for name in VALUES_PER_TOKEN))
    counts = {"of": pl.Int64, "domain": pl.String, "samples": pl.Int64, "measured": pl.Int64}
    return pl.DataFrame(rows, schema={**counts, **dict.fromkeys(floats, pl.Float64)}, orient="row")
