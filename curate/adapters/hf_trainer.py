"""Recording and capture in a Hugging Face `Trainer`: one callback, no change of its loop and of no number of it.

    trainer.add_callback(RecorderCallback(trainer, "runs/stage1", streams={"web": "data/web"}, seq_len=1024))

A sample is known by its content: a row of `input_ids` (where `attention_mask` is 1) and which of its `labels` are not
-100 give the id that prepared MDS streams have, so nothing has to be added to the data set or the collator. The streams
named here are what replay reads; they must hold the same samples. They are read once before the first step, and batches
are held against them; the loss of the first step is held against the one that the record describes.

`Trainer` shows a callback neither batches nor the gradient's norm before clipping. They are read where they pass: from
the arguments of the model's forward pass, and from `backward` and `clip_grad_norm_` of the trainer's accelerator, which
are wrapped for the time of the training.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from transformers import TrainerCallback

from curate.core.errors import UserError
from curate.data.mds import Columns, content_id
from curate.embeddings.run_capture import CaptureConfig, RunCapture
from curate.training.known import KnownSamples
from curate.training.recorder import RecorderConfig, TrajectoryRecorder
from curate.training.task import ModelSpec, TaskSpec

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import Trainer, TrainerControl, TrainerState, TrainingArguments

_INPUTS = frozenset({"input_ids", "labels", "attention_mask", "position_ids", "num_items_in_batch"})
_AUTOCAST: Mapping[str, Literal["bfloat16"] | None] = {"no": None, "bf16": "bfloat16"}
_LOSS_TOLERANCE = 1e-3  # the same logits make both, so half precision is in neither


class RecorderCallback(TrainerCallback):
    """Records the training of a causal language model that computes its own loss from `labels`.

    Args:
        trainer: the trainer that the callback is added to.
        folder: the run.
        streams: domain -> MDS folder with the samples trained on.
        seq_len: tokens of a sequence.
        config: windows, byte budget.
        capture: what to capture of the gradients in the windows; None: nothing.
        columns: columns of the streams.
        tokenizer: tokenizer file of the tokens.
        previous: run of the stage that this one continues from.

    Raises:
        UserError: the trainer does something that the record could not repeat; when its training begins.
    """

    def __init__(
        self,
        trainer: Trainer,
        folder: Path | str,
        *,
        streams: Mapping[str, Path],
        seq_len: int,
        config: RecorderConfig | None = None,
        capture: CaptureConfig | None = None,
        columns: Columns | None = None,
        tokenizer: Path | None = None,
        previous: Path | None = None,
    ) -> None:
        self._trainer, self._folder = trainer, Path(folder)
        self._config, self._capture = config or RecorderConfig(), capture
        self._settings: dict[str, Any] = {
            "streams": dict(streams), "seq_len": seq_len, "columns": columns, "tokenizer": tokenizer,
            "previous": previous,
        }  # fmt: skip
        self._recorder: TrajectoryRecorder | None = None
        self._batch: dict[str, Any] = {}
        self._logits: Tensor | None = None
        self._checked = False  # whether a step's loss has been held against its record
        self._loss: Tensor | None = None
        self._norm: Tensor | float | None = None
        self._undo: list[Any] = []

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **given: Any
    ) -> None:
        """Start the recorder, and see batches and norms from now on."""
        trainer = self._trainer
        self._unwrap()  # auto_find_batch_size begins again
        _refuse(trainer, args)
        model = given["model"]
        config = self._folder / "model" / "config.json"
        config.parent.mkdir(parents=True, exist_ok=True)
        config.write_text(model.config.to_json_string(use_diff=True), encoding="utf-8")
        optimizer = given["optimizer"]
        self._recorder = TrajectoryRecorder(
            self._folder, self._config, model, getattr(optimizer, "optimizer", optimizer),
            task=TaskSpec(model=ModelSpec(hf_config=config), autocast=_AUTOCAST[_precision(trainer)]),
            steps=state.max_steps, clip_norm=args.max_grad_norm or None, first_step=state.global_step,
            **self._settings,
        )  # fmt: skip
        self._known = KnownSamples(self._folder, self._settings["streams"], self._settings["columns"])
        self._checked = False
        if self._capture is not None:
            self._recorder.attach(RunCapture(self._recorder, self._capture))
        self._undo = [
            model.register_forward_pre_hook(self._forward, with_kwargs=True).remove,
            model.register_forward_hook(self._output).remove,
            _wrap(trainer.accelerator, "backward", self._backward),
            _wrap(trainer.accelerator, "clip_grad_norm_", self._clipped),
        ]

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **given: Any
    ) -> None:
        """Before the first micro-batch."""
        self._loss = self._norm = None
        self._running.begin_step(state.global_step)

    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **given: Any
    ) -> None:
        """After the optimizer's step, before the schedule's."""
        if self._loss is None:
            raise UserError("this Trainer takes its steps without accelerator.backward, so it cannot be recorded")
        self._running.end_step(self._loss, self._norm)
        self._checked = True

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **given: Any) -> None:
        """A checkpoint was written."""
        self._running.flush()

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **given: Any) -> None:
        """Finish the run where all its steps were taken; otherwise a resumed training will."""
        self._unwrap()
        self._known.warn()
        if state.global_step == state.max_steps:
            self._running.finish()
        else:
            self._running.flush()

    def _unwrap(self) -> None:
        for undo in self._undo:
            undo()
        self._undo = []

    @property
    def _running(self) -> TrajectoryRecorder:
        assert self._recorder is not None, "Trainer calls on_train_begin first"
        return self._recorder

    def _forward(self, model: Any, arguments: Any, inputs: dict[str, Any]) -> None:
        """Keep what is needed of a batch; evaluation goes by."""
        if model.training:
            self._batch = inputs

    def _output(self, model: Any, arguments: Any, output: Any) -> None:
        """Keep the logits until the first step has been checked."""
        if model.training and not self._checked:
            self._logits = getattr(output, "logits", None)

    def _backward(self, loss: Tensor) -> None:
        """A micro-batch's backward pass has just been.

        With `num_items_in_batch` N the model's loss is a sum over tokens divided by N, and `c_z` the sample's share of
        N; without, it is the micro-batch's mean divided by the number of micro-batches. The accelerator divides again.
        """
        import torch

        inputs, self._batch = self._batch, {}
        if inputs.get("labels") is None or inputs.get("input_ids") is None:
            raise UserError("RecorderCallback needs batches with input_ids and labels, and a model that makes the loss")
        _refuse_batch(inputs)
        predicted = (inputs["labels"][:, 1:] != -100).sum(1)
        items = inputs.get("num_items_in_batch")
        if items is None:
            items = predicted.sum() * self._trainer.current_gradient_accumulation_steps
        divisor = self._trainer.accelerator.gradient_accumulation_steps
        part = loss.detach() / divisor
        self._loss = part if self._loss is None else self._loss + part
        share = 1 / (torch.as_tensor(items, device=predicted.device) * divisor)
        if self._logits is not None:
            _check_loss(self._logits, inputs["labels"], share, part)
            self._logits = None
        sample_ids = _sample_ids(inputs)
        self._known.check(sample_ids)
        self._running.micro_batch(sample_ids, predicted * share, predicted)

    def _clipped(self, norm: Tensor | float) -> None:
        self._norm = norm


def _wrap(owner: Any, name: str, after: Any) -> Any:
    """Call `after` behind a method of one object: with the loss for `backward`, else with what it returned.

    Returns:
        What puts the method back.
    """
    original = getattr(owner, name)

    def wrapped(*arguments: Any, **keywords: Any) -> Any:
        found = original(*arguments, **keywords)
        after(arguments[0] if name == "backward" else found)
        return found

    setattr(owner, name, wrapped)
    return lambda: delattr(owner, name)


def _sample_ids(inputs: Mapping[str, Any]) -> Sequence[int]:
    tokens, labels = inputs["input_ids"].cpu().numpy(), inputs["labels"].cpu().numpy()
    attended = inputs.get("attention_mask")
    kept = np.ones(tokens.shape, bool) if attended is None else attended.cpu().numpy().astype(bool)
    return [content_id(row[keep], label[keep] != -100) for row, label, keep in zip(tokens, labels, kept, strict=True)]


def _refuse_batch(inputs: Mapping[str, Any]) -> None:
    """A batch whose rows are not what their ids say, or that the model reads otherwise than replay would.

    Raises:
        UserError: says what of it.
    """
    import torch

    tokens, labels = inputs["input_ids"], inputs["labels"]
    attended, positions = inputs.get("attention_mask"), inputs.get("position_ids")
    kept = torch.ones_like(tokens, dtype=torch.bool) if attended is None else attended.bool()
    found = {
        f"an input {name}": isinstance(value, torch.Tensor) for name, value in inputs.items() if name not in _INPUTS
    }
    whole = kept.shape == tokens.shape
    found |= {
        "padding that is not at the end of a row (padding_side 'right' would do)": (
            not whole or bool((kept[:, 1:] & ~kept[:, :-1]).any())
        ),
        "position_ids other than 0, 1, 2, ... (rows that a collator joined)": (
            positions is not None and not bool((positions == torch.arange(tokens.shape[1], device=tokens.device)).all())
        ),
        "labels that are neither the input_ids nor -100": bool(((labels != tokens) & (labels != -100)).any()),
        "labels at its padding": whole and bool((~kept & (labels != -100)).any()),
    }
    for what, there in found.items():
        if there:
            raise UserError(
                f"a batch has {what}, which a record does not tell: train on the rows of the streams as they are"
            )


def _check_loss(logits: Tensor, labels: Tensor, share: Tensor, loss: Tensor) -> None:
    """Hold a micro-batch's loss against the token losses that its record gives.

    Raises:
        UserError: another loss is trained on.
    """
    from torch.nn.functional import cross_entropy

    known = cross_entropy(logits[:, :-1].detach().float().transpose(1, 2), labels[:, 1:], reduction="sum") * share
    if not math.isclose(float(known), float(loss), rel_tol=_LOSS_TOLERANCE):
        raise UserError(
            f"the loss of a micro-batch is {float(loss):.6g}, its predicted tokens give {float(known):.6g}: a "
            "compute_loss of its own, an auxiliary loss or a penalty is in it, which replay could not repeat; train "
            "on the token loss alone"
        )


def _precision(trainer: Trainer) -> str:
    """What the trainer computes in; its accelerator decides, which environment and earlier trainers may have set."""
    return str(trainer.accelerator.mixed_precision)


def _refuse(trainer: Trainer, args: TrainingArguments) -> None:
    """What a record of this trainer would get wrong.

    Raises:
        UserError: names it.
    """
    found = {
        "more than one process or GPU": args.world_size > 1 or args.n_gpu > 1,
        "DeepSpeed": bool(args.deepspeed),
        "FSDP": bool(args.fsdp),
        "neftune_noise_alpha, which is random": bool(args.neftune_noise_alpha),
        f"{_precision(trainer)} (use bf16)": _precision(trainer) not in _AUTOCAST,
        "label smoothing": trainer.label_smoother is not None,
        "a loss function of its own (compute_loss_func)": trainer.compute_loss_func is not None,
        "torch.compile": args.torch_compile,
    }
    for what, there in found.items():
        if there:
            raise UserError(
                f"RecorderCallback cannot record a Trainer with {what}; train without, or in a loop of yours"
            )
