"""The callback in a real Hugging Face `Trainer`: its training keeps its bits, and the record replays."""

import numpy as np
import pytest
import torch

pytest.importorskip("accelerate", reason="transformers' Trainer needs accelerate")

from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainerCallback, TrainingArguments

from curate.adapters.hf_trainer import RecorderCallback
from curate.embeddings.captured import CapturedRows
from curate.embeddings.dvemb_estimator import DvembConfig, DvembEstimator
from curate.embeddings.run_capture import CaptureConfig
from curate.embeddings.store import embed_window, plan_job
from curate.errors import UserError
from curate.formats.mds import MdsStream
from curate.gradients.capture import GradientCapture
from curate.trajectory.recorder import RecorderConfig
from curate.trajectory.replay import Replay
from curate.trajectory.run import Run
from tests.tiny import SEQ_LEN, write_tiny_streams

STEPS = 8


@pytest.fixture(scope="module")
def streams(tmp_path_factory):
    return write_tiny_streams(tmp_path_factory.mktemp("data"))


def model():
    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=128, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
            num_key_value_heads=2, max_position_embeddings=SEQ_LEN,
        )
    )  # fmt: skip


def dataset(streams):
    rows = [stream[i] for stream in (MdsStream(path) for path in streams.values()) for i in range(40)]
    return [
        {
            "input_ids": torch.from_numpy(row.tokens.astype(np.int64)),
            "labels": torch.from_numpy(np.where(row.loss_mask, row.tokens, -100).astype(np.int64)),
        }
        for row in rows
    ]


class Losses(TrainerCallback):
    """What Trainer logs of every step."""

    def __init__(self):
        self.found = []

    def on_log(self, args, state, control, logs=None, **given):
        if "loss" in logs:
            self.found.append((logs["loss"], logs["grad_norm"], logs["learning_rate"]))


def trained(streams, folder, *, stop=None, resume=False, record=True, **settings):
    arguments = TrainingArguments(
        str(folder / "trainer"), max_steps=STEPS, per_device_train_batch_size=4, learning_rate=5e-3, logging_steps=1,
        max_grad_norm=0.5, lr_scheduler_type="cosine", weight_decay=0.1, report_to=[], use_cpu=True,
        disable_tqdm=True, seed=1, save_steps=3, **settings,
    )  # fmt: skip
    losses = Losses()
    trainer = Trainer(model=model(), args=arguments, train_dataset=dataset(streams), callbacks=[losses])
    if record:
        trainer.add_callback(
            RecorderCallback(
                trainer, folder / "run", streams=streams, seq_len=SEQ_LEN,
                config=RecorderConfig(windows={"early": (0, 3), "late": (5, STEPS)}),
                capture=CaptureConfig(width=4),
            )
        )  # fmt: skip
    trainer.train()
    return trainer, losses.found


@pytest.mark.parametrize(
    "settings",
    [{}, {"gradient_accumulation_steps": 2}, {"bf16": True, "gradient_checkpointing": True}],
    ids=["plain", "accumulated", "bfloat16 and checkpointing"],
)
def test_the_training_keeps_its_bits_and_the_record_replays(streams, tmp_path, settings):
    plain, wanted = trained(streams, tmp_path / "plain", record=False, **settings)
    recorded, losses = trained(streams, tmp_path, **settings)
    assert losses == wanted
    assert len(losses) == STEPS
    for one, other in zip(recorded.model.parameters(), plain.model.parameters(), strict=True):
        assert torch.equal(one, other)
    assert "backward" not in vars(recorded.accelerator)
    assert not recorded.model._forward_pre_hooks
    run = Run(tmp_path / "run")
    replay = Replay(run, tolerance=1e-4)
    capture = GradientCapture(replay.model, 4, seed=0)
    rows = CapturedRows(run, capture.identity, ("gradients",))
    accumulated = settings.get("gradient_accumulation_steps", 1)
    with capture:
        for replayed, (_, norm, lr) in zip(replay.steps(0, STEPS, capture.take), losses, strict=True):
            record = replayed.record
            assert record.grad_norm == pytest.approx(norm, rel=1e-6)
            assert record.groups[0].lr == pytest.approx(lr, rel=1e-6)
            assert [len(ids) for ids, _ in record.micro_batches] == [4] * accumulated
            found = rows.read(record.step)
            assert (found is None) == (record.step in (3, 4))
            if found is not None:
                expected = torch.cat(replayed.captured).numpy()
                np.testing.assert_allclose(found[0], expected, rtol=1e-3, atol=1e-4 * np.abs(expected).max())


def test_embeddings_need_no_replay_after_the_training(streams, tmp_path, monkeypatch):
    trained(streams, tmp_path)
    job = plan_job(Replay(Run(tmp_path / "run")), "late", "window_end", None, batch_size=4)
    monkeypatch.setattr(Replay, "steps", lambda *arguments: pytest.fail("replayed"))
    embedding = embed_window(job, "late", "window_end", DvembEstimator(DvembConfig(width=4)))
    assert np.abs(embedding.vectors).max(1).min() > 0


def test_what_the_record_would_get_wrong_is_refused(streams, tmp_path):
    with pytest.raises(UserError, match="label smoothing"):
        trained(streams, tmp_path, label_smoothing_factor=0.1)
