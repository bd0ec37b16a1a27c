"""Whole samples from weights, by largest remainder: exact sums, exact caps, whatever the order of domains or shards."""

import math
from collections.abc import Mapping
from fractions import Fraction

from curate.core.errors import UserError
from curate.mixture.constraints import Supply


def allocate(
    weights: Mapping[str, float], budget_tokens: int, supply: Mapping[str, Supply], ceilings: Mapping[str, float]
) -> dict[str, int]:
    """Samples of each domain for a token budget, which is never exceeded by more than the spread of sample lengths.

    Args:
        weights: share of the tokens; sums to 1.
        budget_tokens: stored tokens of the next stage.
        supply: what there is of the same domains.
        ceilings: no domain gets more samples than fit into this share of the budget. (A floor holds to within one
            sample.)

    Returns:
        Samples per domain, in the order of names.

    Raises:
        UserError: the budget is smaller than one sample.
    """
    quotas = {domain: weights[domain] * budget_tokens / supply[domain].mean_length for domain in sorted(weights)}
    limits = sample_limits(supply, budget_tokens, ceilings)
    # 1e-6 of a sample: weights that sum to 1 but for rounding must not lose a whole one
    total = min(
        math.floor(math.fsum(quotas.values()) + 1e-6), sum(limits[domain] for domain in quotas if quotas[domain])
    )
    if total < 1:
        raise UserError(f"a budget of {budget_tokens:,} tokens is less than one sample; raise budget_tokens")
    return apportion(quotas, total, limits)


def sample_limits(supply: Mapping[str, Supply], budget_tokens: int, ceilings: Mapping[str, float]) -> dict[str, int]:
    """Samples of each domain that its ceiling, a share of the budget, allows; repeats counted."""
    return {
        domain: math.floor(ceilings[domain] * budget_tokens / domain_supply.mean_length + 1e-6)
        for domain, domain_supply in supply.items()
    }


def apportion(weights: Mapping[str, float], total: int, limits: Mapping[str, int]) -> dict[str, int]:
    """Divide `total` into integers proportional to the weights, none above its limit, in exact rational arithmetic.

    Each share is rounded down, what is missing goes to the largest remainders (ties: by name). Where a share reaches
    its limit it stays there and the rest is divided anew among the others.

    Args:
        weights: not negative; only their proportions count.
        total: sum of the result.
        limits: largest integer for each domain.

    Returns:
        Integers in the order of names; within 1 of `weight / sum * total` where no limit binds.

    Raises:
        UserError: the limits of the domains with a weight add up to less than `total`.
    """
    # floats as exact fractions: remainders that are equal in truth are ties, decided by name on every machine
    exact = {domain: Fraction(weights[domain]) for domain in sorted(weights)}
    free = {domain for domain, weight in exact.items() if weight > 0}
    if sum(limits[domain] for domain in free) < total:
        most = sum(limits[domain] for domain in free)
        raise UserError(f"{total} samples are wanted, the limits allow {most}; lower budget_tokens or raise max_epochs")
    result = dict.fromkeys(exact, 0)
    while free:
        whole = sum(exact[domain] for domain in free)
        shares = {domain: exact[domain] * (total - sum(result.values())) / whole for domain in free}
        # all of these at once: what they do not take raises the share of the others, so none comes back below its limit
        full = {domain for domain in free if shares[domain] >= limits[domain]}
        if not full:
            break
        result |= {domain: limits[domain] for domain in full}
        free -= full
    else:
        return result  # every domain is at its limit
    result |= {domain: math.floor(share) for domain, share in shares.items()}
    # floor minus share: the largest remainder is the smallest of these
    by_remainder = sorted(free, key=lambda domain: (math.floor(shares[domain]) - shares[domain], domain))
    for domain in by_remainder[: total - sum(result.values())]:
        result[domain] += 1
    return result
