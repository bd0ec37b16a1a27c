"""Influence checkpoints of `dvemb` and `dvemb-adam`: segments by themselves, then chained, against one pass."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from curate.embeddings import dvemb, dvemb_adam, dvemb_adam_estimator, dvemb_estimator
from curate.embeddings.dvemb import carry, chain, joined
from curate.embeddings.estimators import AdjointConfig, DvembAdamConfig, DvembConfig, make_estimator
from curate.embeddings.store import embed_window, embedding_folder, plan_job
from curate.training.replay import Replay
from curate.training.run import Run
from curate.training.target import load_target
from tests.tiny import Training

TOLERANCE = 1e-5  # what the docstring of `segment_steps` says
problems = st.fixed_dictionaries(
    {
        "seed": st.integers(0, 10_000),
        "sizes": st.lists(st.integers(1, 4), min_size=1, max_size=8),
        "dimension": st.integers(1, 7),
        "adam": st.booleans(),
    }
)


class Problem:
    """Gradients of length 1, so that no step amplifies; for `dvemb-adam` a diagonal D and a decay of each step."""

    def __init__(self, seed, sizes, dimension, adam):
        random = np.random.default_rng(seed)
        count = len(sizes)
        self.adam, self.dimension, self.steps = adam, dimension, np.repeat(np.arange(3, 3 + count), sizes)
        self.gradients = random.normal(size=(len(self.steps), dimension))
        self.gradients /= np.linalg.norm(self.gradients, axis=1, keepdims=True)
        self.preconditioned = self.gradients * np.repeat(random.uniform(0.3, 2, (count, dimension)), sizes, axis=0)
        self.scales = random.uniform(0.01, 0.15, size=len(self.steps))
        self.decays = np.repeat(random.uniform(0, 0.4, count), sizes)
        self.own = self.scales * np.linalg.norm(self.preconditioned if adam else self.gradients, axis=1)

    def rows(self, first, stop):
        """Rows of some of the steps, counted from 0."""
        wanted = np.flatnonzero((self.steps >= first + 3) & (self.steps < stop + 3))
        return slice(wanted[0], wanted[-1] + 1)

    def exact(self, rows):
        """A segment in float64, pure: embeddings in the order of steps, and its operator."""
        arrays = [self.gradients, *([self.preconditioned] if self.adam else []), self.scales]
        arrays += [*([self.decays] if self.adam else []), self.steps]
        latest_first = [torch.from_numpy(array[rows][::-1].copy()) for array in arrays]
        block = dvemb_adam.recursion_block if self.adam else dvemb.recursion_block
        zero = torch.zeros(self.dimension, self.dimension, dtype=torch.float64)
        embeddings, operator = block(*latest_first, zero)
        return embeddings.flip(0), operator

    def streamed(self, rows, out, options):
        """A segment in float32, into its rows of `out`; returns its operators."""
        gradients = [self.gradients, *([self.preconditioned] if self.adam else [])]
        factors = [self.scales[:, None], *([self.decays[:, None]] if self.adam else [])]
        recursion = dvemb_adam.recursion if self.adam else dvemb.recursion
        stored = [array[rows].astype(np.float32) for array in gradients]
        return recursion(*stored, *(array[rows] for array in factors), self.steps[rows], out[rows], **options)


def segments_of(data, count):
    """Steps cut anywhere: (first, stop) of each segment."""
    borders = sorted(data.draw(st.sets(st.integers(1, count - 1)))) if count > 1 else []
    return list(zip([0, *borders], [*borders, count], strict=True))


@given(problem=problems, data=st.data())
def test_chained_segments_are_one_pass_with_respect_to_every_checkpoint(problem, data):
    problem, count = Problem(**problem), len(problem["sizes"])
    cuts = segments_of(data, count)
    segments = [problem.exact(problem.rows(*cut)) for cut in cuts]
    for number, (_, checkpoint) in enumerate(cuts, start=1):
        found = chain(segments[:number])
        torch.testing.assert_close(found, problem.exact(problem.rows(0, checkpoint)), rtol=1e-10, atol=1e-10)


@given(problem=problems, data=st.data())
def test_joining_is_associative(problem, data):
    problem, count = Problem(**problem), len(problem["sizes"])
    segments = [problem.exact(problem.rows(*cut)) for cut in segments_of(data, count)]
    middle = data.draw(st.integers(1, len(segments)))
    parts = [chain(part) for part in (segments[:middle], segments[middle:]) if part]
    torch.testing.assert_close(chain(parts), chain(segments), rtol=1e-10, atol=1e-10)


@given(problem=problems, data=st.data(), rows_per_block=st.integers(1, 12))
def test_streamed_segments_are_one_pass_within_float32(problem, data, rows_per_block):
    problem, count = Problem(**problem), len(problem["sizes"])
    options = {"blocks": [slice(0, problem.dimension)], "rows_per_block": rows_per_block, "device": "cpu"}
    wanted, found = (np.zeros(problem.gradients.shape, np.float32) for _ in range(2))
    whole = problem.streamed(slice(0, len(wanted)), wanted, options)
    later = None
    for cut in reversed(segments_of(data, count)):
        rows = problem.rows(*cut)
        operators = problem.streamed(rows, found, options)
        if later is not None:
            carry(found[rows], later, **options)
            operators = [joined(one, other) for one, other in zip(operators, later, strict=True)]
        later = operators
    assert (np.linalg.norm(found - wanted, axis=1) <= TOLERANCE * problem.own).all()
    torch.testing.assert_close(later, whole, rtol=1e-4, atol=1e-5)


NAMES = ["dvemb", "dvemb-adam", "dvemb-adam-shortcut"]


@pytest.fixture
def run(folder, tmp_path):
    """A run of its own for tests that write below it."""
    Training(Run(folder / "run").spec.streams).run(tmp_path / "run")
    return Run(tmp_path / "run")


def job_of(run, folder):
    """Four steps of a window and eight behind it."""
    return plan_job(
        Replay(run), "early", "stage_end", load_target(folder / "target.jsonl", run.spec, min_tokens=100), batch_size=4
    )


def make(name, segment_steps=None, operator="block"):
    settings = {"width": 4, "rows_per_block": 10, "segment_steps": segment_steps, "operator": operator}
    adam = DvembAdamConfig(**settings, shortcut=name.endswith("-shortcut"))
    return make_estimator(name.removesuffix("-shortcut"), AdjointConfig(), DvembConfig(**settings), adam)


@pytest.mark.slow
@pytest.mark.parametrize("operator", ["block", "full"])
@pytest.mark.parametrize("name", NAMES)
def test_a_window_in_segments_is_one_pass_within_float32(folder, run, name, operator):
    """Segments that end inside the window and behind it, and one that is longer than both."""
    job = job_of(run, folder)
    wanted = embed_window(job, "early", "stage_end", make(name, None, operator))
    for steps in (3, 5, 100):
        found = embed_window(job, "early", "stage_end", make(name, steps, operator))
        error = np.linalg.norm(found.vectors - wanted.vectors, axis=1)
        assert (error <= TOLERANCE * np.linalg.norm(wanted.vectors, axis=1)).all()
        assert (found.vectors.tobytes() == wanted.vectors.tobytes()) == (steps == 100)


class Killed(BaseException):
    """Stands for kill -9 at a chosen place."""


@pytest.mark.slow
@pytest.mark.parametrize("place", ["recursion", "carry", "_save_progress"])
@pytest.mark.parametrize("name", NAMES)
def test_an_interrupted_recursion_continues_after_the_last_finished_segment(
    folder, run, name, place, tmp_path, monkeypatch
):
    """Four segments of three steps, killed when the named part of the second or third is done but not kept."""
    wanted = embed_window(job_of(run, folder), "early", "stage_end", make(name, 3)).vectors.tobytes()
    Training(run.spec.streams).run(tmp_path / "again")
    again = job_of(Run(tmp_path / "again"), folder)
    module = dvemb_adam_estimator if place == "recursion" and name != "dvemb" else dvemb_estimator
    original, calls = getattr(module, place), []

    def killing(*arguments, **options):
        calls.append(1)
        if place == "_save_progress" and len(calls) == 2:
            raise Killed  # what is kept is written whole or not at all
        done = original(*arguments, **options)
        if len(calls) == 2:
            raise Killed
        return done

    monkeypatch.setattr(module, place, killing)
    with pytest.raises(Killed):
        embed_window(again, "early", "stage_end", make(name, 3))
    monkeypatch.undo()
    module = dvemb_estimator if name == "dvemb" else dvemb_adam_estimator
    walked, recursion = [], module.recursion
    monkeypatch.setattr(module, "recursion", lambda *a, **o: walked.append(1) or recursion(*a, **o))
    embedding = embed_window(again, "early", "stage_end", make(name, 3))
    assert embedding.vectors.tobytes() == wanted
    assert len(walked) == (2 if place == "carry" else 3)
    assert not (embedding.folder / "scratch").exists()


def test_one_pass_keeps_the_settings_that_it_had_before_there_were_segments(folder, run):
    job = job_of(run, folder)
    assert "segment_steps" not in make("dvemb").settings(job)
    folders = {embedding_folder(job, "early", "stage_end", make("dvemb", steps))[0] for steps in (None, 3, 4)}
    assert len(folders) == 3


def test_a_segment_has_at_least_one_step():
    with pytest.raises(ValidationError, match="segment_steps"):
        DvembConfig(segment_steps=0)
