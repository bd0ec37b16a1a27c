"""Rows of the value index in a selection (`values.rows`): every sample has one.

Rows that exist cost nothing, whoever made them: `curate.embed`, or a selection for another target.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from time import perf_counter
from typing import TYPE_CHECKING, Any

import numpy as np
import polars as pl

from curate.influence.current import target_positions
from curate.influence.row_values import calibrate, target_vectors
from curate.influence.rows import embed_samples, open_rows
from curate.influence.space import open_space, row_passes, space_passes
from curate.stats.deviation import combined_values, target_shares
from curate.tables import RowTrust

if TYPE_CHECKING:
    from collections.abc import Mapping

    import dataframely as dy
    import numpy.typing as npt

    from curate.influence.current import NextStep
    from curate.influence.row_values import Calibration
    from curate.influence.rows import RowStore
    from curate.influence.space import RowSpace
    from curate.selection.resolve import Resolved
    from curate.selection.source import Source
    from curate.tables import Samples
    from curate.training.replay import Replay

    Floats = npt.NDArray[np.floating[Any]]

_KEYS = ("source", "target", "domain", "sample_id")
_SLOPES = {"domain": pl.String, "slope": pl.Float64}


@dataclass(frozen=True, kw_only=True)
class SourceRows:
    """Rows of a source's samples, and what the targets ask for in their space.

    Attributes:
        samples: of the source; each has a row.
        store: of the rows.
        space: of the rows.
        next_step: exact values of some samples, which rows are held against.
        vectors: (T, D), see `row_values.target_vectors`.
        seed: of intervals.
        passes: forward+backward passes of a training batch that rows cost in this call.
        seconds: likewise.
    """

    samples: dy.DataFrame[Samples]
    store: RowStore
    space: RowSpace
    next_step: NextStep
    vectors: npt.NDArray[np.float32]
    seed: int
    passes: float
    seconds: float

    def valued(
        self, weights: Mapping[str, float], predicted: Floats, cross_validated: Floats
    ) -> tuple[pl.DataFrame, dy.DataFrame[RowTrust]]:
        """Values of all targets together by rows and n-grams, in domains where that is trusted.

        Rows hold what linear layers say, n-grams much of what token embeddings do: together they rank better than each
        (docs/benchmarks.md, "The value index").

        Args:
            weights: target -> weight, the main target first: the values go by its name.
            predicted: (N,) values per token that n-grams predict of the samples.
            cross_validated: (n,) of the measured samples, by fits without them.

        Returns:
            `sample_id` and `value_per_token` of samples that were not measured exactly.
            How well rows give exact values, by domain.
        """
        measured, shares = combined_values(self.next_step.values, weights), self._shares(weights)
        every = self.samples.with_columns(product=pl.Series(self._products @ shares), predicted=pl.Series(predicted))
        calibration = self._calibrated(measured, "value_total", every, next(iter(weights)), cross_validated)
        rest = every.join(measured, on="sample_id", how="anti", maintain_order="left")
        values = calibration.values(rest["domain"].to_numpy(), rest.select("product", "predicted").to_numpy())
        valued = rest.select("sample_id", value_per_token=pl.Series(values, dtype=pl.Float64))
        return valued.filter(pl.col("value_per_token").is_not_nan()), calibration.trust

    @property
    def trust(self) -> dy.DataFrame[RowTrust]:
        """How well rows give exact values for each target, by domain."""
        return RowTrust.validate(pl.concat(calibration.trust for calibration in self._by_target.values()))

    def adjusted(self) -> pl.DataFrame:
        """Totals of the measured samples whose mean over a domain is what all of its rows say.

        `v + n b (mean of all products - product)`: the regression estimator of `row_values`, a sample at a time, so
        that resampling the samples gives its error.

        Returns:
            `source`, `target`, `domain`, `sample_id` and `value_adjusted_nats`, of domains where rows are trusted for
            the target.
        """
        tokens = pl.col("predicted_tokens")
        mean = (pl.col("product") * tokens).sum().over("domain") / tokens.sum().over("domain")
        tables = []
        for target, calibration in self._by_target.items():
            away = self._of_target(target).select("domain", "sample_id", away=mean - pl.col("product"))
            slopes = {domain: float(line.slopes[0]) for domain, line in calibration.lines.items()}
            lines = pl.DataFrame({"domain": list(slopes), "slope": list(slopes.values())}, schema=_SLOPES)
            known = self.next_step.values.filter(target=target).join(away, on=["domain", "sample_id"])
            adjusted = pl.col("value_total_nats") + tokens * pl.col("slope") * pl.col("away")
            tables.append(known.join(lines, on="domain").select(*_KEYS, value_adjusted_nats=adjusted))
        return pl.concat(tables)

    @cached_property
    def _by_target(self) -> dict[str, Calibration]:
        values = self.next_step.values
        return {
            target: self._calibrated(values.filter(target=target), "value_total_nats", self._of_target(target), target)
            for target in target_positions(self.next_step)
        }

    def _calibrated(
        self, measured: pl.DataFrame, total: str, products: pl.DataFrame, target: str, *predictors: Floats
    ) -> Calibration:
        """Hold products of measured samples, and other predictors, against their exact values, the column `total`."""
        known = measured.join(
            products.select("domain", "sample_id", "product"), on=["domain", "sample_id"], maintain_order="left"
        )
        per_token = pl.col(total) / pl.col("predicted_tokens")
        exact = known.select("domain", "sample_id", "predicted_tokens", value_per_token=per_token)
        counts = dict(self.samples.group_by("domain").len().sort("domain").iter_rows())
        names = {"source": self.next_step.name, "target": target}
        names["predictors"] = "rows and n-grams" if predictors else "rows"
        columns = np.column_stack([known["product"].to_numpy(), *predictors])
        return calibrate(exact, columns, self.space.fitted, counts, names, self.seed)

    def _of_target(self, target: str) -> pl.DataFrame:
        """The samples with the `product` of their rows for a target."""
        column = self._products[:, target_positions(self.next_step)[target]]
        return self.samples.with_columns(product=pl.Series(column))

    def _shares(self, weights: Mapping[str, float]) -> Floats:
        """(T,) what each target's values are multiplied by, 0 where it has no say."""
        shares = np.zeros(len(self.vectors))
        for target, share in target_shares(self.next_step.values, weights).items():
            shares[target_positions(self.next_step)[target]] = share
        return shares

    @cached_property
    def _products(self) -> npt.NDArray[np.float64]:
        """(N, T) of the samples' rows with every target's vector: rows are read once."""
        return self.store.products(self.samples["sample_id"].to_numpy(), self.vectors).astype(np.float64)


def open_source_rows(plan: Resolved, source: Source, next_step: NextStep, replay: Replay) -> SourceRows:
    """The rows of a source's samples; those that are missing are made, after their cost is logged."""
    run, begin = plan.run, perf_counter()
    passes = space_passes(run, replay)
    space = open_space(run, replay)
    passes += row_passes(run, len(open_rows(space).missing(source.usable)))
    store = embed_samples(run, source.samples, source.usable, space, replay)
    return SourceRows(
        samples=source.usable,
        store=store,
        space=space,
        next_step=next_step,
        vectors=target_vectors(run, replay, space, next_step),
        seed=plan.config.seed,
        passes=passes,
        seconds=perf_counter() - begin,
    )
