"""A record says what the training did: skipped updates, frozen parameters, wrapped names; or it is refused at once."""

import logging

import numpy as np
import polars as pl
import pytest
import torch
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.optim import AdamW

from curate.core.artifacts import list_files, read_json
from curate.core.errors import UserError
from curate.core.machine import free_disk, free_memory
from curate.embeddings.adjoint_estimator import AdjointConfig, AdjointEstimator
from curate.embeddings.baselines import BaselineConfig, BaselineEstimator
from curate.embeddings.dvemb_adam_estimator import DvembAdamConfig, DvembAdamEstimator
from curate.embeddings.dvemb_estimator import DvembConfig, DvembEstimator
from curate.embeddings.run_capture import CaptureConfig
from curate.embeddings.store import embed_window, plan_job
from curate.evaluation.draw import Removal
from curate.evaluation.reruns import Reruns
from curate.training.drift import drift
from curate.training.model import named_parameters, unwrapped_name
from curate.training.recorder import RecorderConfig, TrajectoryRecorder
from curate.training.replay import Replay, records
from curate.training.run import ContinuedRun, Run
from curate.training.samples import trained_tokens
from curate.training.snapshots import snapshot_schedule
from curate.training.target import load_target
from curate.training.token_accounting import domains_seen, seen_uses, uses
from tests import tiny
from tests.tiny import STEPS, Training, record_tiny_run, write_tiny_streams, write_tiny_target

ESTIMATORS = {
    "adjoint": lambda: AdjointEstimator(AdjointConfig()),
    "dvemb": lambda: DvembEstimator(DvembConfig(width=4)),
    "dvemb-adam": lambda: DvembAdamEstimator(DvembAdamConfig(width=4)),
    "grad-dot": lambda: BaselineEstimator("grad-dot", BaselineConfig()),
    "less": lambda: BaselineEstimator("less", BaselineConfig()),
    "shapley": lambda: BaselineEstimator("shapley", BaselineConfig()),
}


@pytest.fixture(scope="module")
def streams(tmp_path_factory):
    return write_tiny_streams(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def target(tmp_path_factory):
    return write_tiny_target(tmp_path_factory.mktemp("target") / "target.jsonl")


def recorder_of(folder, model, optimizer, **settings):
    settings = {"task": tiny.TASK, "streams": {}, "steps": 6, "seq_len": 8, "clip_norm": None, **settings}
    return TrajectoryRecorder(folder, RecorderConfig(), model, optimizer, **settings)


def take_step(recorder, model, step, *, update=None, **told):
    """One recorded step; `update` is called with the optimizers instead of their `step()`."""
    recorder.begin_step(step)
    loss = model(torch.arange(8)[None]).square().mean()
    loss.backward()
    recorder.micro_batch([1], [1.0], [7])
    for optimizer in recorder.optimizers:
        (update or (lambda one: one.step()))(optimizer)
    recorder.end_step(loss.detach(), None, **told)


@pytest.fixture(scope="module")
def skipped_run(tmp_path_factory, streams):
    folder = tmp_path_factory.mktemp("skipped")
    capture = CaptureConfig(estimator="dvemb-adam", width=4)
    Training(streams, skipped=frozenset({0, 9, 11}), capture=capture).run(folder / "run")
    return Run(folder / "run")


class TestSkippedUpdates:
    @pytest.fixture
    def run(self, skipped_run):
        return skipped_run

    def test_they_are_recorded_and_replayed_as_none(self, run):
        assert [one.step for one in records(run, 0, STEPS) if not one.updated] == [0, 9, 11]
        replay = Replay(run, tolerance=1e-6)
        for _ in replay.steps(0, STEPS):
            pass
        assert drift(run, STEPS, replay.model) < 1e-6

    @pytest.mark.parametrize("name", ESTIMATORS)
    def test_their_samples_have_value_0_and_others_the_value_that_training_gives_them(self, run, target, name):
        job = plan_job(Replay(run), "late", "window_end", load_target(target, run.spec, min_tokens=100), batch_size=4)
        embedding = embed_window(job, "late", "window_end", ESTIMATORS[name]())
        values, steps = embedding.values(job.target), embedding.rows["step"].to_numpy()
        assert np.isfinite(values).all()
        assert (values[np.isin(steps, (9, 11))] == 0).all()
        assert (values[~np.isin(steps, (9, 11))] != 0).all()
        if name == "adjoint":
            removals = [Removal(kind="pair", window="late", samples=((step, 0),)) for step in (8, 9, 10)]
            truths = {
                truth.removal.samples[0][0]: float(truth.values[STEPS][0])
                for truth in Reruns(Replay(run), [job.target], 4).run(removals, {"late": [STEPS]})
            }
            assert truths[9] == 0
            assert truths[10] == pytest.approx(values[steps == 10][0], rel=0.05)
            assert truths[8] == pytest.approx(values[steps == 8][0], rel=0.15)  # one update lies between

    def test_captured_in_the_run_or_replayed_they_are_the_same(self, run, target, tmp_path, streams):
        Training(streams, skipped=frozenset({0, 9, 11})).run(tmp_path / "run")
        loaded = load_target(target, run.spec, min_tokens=100)
        found = []
        for one in (run, Run(tmp_path / "run")):
            job = plan_job(Replay(one), "early", "stage_end", loaded, batch_size=4)
            found.append(embed_window(job, "early", "stage_end", DvembEstimator(DvembConfig(width=4, seed=0))).vectors)
        np.testing.assert_allclose(found[0], found[1], rtol=1e-4, atol=1e-5 * np.abs(found[1]).max())

    def test_the_next_step_repeats_the_last_batch_that_was_trained_on(self, run):
        (added,) = records(ContinuedRun(run, 0.1), STEPS, STEPS + 1)
        (last,) = records(run, 10, 11)
        assert [each for each, _ in added.micro_batches] == [each for each, _ in last.micro_batches]
        assert added.updated

    def test_a_scaler_s_overflow_needs_no_word_and_no_norm(self, tmp_path, streams):
        """torch's own GradScaler: the first step overflows at the scale that it begins with."""
        model = tiny.factory()
        optimizer = AdamW(model.parameters(), lr=1e-3)
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**127, backoff_factor=2.0**-127, growth_interval=10**6)
        recorder = recorder_of(tmp_path / "run", model, optimizer, streams=streams, clip_norm=1.0)
        for step in range(6):
            recorder.begin_step(step)
            model.zero_grad()
            loss = 4 * model(torch.arange(8)[None]).square().mean()
            scaler.scale(loss).backward()
            recorder.micro_batch([1], [1.0], [7], scaler.get_scale())
            scaler.unscale_(optimizer)
            norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            scaler.step(optimizer)
            scaler.update()
            recorder.end_step(loss.detach(), norm)
        recorder.finish()
        run = Run(tmp_path / "run")
        steps = list(records(run, 0, 6))
        assert not np.isfinite(steps[0].grad_norm)
        assert [one.updated for one in steps] == [False, True, True, True, True, True]
        assert run.diverged is None

    def test_a_fused_optimizer_is_told_of_the_overflow_by_a_tensor(self, tmp_path):
        model = tiny.factory()
        recorder = recorder_of(tmp_path / "run", model, AdamW(model.parameters(), lr=1e-3, fused=True))

        def scaled(found_inf):
            def update(optimizer):
                optimizer.grad_scale, optimizer.found_inf = torch.tensor(1.0), torch.tensor(found_inf)
                optimizer.step()
                del optimizer.grad_scale, optimizer.found_inf

            return update

        for step in range(6):
            take_step(recorder, model, step, update=scaled(float(step == 2)))
        recorder.finish()
        assert [one.updated for one in records(Run(tmp_path / "run"), 0, 6)] == [True, True, False, True, True, True]

    def test_what_is_said_counts_where_steps_cannot_be_seen(self, tmp_path):
        model = tiny.factory()
        recorder = recorder_of(tmp_path / "run", model, AdamW(model.parameters()))
        for step in range(6):
            take_step(recorder, model, step, update=lambda _: None, updated=step != 3)
        recorder.finish()
        assert [one.updated for one in records(Run(tmp_path / "run"), 0, 6)] == [True, True, True, False, True, True]

    def test_what_contradicts_is_refused(self, tmp_path):
        model = tiny.factory()
        recorder = recorder_of(tmp_path / "run", model, AdamW(model.parameters()))
        with pytest.raises(UserError, match="took no update, but"):
            take_step(recorder, model, 0, updated=False)
        with pytest.raises(UserError, match="2 times in step 1"):
            take_step(recorder, model, 1, update=lambda optimizer: (optimizer.step(), optimizer.step()))
        recorder.optimizers[0].step()
        with pytest.raises(UserError, match="between end_step and begin_step"):
            recorder.begin_step(2)


class Altered(Training):
    """Changes gradients after they were clipped, or weights beside `optimizer.step()`, from one step on."""

    kind, since = "", 0

    def _update(self, optimizers, step):
        parameters = list(self.model.parameters())
        if step < self.since:
            return super()._update(optimizers, step)
        if self.kind == "value clipping":
            norm = torch.nn.utils.clip_grad_norm_(parameters, tiny.CLIP_NORM)
            torch.nn.utils.clip_grad_value_(parameters, 1e-3)
            for optimizer in optimizers:
                optimizer.step()
            return norm
        norm = super()._update(optimizers, step)
        with torch.no_grad():
            parameters[0].mul_(0.999)
        return norm


class TestOtherUpdates:
    """What changed the weights beside the recorded gradient shows at the window's end, behind the last loss."""

    @pytest.mark.parametrize("since", [0, 9, 11])
    @pytest.mark.parametrize("kind", ["value clipping", "averaging"])
    def test_they_are_refused(self, tmp_path, streams, kind, since):
        training = Altered(streams, optimizer="SGD")
        training.kind, training.since = kind, since
        training.run(tmp_path / "run")
        with pytest.raises(UserError, match=r"replay of step") as error:
            list(Replay(Run(tmp_path / "run")).steps(8, STEPS))
        assert "clip" in str(error.value)
        assert since < 11 or "snapshot of step 12" in str(error.value)

    def test_an_honest_replay_in_other_parts_is_within_a_thousandth_of_what_is_allowed(self, tmp_path, streams):
        Training(streams).run(tmp_path / "run")
        replay = Replay(Run(tmp_path / "run"))
        whole = replay.batches
        replay.batches = lambda record: [part for batch in whole(record) for part in batch.split(1)]
        for _ in replay.steps(0, STEPS):
            pass
        assert 0 < drift(replay.run, STEPS, replay.model) < 1e-5


class TestNames:
    def test_wrappers_are_seen_through_wherever_they_stand(self):
        wanted = "layers.0.up.weight"
        for name in (
            "module._orig_mod.layers.0.up.weight", "_orig_mod.module.layers.0.up.weight",
            "layers.0._orig_mod.up.weight", "layers.0._checkpoint_wrapped_module.up.weight",
            "_fsdp_wrapped_module.layers.0._fsdp_wrapped_module._orig_mod.up.weight", wanted,
        ):  # fmt: skip
            assert unwrapped_name(name) == wanted
        assert unwrapped_name("encoder.module.weight") == "encoder.module.weight"

    @pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")  # torch.compile looks at it
    @pytest.mark.parametrize("where", ["trained", "factory"])
    def test_a_model_of_wrapped_layers_replays(self, tmp_path, streams, monkeypatch, where):
        def wrapped(**kwargs):
            model = made(**kwargs)
            model.up = checkpoint_wrapper(model.up)
            model.down = torch.compile(model.down, backend="eager")
            return model

        made = tiny.factory
        monkeypatch.setattr(tiny, "factory", wrapped)
        Training(streams).run(tmp_path / "run")
        if where == "trained":
            monkeypatch.undo()
        run = Run(tmp_path / "run")
        assert "up.weight" in run.spec.groups[0]
        replay = Replay(run)
        states = list(replay.states(8, STEPS))
        assert len(states) == STEPS - 8
        assert torch.isfinite(
            replay.task.sample_losses(states[0].batches[0], replay.layout.views(states[0].parameters))
        ).all()


class TestFrozenParameters:
    @pytest.mark.parametrize(("frozen", "tied"), [("embedding", True), ("embedding", False), ("mix", True)])
    def test_they_are_not_trained_in_a_replay_either(self, tmp_path, streams, target, frozen, tied):
        Training(streams, frozen=frozen, tied=tied, capture=CaptureConfig(width=4)).run(tmp_path / "run")
        run = Run(tmp_path / "run")
        assert not any(name.startswith(frozen) for group in run.spec.groups for name in group)
        replay = Replay(run, tolerance=1e-6)
        assert set(named_parameters(replay.model)) == {name for group in run.spec.groups for name in group}
        loaded = load_target(target, run.spec, min_tokens=100)
        for name in ("adjoint", "dvemb", "dvemb-adam"):
            job = plan_job(Replay(run), "late", "window_end", loaded, batch_size=4)
            values = embed_window(job, "late", "window_end", ESTIMATORS[name]()).values(loaded)
            assert np.isfinite(values).all()
            assert (values != 0).all()
        removal = Removal(kind="pair", window="late", samples=((11, 0),))
        (truth,) = Reruns(replay, [loaded], 4).run([removal], {"late": [STEPS]})
        job = plan_job(Replay(run), "late", "window_end", loaded, batch_size=4)
        embedding = embed_window(job, "late", "window_end", ESTIMATORS["adjoint"]())
        value = embedding.values(loaded)[embedding.rows["step"].to_numpy() == 11][0]
        assert float(truth.values[STEPS][0]) == pytest.approx(value, rel=0.05)

    def test_one_that_gets_gradients_but_has_no_optimizer_is_refused(self, tmp_path):
        model = tiny.factory()
        with pytest.raises(UserError, match=r"embedding.weight and 6 more parameters"):
            recorder_of(tmp_path / "run", model, AdamW([model.mix.weight]))

    def test_an_optimizer_of_a_foreign_parameter_is_refused(self, tmp_path):
        model = tiny.factory()
        with pytest.raises(UserError, match=r"shape \(3,\) that is not the model's"):
            recorder_of(tmp_path / "run", model, AdamW([*model.parameters(), torch.zeros(3, requires_grad=True)]))


class TestChangedGroups:
    def begin(self, folder):
        model = tiny.factory()
        model.mix.requires_grad_(False)
        optimizer = AdamW([p for p in model.parameters() if p.requires_grad])
        recorder = recorder_of(folder, model, optimizer)
        take_step(recorder, model, 0)
        return model, optimizer, recorder

    def test_a_group_added_later(self, tmp_path):
        model, optimizer, recorder = self.begin(tmp_path / "run")
        model.mix.requires_grad_(True)
        optimizer.add_param_group({"params": [model.mix.weight]})
        with pytest.raises(UserError, match="changed before the end of step 1"):
            take_step(recorder, model, 1)

    def test_a_parameter_frozen_later(self, tmp_path):
        model, _, recorder = self.begin(tmp_path / "run")
        model.up.requires_grad_(False)
        with pytest.raises(UserError, match="changed before the end of step 1"):
            take_step(recorder, model, 1)

    def test_a_form_of_the_optimizer_that_replay_does_not_know(self, tmp_path):
        model, optimizer, recorder = self.begin(tmp_path / "run")
        optimizer.param_groups[0]["maximize"] = True
        with pytest.raises(UserError, match="maximize"):
            take_step(recorder, model, 1)

    def test_hyper_parameters_are_replayed_as_they_were(self, tmp_path, streams, monkeypatch):
        """betas, eps and weight decay that change from step to step."""
        original = tiny.set_lr

        def changing(optimizers, lr):
            original(optimizers, lr)
            for group in (group for optimizer in optimizers for group in optimizer.param_groups):
                group |= {"betas": (0.8 + lr, 0.9 + lr), "eps": lr * 1e-6, "weight_decay": 10 * lr}

        monkeypatch.setattr(tiny, "set_lr", changing)
        Training(streams).run(tmp_path / "run")
        replay = Replay(Run(tmp_path / "run"), tolerance=1e-6)
        for _ in replay.steps(0, STEPS):
            pass
        assert drift(replay.run, STEPS, replay.model) < 1e-6


class Modules:
    """Models whose forward pass no replay repeats sample by sample."""

    class Functional(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.dropout = 0.1

    class Counting(torch.nn.Module):
        """Keeps a running mean, as normalisations and quantised layers do."""

        def __init__(self):
            super().__init__()
            self.register_buffer("mean", torch.zeros(()))

        def forward(self, hidden):
            self.mean.lerp_(hidden.detach().mean(), 0.1)
            return hidden


class TestRefusedBeforeTraining:
    @pytest.mark.parametrize(
        ("part", "words"),
        [
            (torch.nn.Dropout(0.1), "extra is a dropout"),
            (Modules.Functional(), "extra has dropout 0.1"),
            (torch.nn.MultiheadAttention(8, 2, dropout=0.2), "extra has dropout 0.2"),
            (torch.nn.BatchNorm1d(8), "extra is a BatchNorm1d"),
            (torch.nn.SyncBatchNorm(8), "extra is a SyncBatchNorm"),
            (torch.nn.Linear(8, 8).to(torch.bfloat16), "extra.weight is bfloat16"),
            (torch.nn.Linear(8, 8).half(), "extra.weight is float16"),
        ],
    )
    def test_a_part_of_the_model(self, tmp_path, part, words):
        model = tiny.factory()
        model.extra = part
        with pytest.raises(UserError, match=words):
            recorder_of(tmp_path / "run", model, AdamW(model.parameters()))
        assert not (tmp_path / "run").exists()

    @pytest.mark.parametrize(
        ("change", "key"),
        [
            ({"attention_dropout": 0.1}, "attention_dropout"),
            ({"text_config": {"hidden_dropout_prob": 0.1}}, "text_config.hidden_dropout_prob"),
        ],
    )
    def test_dropout_in_a_config(self, tmp_path, change, key):
        class Config:
            def to_dict(self):
                return {"hidden_size": 8, "classifier_dropout": 0.1, "summary_first_dropout": 0.1, **change}

        model = tiny.factory()
        model.config = Config()
        with pytest.raises(UserError, match=f"config has {key} 0.1"):
            recorder_of(tmp_path / "run", model, AdamW(model.parameters()))

    def test_sharded_weights(self, tmp_path):
        from torch import distributed
        from torch.distributed.fsdp import fully_shard

        distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/ranks", rank=0, world_size=1)
        try:
            model = tiny.factory(tied=False)
            fully_shard(model)
            with pytest.raises(UserError, match=r"sharded.*DistributedDataParallel"):
                recorder_of(tmp_path / "run", model, AdamW(model.parameters()))
        finally:
            distributed.destroy_process_group()

    def test_state_that_a_forward_pass_leaves_behind_is_refused_at_the_first_step(self, tmp_path):
        model = tiny.factory()
        model.norm = torch.nn.Sequential(model.norm, Modules.Counting())
        recorder = recorder_of(tmp_path / "run", model, AdamW(model.parameters()))
        with pytest.raises(UserError, match=r"norm.1.mean changed"):
            take_step(recorder, model, 0)


def rewrite(run, **columns):
    """Put other records in the place of a run's, as if they had been written so."""
    run.steps.with_columns(**columns).write_parquet(run.folder / "steps.parquet")
    list_files(run.folder, [run.folder / "steps.parquet"])


class TestDivergedTraining:
    def test_the_step_and_a_window_before_it_are_named(self, tmp_path, streams):
        run = record_tiny_run(tmp_path)
        diverged = pl.when(pl.col("step") >= 6).then(np.nan).otherwise(pl.col("loss"))
        rewrite(run, loss=diverged)
        replay = Replay(Run(run.folder))
        assert len(list(replay.steps(0, 4))) == 4
        with pytest.raises(UserError, match=r"diverged at step 6 .*--window early"):
            list(replay.steps(8, STEPS))
        with pytest.raises(UserError, match=r"diverged at step 6"):
            replay.load(STEPS)


class TestSamplesThatAreInNoStream:
    @pytest.fixture
    def run(self, tmp_path):
        """Half of the samples were trained with other labels, say."""
        run = record_tiny_run(tmp_path)
        foreign = pl.col("sample_ids").list.eval(pl.element() + 1)
        ids = pl.when(pl.col("step") % 2 == 1).then(foreign).otherwise("sample_ids")
        rewrite(run, sample_ids=ids)
        return Run(run.folder)

    def test_they_are_counted_and_said(self, run, caplog):
        assert len(run.unknown) == STEPS * 6 // 2
        assert sum(trained_tokens(run).values()) == STEPS * 6 // 2 * tiny.SEQ_LEN
        assert "36 of 72 samples" in caplog.text
        ledger = domains_seen(run.source, uses([run.folder]))
        assert ledger["seen_tokens"].sum() == STEPS * 6 // 2 * tiny.SEQ_LEN
        assert seen_uses(uses([run.folder]))["uses"].sum() == STEPS * 6

    def test_none_at_all_is_refused(self, run):
        foreign = pl.col("sample_ids").list.eval(pl.element() * 2 + 1)
        rewrite(run, sample_ids=foreign)
        with pytest.raises(UserError, match=r"none of the 72 samples"):
            trained_tokens(Run(run.folder))


class TestLimits:
    def test_default_limits_follow_the_machine(self, tmp_path, caplog):
        assert free_memory(torch.device("cpu")) > 0
        assert free_disk(tmp_path / "not" / "there") > 0
        assert RecorderConfig().snapshot_bytes is None
        windows = {"early": (0, 10), "late": (90, 100)}
        with caplog.at_level(logging.WARNING):
            assert snapshot_schedule(windows, 100, 8, 10, 60) == {0, 10, 50, 90, 100}
        assert "2 of 8" in caplog.text

    def test_a_run_holds_every_snapshot_that_was_asked_for(self, tmp_path):
        run = record_tiny_run(tmp_path)
        assert run.snapshots == [0, 2, 4, 6, 8, 10, 12]
        assert read_json(run.folder / "run.json")["steps"] == STEPS
