"""The capture bench, at a size of seconds: every case, the form of its rows, what it counts."""

import json

import pytest

from curate.core.errors import UserError
from pipelines.capture_bench.__main__ import bench, print_table
from pipelines.capture_bench.config import CASES, CaptureBenchConfig


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    config = CaptureBenchConfig(
        folder=tmp_path_factory.mktemp("bench") / "bench", models=("tiny",), context=32, batch_size=4, width=4,
        recursion_rows=64,
    )  # fmt: skip
    return bench(config)


@pytest.mark.slow
def test_every_case_has_a_row_of_the_agreed_form(found, capsys):
    rows = {row["case"]: row for row in json.loads(json.dumps(found))["rows"]}
    assert tuple(rows) == CASES
    assert rows["plain-step"]["ratio_to_plain_step"] == 1
    assert rows["forward-backward"]["ratio_to_forward_backward"] == 1
    for row in rows.values():
        assert {
            "model", "context", "case", "width", "seconds", "ratio_to_plain_step", "ratio_to_forward_backward",
            "ratio_upper_95", "added_multiplications_share", "peak_bytes",
        } <= set(row)  # fmt: skip
        assert row["seconds"] > 0
        assert row["peak_bytes"] > 100_000
    print_table(found["rows"])
    table = capsys.readouterr().out
    assert all(case in table for case in CASES)


def test_multiplications_are_those_that_the_docstrings_say(found):
    """B T (I k + O k + k k) for each of the four layers of both blocks, twice that for Adam; frozen ones save more."""
    rows = {row["case"]: row for row in found["rows"]}
    tokens, width, k = 4 * 32, 32, 4
    layers = [(width, 3 * width), (width, width), (width, 4 * width), (4 * width, width)]
    added = 2 * sum(tokens * (i * k + o * k + k * k) for i, o in layers)
    plain = 3 * 2 * sum(tokens * i * o for i, o in layers) + 3 * tokens * width * 256
    assert rows["recorder"]["added_multiplications_share"] == 0
    assert rows["capture"]["added_multiplications_share"] == pytest.approx(added / plain)
    assert rows["replay-capture"]["added_multiplications_share"] == pytest.approx(added / plain)
    assert rows["capture-adam"]["added_multiplications_share"] == pytest.approx(2 * added / plain)
    assert rows["capture-frozen"]["added_multiplications_share"] < added / plain - 0.3
    assert 1 <= rows["capture"]["added_over_floor"] < 2
    assert rows["capture-adam"]["added_over_floor"] == pytest.approx(rows["capture"]["added_over_floor"])


def test_an_unknown_model_is_refused(tmp_path):
    with pytest.raises(UserError, match="'7B' is not one of tiny, 3M, 25M"):
        bench(CaptureBenchConfig(folder=tmp_path / "bench", models=("7B",)))
