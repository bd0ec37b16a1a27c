"""Checks that a replay can repeat a training, before it begins; and hooks that see what its optimizers do."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from curate.core.errors import UserError
from curate.optimizers.settings import GroupSettings, refuse_unsupported, refuse_variant
from curate.training.model import all_parameters, refuse_random, refuse_unwhole, unwrapped_name
from curate.training.task import build_model

if TYPE_CHECKING:
    from torch import Tensor, nn
    from torch.optim import Optimizer

    from curate.training.task import ModelSpec

_log = logging.getLogger(__name__)


def check_replayable(model: nn.Module, optimizers: Sequence[Optimizer]) -> None:
    """Refuse before training what replay could not repeat after it.

    Raises:
        UserError: randomness, weights that are sharded or not float32, sparse gradients, or optimizers that are not
            supported.
    """
    refuse_random(model)
    refuse_unwhole(model)
    refuse_unsupported(optimizers)
    sparse = [name for name, module in model.named_modules() if getattr(module, "sparse", False) is True]
    if sparse:
        raise UserError(f"{sparse[0]} has sparse gradients, which cannot be replayed; build it with sparse=False")


def check_rebuilt(spec: ModelSpec, model: nn.Module) -> None:
    """Compare the parameters of a model with those that its Hugging Face config gives; nothing is allocated.

    Raises:
        UserError: it is another model.
    """
    import torch

    # a factory may read files or need the device, so it is not run for a check
    if spec.hf_config is None:
        return
    # fork_rng: initialisation draws numbers, and recording must change no number of the training
    with torch.random.fork_rng(devices=[]), torch.device("meta"):
        rebuilt = all_parameters(build_model(spec))
    trained_shapes = {name: tuple(parameter.shape) for name, parameter in all_parameters(model).items()}
    rebuilt_shapes = {name: tuple(parameter.shape) for name, parameter in rebuilt.items()}
    names = {*trained_shapes, *rebuilt_shapes}
    differing = sorted(name for name in names if trained_shapes.get(name) != rebuilt_shapes.get(name))
    if differing:
        name = differing[0]
        here, there = trained_shapes.get(name, "missing"), rebuilt_shapes.get(name, "missing")
        raise UserError(
            f"the model that is trained is not that of {spec.hf_config}: {name} is {here} here, {there} there; correct "
            "the config, or give model.factory (adapters such as LoRA)"
        )


class OptimizerWatch:
    """Hooks that PyTorch calls after every `optimizer.step()`; they change nothing and wait for no device.

    A GradScaler that finds an infinity does not call `step`, or hands a fused optimizer the tensor `found_inf`.

    Args:
        optimizers: of the training.
        model: whose parameters they hold.

    Attributes:
        names: of the parameters that each group trains.

    Raises:
        UserError: a parameter would be trained that no optimizer holds, or one that is not the model's.
    """

    def __init__(self, optimizers: Sequence[Optimizer], model: nn.Module) -> None:
        self._optimizers = optimizers
        self.names = _group_names(optimizers, model)
        self._trained = self._now_trained()
        # per optimizer, one entry for each call of its `step` since the step began: whether it updated
        self._steps: list[list[bool | Tensor]] = [[] for _ in optimizers]
        self._handles = [
            optimizer.register_step_post_hook(self._note(index)) for index, optimizer in enumerate(optimizers)
        ]
        # whether a step has ended, and whether one took no update
        self._recorded = self._skipped = False

    def begin(self) -> None:
        """Begin a step.

        Raises:
            UserError: an optimizer has stepped since the last one ended.
        """
        # before the first step an optimizer may step freely: a warm-up, or a restored checkpoint
        if self._recorded and any(self._steps):
            raise UserError(
                "optimizer.step() was called between end_step and begin_step, so the record would lack it; call "
                "end_step after it"
            )
        self._steps = [[] for _ in self._optimizers]

    def end(self, step: int, updated: bool | None) -> list[dict[str, Any]]:
        """End a step.

        Args:
            step: its number.
            updated: whether an update was taken; None: what the hooks saw.

        Returns:
            The fields of `GroupSettings` of every group; `updated` may be a tensor on the device.

        Raises:
            UserError: an optimizer stepped twice, or stepped although `updated` is False, or the groups have changed.
        """
        calls, self._recorded = self._steps, True
        self._steps = [[] for _ in self._optimizers]
        if any(len(outcomes) > 1 for outcomes in calls):
            raise UserError(
                f"optimizer.step() was called {max(map(len, calls))} times in step {step}; record every update as a "
                "step of its own"
            )
        if updated is False and any(outcomes == [True] for outcomes in calls):
            raise UserError(f"end_step was told that step {step} took no update, but optimizer.step() was called in it")
        self._check_groups(step)
        seen = [outcomes[0] if outcomes else False for outcomes in calls]
        updates = seen if updated is None else [updated] * len(calls)
        # `is not False`: the truth of a tensor would wait for the device
        if not self._skipped and not any(update is not False for update in updates):
            self._skipped = True
            _log.warning("step %d took no update, so its samples get value 0; later ones are not reported", step)
        return [
            vars(GroupSettings.read(type(optimizer).__name__, group)) | {"updated": update}
            for optimizer, update in zip(self._optimizers, updates, strict=True)
            for group in optimizer.param_groups
        ]

    def close(self) -> None:
        """Remove the hooks."""
        for handle in self._handles:
            handle.remove()

    def _note(self, index: int) -> Any:
        """The hook of one optimizer."""

        def after_step(optimizer: Optimizer, *_: Any) -> None:
            # a GradScaler gives it to fused optimizers, whose kernel then skips the update without the host knowing
            found_inf = getattr(optimizer, "found_inf", None)
            self._steps[index].append(True if found_inf is None else found_inf == 0)

        return after_step

    def _now_trained(self) -> list[list[int]]:
        """Identities of the parameters that each group trains now."""
        return [[id(p) for p in group["params"] if p.requires_grad] for _, group in groups_of(self._optimizers)]

    def _check_groups(self, step: int) -> None:
        for name, group in groups_of(self._optimizers):
            refuse_variant(name, group)
        if self._now_trained() != self._trained:
            raise UserError(
                f"the parameters that the optimizers train changed before the end of step {step} (a group was added, "
                "or a parameter frozen or unfrozen), and a run trains the same ones throughout; end it there and "
                "record the rest as a stage of its own"
            )


class BufferWatch:
    """Compares the model's buffers before and after a step: a step must leave nothing in them for the next one.

    Args:
        model: before the step.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._before = {name: buffer.detach().clone() for name, buffer in model.named_buffers()}

    def check(self) -> None:
        """Compare them after the step.

        Raises:
            UserError: names the buffer that changed.
        """
        for name, buffer in self._model.named_buffers():
            if name not in self._before or not buffer.equal(self._before[name]):
                raise UserError(
                    f"{unwrapped_name(name)} changed in a forward pass: the model keeps state from batch to batch, "
                    "which replay could not repeat for single samples; train without it"
                )


def groups_of(optimizers: Sequence[Optimizer]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Every parameter group, with the class name of its optimizer."""
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            yield type(optimizer).__name__, group


def _group_names(optimizers: Sequence[Optimizer], model: nn.Module) -> list[list[str]]:
    """Names of the parameters that each group trains, see `OptimizerWatch`."""
    names = {id(parameter): name for name, parameter in all_parameters(model).items()}
    # frozen ones may stay in a group: torch skips them
    trained = [[p for p in group["params"] if p.requires_grad] for _, group in groups_of(optimizers)]
    foreign = [p for group in trained for p in group if id(p) not in names]
    if foreign:
        raise UserError(
            f"an optimizer trains a parameter of shape {tuple(foreign[0].shape)} that is not the model's, so replay "
            "could not rebuild it; make it a part of the model, or train it with an optimizer that is not recorded"
        )
    # a parameter with gradients but no optimizer counts in the clip norm, which replay could not repeat
    held = {id(p) for group in trained for p in group}
    without_optimizer = [n for n, p in all_parameters(model).items() if p.requires_grad and id(p) not in held]
    if without_optimizer:
        raise UserError(
            f"{without_optimizer[0]} and {len(without_optimizer) - 1} more parameters need gradients but are in no "
            "optimizer; freeze them with requires_grad_(False), or give them to an optimizer before recording"
        )
    return [[names[id(p)] for p in group] for group in trained]
