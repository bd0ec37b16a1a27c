"""Why no mixture satisfies the constraints: the settings that conflict, and the nearest feasible value of each."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

from curate.core.errors import UserError
from curate.mixture.constraints import Inputs, MixtureConfig, Supply, check_names, chosen_prior, is_feasible

Restrict = Callable[[MixtureConfig, Inputs], Inputs | None]
"""From a whole stage to the part of it that weights are solved for; None: they do not even hold for the whole."""

_Feasible = Callable[[MixtureConfig, Inputs], bool]
_FAR = 1e9  # beyond it a setting that may grow without end constrains nothing


@dataclass(frozen=True, kw_only=True)
class _Setting:
    """One setting that can be loosened.

    Args:
        name: as the user writes it.
        value: what it is.
        loosest: where it constrains nothing.
        put: (config, inputs, value) -> the same with another value.
    """

    name: str
    value: float
    loosest: float
    put: Callable[[MixtureConfig, Inputs, float], tuple[MixtureConfig, Inputs]]


def check(config: MixtureConfig, inputs: Inputs, restrict: Restrict = lambda _, inputs: inputs) -> None:
    """Refuse constraints that no mixture satisfies.

    Of the settings a smallest set is named that conflicts by itself: loosening any one of it ends that conflict. The
    nearest feasible value of each is given, everything else as it is.

    Args:
        config: the constraints.
        inputs: of the whole stage.
        restrict: gives what weights are solved for.

    Raises:
        UserError: the conflict, or a name that is no domain.
    """
    check_names(config, inputs)

    def feasible(config: MixtureConfig, inputs: Inputs) -> bool:
        restricted = restrict(config, inputs)
        return restricted is not None and is_feasible(config, restricted)

    if feasible(config, inputs):
        return
    conflict = _smallest(config, inputs, feasible)
    remedies = [
        remedy
        for setting in conflict
        # an epoch cap holds against a budget: a smaller stage is a remedy too
        for changed in ([setting, _budget(inputs)] if setting.name == "mixture.max_epochs" else [setting])
        if (remedy := _remedy(changed, config, inputs, feasible)) is not None
    ]
    named = ", ".join(f"{setting.name} {setting.value:g}" for setting in conflict)
    detail = _left(config, inputs) if any(setting.name == "mixture.max_epochs" for setting in conflict) else ""
    if not conflict:
        left = f"the domains {', '.join(inputs.domains)} have nothing left" if inputs.domains else "there is no domain"
        raise UserError(f"no mixture is possible with any constraints: {left}; give streams with samples to draw")
    if not remedies:
        raise UserError(f"no mixture satisfies {named} together{detail}, and other constraints conflict besides")
    raise UserError(
        f"no mixture satisfies {named} {'together' if len(conflict) > 1 else 'at all'}{detail}; "
        f"with all else as it is, this would do: {', or '.join(remedies)}"
    )


def check_settings(
    config: MixtureConfig, previous: Mapping[str, float], supply: Mapping[str, Supply], budget_tokens: int
) -> None:
    """Refuse, before anything is paid for, constraints that this data could not satisfy, whatever is left out of it.

    Args:
        config: the constraints.
        previous: share of each domain in what was trained on; need not sum to 1.
        supply: all that there is of the domains.
        budget_tokens: stored tokens of the next stage.

    Raises:
        UserError: see `check` and `chosen_prior`.
    """
    shares = chosen_prior(MixtureConfig(), previous)
    # scores are not known yet; first as if there were enough of everything, so that the shorter conflict is named
    plenty = dict.fromkeys(shares, Supply(samples=1, tokens=1))
    inputs = Inputs(prior=chosen_prior(config, shares), previous=shares, supply=plenty, budget_tokens=1.0)
    check(config.model_copy(update={"max_epochs": math.inf}), inputs)
    # a domain of which nothing is left has no weight, which is decided when it is known what else is left out
    if all(supply[domain].samples for domain in shares):
        check(config, replace(inputs, supply=supply, budget_tokens=budget_tokens))


def _smallest(config: MixtureConfig, inputs: Inputs, feasible: _Feasible) -> list[_Setting]:
    """Loosen one setting after the other; what cannot be loosened without ending the conflict is part of it."""
    conflict = []
    for setting in _settings(config, inputs):
        # what is loosened stays loosened: so what is left conflicts by itself, and each of it counts
        looser = setting.put(config, inputs, setting.loosest)
        if feasible(*looser):
            conflict.append(setting)
        else:
            config, inputs = looser
    return conflict


def _settings(config: MixtureConfig, inputs: Inputs) -> list[_Setting]:
    """Every setting that constrains something; the ones named last are more likely to be kept in a conflict."""
    settings = [
        _plain("min_share_of_prior", config.min_share_of_prior, 0.0),
        _plain("max_weight", config.max_weight, 1.0),
        _plain("max_epochs", config.max_epochs, math.inf),
        _plain("replay_share", config.replay_share, 0.0),
    ]
    if config.max_change is not None:
        settings.append(_plain("max_change", config.max_change, _FAR))
    if inputs.retained is not None:
        settings.append(_plain("max_regression", config.max_regression, _FAR))
    settings += [_single("ceilings", domain, config.ceilings[domain], 1.0) for domain in sorted(config.ceilings)]
    settings += [_single("floors", domain, config.floors[domain], 0.0) for domain in sorted(config.floors)]
    return settings


def _plain(name: str, value: float, loosest: float) -> _Setting:
    return _Setting(
        name=f"mixture.{name}",
        value=value,
        loosest=loosest,
        put=lambda config, inputs, value: (config.model_copy(update={name: value}), inputs),
    )


def _single(name: str, domain: str, value: float, loosest: float) -> _Setting:
    def put(config: MixtureConfig, inputs: Inputs, value: float) -> tuple[MixtureConfig, Inputs]:
        return config.model_copy(update={name: {**getattr(config, name), domain: value}}), inputs

    return _Setting(name=f"mixture.{name}.{domain}", value=value, loosest=loosest, put=put)


def _budget(inputs: Inputs) -> _Setting:
    return _Setting(
        name="budget_tokens",
        value=inputs.budget_tokens,
        loosest=1.0,
        put=lambda config, inputs, value: (config, replace(inputs, budget_tokens=value)),
    )


def _remedy(setting: _Setting, config: MixtureConfig, inputs: Inputs, feasible: _Feasible) -> str | None:
    """`setting` and the value next to its own that is feasible; None where loosening it alone is not enough."""

    def works(value: float) -> bool:
        return feasible(*setting.put(config, inputs, value))

    # infinity cannot be halved: _FAR stands for it
    if not works(min(setting.loosest, _FAR)):
        return None
    # feasibility is monotone in each setting, so that bisection finds its border
    bad, good = setting.value, min(setting.loosest, _FAR)
    for _ in range(45):  # halvings: from 1e9 to below 1e-4, and from a share to below rounding
        middle = (bad + good) / 2
        bad, good = (bad, middle) if works(middle) else (middle, good)
    word = "at least" if setting.loosest > setting.value else "at most"
    return f"{setting.name} {word} {_rounded(good, setting, works)}"


def _rounded(value: float, setting: _Setting, works: Callable[[float], bool]) -> str:
    """A number of three digits that is feasible; a budget in whole tokens."""
    if setting.name == "budget_tokens":
        return f"{math.floor(value):,}"
    scale = 10.0 ** (3 - math.ceil(math.log10(value))) if value > 0 else 1.0
    # three digits read well, but must be feasible: else away from what conflicts, not to the nearest
    nearest = round(value * scale) / scale
    if works(nearest):
        return f"{nearest:g}"
    return f"{(math.ceil if setting.loosest > setting.value else math.floor)(value * scale) / scale:g}"


def _left(config: MixtureConfig, inputs: Inputs) -> str:
    """How much the domains have left that are wanted more of than that."""
    short = []
    for domain in inputs.domains:
        left = inputs.supply[domain].available_tokens(config.max_epochs)
        wanted = max(min(config.max_weight, config.ceilings.get(domain, 1.0)), config.floors.get(domain, 0.0))
        if left < wanted * inputs.budget_tokens:
            short.append(f"{domain} {int(left):,}")
    return f" (tokens left of {int(inputs.budget_tokens):,} wanted: {', '.join(short)})" if short else ""
