"""Recording and capture in a Hugging Face `Trainer`: one callback, which changes neither its loop nor its numbers.

    trainer.add_callback(RecorderCallback(trainer, "runs/stage1", streams={"web": "data/web"}, seq_len=1024))

A sample is identified by its content: a row of `input_ids` (where `attention_mask` is 1) and which of its `labels` are
not -100 give the id that prepared MDS streams have, so the data set and the collator need no id column. Replay reads
the streams named here; they must hold the same samples. They are read once before the first step, and each batch is
compared with them; the loss of the first step is compared with the one that the record describes.

`Trainer` shows a callback neither batches nor the gradient's norm before clipping. The callback reads them where they
pass: from the arguments of the model's forward pass, and from `backward` and `clip_grad_norm_` of the trainer's
accelerator, which are wrapped while the training runs.
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
# fp16 is missing: its loss scaling skips steps and changes gradients, which replay would have to repeat.
_AUTOCAST: Mapping[str, Literal["bfloat16"] | None] = {"no": None, "bf16": "bfloat16"}
# Relative. Both losses are made of the same logits, so half precision makes no difference between them.
_LOSS_TOLERANCE = 1e-3


class RecorderCallback(TrainerCallback):
    """Records the training of a causal language model that computes its own loss from `labels`.

    Args:
        trainer: the trainer that the callback is added to.
        folder: folder of the run.
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
            "streams": dict(streams),
            "seq_len": seq_len,
            "columns": columns,
            "tokenizer": tokenizer,
            "previous": previous,
        }
        self._recorder: TrajectoryRecorder | None = None
        self._batch: dict[str, Any] = {}
        self._logits: Tensor | None = None
        # Whether a step's loss was compared with its record.
        self._checked = False
        self._loss: Tensor | None = None
        self._norm: Tensor | float | None = None
        self._undo: list[Any] = []

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **given: Any
    ) -> None:
        """Start the recorder, and see batches and norms from now on."""
        trainer = self._trainer
        # `auto_find_batch_size` begins a training again, without an end of the first.
        self._unwrap()
        _refuse(trainer, args)
        model = given["model"]
        # Replay builds the model from its configuration alone; weights are in the snapshots.
        config = self._folder / "model" / "config.json"
        config.parent.mkdir(parents=True, exist_ok=True)
        config.write_text(model.config.to_json_string(use_diff=True), encoding="utf-8")
        optimizer = given["optimizer"]
        self._recorder = TrajectoryRecorder(
            self._folder,
            self._config,
            model,
            getattr(optimizer, "optimizer", optimizer),  # inside of Accelerate's wrapper
            task=TaskSpec(model=ModelSpec(hf_config=config), autocast=_AUTOCAST[_precision(trainer)]),
            steps=state.max_steps,
            clip_norm=args.max_grad_norm or None,  # 0 means no clipping
            first_step=state.global_step,
            **self._settings,
        )
        self._known = KnownSamples(self._folder, self._settings["streams"], self._settings["columns"])
        # Each training's own first step is checked.
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
        """Begin a step, before its first micro-batch."""
        self._loss = self._norm = None
        self._running.begin_step(state.global_step)

    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **given: Any
    ) -> None:
        """End a step, after the optimizer's step and before the schedule's."""
        if self._loss is None:
            raise UserError("this Trainer takes its steps without accelerator.backward, so it cannot be recorded")
        self._running.end_step(self._loss, self._norm)
        self._checked = True

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **given: Any) -> None:
        """Write what was recorded, as a checkpoint was written."""
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
        """Keep the inputs of a training batch."""
        if model.training:  # evaluation between steps runs the same model
            self._batch = inputs

    def _output(self, model: Any, arguments: Any, output: Any) -> None:
        """Keep the logits until the first step has been checked."""
        if model.training and not self._checked:
            self._logits = getattr(output, "logits", None)

    def _backward(self, loss: Tensor) -> None:
        """Record a micro-batch after its backward pass.

        With `num_items_in_batch` N the model's loss is a sum over tokens divided by N, and `c_z` the sample's share of
        N; without, it is the micro-batch's mean divided by the number of micro-batches. The accelerator divides again.
        """
        import torch

        inputs, self._batch = self._batch, {}
        if inputs.get("labels") is None or inputs.get("input_ids") is None:
            raise UserError("RecorderCallback needs batches with input_ids and labels, and a model that makes the loss")
        _refuse_batch(inputs)
        # The model shifts labels by one, so the first label of a row is never predicted.
        predicted = (inputs["labels"][:, 1:] != -100).sum(1)
        items = inputs.get("num_items_in_batch")
        if items is None:
            # The accumulation of this step, which is shorter at the end of an epoch.
            items = predicted.sum() * self._trainer.current_gradient_accumulation_steps
        divisor = self._trainer.accelerator.gradient_accumulation_steps
        batch_loss = loss.detach() / divisor
        self._loss = batch_loss if self._loss is None else self._loss + batch_loss
        # No `float(...)` here: it would wait for the GPU at each micro-batch.
        share = 1 / (torch.as_tensor(items, device=predicted.device) * divisor)
        if self._logits is not None:
            _check_loss(self._logits, inputs["labels"], share, batch_loss)
            self._logits = None  # frees (B, T, vocabulary) numbers
        sample_ids = _sample_ids(inputs)
        self._known.check(sample_ids)
        self._running.micro_batch(sample_ids, predicted * share, predicted)

    def _clipped(self, norm: Tensor | float) -> None:
        self._norm = norm


def _wrap(owner: Any, name: str, after: Any) -> Any:
    """Call `after` each time a method of one object returns: with the loss for `backward`, else with its result.

    Returns:
        A function that restores the method.
    """
    original = getattr(owner, name)

    def wrapped(*arguments: Any, **keywords: Any) -> Any:
        result = original(*arguments, **keywords)
        after(arguments[0] if name == "backward" else result)
        return result

    # On the object, so that deleting it uncovers the class's method again.
    setattr(owner, name, wrapped)
    return lambda: delattr(owner, name)


def _sample_ids(inputs: Mapping[str, Any]) -> Sequence[int]:
    tokens, labels = inputs["input_ids"].cpu().numpy(), inputs["labels"].cpu().numpy()
    attended = inputs.get("attention_mask")
    kept = np.ones(tokens.shape, bool) if attended is None else attended.cpu().numpy().astype(bool)
    return [content_id(row[keep], label[keep] != -100) for row, label, keep in zip(tokens, labels, kept, strict=True)]


def _refuse_batch(inputs: Mapping[str, Any]) -> None:
    """Refuse a batch whose rows are not what their ids say, or that replay would read differently.

    Raises:
        UserError: names what is wrong with it.
    """
    import torch

    tokens, labels = inputs["input_ids"], inputs["labels"]
    attended, positions = inputs.get("attention_mask"), inputs.get("position_ids")
    kept = torch.ones_like(tokens, dtype=torch.bool) if attended is None else attended.bool()
    # Tensors of other names (token_type_ids, images) change the loss, and no record has them.
    problems = {
        f"an input {name}": isinstance(value, torch.Tensor) for name, value in inputs.items() if name not in _INPUTS
    }
    # Not a mask per pair of tokens (4-d), as packed rows have.
    whole = kept.shape == tokens.shape
    problems |= {
        "padding that is not at the end of a row (padding_side 'right' would do)": (
            not whole or bool((kept[:, 1:] & ~kept[:, :-1]).any())
        ),
        "position_ids other than 0, 1, 2, ... (rows that a collator joined)": (
            positions is not None and not bool((positions == torch.arange(tokens.shape[1], device=tokens.device)).all())
        ),
        "labels that are neither the input_ids nor -100": bool(((labels != tokens) & (labels != -100)).any()),
        "labels at its padding": whole and bool((~kept & (labels != -100)).any()),
    }
    for what, is_there in problems.items():
        if is_there:
            raise UserError(
                f"a batch has {what}, which a record does not tell: train on the rows of the streams as they are"
            )


def _check_loss(logits: Tensor, labels: Tensor, share: Tensor, loss: Tensor) -> None:
    """Compare a micro-batch's loss with the token losses that its record gives.

    Raises:
        UserError: the training uses another loss.
    """
    from torch.nn.functional import cross_entropy

    # Labels of -100 are ignored by default; (B, T, V) logits become (B, V, T), as cross_entropy wants them.
    recorded = cross_entropy(logits[:, :-1].detach().float().transpose(1, 2), labels[:, 1:], reduction="sum") * share
    if not math.isclose(float(recorded), float(loss), rel_tol=_LOSS_TOLERANCE):
        raise UserError(
            f"the loss of a micro-batch is {float(loss):.6g}, its predicted tokens give {float(recorded):.6g}: a "
            "compute_loss of its own, an auxiliary loss or a penalty is in it, which replay could not repeat; train "
            "on the token loss alone"
        )


def _precision(trainer: Trainer) -> str:
    """Precision of the trainer's computation: its accelerator decides, which the environment may have set too."""
    return str(trainer.accelerator.mixed_precision)


def _refuse(trainer: Trainer, args: TrainingArguments) -> None:
    """Refuse a trainer that a record could not describe.

    Raises:
        UserError: names what it does.
    """
    refused = {
        "more than one process or GPU": args.world_size > 1 or args.n_gpu > 1,
        "DeepSpeed": bool(args.deepspeed),
        "FSDP": bool(args.fsdp),
        "neftune_noise_alpha, which is random": bool(args.neftune_noise_alpha),
        f"{_precision(trainer)} (use bf16)": _precision(trainer) not in _AUTOCAST,
        "label smoothing": trainer.label_smoother is not None,
        "a loss function of its own (compute_loss_func)": trainer.compute_loss_func is not None,
        "torch.compile": args.torch_compile,
    }
    for what, is_used in refused.items():
        if is_used:
            raise UserError(
                f"RecorderCallback cannot record a Trainer with {what}; train without, or in a loop of yours"
            )
