"""From the values of probed samples to values of all: judge the predictor, and use it where it is good enough."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import polars as pl

from curate.arrays import read_array
from curate.fidelity.measure import spearman, spearman_interval
from curate.pools.draw import VALUES
from curate.pools.features import likeness, ngram_features
from curate.pools.predictor import fit, held_out_scores
from curate.progress import progress

if TYPE_CHECKING:
    import numpy.typing as npt

    from curate.formats.mds import Sample
    from curate.pools.ngram_slopes import NgramSlopes

    Floats = npt.NDArray[np.floating[Any]]

# What predictions are made from and how, part of their identity.
PREDICTOR = ("hidden states", "n-grams", "likeness", "slopes of tokens", "ridge: leave-one-out with domain means")
_BLOCK = 4096  # samples whose features are held at once


def blocks_of(samples: pl.DataFrame) -> list[pl.DataFrame]:
    """The samples in consecutive parts."""
    return list(samples.iter_slices(_BLOCK))


def block_file(folder: Path, number: int) -> Path:
    """Where the hidden states of a part lie: float32 (N, H)."""
    return folder / f"{number:06d}.npy"


class FeatureReader:
    """Features of a pool's samples, a part at a time.

    Args:
        samples: of the pool.
        read: gives the samples of a table in its order, some at a time.
        hidden: folder of the hidden states of `blocks_of(samples)`; None: n-grams only.
        ratios: (T, V) of the targets, see `features.log_ratios`.
        tokens: a fit to the slopes of the probes' tokens, and what fits without them predict of the probes, (n, T): a
            fit knows its own tokens too well to say how far it is to be trusted; None: no feature.
    """

    def __init__(
        self,
        samples: pl.DataFrame,
        read: Callable[[pl.DataFrame], Iterable[list[Sample]]],
        hidden: Path | None,
        ratios: npt.NDArray[np.float64],
        tokens: tuple[NgramSlopes, Floats] | None = None,
    ) -> None:
        self._blocks, self._read, self._hidden, self._ratios = blocks_of(samples), read, hidden, ratios
        self._tokens = tokens
        if tokens is not None:  # targets differ in what their slopes are measured in
            self._scale = 1 / np.maximum(tokens[1].std(axis=0), 1e-30)
        self._deviations: Floats | None = None

    def of_probes(self, probes: pl.DataFrame) -> list[Floats]:
        """Features (n, F_b) of samples of the pool, in their order; hidden states are measured in their deviations."""
        chosen = [block.join(probes, on=["domain", "sample_id"], how="semi") for block in self._blocks]
        parts = [self._features(number, own) for number, own in enumerate(chosen) if len(own)]
        found = [np.concatenate(part) for part in zip(*parts, strict=True)]
        if self._hidden is not None:
            self._deviations = np.maximum(found[0].std(axis=0), 1e-12)
            found[0] = found[0] / self._deviations
        if self._tokens is not None:
            found[-1] = self._tokens[1] * self._scale
        return found

    def of_all(self, domains: Collection[str]) -> Iterator[tuple[pl.DataFrame, Floats]]:
        """Parts of some domains of the pool with their features (N, F), in the units of the probes."""
        blocks = progress(self._blocks, total=len(self._blocks), what="predict", unit="block")
        for number, whole in enumerate(blocks):
            block = whole.filter(pl.col("domain").is_in(list(domains)))
            if block.is_empty():
                continue
            features = self._features(number, block)
            if self._deviations is not None:
                features[0] = features[0] / self._deviations
            yield block, np.concatenate(features, axis=1)

    def _features(self, number: int, rows: pl.DataFrame) -> list[Floats]:
        """Of some samples of a part, in its order."""
        found: list[Floats] = []
        if self._hidden is not None:
            block = self._blocks[number].with_row_index("at")
            at = block.join(rows, on=["domain", "sample_id"], how="semi", maintain_order="left")["at"].to_numpy()
            found.append(read_array(block_file(self._hidden, number))[at])
        texts = [self._of_texts(samples) for samples in self._read(rows)]
        return [*found, *(np.concatenate(part) for part in zip(*texts, strict=True))]

    def _of_texts(self, samples: Sequence[Sample]) -> list[Floats]:
        found: list[Floats] = [ngram_features(samples), likeness(samples, self._ratios)]
        if self._tokens is not None:
            found.append(self._tokens[0].samples(samples) * self._scale)
        return found


def spread(
    samples: pl.DataFrame,
    probes: pl.DataFrame,
    values: Floats,
    reader: FeatureReader,
    seed: int,
    least: float | None = None,
) -> tuple[pl.DataFrame, pl.DataFrame]:
    """Values of every sample, and how good predictions are; see `settled` for what is made of them.

    Args:
        samples: of the pool, by domain and content id.
        probes: some of them in that order, with `step`.
        values: (n, 3 T) of the probes, per token: value, value_a, value_b for each target.
        reader: of features.
        seed: of folds and intervals.
        least: only domains are predicted that `settled` will use at this threshold; None: all.

    Returns:
        `of` (place of the target), `domain`, `sample_id`, `step` (of probes, else null), `value`, `value_a`, `value_b`
        (per token; predicted, but of probes) and `source` (probe or predicted) of every target and sample.
        `of`, `domain`, `samples`, `probed`, `spearman`, `low`, `high`, and the mean of each value over the probes'
        tokens (`mean_value` and so on), of every target and domain.
    """
    features, domains = reader.of_probes(probes), probes["domain"].to_numpy().astype(str)
    judged = _judge(samples, probes, values, held_out_scores(features, values, domains, seed), seed)
    predictor, targets = fit(features, values, domains), range(values.shape[1] // len(VALUES))
    wanted = judged if least is None else judged.filter(_good(least))
    parts = [_rows(place, probes.clear(), values[:0]) for place in targets]
    for block, own in reader.of_all(wanted["domain"].unique().to_list()):
        names, predicted = block["domain"].to_numpy().astype(str), np.empty((len(block), values.shape[1]))
        for name in map(str, np.unique(names)):
            predicted[names == name] = predictor.predict(own[names == name], name)
        parts += [_rows(place, block, predicted) for place in targets]
    return _with_probes(parts, probes, values), judged


def from_slopes(
    samples: pl.DataFrame, probes: pl.DataFrame, values: Floats, slopes: Floats, seed: int
) -> tuple[pl.DataFrame, pl.DataFrame]:
    """As `spread`, with linear values of every sample instead of a fit.

    The own step of probes may be exact, which moves their mean and spread: in each domain linear values get those of
    its probes. They stand for the values of a target's halves too, each in its own mean and spread.

    Args:
        samples: of the pool, by domain and content id.
        probes: some of them in that order, with `step`.
        values: (n, 3 T) of the probes, see `spread`.
        slopes: (N, T) linear values of all samples, per token.
        seed: of intervals.
    """
    linear = np.repeat(slopes, len(VALUES), axis=1)
    keys = ["domain", "sample_id"]
    at = samples.with_row_index("at").join(probes, on=keys, how="semi", maintain_order="left")["at"].to_numpy()
    slopes_of_probes = linear[at]
    judged = _judge(samples, probes, values, slopes_of_probes, seed)
    names, probed = samples["domain"].to_numpy().astype(str), probes["domain"].to_numpy().astype(str)
    for name in map(str, np.unique(probed)):
        own, known, here = slopes_of_probes[probed == name], values[probed == name], names == name
        z = (linear[here] - own.mean(axis=0)) / np.maximum(own.std(axis=0), 1e-30)
        linear[here] = z * known.std(axis=0) + known.mean(axis=0)
    parts = [_rows(place, samples, linear) for place in range(slopes.shape[1])]
    return _with_probes(parts, probes, values), judged


def from_fit(
    samples: pl.DataFrame, probes: pl.DataFrame, values: Floats, predicted: Floats, held_out: Floats, seed: int
) -> tuple[pl.DataFrame, pl.DataFrame]:
    """As `spread`, with predictions for one target that were made elsewhere; they stand for those of its halves too.

    Args:
        samples: by domain and content id.
        probes: some of them in that order, with `step`.
        values: (n,) of the probes, per token.
        predicted: (N,) of all samples.
        held_out: (n,) of the probes by fits without them; NaN where there is none.
        seed: of intervals.
    """
    known, told, judged_by = (np.repeat(own[:, None], len(VALUES), axis=1) for own in (values, predicted, held_out))
    return _with_probes([_rows(0, samples, told)], probes, known), _judge(samples, probes, known, judged_by, seed)


def _with_probes(parts: Sequence[pl.DataFrame], probes: pl.DataFrame, values: Floats) -> pl.DataFrame:
    """Tables of `_rows`, where what was probed has its own values; see `spread`."""
    targets = range(values.shape[1] // len(VALUES))
    known = pl.concat(_rows(place, probes, values).with_columns(probes["step"]) for place in targets)
    keys = ["of", "domain", "sample_id"]
    both = pl.concat(parts).join(known, on=keys, how="left", suffix="_probed", maintain_order="left")
    probed = pl.col("step").is_not_null()
    every = both.select(
        *keys,
        "step",
        *(pl.when(probed).then(f"{name}_probed").otherwise(name).alias(name) for name in VALUES),
        source=pl.when(probed).then(pl.lit("probe")).otherwise(pl.lit("predicted")),
    )
    return every.sort(keys)


def settled(every: pl.DataFrame, domains: pl.DataFrame, least: float) -> tuple[pl.DataFrame, pl.DataFrame]:
    """Use predictions where they are good enough, the domain's mean elsewhere.

    Args:
        every: see `spread`.
        domains: see `spread`.
        least: held-out rank correlation from which a domain's predictions are used, if it is certainly positive.

    Returns:
        `every` with the means of domains, and the source "domain mean", where predictions are not used.
        `domains` with `used` instead of the means.
    """
    weak = pl.when(_good(least)).then(pl.lit("predictor")).otherwise(pl.lit("domain mean"))
    used = pl.when(pl.col("probed") == pl.col("samples")).then(pl.lit("probes")).otherwise(weak)
    judged = domains.with_columns(used=used)
    means = [f"mean_{name}" for name in VALUES]
    joined = every.join(judged.select("of", "domain", "used", *means), on=["of", "domain"], maintain_order="left")
    falls = (pl.col("source") == "predicted") & (pl.col("used") == "domain mean")
    values = [pl.when(falls).then(f"mean_{name}").otherwise(name).alias(name) for name in VALUES]
    source = pl.when(falls).then("used").otherwise("source")
    return joined.with_columns(*values, source=source).drop("used", *means), judged.drop(means)


def _good(least: float) -> pl.Expr:
    return ((pl.col("spearman") >= least) & (pl.col("low") > 0)).fill_null(value=False)


def _rows(place: int, samples: pl.DataFrame, values: Floats) -> pl.DataFrame:
    """The samples with their values (N, 3 T) for one target."""
    own = {name: pl.Series(values[:, len(VALUES) * place + at]) for at, name in enumerate(VALUES)}
    return samples.select(pl.lit(place, pl.Int64).alias("of"), "domain", "sample_id").with_columns(**own)


def _judge(samples: pl.DataFrame, probes: pl.DataFrame, values: Floats, held_out: Floats, seed: int) -> pl.DataFrame:
    """How well held-out predictions rank the probes of each domain, and their means; see `spread`."""
    sizes = dict(samples.group_by("domain").len().iter_rows())
    domains, tokens = probes["domain"].to_numpy().astype(str), probes["tokens"].to_numpy()
    rows: list[dict[str, Any]] = []
    for place in range(values.shape[1] // len(VALUES)):
        first = len(VALUES) * place
        for name in map(str, np.unique(domains)):
            own = domains == name
            known = own & np.isfinite(held_out[:, first])
            truth, found = values[known, first], held_out[known, first]
            r = spearman(found, truth)
            low, high = (None, None) if r is None else spearman_interval(found, truth, np.arange(len(found)), seed)
            means = np.average(values[own, first : first + len(VALUES)], axis=0, weights=tokens[own])
            rows.append(
                {"of": place, "domain": name, "samples": sizes[name], "probed": int(own.sum()), "spearman": r,
                 "low": low, "high": high, **{f"mean_{one}": float(means[at]) for at, one in enumerate(VALUES)}}
            )  # fmt: skip
    floats = ("spearman", "low", "high", *(f"mean_{name}" for name in VALUES))
    counts = {"of": pl.Int64, "domain": pl.String, "samples": pl.Int64, "probed": pl.Int64}
    return pl.DataFrame(rows, schema={**counts, **dict.fromkeys(floats, pl.Float64)}, orient="row")
