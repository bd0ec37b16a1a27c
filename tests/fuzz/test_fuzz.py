"""Readers of what users and programs write, on inputs that are nearly right; `scripts/fuzz` tries more of them."""

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.fuzz.outcome import sentences
from tests.fuzz.targets import all_targets

NAMES = [
    "documents",
    "target",
    "parquet",
    "saved rows",
    "saved state",
    "saved info",
    "plan",
    "description",
    "settings",
    "streams",
    "schedule",
    "mixture",
    "run",
    "steps",
    "catalogue",
    "log",
]
EXAMPLES = 80


@pytest.fixture(scope="module")
def targets(tmp_path_factory):
    folder = tmp_path_factory.mktemp("fuzz")
    (folder / "inputs").mkdir()
    return {target.name: (target, folder / "inputs") for target in all_targets(folder)}


def test_every_target_is_tried(targets):
    assert list(targets) == NAMES


@pytest.mark.parametrize("name", NAMES)
def test_what_once_went_wrong(targets, name):
    target, folder = targets[name]
    for data, wanted in target.corpus:
        assert target.outcome(data, folder) == wanted, data[:300]


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
@settings(max_examples=EXAMPLES, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_an_input_is_read_for_what_it_says_or_refused_in_a_sentence(targets, name, data):
    target, folder = targets[name]
    target.outcome(data.draw(target.inputs), folder)


def test_sentences_are_counted():
    assert sentences("a.yaml line 3: no key 'a. B. C' (it has A. B.); write one") == 1
    assert sentences("The file is cut off. Restore it.") == 2
    assert sentences("It is cut off. Restore it. Then go on.") == 3
