"""Domain weights from scores: the largest score for the least departure from the prior, within bounds.

Shape legend: D domains.
"""

import math

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]

_UNDERFLOW = 800.0  # exp(-800) is 0 in float64


def solve(prior: Floats, scores: Floats, temperature: float, lo: Floats, hi: Floats) -> Floats:
    """Solve `max_w <w, s> - T KL(w || prior)` subject to `sum w = 1`, `lo <= w <= hi`.

        w_d = clip(prior_d exp(s_d / T - mu), lo_d, hi_d)

    The sum falls as mu rises, so mu is found by bisection; the mass that is not at a bound is then shared out exactly.

    Args:
        prior: float64 [D], positive; only its proportions count.
        scores: float64 [D], finite; only their differences count.
        temperature: T > 0, in the unit of the scores; infinity gives the clipped prior.
        lo: float64 [D], `0 <= lo <= hi`, sum at most 1.
        hi: float64 [D], at most 1, sum at least 1.

    Returns:
        float64 [D] within the bounds exactly, summing to 1 up to rounding.
    """
    assert temperature > 0
    assert (prior > 0).all()
    assert (lo <= hi).all()
    tilt = np.log(prior) + (scores - scores.max()) / temperature

    def weights(mu: float) -> Floats:
        clipped: Floats = np.clip(np.exp(np.minimum(tilt - mu, 0.0)), lo, hi)
        return clipped

    below, above = float(tilt.min()), float(tilt.max()) + _UNDERFLOW  # every weight at hi, every weight at lo
    while below < (middle := (below + above) / 2) < above:
        below, above = (middle, above) if math.fsum(weights(middle)) > 1 else (below, middle)
    found = weights(above)
    free = (found > lo) & (found < hi)
    if free.any():
        shares = np.exp(tilt[free] - tilt[free].max())
        found[free] = (1 - math.fsum(found[~free])) * shares / math.fsum(shares)
    return np.clip(found, lo, hi)


def effective_number(weights: Floats) -> float:
    """exp(entropy): how many equally weighted domains would be as spread out; 1 to D."""
    positive = weights[weights > 0]
    return float(np.exp(-(positive * np.log(positive)).sum()))


def divergence(weights: Floats, prior: Floats) -> float:
    """KL(weights || prior) in nats; both sum to 1, the prior is positive."""
    positive = weights > 0
    return max(0.0, float((weights[positive] * np.log(weights[positive] / prior[positive])).sum()))
