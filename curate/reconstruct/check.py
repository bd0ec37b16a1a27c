"""Does a described run replay to what was logged? Steps after each checkpoint are repeated and compared.

The first step after a checkpoint needs the right samples, model, loss and precision; the ones after it also the right
optimizer, lr and clipping. A comparison counts only where the samples of another step would have given another loss:
at an untrained model every batch has about the same one.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from decimal import Decimal
from pathlib import Path
from typing import TYPE_CHECKING

from curate.core.errors import UserError
from curate.training.replay import records

if TYPE_CHECKING:
    import polars as pl

    from curate.training.replay import Replay
    from curate.training.task import Batch

_CLEARER = 10  # another step's samples must be so many times further off


@dataclass(frozen=True, kw_only=True)
class Compared:
    """A logged number beside the replayed one.

    Attributes:
        checkpoint: step that the replay began at.
        step: the step.
        what: "loss" or "gradient norm".
        logged: by the training.
        replayed: now.
        agrees: whether they differ by at most the tolerance.
        tells: whether the samples of another step, at the same weights, would have been noticed.
        rounding: how far the log's digits leave the logged number open.
        coarsest: how far they leave any number of its column open, as a share of it.
    """

    checkpoint: int
    step: int
    what: str
    logged: float
    replayed: float
    agrees: bool
    tells: bool
    rounding: float = 0.0
    coarsest: float = 0.0

    @property
    def rounded(self) -> bool:
        """Whether the replayed number, rounded as the log is, would be the logged one."""
        return abs(self.replayed - self.logged) <= 1.01 * self.rounding

    @property
    def line(self) -> str:
        """In words."""
        verdict = "agrees" if self.agrees else "DIFFERS"
        note = "" if self.tells else " (other samples would have given the same)"
        where = f"step {self.step}, from checkpoint {self.checkpoint}"
        return f"{where}: {self.what} logged {self.logged:.6g}, replayed {self.replayed:.6g}: {verdict}{note}"


def compare(replay: Replay, checkpoint: int, state: Path, steps: int) -> list[Compared]:
    """Repeat steps from a checkpoint and compare loss and gradient norm where they were logged.

    Args:
        replay: of the reconstructed run.
        checkpoint: its step.
        state: file of its state.
        steps: how many steps.
    """
    optimizers = replay.restore(checkpoint, state)
    digits = {"loss": Digits.of(replay.run.steps["loss"]), "gradient norm": Digits.of(replay.run.steps["grad_norm"])}
    found = []
    for record in records(replay.run, checkpoint, checkpoint + steps):
        batches = replay.batches(record)
        other = next(records(replay.run, *_other(record.step, replay.run.spec.steps)), None)
        control = math.nan if other is None else batch_loss(replay, replay.batches(other))
        loss, _ = replay.backward(batches, optimizers)
        numbers = (("loss", loss, record.loss), ("gradient norm", replay.gradient_norm(), record.grad_norm))
        for what, replayed, logged in numbers:
            if logged is not None:
                agrees = math.isclose(replayed, logged, rel_tol=replay.tolerance)
                tells = record.loss is not None and telling(control, loss, record.loss)
                found.append(
                    Compared(
                        checkpoint=checkpoint, step=record.step, what=what, logged=logged, replayed=replayed,
                        agrees=agrees, tells=tells, rounding=digits[what].rounding(logged),
                        coarsest=digits[what].coarsest,
                    )
                )  # fmt: skip
        replay.update(record, optimizers)
    return found


@dataclass(frozen=True)
class Digits:
    """How precisely a column of a log was written.

    Attributes:
        decimals: most decimals of a number in it.
        significant: most significant digits.
        coarsest: largest rounding of a number in it, as a share of the number.
    """

    decimals: int = 0
    significant: int = 0
    coarsest: float = 0.0

    @classmethod
    def of(cls, column: pl.Series) -> Digits:
        """The digits of a column; null where nothing was logged."""
        known = [value for value in column.drop_nulls().unique() if math.isfinite(value) and value]
        if not known:
            return cls()
        written = [Decimal(repr(value)).normalize().as_tuple() for value in known]
        digits = cls(
            decimals=max(-int(number.exponent) for number in written),
            significant=max(len(number.digits) for number in written),
        )
        return replace(digits, coarsest=max(digits.rounding(value) / abs(value) for value in known))

    def rounding(self, value: float) -> float:
        """Half a unit of the last digit that a logged number has."""
        leading = math.floor(math.log10(abs(value))) if value and math.isfinite(value) else 0
        return 0.5 * max(10.0**-self.decimals, 10.0 ** (leading + 1 - self.significant))


def telling(control: float, loss: float, logged: float) -> bool:
    """Whether a wrong batch's loss is clearly further from the logged one than the right batch's is."""
    return abs(control - logged) > max(_CLEARER * abs(loss - logged), 1e-5 * abs(logged))


def _other(step: int, steps: int) -> tuple[int, int]:
    """A neighbour of a step, as a range."""
    return (step + 1, step + 2) if step + 1 < steps else (step - 1, step)


def batch_loss(replay: Replay, batches: Sequence[Batch]) -> float:
    """Loss of some micro-batches at the weights that the model has."""
    import torch

    with torch.no_grad():
        return sum(float((replay.task.sample_losses(batch) * batch.weights).sum()) for batch in batches)


def judge(found: Sequence[Compared], tolerance: float, diagnose: Callable[[], Sequence[str]]) -> None:
    """Refuse a description that does not give the logged numbers.

    Args:
        found: all comparisons.
        tolerance: of the description.
        diagnose: looks for single settings that would give them; called where samples are in doubt.

    Raises:
        UserError: nothing could be compared, nothing compared tells anything, or numbers differ.
    """
    if not found:
        raise UserError(
            "no step after a checkpoint has a logged loss: nothing can be checked; give a log with the losses of the "
            "steps that follow the checkpoints, or raise check_steps"
        )
    firsts = [one for one in found if one.step == one.checkpoint]
    wrong = [one for one in found if not one.agrees]
    early = [one for one in wrong if one.step == one.checkpoint]
    if wrong and all(one.rounded for one in wrong):
        raise UserError(_too_coarse(found, wrong, tolerance))
    if early:
        raise UserError(
            f"{len(early)} of {len(firsts)} numbers differ at the first step after a checkpoint ({early[0].line}): "
            f"these are other samples, another loss or another model. {_causes(diagnose())}"
        )
    if wrong:
        raise UserError(
            f"the first step after each checkpoint agrees, but {len(wrong)} of {len(found)} numbers differ later "
            f"({wrong[0].line}): samples and model are right, updates are not. Likely causes: lr (another schedule, "
            "rounded in the log, or log.first_step off by one), clip_norm, optimizer arguments or weight decay groups, "
            "loss scaling"
        )
    if not any(one.tells for one in found):
        raise UserError(
            "all compared numbers agree, but other samples would have given the same: this says nothing about the "
            "order; add a checkpoint of a later step, or log losses with more digits"
        )


_LOOSEST = 0.01  # a larger tolerance would let other mistakes pass


def _too_coarse(found: Sequence[Compared], wrong: Sequence[Compared], tolerance: float) -> str:
    """That the log was rounded too much, and with what settings it can be checked nevertheless."""
    kinds = {one.what for one in wrong}
    said = (
        f"{len(wrong)} of {len(found)} numbers differ from the log by its rounding only ({wrong[0].line}): it leaves "
        f"the {' and '.join(sorted(kinds))} open by up to {max(one.coarsest for one in wrong):.1g} of its size, and "
        f"tolerance is {tolerance:g}. Give a log with {math.ceil(-math.log10(2 * tolerance)) + 1} significant digits"
    )
    enough = _up(max(one.coarsest for one in found))
    if not any(one.tells for one in found):
        return f"{said}: in this one other samples have the same numbers"
    if kinds == {"gradient norm"}:
        return f'{said}, or set log.grad_norm to "", which leaves the norms out'
    if enough <= _LOOSEST:
        return f"{said}, or set tolerance to {enough:g} here and in curate.select (--tolerance {enough:g})"
    return said


def _up(value: float) -> float:
    """The next number with one significant digit, above it by a tenth at least."""
    unit = 10.0 ** math.floor(math.log10(1.1 * value)) if value else 1.0
    return math.ceil(1.1 * value / unit) * unit


def _causes(hints: Sequence[str]) -> str:
    if hints:
        return f"They would agree with {', or with '.join(hints)}: correct the description"
    return (
        "Likely causes: dataset.shuffle_seed, shuffle_algo, shuffle_block_size or num_canonical_nodes, "
        "loader.batch_size, world_size, workers or first_epoch, a restart that `loader.resumed` lacks, the order or "
        "weights of the streams, another version of mosaicml-streaming, log.first_step or the steps of `checkpoints` "
        "off by one, loss.mean and loss.over, a loss that was logged of one rank only, task.autocast, samples that the "
        "trainer packed or cut again (not predownload, cache limits or downloads: they change no order)"
    )
