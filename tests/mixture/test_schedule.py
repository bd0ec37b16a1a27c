"""The mixture of a stage over its phases: exact counts, caps over the whole stage, nothing but the weights counts."""

import re
from fractions import Fraction

import polars as pl
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from curate.core.errors import UserError
from curate.mixture.constraints import Inputs, MixtureConfig, Supply
from curate.mixture.decide import Objectives, decide
from curate.mixture.record import read_mixture, write_mixture
from curate.mixture.schedule import Part, base_weights, decide_stage, lay_out, parts

LENGTH = 16


def scores_of(shrunk):
    names = sorted(shrunk)
    columns = {name: [shrunk[domain] for domain in names] for name in ("score", "score_low", "score_high", "shrunk")}
    return pl.DataFrame({"source": "late", "target": "t", "domain": names, "samples": 9, **columns})


ONE = Objectives(targets={"t": 1.0})


def supply_of(samples, consumed=0):
    return {
        name: Supply(samples=count, tokens=count * LENGTH, seen_tokens=consumed * LENGTH)
        for name, count in samples.items()
    }


@st.composite
def schedules(draw):
    """Settings of the mixture that say where in the stage its weights hold."""
    shares = {name: draw(st.floats(0.01, 0.3)) for name in ("early_share", "late_share")}
    return {"schedule": draw(st.sampled_from(["constant", "early-and-late", "anneal"])), **shares}


@st.composite
def stages(draw):
    names = draw(st.lists(st.sampled_from("abcdefg"), min_size=2, max_size=5, unique=True))
    samples = {name: draw(st.integers(20, 3000)) for name in names}
    shrunk = {name: draw(st.floats(-3, 3)) for name in names}
    epochs = draw(st.floats(1.0, 4.0))
    consumed = {name: draw(st.integers(0, samples[name])) for name in names}
    supply = {
        name: Supply(samples=n, tokens=n * LENGTH, seen_tokens=consumed[name] * LENGTH) for name, n in samples.items()
    }
    left = sum(epochs * samples[name] - consumed[name] for name in names)
    budget = int(draw(st.floats(0.05, 0.99)) * left)
    return shrunk, {name: float(n) for name, n in samples.items()}, supply, max(budget, 60), epochs


@given(stages(), schedules())
def test_phases_are_exact_and_the_caps_hold_for_the_whole_stage(stage, schedule):
    shrunk, prior, supply, samples, epochs = stage
    left = sum(one.available_tokens(epochs) for one in supply.values())
    if samples * LENGTH > left:
        return
    config = MixtureConfig(max_epochs=epochs, **schedule)
    if samples * sum(part.share * part.blend for part in parts(config)) < 1:
        with pytest.raises(UserError, match=config.schedule):
            decide_stage(scores_of(shrunk), prior, supply, samples * LENGTH, config, ONE, "late")
        return
    mixture = decide_stage(scores_of(shrunk), prior, supply, samples * LENGTH, config, ONE, "late")
    start = 0
    for phase in mixture.phases:
        assert phase.start_sample == start
        assert sum(phase.domains.values()) == phase.samples > 0
        start += phase.samples
    assert start == mixture.samples <= samples
    assert mixture.samples >= samples - len(supply)  # whole samples under caps
    for name, domain in mixture.domains.items():
        assert domain.samples == sum(phase.domains[name] for phase in mixture.phases)
        assert domain.stored_tokens == domain.samples * LENGTH
        assert domain.samples * LENGTH <= supply[name].available_tokens(epochs) + 1e-3
        assert domain.epochs_in_all <= epochs + 1e-6
    assert mixture.budget_tokens == samples * LENGTH


@given(st.permutations("abcd"), schedules())
def test_the_order_of_domains_changes_nothing(order, schedule):
    samples = {"a": 500, "b": 300, "c": 77, "d": 1200}
    shrunk = {"a": 0.4, "b": -0.2, "c": 1.5, "d": -1.0}

    def stage(names):
        return decide_stage(
            scores_of(shrunk), {name: samples[name] for name in names},
            {name: supply_of(samples)[name] for name in names}, 1001 * LENGTH, MixtureConfig(**schedule), ONE, "late",
        )  # fmt: skip

    assert stage(order) == stage("abcd")


@given(stages(), schedules())
def test_up_to_any_phase_each_domain_is_within_one_sample_of_its_share(stage, schedule):
    _, prior, supply, samples, _ = stage
    whole = sum(prior.values())
    phases = parts(MixtureConfig(**schedule))
    weights = [
        {
            name: float(Fraction(prior[name]) / Fraction(whole)) if i % 2 else 1 / len(prior)
            for name in sorted(prior)
        }
        for i, _ in enumerate(phases)
    ]  # fmt: skip
    laid = lay_out(phases, weights, samples * LENGTH, supply, dict.fromkeys(supply, 10**9))
    assert sum(phase.samples for phase in laid) == samples
    for domain in prior:
        due = sum(part.share * each[domain] * samples for part, each in zip(phases, weights, strict=True))
        assert abs(sum(phase.domains[domain] for phase in laid) - due) < 1 + 1e-6


def test_constant_is_the_plain_mixture():
    samples, shrunk = {"a": 500, "b": 300, "c": 77}, {"a": 0.4, "b": -0.2, "c": 1.5}
    arguments = (scores_of(shrunk), samples, supply_of(samples, consumed=40), 801 * LENGTH, MixtureConfig())
    plain, whole = decide(*arguments, ONE, "late"), decide_stage(*arguments, ONE, "late")
    assert whole.model_dump(exclude={"phases"}) == plain.model_dump(exclude={"phases"})
    assert [(phase.start_sample, phase.samples) for phase in whole.phases] == [(0, 801)]


def test_early_and_late_parts_are_curated_and_the_stable_phase_is_not(tmp_path):
    samples, shrunk = {"a": 10_000, "b": 10_000}, {"a": 1.0, "b": -1.0}
    config = MixtureConfig(schedule="early-and-late", early_share=0.1, late_share=0.2)
    given = (scores_of(shrunk), samples, supply_of(samples))
    mixture = decide_stage(*given, 1000 * LENGTH, config, ONE, "late")
    curated = decide(*given, 300 * LENGTH, config, ONE, "late").domains["a"].weight
    assert curated > 0.85
    found = [(phase.start_sample, phase.blend, phase.samples, phase.domains["a"]) for phase in mixture.phases]
    wanted = [(0, 1.0, 100, 100 * curated), (100, 0.0, 700, 350), (800, 1.0, 200, 200 * curated)]
    assert [one[:3] for one in found] == [one[:3] for one in wanted]
    assert [one[3] for one in found] == pytest.approx([one[3] for one in wanted], abs=1)
    assert mixture.domains["a"].weight == pytest.approx(0.3 * curated + 0.35)
    write_mixture(tmp_path / "mixture.yaml", mixture)
    assert read_mixture(tmp_path / "mixture.yaml") == mixture


def test_the_parts_of_each_schedule_fill_the_stage():
    early = MixtureConfig(schedule="early-and-late", early_share=0.1, late_share=0.2)
    assert [part.blend for part in parts(early)] == [1, 0, 1]
    assert [part.share for part in parts(early)] == pytest.approx([0.1, 0.7, 0.2])
    assert parts(MixtureConfig(schedule="anneal")) == [Part(0.8, 0.0), Part(0.2, 1.0)]
    assert parts(MixtureConfig()) == [Part(1.0, 1.0)]


def test_what_the_stable_phase_uses_counts_against_the_cap_of_the_curated_parts():
    """b is small and valuable: the stable phase uses much of its two epochs, the curated parts get the rest."""
    samples, shrunk = {"a": 10_000, "b": 100}, {"a": -1.0, "b": 5.0}
    config = MixtureConfig(max_epochs=2.0, schedule="anneal", late_share=0.5)
    mixture = decide_stage(scores_of(shrunk), samples, supply_of(samples), 5000 * LENGTH, config, ONE, "late")
    shares = {name: count / 10_100 for name, count in samples.items()}
    inputs = Inputs(prior=shares, previous=shares, supply=supply_of(samples), budget_tokens=5000 * LENGTH)
    base = base_weights(config, inputs)
    stable, late = mixture.phases
    assert stable.domains["b"] == pytest.approx(2500 * base["b"], abs=1)
    assert stable.domains["b"] + late.domains["b"] == 200
    assert mixture.domains["b"].binding == "max_epochs"


@pytest.mark.slow
@given(
    st.lists(st.integers(50, 3000), min_size=3, max_size=3),
    st.integers(100, 6000),
    st.sampled_from([1.0, 1.5, 4.0]),
    st.sampled_from([0.4, 0.6, 1.0]),
    st.sampled_from([None, 1.2]),
    schedules(),
)
def test_what_would_do_does_for_the_whole_stage(counts, budget, max_epochs, max_weight, change, schedule):
    """Each remedy that an error names works by itself."""
    samples = dict(zip("abc", counts, strict=True))
    table = scores_of({"a": 2.0, "b": 0.0, "c": -1.0})
    retained = scores_of({"a": -1.0, "b": 0.5, "c": 0.2}).with_columns(target=pl.lit("g"))
    prior, objectives = {"a": 1.0, "b": 2.0, "c": 1.0}, Objectives(targets={"t": 1.0}, retain="g")

    def solved(budget_tokens=budget * LENGTH, **settings):
        given = {"max_epochs": max_epochs, "max_weight": max_weight, "max_change": change, **schedule, **settings}
        config = MixtureConfig(**given)
        scores = pl.concat([table, retained])
        decide_stage(scores, prior, supply_of(samples), budget_tokens, config, objectives, "late")

    try:
        solved()
    except UserError as error:
        told = str(error)
        remedies = re.findall(r"(?:mixture\.)?(\w+) at (?:least|most) ([\d.,e+-]+)", told.partition("do:")[2])
        assert remedies or "conflict besides" in told
        for name, value in remedies:
            number = float(value.strip(",").replace(",", ""))
            solved(**{name: int(number) if name == "budget_tokens" else number})


def test_parts_that_do_not_fit_are_refused():
    with pytest.raises(ValidationError, match=r"early_share 0\.5.*late_share 0\.6"):
        MixtureConfig(schedule="early-and-late", early_share=0.5, late_share=0.6)
