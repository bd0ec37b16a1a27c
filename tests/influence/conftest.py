"""The tiny run of `folder`, opened once for each module of tests."""

import pytest

from curate.training.replay import Replay
from curate.training.run import Run


@pytest.fixture(scope="module")
def run(folder):
    return Run(folder / "run")


@pytest.fixture(scope="module")
def replay(run):
    return Replay(run)
