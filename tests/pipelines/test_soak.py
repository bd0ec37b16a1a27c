"""The soak at a size of seconds: killed commands end as undisturbed ones do, and what does not is found."""

import subprocess
import sys
from pathlib import Path

import pytest

from pipelines.soak import files_of

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.slow
def test_a_short_soak_ends_without_a_difference(tmp_path):
    command = [
        sys.executable, "-m", "pipelines.soak", "--minutes", "60", "--kills", "3", "--seed", "1", "--jobs",
        "[prepare,train]", "--out", str(tmp_path / "soak"),
    ]  # fmt: skip
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout + result.stderr
    assert result.stdout.count("\nkill ") == 3
    assert result.stdout.endswith("seed 1: 3 kills, 0 differences\n")


def test_what_differs_and_what_was_left_lying_is_found(tmp_path):
    for place in ("one", "other"):
        (tmp_path / place / "run").mkdir(parents=True)
        (tmp_path / place / "run" / "run.json").write_text(f'"{tmp_path / place}/data"')  # its own place is no change
        (tmp_path / place / "run" / "timings.json").write_text(place)
        (tmp_path / place / "run" / "steps").write_text("same")
    assert files_of(tmp_path / "one") == files_of(tmp_path / "other")
    (tmp_path / "other" / "run" / "steps").write_text("another")
    (tmp_path / "other" / "run" / ".mds.part").mkdir()
    one, other = files_of(tmp_path / "one"), files_of(tmp_path / "other")
    assert one["run/steps"] != other["run/steps"]
    assert other.keys() - one.keys() == {"run/.mds.part"}
