"""What a training must be for a replay to repeat it, and what its optimizers do, seen from outside."""

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
    """Hold the parameters of a model against those that its Hugging Face config gives; nothing is allocated.

    Raises:
        UserError: it is another model.
    """
    import torch

    if spec.hf_config is None:  # a factory may do anything
        return
    with torch.random.fork_rng(devices=[]), torch.device("meta"):
        rebuilt = all_parameters(build_model(spec))
    found = {name: tuple(parameter.shape) for name, parameter in all_parameters(model).items()}
    wanted = {name: tuple(parameter.shape) for name, parameter in rebuilt.items()}
    differing = sorted(name for name in {*found, *wanted} if found.get(name) != wanted.get(name))
    if differing:
        name = differing[0]
        here, there = found.get(name, "missing"), wanted.get(name, "missing")
        raise UserError(
            f"the model that is trained is not that of {spec.hf_config}: {name} is {here} here, {there} there; correct "
            "the config, or give model.factory (adapters such as LoRA)"
        )


class OptimizerWatch:
    """Hooks that PyTorch calls after every `optimizer.step()`; they change nothing and wait for no device.

    A GradScaler that finds an infinity does not call it, or hands a fused optimizer the tensor `found_inf`.

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
        self._steps: list[list[bool | Tensor]] = [[] for _ in optimizers]
        self._handles = [
            optimizer.register_step_post_hook(self._note(index)) for index, optimizer in enumerate(optimizers)
        ]
        self._recorded = self._skipped = False  # whether a step has ended, and one without an update

    def begin(self) -> None:
        """A step begins.

        Raises:
            UserError: an optimizer has stepped since the last one ended.
        """
        if self._recorded and any(self._steps):
            raise UserError(
                "optimizer.step() was called between end_step and begin_step, so the record would lack it; call "
                "end_step after it"
            )
        self._steps = [[] for _ in self._optimizers]

    def end(self, step: int, updated: bool | None) -> list[dict[str, Any]]:
        """A step ends: the fields of `GroupSettings` of every group; `updated` may be a tensor.

        Args:
            step: its number.
            updated: whether an update was taken; None: what the hooks saw.

        Raises:
            UserError: an optimizer stepped twice or although it is said that it did not, or the groups have changed.
        """
        taken, self._recorded = self._steps, True
        self._steps = [[] for _ in self._optimizers]
        if any(len(each) > 1 for each in taken):
            raise UserError(
                f"optimizer.step() was called {max(map(len, taken))} times in step {step}; record every update as a "
                "step of its own"
            )
        if updated is False and any(each == [True] for each in taken):
            raise UserError(f"end_step was told that step {step} took no update, but optimizer.step() was called in it")
        self._check_groups(step)
        seen = [each[0] if each else False for each in taken] if updated is None else [updated] * len(taken)
        if not self._skipped and not any(took is not False for took in seen):
            self._skipped = True
            _log.warning("step %d took no update, so its samples get value 0; later ones are not said", step)
        return [
            vars(GroupSettings.read(type(optimizer).__name__, group)) | {"updated": took}
            for optimizer, took in zip(self._optimizers, seen, strict=True)
            for group in optimizer.param_groups
        ]

    def close(self) -> None:
        """Remove the hooks."""
        for handle in self._handles:
            handle.remove()

    def _note(self, index: int) -> Any:
        def after_step(optimizer: Optimizer, *_: Any) -> None:
            infinite = getattr(optimizer, "found_inf", None)  # of a fused optimizer under a GradScaler
            self._steps[index].append(True if infinite is None else infinite == 0)

        return after_step

    def _now_trained(self) -> list[list[int]]:
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
    """Looks at the model's buffers before and after a step: it may leave nothing in them for the next one.

    Args:
        model: before the step.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._before = {name: buffer.detach().clone() for name, buffer in model.named_buffers()}

    def check(self) -> None:
        """After the step.

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
    names = {id(parameter): name for name, parameter in all_parameters(model).items()}
    trained = [[p for p in group["params"] if p.requires_grad] for _, group in groups_of(optimizers)]
    foreign = [p for group in trained for p in group if id(p) not in names]
    if foreign:
        raise UserError(
            f"an optimizer trains a parameter of shape {tuple(foreign[0].shape)} that is not the model's, so replay "
            "could not rebuild it; make it a part of the model, or train it with an optimizer that is not recorded"
        )
    held = {id(p) for group in trained for p in group}
    left = [n for n, p in all_parameters(model).items() if p.requires_grad and id(p) not in held]
    if left:
        raise UserError(
            f"{left[0]} and {len(left) - 1} more parameters need gradients but are in no optimizer; freeze them with "
            "requires_grad_(False), or give them to an optimizer before recording"
        )
    return [[names[id(p)] for p in group] for group in trained]
