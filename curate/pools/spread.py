"""From the values of probed samples to values of all: judge the predictor, and use it where it is good enough."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import polars as pl

from curate.fidelity.measure import spearman, spearman_interval
from curate.pools.features import ngram_features
from curate.pools.predictor import fit, held_out_scores
from curate.progress import progress

if TYPE_CHECKING:
    import numpy.typing as npt

    from curate.formats.mds import Sample

    Floats = npt.NDArray[np.floating[Any]]

VALUES = ("value", "value_a", "value_b")
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
    """

    def __init__(
        self, samples: pl.DataFrame, read: Callable[[pl.DataFrame], Iterable[list[Sample]]], hidden: Path | None
    ) -> None:
        self._samples, self._read, self._hidden = samples, read, hidden
        self._deviations: Floats | None = None

    def of_probes(self, probes: pl.DataFrame) -> list[Floats]:
        """Features (n, F_b) of samples of the pool, in their order; hidden states are measured in their deviations."""
        chosen = [block.join(probes, on=["domain", "sample_id"], how="semi") for block in blocks_of(self._samples)]
        parts = [self._features(number, own) for number, own in enumerate(chosen) if len(own)]
        found = [np.concatenate(part) for part in zip(*parts, strict=True)]
        if self._hidden is not None:
            self._deviations = np.maximum(found[0].std(axis=0), 1e-12)
            found[0] = found[0] / self._deviations
        return found

    def of_all(self) -> Iterator[tuple[pl.DataFrame, Floats]]:
        """Parts of the pool with their features (N, F), in the units of the probes."""
        blocks = blocks_of(self._samples)
        for number, block in enumerate(progress(blocks, total=len(blocks), what="predict", unit="block")):
            features = self._features(number, block)
            if self._deviations is not None:
                features[0] = features[0] / self._deviations
            yield block, np.concatenate(features, axis=1)

    def _features(self, number: int, rows: pl.DataFrame) -> list[Floats]:
        """Of some samples of a part, in its order."""
        found: list[Floats] = []
        if self._hidden is not None:
            block = blocks_of(self._samples)[number].with_row_index("at")
            at = block.join(rows, on=["domain", "sample_id"], how="semi", maintain_order="left")["at"].to_numpy()
            found.append(np.load(block_file(self._hidden, number), mmap_mode="r")[at])
        return [*found, np.concatenate([ngram_features(samples) for samples in self._read(rows)])]


def spread(
    samples: pl.DataFrame, probes: pl.DataFrame, values: Floats, reader: FeatureReader, *, least: float, seed: int
) -> tuple[pl.DataFrame, pl.DataFrame]:
    """Values of every sample, and how good they are.

    Args:
        samples: of the pool, by domain and content id.
        probes: some of them in that order, with `step`.
        values: (n, 3 T) of the probes, per token: value, value_a, value_b for each target.
        reader: of features.
        least: held-out rank correlation from which a domain's predictions are used.
        seed: of folds and intervals.

    Returns:
        `of` (place of the target), `domain`, `sample_id`, `step` (of probes, else null), `value`, `value_a`, `value_b`
        (per token) and `source` of every target and sample.
        `of`, `domain`, `samples`, `probed`, `spearman`, `low`, `high` and `used` of every target and domain.
    """
    features, domains = reader.of_probes(probes), probes["domain"].to_numpy().astype(str)
    judged = _judge(samples, probes, values, held_out_scores(features, values, domains, seed), least, seed)
    predictor = fit(features, values, domains)
    means = _means(probes, values)
    parts = []
    for block, own in reader.of_all():
        names = block["domain"].to_numpy().astype(str)
        predicted, mean = np.empty((len(block), values.shape[1])), np.empty((len(block), values.shape[1]))
        for name in np.unique(names):
            predicted[names == name] = predictor.predict(own[names == name], str(name))
            mean[names == name] = means[str(name)]
        for place in range(values.shape[1] // len(VALUES)):
            used = dict(judged.filter(of=place).select("domain", "used").iter_rows())
            trusted = np.array([used[name] == "predictor" for name in names])
            chosen = np.where(trusted[:, None], predicted, mean)[:, len(VALUES) * place :]
            parts.append(_rows(place, block, chosen).with_columns(
                source=pl.Series(np.where(trusted, "predicted", "domain mean"))
            ))  # fmt: skip
    every = pl.concat(parts)
    known = pl.concat(
        _rows(place, probes, values[:, len(VALUES) * place :]).with_columns(probes["step"])
        for place in range(values.shape[1] // len(VALUES))
    )
    both = every.join(known, on=["of", "domain", "sample_id"], how="left", suffix="_probed", maintain_order="left")
    probed = pl.col("step").is_not_null()
    spread_values = both.with_columns(
        *(pl.when(probed).then(f"{name}_probed").otherwise(name).alias(name) for name in VALUES),
        source=pl.when(probed).then(pl.lit("probe")).otherwise("source"),
    )
    ordered = spread_values.select("of", "domain", "sample_id", "step", *VALUES, "source")
    return ordered.sort("of", "domain", "sample_id"), judged


def _rows(place: int, samples: pl.DataFrame, values: Floats) -> pl.DataFrame:
    """The samples with the first three columns of some values."""
    columns = {name: pl.Series(values[:, at], dtype=pl.Float64) for at, name in enumerate(VALUES)}
    return samples.select(pl.lit(place, pl.Int64).alias("of"), "domain", "sample_id").with_columns(**columns)


def _means(probes: pl.DataFrame, values: Floats) -> dict[str, Floats]:
    """Domain -> (3 T,) mean value per token of its probes."""
    tokens, domains = probes["tokens"].to_numpy(), probes["domain"].to_numpy().astype(str)
    return {
        str(name): np.average(values[domains == name], axis=0, weights=tokens[domains == name])
        for name in np.unique(domains)
    }


def _judge(
    samples: pl.DataFrame, probes: pl.DataFrame, values: Floats, held_out: Floats, least: float, seed: int
) -> pl.DataFrame:
    """How well held-out predictions rank the probes of each domain, and what is made of it; see `spread`."""
    sizes = dict(samples.group_by("domain").len().iter_rows())
    domains = probes["domain"].to_numpy().astype(str)
    rows: list[dict[str, Any]] = []
    for place in range(values.shape[1] // len(VALUES)):
        truth, found = values[:, len(VALUES) * place], held_out[:, len(VALUES) * place]
        for name in map(str, np.unique(domains)):
            own = (domains == name) & np.isfinite(found)
            r = spearman(found[own], truth[own])
            low, high = (None, None)
            if r is not None:
                low, high = spearman_interval(found[own], truth[own], np.arange(own.sum()), seed)
            probed = int((domains == name).sum())
            good = r is not None and low is not None and r >= least and low > 0
            used = "probes" if probed == sizes[name] else "predictor" if good else "domain mean"
            rows.append(
                {"of": place, "domain": name, "samples": sizes[name], "probed": probed, "spearman": r, "low": low,
                 "high": high, "used": used}
            )  # fmt: skip
    schema = {"of": pl.Int64, "domain": pl.String, "samples": pl.Int64, "probed": pl.Int64}
    schema |= dict.fromkeys(("spearman", "low", "high"), pl.Float64) | {"used": pl.String}
    return pl.DataFrame(rows, schema=schema, orient="row")
