"""Predictions of samples, read as a selection reads them: some at a time."""

import numpy as np

from curate.influence.predict_next_step import fit_predictor


def predict_samples(source, samples, part, weights, seed):
    """What n-grams say of samples by the measured part, and how good that is."""
    predictor = fit_predictor(source, part, weights, seed)
    predicted = [predictor.predict(batch) for batch in source.read_batches(samples, 7)]
    return predictor.with_fallback(samples, np.concatenate(predicted))
