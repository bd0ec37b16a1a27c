"""`adjoint` and `anchors` on whole windows: what must not change a number, and what must be said."""

import itertools
import json
import logging
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.autograd.function import once_differentiable

from curate.core.errors import UserError
from curate.embeddings import adjoint, adjoint_estimator
from curate.embeddings.adjoint_estimator import AdjointConfig, AdjointEstimator
from curate.embeddings.store import embed_window, embedding_folder, plan_job
from curate.training.replay import Replay
from curate.training.run import Run
from curate.training.target import load_target, target_loss
from tests.tiny import Training, record_tiny_run, write_tiny_target

STATE = 16 * 1384  # bytes of one state of the tiny model
_copies = itertools.count()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("adjoint")
    record_tiny_run(folder)
    write_tiny_target(folder / "target.jsonl")
    text = Path(json.__file__).read_bytes()[3000:]
    with (folder / "familiar.jsonl").open("w") as file:
        for i in range(16):
            file.write(json.dumps({"tokens": [byte % 128 for byte in text[i * 30 : (i + 1) * 30]]}) + "\n")
    random = np.random.default_rng(0)
    with (folder / "foreign.jsonl").open("w") as file:
        for _ in range(12):
            file.write(json.dumps({"tokens": random.integers(0, 32, 30).tolist()}) + "\n")
    return folder


@pytest.fixture
def copy(folder, tmp_path):
    """A function that makes the same run again, without embeddings."""

    def make():
        place = tmp_path / f"run{next(_copies)}"
        Training(Run(folder / "run").spec.streams).run(place)
        return Run(place)

    return make


def embedded(
    run, folder, *, window="early", horizon="stage_end", target="target", with_target=True, steps=None, **settings
):
    loaded = load_target(folder / f"{target}.jsonl", run.spec, min_tokens=100) if target else None
    job = plan_job(Replay(run), window, horizon, loaded, batch_size=4, window_steps=steps)
    estimator = AdjointEstimator(AdjointConfig(**{"min_anchor_tokens": 50, **settings}), with_target=with_target)
    return embed_window(job, window, horizon, estimator)


@pytest.fixture(scope="module")
def plain(folder):
    """The early window with respect to the stage's end, in one pass, with anchors beside the target's halves."""
    return embedded(Run(folder / "run"), folder, anchors_per_domain=1, samples_per_anchor=4)


def same_anchors(**settings):
    return {"anchors_per_domain": 1, "samples_per_anchor": 4, **settings}


@pytest.mark.parametrize("limit", [STATE, 5 * STATE, 100 * STATE])
def test_the_memory_limit_changes_no_bit(folder, plain, copy, limit):
    found = embedded(copy(), folder, **same_anchors(memory_bytes=limit))
    assert found.vectors.tobytes() == plain.vectors.tobytes()
    assert found.folder.name == plain.folder.name


class Killed(BaseException):
    """Stands for kill -9 at a chosen place."""


@pytest.mark.parametrize("limit", [2 * STATE, 100 * STATE])
def test_interrupted_at_any_step_it_ends_with_the_same_bytes(folder, plain, copy, monkeypatch, limit):
    """Killed before each of the 12 steps in turn: one step of progress per call."""
    run, original, calls = copy(), adjoint_estimator.adjoint_step, []

    def killing(*arguments):
        calls.append(arguments[2].record.step)
        if len(calls) % 2 == 0:
            raise Killed
        return original(*arguments)

    monkeypatch.setattr(adjoint_estimator, "adjoint_step", killing)
    settings = same_anchors(memory_bytes=limit, save_seconds=0)
    for _ in range(11):
        with pytest.raises(Killed):
            embedded(run, folder, **settings)
    found = embedded(run, folder, **settings)
    assert calls == [step for step in range(11, -1, -1) for _ in range(2)][1:]
    assert found.vectors.tobytes() == plain.vectors.tobytes()
    assert (found.folder / "manifest.json").read_bytes() == (plain.folder / "manifest.json").read_bytes()
    assert not (found.folder / "scratch").exists()


@pytest.mark.parametrize("own_step", ["exact", "linear"])
def test_windows_chained_by_influence_checkpoints_have_the_values_of_one_pass(
    folder, plain, copy, monkeypatch, caplog, own_step
):
    """Late first, whatever its own step; then early continues at the late window's start."""
    run, original, steps = copy(), adjoint_estimator.adjoint_step, []
    embedded(run, folder, window="late", **same_anchors(own_step=own_step))
    monkeypatch.setattr(adjoint_estimator, "adjoint_step", lambda *a: steps.append(a[2].record.step) or original(*a))
    with caplog.at_level(logging.INFO):
        found = embedded(run, folder, **same_anchors())
    assert steps == list(range(7, -1, -1))
    assert "continuing from the influence checkpoint at step 8 of late-stage_end-adjoint" in caplog.text
    assert found.vectors.tobytes() == plain.vectors.tobytes()


@pytest.mark.parametrize(
    ("late", "early"),
    [
        ({"anchors_per_domain": 2}, {}),
        ({"hessian": "difference"}, {}),
        ({"disk_bytes": 100}, {}),
    ],
)
def test_influence_of_other_settings_is_not_continued(folder, copy, monkeypatch, late, early):
    run, original, steps = copy(), adjoint_estimator.adjoint_step, []
    embedded(run, folder, window="late", **same_anchors(**late))
    monkeypatch.setattr(adjoint_estimator, "adjoint_step", lambda *a: steps.append(a[2].record.step) or original(*a))
    embedded(run, folder, **same_anchors(**early))
    assert steps == list(range(11, -1, -1))


def test_a_damaged_influence_checkpoint_is_named(folder, copy):
    run = copy()
    late = embedded(run, folder, window="late")
    path = late.folder / "influence.safetensors"
    path.write_bytes(path.read_bytes()[:-5])
    with pytest.raises(UserError, match=r"influence.safetensors is corrupted.* or delete"):
        embedded(run, folder)


def loss_without(run, target, row, horizon):
    """The target's loss at a horizon after training the early window without one (sample, step)."""
    replay, position = Replay(run), 0
    optimizers = replay.restore(0)
    for record in adjoint_estimator.records(run, 0, horizon):
        batches = replay.batches(record)
        replay.backward(batches, optimizers)
        for batch in batches:
            if position <= row < position + len(batch):
                weight = torch.zeros_like(batch.weights)
                weight[row - position] = batch.weights[row - position]
                (-(replay.task.sample_losses(batch) * weight).sum()).backward()
            position += len(batch)
        replay.update(record, optimizers)
    return target_loss(replay.task, target, 16)


def test_values_at_an_intermediate_horizon_are_about_the_model_there(folder):
    run = Run(folder / "run")
    found = embedded(run, folder, horizon=6)
    assert found.folder.name.startswith("early-step_6-adjoint-")
    assert set(found.rows["horizon"]) == {"step_6"}
    target = load_target(folder / "target.jsonl", run.spec, min_tokens=100)
    values = found.vectors @ found.targets.T @ np.array(target.half_weights)
    replay = Replay(run)
    replay.model_at(6)
    base = target_loss(replay.task, target, 16)
    removed = np.array([loss_without(run, target, row, 6) - base for row in range(24)])
    assert np.corrcoef(values, removed)[0, 1] > 0.97


@pytest.mark.parametrize(("horizon", "name"), [(4, "window_end"), (12, "stage_end")])
def test_a_horizon_in_steps_has_the_values_of_the_named_one(folder, horizon, name):
    run = Run(folder / "run")
    steps, named = embedded(run, folder, horizon=horizon), embedded(run, folder, horizon=name)
    assert steps.folder != named.folder
    assert steps.vectors.tobytes() == named.vectors.tobytes()


@pytest.mark.parametrize(
    ("window", "horizon", "ends"), [("early", 3, 4), ("late", 11, 12), ("early", 13, 4), ("early", -1, 4)]
)
def test_a_horizon_before_the_windows_end_or_behind_the_stage_is_refused(folder, window, horizon, ends):
    message = rf"horizon {horizon} is not between the end of the {window} window \({ends}\) and .* the stage \(12\)"
    with pytest.raises(UserError, match=message):
        embedded(Run(folder / "run"), folder, window=window, horizon=horizon)


class TestAnchors:
    def test_a_target_that_is_an_anchor_has_its_exact_values(self, folder, copy):
        run = copy()
        exact = embedded(run, folder, horizon="window_end")
        files = (folder / "target.jsonl", folder / "familiar.jsonl")
        found = embedded(run, folder, horizon="window_end", with_target=False, anchor_files=files, anchors_per_file=2)
        assert found.residual == 0
        np.testing.assert_array_equal(found.targets, np.eye(2, 4))
        scale = np.abs(exact.vectors).max(0)
        np.testing.assert_allclose(found.vectors[:, :2] / scale, exact.vectors / scale, atol=1e-5)

    def test_a_target_made_of_anchors_is_nearly_exact_and_a_foreign_one_is_not(self, folder, copy):
        """One job serves all targets; one of whose documents are spread over the anchors is in their span nearly."""
        run = copy()
        settings = {
            "horizon": "window_end", "with_target": False, "anchor_files": (folder / "target.jsonl",),
            "anchors_per_file": 3, "anchors_per_domain": 2, "samples_per_anchor": 8,
        }  # fmt: skip
        made = embedded(run, folder, target=None, **settings)
        assert (made.targets, made.residual) == (None, None)
        stamp = (made.folder / "embeddings.npy").stat().st_mtime_ns
        own, foreign = (embedded(run, folder, target=name, **settings) for name in ("target", "foreign"))
        assert own.folder == foreign.folder == made.folder
        assert (made.folder / "embeddings.npy").stat().st_mtime_ns == stamp
        assert made.vectors.shape == (24, 3 + 4 + 1)
        solver = json.loads((made.folder / "manifest.json").read_text())["solver"]
        assert solver["metric"] in solver["held_out_spearman"]
        assert 0 < own.residual < 0.6 < foreign.residual <= 1
        exact = embedded(run, folder, horizon="window_end")
        values = [(found.vectors @ found.targets.T).mean(1) for found in (own, foreign)]
        correlation = [np.corrcoef(each, exact.vectors.mean(1))[0, 1] for each in values]
        assert correlation[0] > 0.95 > correlation[1]

    def test_none_and_too_few_are_refused(self, folder):
        run = Run(folder / "run")
        with pytest.raises(UserError, match=r"needs at least 2 anchors, it has 0: set adjoint.anchors_per_domain"):
            embedded(run, folder, with_target=False)
        with pytest.raises(UserError, match="needs at least 2 anchors, it has 1"):
            embedded(run, folder, with_target=False, anchor_files=(folder / "target.jsonl",), anchors_per_file=1)

    def test_adjoint_without_a_target_is_refused(self, folder):
        with pytest.raises(UserError, match="estimator adjoint needs a target here; pass --target"):
            embedded(Run(folder / "run"), folder, target=None)


def test_settings_that_change_values_have_folders_of_their_own(folder):
    run = Run(folder / "run")
    job = plan_job(Replay(run), "early", "stage_end", load_target(folder / "target.jsonl", run.spec, 100), batch_size=4)

    def place(**settings):
        return embedding_folder(job, "early", "stage_end", AdjointEstimator(AdjointConfig(**settings)))[0]

    changes = [
        {}, {"own_step": "linear"}, {"own_step": "embedding"}, {"hessian": "difference"}, {"anchors_per_domain": 1},
    ]  # fmt: skip
    assert len({place(**change) for change in changes}) == len(changes)
    assert {place(memory_bytes=1), place(disk_bytes=1), place(save_seconds=1)} == {place()}


def test_own_steps_differ_only_in_the_window(folder, copy):
    run = copy()
    found = {kind: embedded(run, folder, own_step=kind).vectors for kind in ("exact", "embedding", "linear")}
    for one, other in itertools.combinations(found.values(), 2):
        assert not np.allclose(one, other, rtol=1e-3)
        assert np.corrcoef(one[:, 0], other[:, 0])[0, 1] > 0.3


class Opaque(torch.autograd.Function):
    """Stands for a fused kernel that no function transform knows."""

    @staticmethod
    def forward(ctx, value):
        return value * 1.0

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient):
        return gradient * 1.0


@pytest.fixture
def opaque(monkeypatch):
    """Every model built from now on has such a kernel behind its first MLP layer."""
    original = Replay.__init__

    def changed(self, *arguments, **settings):
        original(self, *arguments, **settings)
        self.task.model.up.register_forward_hook(lambda _module, _inputs, output: Opaque.apply(output))

    monkeypatch.setattr(Replay, "__init__", changed)


def test_an_opaque_model_is_refused_before_long_work(folder, copy, opaque, monkeypatch):
    monkeypatch.setattr(adjoint_estimator, "states_backward", lambda *_: pytest.fail("long work began"))
    with pytest.raises(UserError, match=r"module up cannot be differentiated as adjoint.hessian exact needs it"):
        embedded(copy(), folder)


@pytest.mark.parametrize("own_step", ["exact", "embedding", "linear"])
def test_differences_serve_an_opaque_model(folder, copy, request, own_step):
    """The same numbers as without the opaque kernel, up to rounding; and near the exact ones."""
    transparent = embedded(copy(), folder, hessian="difference", own_step=own_step).vectors
    exact = embedded(copy(), folder, own_step=own_step).vectors
    request.getfixturevalue("opaque")
    found = embedded(copy(), folder, hessian="difference", own_step=own_step).vectors
    for column in range(2):
        assert np.corrcoef(found[:, column], transparent[:, column])[0, 1] > 0.9999
        assert np.corrcoef(found[:, column], exact[:, column])[0, 1] > 0.99


def test_a_value_that_is_not_finite_is_named_by_sample_and_step(folder, copy, monkeypatch):
    run, original = copy(), adjoint.exact_values

    def broken(task, layout, state, *arguments):
        values = original(task, layout, state, *arguments)
        if state.record.step == 2:
            values[4] = torch.inf
        return values

    monkeypatch.setattr(adjoint, "exact_values", broken)
    sample = run.steps.filter(step=2)["sample_ids"].explode().to_list()[4]
    with pytest.raises(UserError, match=f"the value of sample {sample} at step 2 is not finite"):
        embedded(run, folder, horizon="window_end")


def test_a_cotangent_that_is_not_finite_is_named_by_step(folder, copy, monkeypatch):
    original = adjoint_estimator.anchor_gradients
    monkeypatch.setattr(adjoint_estimator, "anchor_gradients", lambda *a: original(*a) * torch.inf)
    with pytest.raises(UserError, match="the adjoint is not finite at step 3"):
        embedded(copy(), folder, horizon="window_end")


def test_the_stated_cost_grows_with_what_is_asked_for(folder):
    run = Run(folder / "run")
    target = load_target(folder / "target.jsonl", run.spec, 100)

    def cost(horizon="stage_end", **settings):
        job = plan_job(Replay(run), "early", horizon, target, batch_size=4)
        return AdjointEstimator(AdjointConfig(**settings)).passes(job)

    assert cost() > cost(hessian="difference") > cost("window_end")
    assert cost(memory_bytes=STATE) == pytest.approx(cost() + 12)  # every step is replayed twice
    assert cost(anchors_per_domain=2) > cost() > cost(own_step="linear")
