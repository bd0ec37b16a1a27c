"""Constraints and the record."""

import math
import re

import polars as pl
import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from curate.core.artifacts import SIGN
from curate.core.errors import UserError
from curate.mixture.conflicts import check
from curate.mixture.constraints import Inputs, MixtureConfig, Supply, bounds_of, is_feasible, problem_of
from curate.mixture.decide import RETAIN_WEIGHT, Objectives, decide, tilted_prior
from curate.mixture.record import read_mixture, with_tokens, write_mixture
from curate.mixture.weights import optimum

PRIOR = {"a": 0.5, "b": 0.3, "c": 0.2}
PLAIN = MixtureConfig(prior_strength=0.5)
ONE = Objectives(targets={"t": 1.0})
SUPPLY = {name: Supply(samples=1000, tokens=8000) for name in PRIOR}


def scores(shrunk=(0.5, 0.0, -0.5), source="late", target="t"):
    return pl.DataFrame(
        {
            "source": [source] * 3,
            "target": [target] * 3,
            "domain": list("abc"),
            "score": [2.0 * value for value in shrunk],
            "score_low": [None, -1.0, -1.0],
            "score_high": [None, 1.0, 1.0],
            "shrunk": [float(value) for value in shrunk],
            "samples": [100, 100, 0],
        },
        schema_overrides={"score_low": pl.Float64, "score_high": pl.Float64},
    )


def chosen(table=None, budget=8_000, config=None, objectives=ONE, supply=None, source="late", previous=PRIOR, **more):
    table = scores() if table is None else table
    return decide(table, previous, supply or SUPPLY, budget, config or MixtureConfig(), objectives, source, **more)


def inputs(budget=10_000, supply=None, **more):
    return Inputs(**{"prior": PRIOR, "previous": PRIOR, "supply": supply or SUPPLY, "budget_tokens": budget, **more})


def test_bounds():
    config = MixtureConfig(max_epochs=2, max_weight=0.7, ceilings={"b": 0.4}, floors={"c": 0.15})
    supply = {**SUPPLY, "a": Supply(samples=1000, tokens=8000, seen_tokens=12_000)}
    bounds = bounds_of(config, inputs(supply=supply))
    assert [(b.lo, b.hi, b.hi_from) for b in bounds.values()] == [
        (pytest.approx(0.05), 0.4, "max_epochs"),
        (pytest.approx(0.03), 0.4, "ceiling"),
        (0.15, 0.7, "ceiling"),
    ]


def test_the_change_of_a_stage_is_bounded_by_what_the_last_one_trained_on():
    bounds = bounds_of(MixtureConfig(max_change=2), inputs(prior={"a": 0.2, "b": 0.2, "c": 0.6}))
    sides = [(b.lo, b.hi, b.lo_from, b.hi_from) for b in bounds.values()]
    assert sides == [
        (0.25, 0.8, "max_change", "max_epochs") if 2 * 0.5 > 3.2 else (0.25, 1.0, "max_change", "ceiling"),
        (0.15, 0.6, "max_change", "max_change"),
        (0.1, 0.4, "max_change", "max_change"),
    ]


def test_relative_floor_gives_way_to_an_exhausted_domain():
    supply = {**SUPPLY, "a": Supply(samples=1000, tokens=8000, seen_tokens=50_000)}
    bound = bounds_of(MixtureConfig(), inputs(supply=supply))["a"]
    assert (bound.lo, bound.hi, bound.binding(0.0)) == (0, 0, "max_epochs")


def test_largest_feasible_budget_is_the_largest():
    config = MixtureConfig(max_epochs=2, ceilings={"a": 0.2})
    with pytest.raises(UserError, match=r"b 16,000.*max_epochs at least .*budget_tokens at most 40,000"):
        check(config, inputs(10**6))
    check(config, inputs(40_000))
    with pytest.raises(UserError):
        check(config, inputs(40_010))


@settings(max_examples=12)
@given(
    st.floats(0.1, 8),
    st.lists(st.integers(1, 10**6), min_size=3, max_size=3),
    st.integers(10, 10**8),
    st.floats(0.34, 1),
    st.floats(0, 1),
    st.none() | st.floats(1, 3),
)
def test_feasible_or_told_what_would_be(max_epochs, tokens, budget, max_weight, replay, change):
    """Each remedy that an error names makes the constraints feasible, by itself."""
    config = MixtureConfig(
        max_epochs=max_epochs, max_weight=max_weight, replay_domains=("b",), replay_share=replay, max_change=change
    )
    supply = {name: Supply(samples=count, tokens=count) for name, count in zip("abc", tokens, strict=True)}
    if not is_feasible(config, inputs(budget, supply)):
        with pytest.raises(UserError) as raised:
            check(config, inputs(budget, supply))
        told = str(raised.value)
        remedies = re.findall(r"(?:mixture\.)?(\w+) at (?:least|most) ([\d.,e+-]+)", told.partition("do:")[2])
        assert remedies or "conflict besides" in told
        for name, value in remedies:
            number = float(value.strip(",").replace(",", ""))
            if name == "budget_tokens":
                assert is_feasible(config, inputs(number, supply))
            else:
                assert is_feasible(config.model_copy(update={name: number}), inputs(budget, supply)), (name, value)
    else:
        weights = optimum(problem_of(config, inputs(budget, supply), dict.fromkeys(PRIOR, 0.0))).weights
        assert weights.sum() == pytest.approx(1, abs=1e-8)
        assert weights[1] >= replay - 1e-8


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"floors": {"x": 0.1}}, "floors names x; the domains are a, b, c"),
        (
            {"floors": {"a": 0.6, "b": 0.6}},
            r"floors.a 0.6, mixture.floors.b 0.6 together; .*floors.a at most 0.38, or mixture.floors.b at most 0.38$",
        ),
        (
            {"floors": {"a": 0.98}, "min_share_of_prior": 0.5},
            "min_share_of_prior 0.5, mixture.floors.a 0.98 together; .*min_share_of_prior at most 0.04, or .* 0.75",
        ),
        ({"floors": {"a": 0.6}, "max_weight": 0.5}, "max_weight at least 0.6, or mixture.floors.a at most 0.5"),
        ({"floors": {"a": 0.6}, "ceilings": {"a": 0.3}}, "ceilings.a at least 0.6, or mixture.floors.a at most 0.3"),
        ({"max_weight": 0.3}, "max_weight 0.3 at all; .*: mixture.max_weight at least 0.33[34]"),
        (
            {"floors": {"b": 0.5}, "max_epochs": 1},
            r"of 20,000 wanted: a 8,000, .*least 1.25, or budget_tokens at most 16,000, or .*b at most 0.4$",
        ),
        ({"replay_share": 0.3}, "needs mixture.replay_domains"),
        ({"replay_share": 0.3, "replay_domains": ("web",)}, "replay_domains names web"),
        (
            {"replay_share": 0.7, "replay_domains": ("b", "c"), "ceilings": {"b": 0.3}, "max_change": 1.8},
            "replay_share at most 0.66, or mixture.max_change at least 2, or mixture.ceilings.b at least 0.34",
        ),
    ],
)
def test_infeasible(config, message):
    with pytest.raises(UserError, match=message):
        check(MixtureConfig(**config), inputs(20_000))


def test_a_retention_target_that_no_mixture_within_the_bounds_keeps():
    kept = inputs(retained={"a": 1.0, "b": 0.0, "c": 0.0})
    check(MixtureConfig(ceilings={"a": 0.4}, max_regression=0.1), kept)
    with pytest.raises(UserError, match=r"max_regression 0, mixture.ceilings.a 0.4.* 0.1,.* 0.5$"):
        check(MixtureConfig(ceilings={"a": 0.4}), kept)


def test_domains_must_be_those_of_the_run():
    with pytest.raises(UserError, match=r"'a', 'b', 'c'.*\['a'\]"):
        check(MixtureConfig(), inputs(supply={"a": SUPPLY["a"]}))
    with pytest.raises(UserError, match=r"\ba\b"):
        check(MixtureConfig(), inputs(supply={**SUPPLY, "a": Supply(samples=0, tokens=0)}))


@pytest.mark.parametrize(
    ("prior", "message"),
    [
        ({"a": 1, "b": 1, "web": 1}, "names web and lacks c; the domains are a, b, c"),
        ({"a": 1, "b": 1}, "lacks c"),
        ({"a": 1, "b": -1, "c": 1}, "positive numbers, got {'b': -1.0}"),
    ],
)
def test_a_prior_that_is_not_the_domains(prior, message):
    with pytest.raises(UserError, match=message):
        chosen(config=MixtureConfig(prior=prior))


def test_a_given_prior_is_what_equal_scores_keep():
    mixture = chosen(scores((0, 0, 0)), config=MixtureConfig(prior={"a": 1, "b": 1, "c": 2}))
    assert [part.weight for part in mixture.domains.values()] == pytest.approx([0.25, 0.25, 0.5])


def test_decide():
    config = PLAIN.model_copy(update={"max_epochs": 1.5})
    mixture = chosen(budget=16_000, config=config, previous={"a": 5, "b": 3, "c": 2}, decay_epochs=math.inf)
    a, b, c = (mixture.domains[name] for name in "abc")
    assert (a.binding, b.binding, c.binding) == ("max_epochs", None, None)
    assert a.weight == 0.75
    assert a.epochs == 1.5
    assert b.weight / c.weight == pytest.approx(0.3 / (0.2 * 2.718281828 ** (-0.5 / 0.5)))
    assert a.unconstrained_weight > a.weight
    assert mixture.stored_tokens == mixture.budget_tokens == 16_000
    assert mixture.samples == sum(domain.samples for domain in mixture.domains.values()) == 2_000
    assert sum(domain.delivered_weight for domain in mixture.domains.values()) == pytest.approx(1)
    assert c.delivered_weight == c.stored_tokens / 16_000
    assert c.weight < c.prior
    assert mixture.kl_to_prior > 0
    assert 1 < mixture.effective_domains < 3


def test_equal_scores_keep_the_prior():
    mixture = chosen(scores((0, 0, 0)))
    assert {name: domain.samples for name, domain in mixture.domains.items()} == {"a": 500, "b": 300, "c": 200}
    assert mixture.kl_to_prior == pytest.approx(0, abs=1e-12)


def test_sources_are_never_mixed():
    both = pl.concat([scores((1, 0, -1), "early"), scores()])
    late, alone = (chosen(table, 800) for table in (both, scores()))
    assert late.domains == alone.domains
    assert set(late.by_source) == {"early", "late"}
    assert late.by_source["late"] == alone.by_source["late"]
    assert late.by_source["early"].weights["a"] > late.by_source["late"].weights["a"]
    assert chosen(both, 800, source="early").domains["a"].weight == late.by_source["early"].weights["a"]
    with pytest.raises(UserError, match=r"middle .*early, late.*values\.sources"):
        chosen(both, 800, source="middle")


def test_several_targets_are_weighted_and_what_is_retained_does_not_lose():
    """Target u wants the opposite of t; the retention target wants what t does not."""
    table = pl.concat([scores(), scores((-0.5, 0.0, 0.5), target="u"), scores((-0.4, 0.0, 0.4), target="general")])
    even = chosen(table, objectives=Objectives(targets={"t": 1, "u": 1}))
    assert [part.weight for part in even.domains.values()] == pytest.approx([0.5, 0.3, 0.2])
    more = chosen(table, objectives=Objectives(targets={"t": 3, "u": 1}))
    assert more.domains["a"].shrunk == pytest.approx(0.25)
    assert more.targets == {"t": 3, "u": 1}
    both = Objectives(targets={"t": 1}, retain="general")
    free, kept = chosen(table), chosen(table, objectives=both)
    before = -0.4 * 0.5 + 0.4 * 0.2
    assert free.domains["a"].weight > 0.5
    assert kept.group_limits["retain"].least == pytest.approx(before)
    assert kept.group_limits["retain"].reached == pytest.approx(before, abs=1e-8)
    assert kept.group_limits["retain"].price > 0
    assert kept.gap < 1e-8
    assert {point.retained_score >= before - 1e-8 for point in kept.sweep} == {True}
    loose = chosen(table, objectives=both, config=MixtureConfig(max_regression=9))
    assert loose.group_limits["retain"].price == 0
    assert kept.domains["a"].weight < loose.domains["a"].weight < free.domains["a"].weight
    assert loose.domains["a"].shrunk == pytest.approx((0.5 - RETAIN_WEIGHT * 0.4) / (1 + RETAIN_WEIGHT))
    expected = (free.domains["c"].score + RETAIN_WEIGHT * 0.8) / (1 + RETAIN_WEIGHT)
    assert loose.domains["c"].score == pytest.approx(expected)


def test_the_tilted_prior_is_the_mixture_where_nothing_binds():
    """What measuring goes by before the mixture can be solved."""
    table = scores((0.3, 0.2, -0.1))
    config = MixtureConfig(min_share_of_prior=0.0)
    wanted = {name: part.weight for name, part in chosen(table, config=config, decay_epochs=math.inf).domains.items()}
    assert tilted_prior(table, {"a": 5, "b": 3, "c": 2}, config, ONE) == pytest.approx(wanted)


def test_general_domains_keep_their_share_together():
    config = MixtureConfig(prior_strength=0.2, replay_domains=("b", "c"), replay_share=0.4)
    mixture = chosen(scores((1.0, 0.2, 0.1)), config=config)
    assert mixture.group_limits["replay_share"].reached == pytest.approx(0.4)
    assert mixture.domains["b"].weight > mixture.domains["c"].weight
    assert mixture.domains["a"].binding is None


def test_the_sweep_goes_from_concentrated_to_the_prior():
    mixture = chosen()
    divergences = [point.kl_to_prior for point in mixture.sweep]
    assert divergences == sorted(divergences, reverse=True)
    assert [point.expected_score for point in mixture.sweep] == sorted(
        (point.expected_score for point in mixture.sweep), reverse=True
    )
    same = next(point for point in mixture.sweep if point.prior_strength == mixture.prior_strength)
    assert same.weights == {name: part.weight for name, part in mixture.domains.items()}


@settings(max_examples=25)
@given(
    st.lists(st.floats(-3, 3), min_size=3, max_size=3),
    st.lists(st.integers(1, 400), min_size=3, max_size=3),
    st.integers(8, 4000),
    st.sampled_from([0.4, 0.55, 1.0]),
    st.sampled_from([None, 1.7]),
)
def test_caps_hold_exactly_after_rounding_and_floors_to_a_sample(shrunk, counts, samples, max_weight, change):
    supply = {name: Supply(samples=n, tokens=8 * n, seen_tokens=4 * n) for name, n in zip("abc", counts, strict=True)}
    config = MixtureConfig(max_weight=max_weight, max_change=change)
    budget = 8 * samples
    try:
        mixture = chosen(scores(shrunk), budget, config, supply=supply)
    except UserError:
        return
    for name, part in mixture.domains.items():
        assert part.stored_tokens <= max_weight * budget + 1e-6
        assert part.epochs_in_all <= config.max_epochs + 1e-9
        floor = min(0.1 * PRIOR[name], supply[name].available_tokens(config.max_epochs) / budget)
        assert part.stored_tokens > floor * budget - 8
        if change is not None:
            assert part.stored_tokens <= change * PRIOR[name] * budget + 1e-6
    assert mixture.stored_tokens == sum(part.stored_tokens for part in mixture.domains.values()) <= budget
    room = sum(min(max_weight, (change or 99) * PRIOR[name]) * samples // 1 for name in PRIOR)
    if room >= samples and all(part.binding != "max_epochs" for part in mixture.domains.values()):
        assert mixture.samples == samples


@given(st.permutations("abc"))
@settings(max_examples=6)
def test_the_order_of_rows_and_domains_does_not_matter(order):
    table = scores((0.3, 0.2, -0.5))
    moved = pl.concat([table.filter(domain=name) for name in order])
    previous = {name: PRIOR[name] for name in order}
    assert chosen(moved, 9_000, PLAIN, previous=previous) == chosen(table, 9_000, PLAIN)


def test_with_tokens_sets_what_follows_from_them():
    mixture = chosen(budget=16_000)
    changed = with_tokens(mixture, {"a": 100, "b": 60, "c": 40})
    assert changed.stored_tokens == 200
    assert [domain.delivered_weight for domain in changed.domains.values()] == [0.5, 0.3, 0.2]
    assert changed.kl_to_prior == pytest.approx(0)
    assert changed.domains["a"].weight == mixture.domains["a"].weight


def test_round_trip(tmp_path):
    mixture = chosen(budget=16_000)
    path = tmp_path / "mixture.yaml"
    write_mixture(path, mixture)
    assert read_mixture(path) == mixture
    plain = yaml.safe_load(path.read_text())
    assert plain["sign"] == SIGN
    assert plain["domains"]["a"]["score_low"] is None
    assert plain["domains"]["a"]["stored_tokens"] == mixture.domains["a"].stored_tokens


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "mixture.yaml"),
        ("- 1", "mixture.yaml"),
        ("a: [", r"mixture.yaml.* 1"),
        ("target: t", "targets"),
        ("extra: t", "mixture.yaml"),
    ],
)
def test_bad_file(tmp_path, text, message):
    path = tmp_path / "mixture.yaml"
    if text is not None:
        path.write_text(text)
    with pytest.raises(UserError, match=message):
        read_mixture(path)
