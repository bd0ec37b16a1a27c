"""Does a described run replay to what was logged? Steps after each checkpoint are repeated and compared.

The first step after a checkpoint needs the right samples, model, loss and precision; later steps also need the right
optimizer, lr and clipping. A comparison counts only where the samples of another step would have given another loss:
an untrained model has about the same loss on every batch.
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

# Another step's samples must be so many times further from the log: kernels and hardware differ by far less, and a
# wrong batch of a trained model by far more.
_CLEARER = 10


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
        rounding: how far the digits of the log leave the logged number open.
        coarsest: how far they leave any number of its column open, as a share of that number.
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
        # 1.01: a number on the border of two roundings may lie beyond half a unit by its own float error.
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
    comparisons = []
    for record in records(replay.run, checkpoint, checkpoint + steps):
        batches = replay.batches(record)
        # The control: what the log would have held, had the order of samples been off by one step.
        other = next(records(replay.run, *_neighbour(record.step, replay.run.spec.steps)), None)
        control = math.nan if other is None else batch_loss(replay, replay.batches(other))
        loss, _ = replay.backward(batches, optimizers)
        numbers = (("loss", loss, record.loss), ("gradient norm", replay.gradient_norm(), record.grad_norm))
        for what, replayed, logged in numbers:
            if logged is not None:
                # By the loss for the norm too: a control's norm would cost a backward pass.
                tells = record.loss is not None and telling(control, loss, record.loss)
                comparisons.append(
                    Compared(
                        checkpoint=checkpoint,
                        step=record.step,
                        what=what,
                        logged=logged,
                        replayed=replayed,
                        agrees=math.isclose(replayed, logged, rel_tol=replay.tolerance),
                        tells=tells,
                        rounding=digits[what].rounding(logged),
                        coarsest=digits[what].coarsest,
                    )
                )
        # After the comparison: the norm above is of the gradient before clipping, which `update` scales in place.
        replay.update(record, optimizers)
    return comparisons


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
        logged = [value for value in column.drop_nulls().unique() if math.isfinite(value) and value]
        if not logged:
            return cls()
        # repr is the shortest text that gives the float back: the digits that the log had, without trailing zeros.
        written = [Decimal(repr(value)).normalize().as_tuple() for value in logged]
        # The most of the whole column: 2.5 in a log of "%.4f" was 2.5000, and one number alone does not show it.
        digits = cls(
            decimals=max(-int(number.exponent) for number in written),
            significant=max(len(number.digits) for number in written),
        )
        return replace(digits, coarsest=max(digits.rounding(value) / abs(value) for value in logged))

    def rounding(self, value: float) -> float:
        """Half a unit of the last digit that a logged number has."""
        leading = math.floor(math.log10(abs(value))) if value and math.isfinite(value) else 0
        # A log has fixed decimals (%.4f) or fixed significant digits (%.4g); the coarser one holds for this number.
        return 0.5 * max(10.0**-self.decimals, 10.0 ** (leading + 1 - self.significant))


def telling(control: float, loss: float, logged: float) -> bool:
    """Whether a wrong batch's loss is clearly further from the logged one than the right batch's is."""
    # The floor: where loss and log agree to the bit, ten times their difference is 0, and any control would be clear.
    return abs(control - logged) > max(_CLEARER * abs(loss - logged), 1e-5 * abs(logged))


def _neighbour(step: int, steps: int) -> tuple[int, int]:
    """A neighbour of a step, as a range."""
    return (step + 1, step + 2) if step + 1 < steps else (step - 1, step)


def batch_loss(replay: Replay, batches: Sequence[Batch]) -> float:
    """Loss of some micro-batches at the weights that the model has."""
    import torch

    with torch.no_grad():
        return sum(float((replay.task.sample_losses(batch) * batch.weights).sum()) for batch in batches)


def judge(comparisons: Sequence[Compared], tolerance: float, diagnose: Callable[[], Sequence[str]]) -> None:
    """Refuse a description that does not give the logged numbers.

    Args:
        comparisons: all of them.
        tolerance: of the description.
        diagnose: looks for single settings that would give them; called where samples are in doubt.

    Raises:
        UserError: nothing could be compared, no comparison tells anything, or numbers differ.
    """
    if not comparisons:
        raise UserError(
            "no step after a checkpoint has a logged loss: nothing can be checked; give a log with the losses of the "
            "steps that follow the checkpoints, or raise check_steps"
        )
    firsts = [comparison for comparison in comparisons if comparison.step == comparison.checkpoint]
    wrong = [comparison for comparison in comparisons if not comparison.agrees]
    wrong_firsts = [comparison for comparison in wrong if comparison.step == comparison.checkpoint]
    # Rounding first: it explains every difference, and the advice below would send a user after no mistake.
    if wrong and all(comparison.rounded for comparison in wrong):
        raise UserError(_too_coarse(comparisons, wrong, tolerance))
    if wrong_firsts:
        raise UserError(
            f"{len(wrong_firsts)} of {len(firsts)} numbers differ at the first step after a checkpoint "
            f"({wrong_firsts[0].line}): these are other samples, another loss or another model. {_causes(diagnose())}"
        )
    if wrong:
        raise UserError(
            f"the first step after each checkpoint agrees, but {len(wrong)} of {len(comparisons)} numbers differ later "
            f"({wrong[0].line}): samples and model are right, updates are not. Likely causes: lr (another schedule, "
            "rounded in the log, or log.first_step off by one), clip_norm, optimizer arguments or weight decay groups, "
            "loss scaling"
        )
    if not any(comparison.tells for comparison in comparisons):
        raise UserError(
            "all compared numbers agree, but other samples would have given the same: this says nothing about the "
            "order; add a checkpoint of a later step, or log losses with more digits"
        )


_LOOSEST = 0.01  # a larger tolerance would let other mistakes pass


def _too_coarse(comparisons: Sequence[Compared], wrong: Sequence[Compared], tolerance: float) -> str:
    """The message that the log was rounded too much, with the settings that would still allow a check."""
    quantities = {comparison.what for comparison in wrong}
    coarsest = max(comparison.coarsest for comparison in wrong)
    message = (
        f"{len(wrong)} of {len(comparisons)} numbers differ from the log by its rounding only ({wrong[0].line}): it "
        f"leaves the {' and '.join(sorted(quantities))} open by up to {coarsest:.1g} of its size, and tolerance is "
        f"{tolerance:g}. Give a log with {math.ceil(-math.log10(2 * tolerance)) + 1} significant digits"
    )
    # Of all, not of the wrong ones: the tolerance that is proposed must hold for every logged number.
    sufficient = _round_up(max(comparison.coarsest for comparison in comparisons))
    if not any(comparison.tells for comparison in comparisons):
        return f"{message}: in this one other samples have the same numbers"
    if quantities == {"gradient norm"}:
        return f'{message}, or set log.grad_norm to "", which leaves the norms out'
    if sufficient <= _LOOSEST:
        return f"{message}, or set tolerance to {sufficient:g} here and in curate.select (--tolerance {sufficient:g})"
    return message


def _round_up(value: float) -> float:
    """The next number with one significant digit, above it by a tenth at least."""
    unit = 10.0 ** math.floor(math.log10(1.1 * value)) if value else 1.0
    return math.ceil(1.1 * value / unit) * unit


def _causes(hints: Sequence[str]) -> str:
    # Settings that were tried and fit, or else all that could be wrong, the likely ones first.
    if hints:
        return f"They would agree with {', or with '.join(hints)}: correct the description"
    return (
        "Likely causes: dataset.shuffle_seed, shuffle_algo, shuffle_block_size or num_canonical_nodes, "
        "loader.batch_size, world_size, workers or first_epoch, a restart that `loader.resumed` lacks, the order or "
        "weights of the streams, another version of mosaicml-streaming, log.first_step or the steps of `checkpoints` "
        "off by one, loss.mean and loss.over, a loss that was logged of one rank only, task.autocast, samples that the "
        "trainer packed or cut again (not predownload, cache limits or downloads: they change no order)"
    )
