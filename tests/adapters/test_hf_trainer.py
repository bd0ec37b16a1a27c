"""The callback in a real Hugging Face `Trainer`: its training keeps its bits, and the record replays."""

import numpy as np
import pytest
import torch

pytest.importorskip("accelerate", reason="transformers' Trainer needs accelerate")

from accelerate.state import AcceleratorState
from transformers import (
    DataCollatorWithFlattening,
    LlamaConfig,
    LlamaForCausalLM,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

from curate.adapters.hf_trainer import RecorderCallback
from curate.core.errors import UserError
from curate.data.mds import MdsStream
from curate.embeddings.captured import CapturedRows
from curate.embeddings.dvemb_estimator import DvembConfig, DvembEstimator
from curate.embeddings.run_capture import CaptureConfig
from curate.embeddings.store import embed_window, plan_job
from curate.gradients.capture import GradientCapture
from curate.training.recorder import RecorderConfig
from curate.training.replay import Replay
from curate.training.run import Run
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


def fine_tuned(streams, folder, *, rows=None, collator=None, made=None, kind=Trainer, **settings):
    """A recorded training of a few steps with something of the user's own."""
    arguments = TrainingArguments(
        str(folder / "trainer"), max_steps=4, per_device_train_batch_size=4, report_to=[], use_cpu=True,
        disable_tqdm=True, save_strategy="no", seed=1, **settings,
    )  # fmt: skip
    trainer = kind(
        model=made or model(), args=arguments, train_dataset=rows or dataset(streams), data_collator=collator
    )
    trainer.add_callback(RecorderCallback(trainer, folder / "run", streams=streams, seq_len=SEQ_LEN))
    trainer.train()
    return folder / "run"


def changed(streams, change):
    return [{**row, **change(row)} for row in dataset(streams)]


class TestWhatTheRecordWouldGetWrongIsRefused:
    @pytest.mark.parametrize(
        ("settings", "words"),
        [({"label_smoothing_factor": 0.1}, "label smoothing"), ({"neftune_noise_alpha": 5.0}, "neftune_noise_alpha")],
    )
    def test_a_setting(self, streams, tmp_path, settings, words):
        with pytest.raises(UserError, match=words):
            fine_tuned(streams, tmp_path, **settings)

    @pytest.mark.parametrize("what", ["dropout", "bfloat16", "adapter"])
    def test_a_model(self, streams, tmp_path, what):
        made = model()
        if what == "dropout":
            made.config.attention_dropout = 0.1
        elif what == "bfloat16":
            made = made.to(torch.bfloat16)
        else:
            made.model.layers[0].adapter = torch.nn.Linear(16, 16)
        words = {"dropout": "attention_dropout 0.1", "bfloat16": "is bfloat16", "adapter": r"adapter.bias is \(16,\)"}
        with pytest.raises(UserError, match=words[what]):
            fine_tuned(streams, tmp_path, made=made)

    def test_samples_that_are_in_no_stream(self, streams, tmp_path):
        """Labels that a collator made of padding, where padding is the end of text."""
        rows = changed(streams, lambda row: {"labels": torch.where(row["input_ids"] == 32, -100, row["labels"])})
        with pytest.raises(UserError, match=r"of 4 samples of batch \d are in none of the streams .*pad = eos"):
            fine_tuned(streams, tmp_path, rows=rows)

    def test_joined_rows(self, streams, tmp_path):
        rows = [{key: value.tolist() for key, value in row.items()} for row in dataset(streams)]
        with pytest.raises(UserError, match="position_ids"):
            fine_tuned(streams, tmp_path, rows=rows, collator=DataCollatorWithFlattening())

    @pytest.mark.parametrize(
        ("change", "words"),
        [
            (lambda row: {"attention_mask": torch.arange(SEQ_LEN) >= 2}, "padding_side"),
            (lambda row: {"attention_mask": torch.arange(SEQ_LEN) != 5}, "padding_side"),
            (lambda row: {"attention_mask": torch.arange(SEQ_LEN) < 9}, "labels at its padding"),
            (lambda row: {"labels": row["labels"].roll(-1)}, "labels that are neither"),
            (lambda row: {"position_ids": torch.arange(SEQ_LEN) + 1}, "position_ids"),
        ],
        ids=["left padding", "a hole", "padding is predicted", "shifted labels", "positions"],
    )
    def test_a_batch(self, streams, tmp_path, change, words):
        with pytest.raises(UserError, match=words):
            fine_tuned(streams, tmp_path, rows=changed(streams, change))

    def test_another_loss(self, streams, tmp_path):
        class Penalised(Trainer):
            def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
                loss = super().compute_loss(model, inputs, num_items_in_batch=num_items_in_batch)
                return loss + 0.1 * model.lm_head.weight.square().sum()

        with pytest.raises(UserError, match="compute_loss"):
            fine_tuned(streams, tmp_path, kind=Penalised)


@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_the_precision_is_the_one_that_the_environment_sets(streams, tmp_path, monkeypatch, precision):
    AcceleratorState._reset_state(reset_partial_state=True)
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", precision)
    run = Run(fine_tuned(streams, tmp_path))
    assert run.spec.task.autocast == {"no": None, "bf16": "bfloat16"}[precision]
    assert len(list(Replay(run, tolerance=1e-4).steps(0, 4))) == 4


def test_frozen_parameters_and_positions_that_are_the_usual_ones_are_recorded(streams, tmp_path):
    made = model()
    made.model.embed_tokens.weight.requires_grad_(False)
    rows = changed(streams, lambda row: {"position_ids": torch.arange(SEQ_LEN)})
    run = Run(fine_tuned(streams, tmp_path, made=made, rows=rows))
    assert "model.embed_tokens.weight" not in [name for group in run.spec.groups for name in group]
    assert len(list(Replay(run, tolerance=1e-4).steps(0, 4))) == 4
