"""Rows of the value index in a selection (`values.rows`): every sample has one.

Rows that exist cost nothing, whoever made them: `curate.embed`, or a selection for another target.
"""

from __future__ import annotations

from dataclasses import dataclass
from time import perf_counter
from typing import TYPE_CHECKING, Any

import numpy as np
import polars as pl

from curate.influence.current import target_positions
from curate.influence.row_values import calibrate, target_vectors
from curate.influence.rows import embed_samples, open_rows
from curate.influence.space import find_space, open_space, row_passes, space_passes
from curate.stats.deviation import combined_values, target_shares
from curate.tables import RowTrust
from curate.training.replay import Replay

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

    Floats = npt.NDArray[np.floating[Any]]
    Vector = npt.NDArray[np.float32]


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
        measured = combined_values(self.next_step.values, weights)
        positions, shares = target_positions(self.next_step), target_shares(self.next_step.values, weights)
        rows = self.vectors[[positions[name] for name in shares]]
        vector = (np.array(list(shares.values())) @ rows).astype(np.float32)
        calibration = self._calibrated(measured, "value_total", vector, next(iter(weights)), cross_validated)
        every = self.samples.with_columns(predicted=pl.Series(predicted, dtype=pl.Float64))
        rest = every.join(measured, on="sample_id", how="anti", maintain_order="left")
        both = np.column_stack([self._products(rest, vector), rest["predicted"].to_numpy()])
        values = calibration.values(rest["domain"].to_numpy().astype(str), both)
        valued = rest.select("sample_id", value_per_token=pl.Series(values, dtype=pl.Float64))
        return valued.filter(pl.col("value_per_token").is_not_nan()), calibration.trust

    def trust(self) -> dy.DataFrame[RowTrust]:
        """How well rows give exact values for each target, by domain."""
        positions = target_positions(self.next_step)
        tables = [
            self._calibrated(
                self.next_step.values.filter(target=name), "value_total_nats", self.vectors[at], name
            ).trust
            for name, at in positions.items()
        ]
        return RowTrust.validate(pl.concat(tables))

    def adjusted(self) -> pl.DataFrame:
        """Totals of the measured samples whose mean over a domain is what all of its rows say.

        `v + n b (mean of all products - product)`: the regression estimator of `row_values`, a sample at a time, so
        that resampling the samples gives its error.

        Returns:
            `target`, `domain`, `sample_id` and `value_adjusted_nats`, of domains where rows are trusted for the target.
        """
        tables = [self._adjusted(name, self.vectors[at]) for name, at in target_positions(self.next_step).items()]
        return pl.concat(tables)

    def _adjusted(self, target: str, vector: Vector) -> pl.DataFrame:
        measured = self.next_step.values.filter(target=target)
        lines, means = self._calibrated(measured, "value_total_nats", vector, target).lines, self._means(vector)
        known = measured.filter(pl.col("domain").is_in(list(lines)))
        domains = known["domain"].to_list()
        away = np.array([means[domain] for domain in domains]) - self._products(known, vector)
        shift = np.array([lines[domain].slopes[0] for domain in domains]) * away
        total = known["value_total_nats"].to_numpy() + known["predicted_tokens"].to_numpy() * shift
        return known.select("target", "domain", "sample_id", value_adjusted_nats=pl.Series(total, dtype=pl.Float64))

    def _calibrated(
        self, measured: pl.DataFrame, total: str, vector: Vector, target: str, *predictors: Floats
    ) -> Calibration:
        """Hold the rows of measured samples, and other predictors, against their exact values, the column `total`."""
        per_token = pl.col(total) / pl.col("predicted_tokens")
        exact = measured.select("domain", "sample_id", "predicted_tokens", value_per_token=per_token)
        counts = dict(self.samples.group_by("domain").len().sort("domain").iter_rows())
        names = {"source": self.next_step.name, "target": target}
        names["predictors"] = "rows and n-grams" if predictors else "rows"
        known = np.column_stack([self._products(exact, vector), *predictors])
        return calibrate(exact, known, self.space.fitted, counts, names, self.seed)

    def _products(self, samples: pl.DataFrame, vector: Vector) -> npt.NDArray[np.float64]:
        products = self.store.products(samples["sample_id"].to_numpy(), vector[None])[:, 0]
        return products.astype(np.float64)

    def _means(self, vector: Vector) -> dict[str, float]:
        """Domain -> mean product over all of its tokens."""
        products = pl.Series(self._products(self.samples, vector))
        table = self.samples.select("domain", "predicted_tokens", product=products)
        total: Any = (pl.col("product") * pl.col("predicted_tokens")).sum() / pl.col("predicted_tokens").sum()
        return dict(table.group_by("domain").agg(total).iter_rows())


def open_source_rows(plan: Resolved, source: Source, next_step: NextStep) -> SourceRows:
    """The rows of a source's samples; those that are missing are made, after their cost is logged."""
    run, begin = plan.run, perf_counter()
    replay = Replay(run, plan.config.device, plan.embedding.tolerance)
    space = find_space(run)
    passes = space_passes(run) if space is None else 0.0
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
