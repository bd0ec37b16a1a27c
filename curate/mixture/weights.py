"""Domain weights from scores: the largest gain for the least departure from the prior, within bounds.

    max_w  sum_d gain_d(w_d) - T KL(w || prior)    subject to  sum w = 1,  lo <= w <= hi,  rows w >= least

The gain of a domain is its score times its weight, less what repetition takes: data seen for the e-th time is worth
`exp(-(e - 1) / R)` of new data beyond the first epoch (the derivative of equation 5 of Muennighoff et al.,
"Scaling Data-Constrained Language Models", arXiv 2305.16264, whose fit is R = 15.4). Only a positive score is
discounted: repeating what hurts does not make it harmless.

For given shadow prices of the shared constraints (`rows`) the problem falls apart into domains that share one number
mu, which bisection finds exactly. The prices are the minimum of the convex dual: a root for one constraint, scipy's
L-BFGS-B for more. The result carries its certificate: the dual's value bounds what any mixture could reach.

Shape legend: D domains, K shared constraints.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]

_UNDERFLOW = 800.0  # exp(-800) is 0 in float64
_MOST = 1e12  # shadow price of a shared constraint that no prior strength needs
_TOLERANCE = 1e-9  # of a shared constraint, in its own unit


@dataclass(frozen=True, kw_only=True)
class Problem:
    """What the weights are solved from.

    Args:
        prior: float64 [D], positive; only its proportions count.
        scores: float64 [D], finite; without rows only their differences count, but for the discount of repetition.
        prior_strength: T > 0, in the unit of the scores; infinity gives the prior as far as the constraints allow.
        lo: float64 [D], `0 <= lo <= hi`, sum at most 1.
        hi: float64 [D], at most 1, sum at least 1.
        used: float64 [D], epochs of each domain that were seen already; None: none.
        epochs: float64 [D], epochs that weight 1 adds; None: repetition costs nothing.
        decay_epochs: R of the discount; infinity: repetition costs nothing.
        rows: float64 [K, D], shared constraints.
        least: float64 [K], their right-hand sides; some weights within the bounds satisfy them.
    """

    prior: Floats
    scores: Floats
    prior_strength: float
    lo: Floats
    hi: Floats
    used: Floats | None = None
    epochs: Floats | None = None
    decay_epochs: float = math.inf
    rows: Floats | None = None
    least: Floats | None = None

    @property
    def repeats(self) -> bool:
        """Whether some domain would be repeated often enough to lose value."""
        if self.epochs is None or self.used is None or math.isinf(self.decay_epochs):
            return False
        return bool(((self.scores > 0) & (self.used + self.epochs * self.hi > 1)).any())

    def unconstrained(self) -> "Problem":
        """The same without bounds and shared constraints."""
        nothing = np.zeros_like(self.prior)
        return replace(self, lo=nothing, hi=nothing + 1, rows=None, least=None)


@dataclass(frozen=True, kw_only=True)
class Solution:
    """Weights, and how good they are known to be.

    Args:
        weights: float64 [D], within the bounds exactly, summing to 1 up to rounding.
        prices: float64 [K]: what the objective gains per unit that a shared constraint is loosened; 0 if it is slack.
        gap: no weights reach a better objective than these by more than this (dual minus primal value).
    """

    weights: Floats
    prices: Floats
    gap: float


def optimum(problem: Problem) -> Solution:
    """Solve the problem (see the module)."""
    if math.isinf(problem.prior_strength):  # only the divergence counts, whatever the scores
        problem = replace(problem, scores=np.zeros_like(problem.scores), prior_strength=1.0)
    rows, least = _shared(problem)
    prices = np.zeros(len(rows))
    weights = _priced(problem, prices)
    slack = rows @ weights - least
    # most problems end here: without a binding constraint of several domains the first solution is exact
    if (slack >= -_TOLERANCE).all():
        return Solution(weights=weights, prices=prices, gap=0.0)
    # a root is exact to the last digits; a minimiser of the dual is not, hence the repair
    prices = _one_price(problem) if len(rows) == 1 else _prices(problem)
    weights = _repaired(problem, _priced(problem, prices))
    dual = _dual(problem, prices)[0]
    return Solution(weights=weights, prices=prices, gap=max(0.0, dual - objective(problem, weights)))


def objective(problem: Problem, weights: Floats) -> float:
    """The gain less prior strength times divergence."""
    prior = problem.prior / problem.prior.sum()
    return expected_gain(problem, weights) - problem.prior_strength * divergence(weights, prior)


def expected_gain(problem: Problem, weights: Floats) -> float:
    """`sum_d gain_d(w_d)`: the expected score of a token of the next stage, repetition discounted."""
    effective = weights
    if problem.repeats:
        assert problem.used is not None
        assert problem.epochs is not None
        rate, decay = problem.epochs, problem.decay_epochs
        start, stop = (np.maximum(problem.used + rate * at, 1.0) for at in (np.zeros_like(weights), weights))
        # the share below the first epoch counts whole, the rest is the integral of exp(-(e - 1) / R)
        first_epoch = np.clip((1 - problem.used) / rate, 0, weights)
        repeated = decay / rate * (np.exp(-(start - 1) / decay) - np.exp(-(stop - 1) / decay))
        effective = np.where(problem.scores > 0, first_epoch + repeated, weights)
    return float(problem.scores @ effective)


def solve(prior: Floats, scores: Floats, prior_strength: float, lo: Floats, hi: Floats) -> Floats:
    """Solve `max_w <w, s> - T KL(w || prior)` subject to `sum w = 1`, `lo <= w <= hi`.

        w_d = clip(prior_d exp(s_d / T - mu), lo_d, hi_d)

    The sum falls as mu rises, so mu is found by bisection; the mass that is not at a bound is then shared out exactly.

    Args:
        prior: float64 [D], positive; only its proportions count.
        scores: float64 [D], finite; only their differences count.
        prior_strength: T > 0, in the unit of the scores; infinity gives the clipped prior.
        lo: float64 [D], `0 <= lo <= hi`, sum at most 1.
        hi: float64 [D], at most 1, sum at least 1.

    Returns:
        float64 [D] within the bounds exactly, summing to 1 up to rounding.
    """
    assert prior_strength > 0
    assert (prior > 0).all()
    assert (lo <= hi).all()
    tilt = np.log(prior) + (scores - scores.max()) / prior_strength

    def weights(mu: float) -> Floats:
        clipped: Floats = np.clip(np.exp(np.minimum(tilt - mu, 0.0)), lo, hi)
        return clipped

    below, above = float(tilt.min()), float(tilt.max()) + _UNDERFLOW  # every weight at hi, every weight at lo
    # until no float64 lies between the two ends
    while below < (middle := (below + above) / 2) < above:
        below, above = (middle, above) if math.fsum(weights(middle)) > 1 else (below, middle)
    solved = weights(above)
    # bisection ends within rounding of mu, which a sum of many weights would show
    free = (solved > lo) & (solved < hi)
    if free.any():
        shares = np.exp(tilt[free] - tilt[free].max())
        solved[free] = (1 - math.fsum(solved[~free])) * shares / math.fsum(shares)
    return np.clip(solved, lo, hi)


def _priced(problem: Problem, prices: Floats) -> Floats:
    """The best weights where a shared constraint is not a constraint but has a price."""
    linear = prices @ _shared(problem)[0]
    if not problem.repeats:
        return solve(problem.prior, problem.scores + linear, problem.prior_strength, problem.lo, problem.hi)
    return _discounted(problem, linear)


def _discounted(problem: Problem, linear: Floats) -> Floats:
    """`solve` with the discount of repetition: each domain's marginal gain falls as its weight grows.

    g exp(-max(0, used + epochs w - 1) / R) + linear - T log(w / prior) = mu       unless w is at a bound
    """
    gain = np.maximum(problem.scores, 0.0)
    linear = linear + np.minimum(problem.scores, 0.0)  # what hurts is not discounted
    lo, hi, strength = problem.lo, problem.hi, problem.prior_strength
    prior = problem.prior / problem.prior.sum()
    # logarithms need positive weights: 1e-300 and exp(-700) are 0 for every purpose but that
    most, few = np.maximum(hi, 1e-300), np.maximum(lo, prior * math.exp(-700))
    value, _ = _marginal(problem, np.log(most / prior), gain)
    below = float((value + linear - strength * np.log(most / prior)).min())
    value, _ = _marginal(problem, np.log(few / prior), gain)
    above = max(below, float((value + linear - strength * np.log(few / prior)).max()))
    mu = _root(lambda mu: math.fsum(_balanced(problem, gain, linear - mu)) - 1, below, above)
    solved = _balanced(problem, gain, linear - mu)
    free = (solved > lo) & (solved < hi)
    if free.any():
        solved[free] *= (1 - math.fsum(solved[~free])) / math.fsum(solved[free])
    return np.clip(solved, lo, hi)


def _balanced(problem: Problem, gain: Floats, linear: Floats) -> Floats:
    """The weight of each domain where its marginal gain is 0, clipped to the bounds; Newton's method, kept in brackets.

    Args:
        problem: prior, bounds, prior_strength and repetition.
        gain: float64 [D], what new data is worth, not negative.
        linear: float64 [D], the rest of the marginal gain, mu included.
    """
    strength, prior = problem.prior_strength, problem.prior / problem.prior.sum()
    least, most = (np.log(np.maximum(bound, 1e-300) / prior) for bound in (problem.lo, problem.hi))
    # of log(w / prior): the discount is between 0 and 1, and beyond its bounds a weight is clipped
    below, above = (np.clip(at / strength, least, most) for at in (linear, gain + linear))
    rounding = 1e-15 * (1 + np.maximum(np.abs(below), np.abs(above)))
    at = above.copy()
    for _ in range(100):
        value, slope = _marginal(problem, at, gain)
        rest = value + linear - strength * at
        below, above = np.where(rest >= 0, at, below), np.where(rest <= 0, at, above)
        step = at - rest / (slope - strength)
        # Newton overshoots where the discount sets in (a kink at the first epoch): the middle of the bracket instead
        step = np.where((step < below) | (step > above), (below + above) / 2, step)
        if (np.abs(step - at) <= rounding).all():
            break
        at = step
    return np.asarray(np.clip(prior * np.exp(at), problem.lo, problem.hi))


def _marginal(problem: Problem, at: Floats, gain: Floats) -> tuple[Floats, Floats]:
    """Discounted gain of one more token at `log(w / prior)`, and its derivative there."""
    assert problem.used is not None
    assert problem.epochs is not None
    added = problem.epochs * problem.prior / problem.prior.sum() * np.exp(at)
    repeats = problem.used + added - 1
    value = gain * np.exp(-np.maximum(repeats, 0.0) / problem.decay_epochs)
    slope = np.where((repeats > 0) & (value > 0), -value * added / problem.decay_epochs, 0.0)
    return value, slope


def _shared(problem: Problem) -> tuple[Floats, Floats]:
    if problem.rows is None or problem.least is None:
        return np.zeros((0, len(problem.prior))), np.zeros(0)
    return problem.rows, problem.least


def _dual(problem: Problem, prices: Floats) -> tuple[float, Floats]:
    """The dual function, an upper bound of the objective for any prices that are not negative, and its gradient."""
    rows, least = _shared(problem)
    weights = _priced(problem, prices)
    slack = rows @ weights - least
    return objective(problem, weights) + float(prices @ slack), slack


def _one_price(problem: Problem) -> Floats:
    """The lowest price at which the one shared constraint holds: its slack grows with the price."""

    def slack(price: float) -> float:
        return float(_dual(problem, np.array([price]))[1][0])

    above = 1.0  # deviations per unit of the constraint; most need less
    while slack(above) < 0 and above < _MOST:
        above *= 4
    return np.array([_root(slack, 0.0, above)])


def _root(function: Callable[[float], float], below: float, above: float) -> float:
    """Where a monotone function changes its sign, as closely as float64 tells; the nearer end where it does not."""
    from scipy.optimize import brentq

    # brentq refuses a bracket without a change of sign, which rounding or a price of 0 can leave
    ends = function(below), function(above)
    if ends[0] * ends[1] > 0 or below == above:
        return below if abs(ends[0]) < abs(ends[1]) else above
    return float(brentq(function, below, above, xtol=1e-300, rtol=4e-15, maxiter=500))


def _prices(problem: Problem) -> Floats:
    """The prices that minimise the dual."""
    from scipy.optimize import minimize

    rows, _ = _shared(problem)
    # in units of the prior strength the dual is as curved for every strength, which the tolerances count on
    scale = problem.prior_strength
    result = minimize(
        lambda prices: tuple(term / scale for term in _dual(problem, prices * scale)),
        np.zeros(len(rows)),
        jac=True,
        method="L-BFGS-B",
        bounds=[(0.0, None)] * len(rows),
        options={"maxiter": 1000, "ftol": 0.0, "gtol": 1e-12},
    )
    return np.asarray(result.x * scale)


def _repaired(problem: Problem, weights: Floats) -> Floats:
    """Move as little as possible towards weights well inside the shared constraints, so that each of them holds."""
    rows, least = _shared(problem)
    short = least - rows @ weights
    if (short <= _TOLERANCE).all():
        return weights
    # on the segment between the two every constraint's slack is linear, so the share that mends the worst mends all
    inside, _ = max_slack(rows, least, problem.lo, problem.hi)
    room = np.maximum(rows @ inside - least, 0.0)
    share = max((s / (s + r) for s, r in zip(short, room, strict=True) if s > 0), default=0.0)
    mixed = weights + min(1.0, share) * (inside - weights)
    return np.clip(mixed, problem.lo, problem.hi)


def max_slack(rows: Floats, least: Floats, lo: Floats, hi: Floats) -> tuple[Floats, float]:
    """The weights within the bounds whose least slack in the shared constraints is largest, and that slack.

    A linear program (HiGHS). The slack is negative where the constraints cannot all hold.

    Args:
        rows: float64 [K, D], K at least 1.
        least: float64 [K].
        lo: float64 [D], sum at most 1.
        hi: float64 [D], sum at least 1.
    """
    from scipy.optimize import linprog

    size = len(lo)
    # the last variable is the slack t: maximise t with rows w - t >= least
    result = linprog(
        np.append(np.zeros(size), -1.0),
        A_ub=np.hstack([-rows, np.ones((len(rows), 1))]),
        b_ub=-least,
        A_eq=np.append(np.ones(size), 0.0)[None],
        b_eq=[1.0],
        bounds=[*zip(lo, hi, strict=True), (None, None)],
        method="highs",
    )
    assert result.status == 0, result.message
    weights = np.clip(result.x[:size], lo, hi)  # the solver keeps bounds to its tolerance only
    return weights, float((rows @ weights - least).min())


def effective_number(weights: Floats) -> float:
    """exp(entropy): how many equally weighted domains would be as spread out; 1 to D."""
    positive = weights[weights > 0]
    return float(np.exp(-(positive * np.log(positive)).sum()))


def divergence(weights: Floats, prior: Floats) -> float:
    """KL(weights || prior) in nats; both sum to 1, the prior is positive."""
    positive = weights > 0
    return max(0.0, float((weights[positive] * np.log(weights[positive] / prior[positive])).sum()))
