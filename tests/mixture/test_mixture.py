"""Constraints and the record."""

import polars as pl
import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from curate.artifacts import SIGN
from curate.errors import UserError
from curate.mixture.constraints import MixtureConfig, Supply, caps
from curate.mixture.record import decide, read_mixture, with_tokens, write_mixture

PRIOR = {"a": 0.5, "b": 0.3, "c": 0.2}
SUPPLY = {name: Supply(samples=1000, tokens=8000) for name in PRIOR}


def scores(shrunk=(0.5, 0.0, -0.5), window="late"):
    return pl.DataFrame(
        {
            "window": [window] * 3,
            "target": ["t"] * 3,
            "domain": list("abc"),
            "score": [2.0 * value for value in shrunk],
            "score_low": [None, -1.0, -1.0],
            "score_high": [None, 1.0, 1.0],
            "shrunk": [float(value) for value in shrunk],
        },
        schema_overrides={"score_low": pl.Float64, "score_high": pl.Float64},
    )


def test_caps():
    config = MixtureConfig(max_epochs=2, max_weight=0.7, ceilings={"b": 0.4}, floors={"c": 0.15})
    supply = {**SUPPLY, "a": Supply(samples=1000, tokens=8000, consumed_tokens=12_000)}
    bounds = caps(config, PRIOR, supply, 10_000)
    assert [(b.lo, b.hi, b.hi_from) for b in bounds.values()] == [
        (pytest.approx(0.05), 0.4, "max_epochs"),
        (pytest.approx(0.03), 0.4, "ceiling"),
        (0.15, 0.7, "ceiling"),
    ]


def test_relative_floor_gives_way_to_an_exhausted_domain():
    supply = {**SUPPLY, "a": Supply(samples=1000, tokens=8000, consumed_tokens=50_000)}
    bound = caps(MixtureConfig(), PRIOR, supply, 10_000)["a"]
    assert (bound.lo, bound.hi, bound.binding(0.0)) == (0, 0, "max_epochs")


def test_largest_feasible_budget_is_the_largest():
    config = MixtureConfig(max_epochs=2, ceilings={"a": 0.2})
    with pytest.raises(UserError, match=r"at mixture.max_epochs 2 \(a has .*b has 16,000 left.*is 40,000$"):
        caps(config, PRIOR, SUPPLY, 10**6)
    caps(config, PRIOR, SUPPLY, 40_000)
    with pytest.raises(UserError):
        caps(config, PRIOR, SUPPLY, 40_010)


@given(
    st.floats(0.1, 8),
    st.lists(st.integers(1, 10**6), min_size=3, max_size=3),
    st.integers(1, 10**8),
    st.floats(0.34, 1),
)
def test_feasible_or_told_what_would_be(max_epochs, tokens, budget, max_weight):
    config = MixtureConfig(max_epochs=max_epochs, max_weight=max_weight)
    supply = {name: Supply(samples=count, tokens=count) for name, count in zip("abc", tokens, strict=True)}
    try:
        bounds = caps(config, PRIOR, supply, budget)
    except UserError as error:
        largest = int(str(error).rsplit(" ", 1)[1].replace(",", ""))
        assert largest < budget
        if largest > 0:
            caps(config, PRIOR, supply, largest)
    else:
        assert sum(bound.lo for bound in bounds.values()) <= 1 + 1e-9
        assert sum(bound.hi for bound in bounds.values()) >= 1 - 1e-8
        assert all(0 <= bound.lo <= bound.hi <= 1 for bound in bounds.values())


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"floors": {"x": 0.1}}, "floors names x; the domains are a, b, c"),
        ({"ceilings": {"a": 1.5}}, "ceilings must be weights"),
        ({"floors": {"a": 0.6, "b": 0.6}}, "floors add up to more than 1"),
        ({"floors": {"a": 0.98}, "min_share_of_prior": 0.5}, "min_share_of_prior can be at most 0.04"),
        ({"floors": {"a": 0.6}, "max_weight": 0.5}, "above the ceiling 0.5"),
        ({"max_weight": 0.3}, "less than 1: raise mixture.ceilings, or mixture.max_weight to at least 0.333"),
        ({"floors": {"b": 0.5}, "max_epochs": 1}, "b has 8,000 left.*largest feasible budget_tokens is 16,000"),
    ],
)
def test_infeasible(config, message):
    with pytest.raises(UserError, match=message):
        caps(MixtureConfig(**config), PRIOR, SUPPLY, 20_000)


def test_domains_must_be_those_of_the_run():
    with pytest.raises(UserError, match="the data has"):
        caps(MixtureConfig(), PRIOR, {"a": SUPPLY["a"]}, 100)
    with pytest.raises(UserError, match="no samples of a"):
        caps(MixtureConfig(), PRIOR, {**SUPPLY, "a": Supply(samples=0, tokens=0)}, 100)


def test_decide():
    mixture = decide(scores(), {"a": 5, "b": 3, "c": 2}, SUPPLY, 16_000, MixtureConfig(temperature=0.5, max_epochs=1.5))
    a, b, c = (mixture.domains[name] for name in "abc")
    assert (a.binding, b.binding, c.binding) == ("max_epochs", None, None)
    assert a.weight == 0.75
    assert a.epochs == 1.5
    assert b.weight / c.weight == pytest.approx(0.3 / (0.2 * 2.718281828 ** (-0.5 / 0.5)))
    assert a.unconstrained_weight > a.weight
    assert mixture.tokens == mixture.budget_tokens == 16_000
    assert mixture.samples == sum(domain.samples for domain in mixture.domains.values()) == 2_000
    assert sum(domain.delivered_weight for domain in mixture.domains.values()) == pytest.approx(1)
    assert c.delivered_weight == c.tokens / 16_000
    assert c.weight < c.prior
    assert mixture.kl_to_prior > 0
    assert 1 < mixture.effective_domains < 3


def test_equal_scores_keep_the_prior():
    mixture = decide(scores((0, 0, 0)), PRIOR, SUPPLY, 8_000, MixtureConfig())
    assert {name: domain.samples for name, domain in mixture.domains.items()} == {"a": 500, "b": 300, "c": 200}
    assert mixture.kl_to_prior == pytest.approx(0, abs=1e-12)


def test_windows_are_never_mixed():
    both = pl.concat([scores((1, 0, -1), "early"), scores()])
    assert decide(both, PRIOR, SUPPLY, 800, MixtureConfig()) == decide(scores(), PRIOR, SUPPLY, 800, MixtureConfig())
    with pytest.raises(UserError, match="no scores for window 'middle' \\(there are early, late\\)"):
        decide(both, PRIOR, SUPPLY, 800, MixtureConfig(window="middle"))


def test_with_tokens_sets_what_follows_from_them():
    mixture = decide(scores(), PRIOR, SUPPLY, 16_000, MixtureConfig())
    changed = with_tokens(mixture, {"a": 100, "b": 60, "c": 40})
    assert changed.tokens == 200
    assert [domain.delivered_weight for domain in changed.domains.values()] == [0.5, 0.3, 0.2]
    assert changed.kl_to_prior == pytest.approx(0)
    assert changed.domains["a"].weight == mixture.domains["a"].weight


def test_round_trip(tmp_path):
    mixture = decide(scores(), PRIOR, SUPPLY, 16_000, MixtureConfig())
    path = tmp_path / "mixture.yaml"
    write_mixture(path, mixture)
    assert read_mixture(path) == mixture
    plain = yaml.safe_load(path.read_text())
    assert plain["sign"] == SIGN
    assert plain["domains"]["a"]["low"] is None
    assert plain["domains"]["a"]["tokens"] == mixture.domains["a"].tokens


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "does not exist"),
        ("- 1", "is not a mixture"),
        ("a: [", "is not a mixture"),
        ("target: t", "window: Field required"),
        ("extra: t", "Field required|Extra"),
    ],
)
def test_bad_file(tmp_path, text, message):
    path = tmp_path / "mixture.yaml"
    if text is not None:
        path.write_text(text)
    with pytest.raises(UserError, match=message):
        read_mixture(path)
