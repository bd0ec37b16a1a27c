"""Next-step values of unmeasured samples, predicted from the n-grams of measured ones; no pass through the model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import dataframely as dy
import numpy as np

from curate.core.arrays import read_arrays
from curate.influence.current import TOKEN_VALUES, target_positions
from curate.influence.extrapolate import from_fit, with_fallback
from curate.ngrams.regression import NgramRegression, fit, ngrams_of
from curate.stats.deviation import combined_values, target_shares
from curate.tables import PredictedValues, PredictionQuality, Samples, SampleValues

if TYPE_CHECKING:
    import numpy.typing as npt

    from curate.data.mds import Sample
    from curate.influence.current import NextStep
    from curate.training.source import SampleSource

    Floats = npt.NDArray[np.floating[Any]]

MIN_RANK_CORRELATION = 0.2
"""Held-out rank correlation from which a domain's predictions are used, if it is certainly positive; elsewhere the
domain's mean stands for what is not measured. What choosing by predictions gains is about this share of what choosing
by values would gain."""
_BATCH = 64  # samples read at a time


@dataclass(frozen=True, kw_only=True)
class NextStepPredictor:
    """What n-grams say of the next step, learned from the tokens of the measured part; no pass through the model.

    Attributes:
        regression: gives the value per token of any text, for all targets together.
        measured: the part that it was fitted to.
        cross_validated: (n,) what fits without a measured sample's fold predict of it; NaN where there is none.
        seed: of intervals.
    """

    regression: NgramRegression
    measured: dy.DataFrame[SampleValues]
    cross_validated: Floats
    seed: int

    def predict(self, samples: Sequence[Sample]) -> Floats:
        """(B,) values per token; NaN of samples that predict no token."""
        predicted = np.full(len(samples), np.nan)
        usable = [row for row, sample in enumerate(samples) if sample.predicted_tokens]
        if usable:
            predicted[usable] = self.regression.samples([samples[row] for row in usable])[:, 0]
        return predicted

    def with_fallback(
        self, samples: dy.DataFrame[Samples], predicted: Floats
    ) -> tuple[dy.DataFrame[PredictedValues], dy.DataFrame[PredictionQuality]]:
        """Predictions where they are good enough, the domain's mean elsewhere, and how good they are.

        Args:
            samples: N samples, the measured ones among them.
            predicted: (N,) of them.

        Returns:
            Values of all samples; measured ones have the measured value.
            How good predictions are in each domain; `used` as of `extrapolate.with_fallback`.
        """
        per_token = (self.measured["value_total"] / self.measured["predicted_tokens"]).to_numpy()
        tables = from_fit(samples, self.measured, per_token, predicted, self.cross_validated, self.seed)
        every, quality = with_fallback(*tables, MIN_RANK_CORRELATION)
        return PredictedValues.validate(every), PredictionQuality.validate(quality)


def fit_predictor(
    source: SampleSource, next_step: NextStep, weights: Mapping[str, float], seed: int
) -> NextStepPredictor:
    """Learn from the tokens of the measured part.

    Args:
        source: of the samples.
        next_step: of the run and the targets.
        weights: target -> weight.
        seed: of folds and intervals.
    """
    measured = combined_values(next_step.values, weights)
    shares = np.array(list(target_shares(next_step.values, weights).values()))
    stored = read_arrays(next_step.folder / TOKEN_VALUES)["values"][
        :, [target_positions(next_step)[name] for name in weights]
    ]
    keys = [ngrams_of(sample) for batch in source.read_batches(measured, _BATCH) for sample in batch]
    tokens = stored.astype(np.float64) @ shares
    # targets are combined before the fit: one regression, and one test of it, of what samples are chosen by
    regression, cross_validated = fit(
        np.concatenate(keys), tokens[:, None], measured["predicted_tokens"].to_numpy(), seed
    )
    return NextStepPredictor(regression=regression, measured=measured, cross_validated=cross_validated[:, 0], seed=seed)
