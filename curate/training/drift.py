"""How far a replayed state is from the one that training stored there.

Losses and gradient norms are those of the state before an update, so they say nothing about the last one, nor about an
update that was small. The parameters say all: the distance between replayed and stored ones, relative to how far the
training moved them since the snapshot before.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from curate.core.errors import UserError
from curate.training.model import all_parameters
from curate.training.snapshots import is_estimated, read_tensors

if TYPE_CHECKING:
    from torch import nn

    from curate.training.run import Run

# drift that is allowed, in tolerances of losses and norms; measured, see `check_drift`
_TOLERANCES = 10


def drift(run: Run, step: int, model: nn.Module) -> float:
    """`|replayed - stored| / |stored - stored before|` over the trained parameters; 0 where nothing differs.

    Args:
        run: the run.
        step: where the model is; it has a snapshot, and there is one before it.
        model: in the replayed state.
    """
    parameters = all_parameters(model)
    trained = [name for group in run.spec.groups for name in group]
    # generators: one tensor of each snapshot is in memory at a time
    stored = read_tensors(run.snapshot(step), "model.", trained)
    before = read_tensors(run.snapshot(run.snapshot_before(step - 1)), "model.", trained)
    apart = moved = 0.0
    for name, now, earlier in zip(trained, stored, before, strict=True):
        # float64: the squares of differences of a millionth would drown in a float32 sum over all weights
        apart += float((parameters[name].detach().cpu().double() - now.double()).square().sum())
        moved += float((now.double() - earlier.double()).square().sum())
    # first, because a stretch without updates moves nothing and may still be repeated exactly
    if apart == 0:
        return 0.0
    return float("inf") if moved == 0 else float((apart / moved) ** 0.5)


def check_drift(run: Run, step: int, model: nn.Module, tolerance: float) -> None:
    """Compare a replayed state with the snapshot of its step.

    The limit is ten times the tolerance of losses and norms. Measured: the same machine 0, batches split into single
    samples 1e-6 at most, a run in bfloat16 replayed in float32 1e-2 in its first steps and 1e-3 later (its gradient
    norms differ by 4e-3); one of 50 updates left out 2e-2 at least. Where a snapshot was estimated there is no limit.

    Args:
        run: the run.
        step: see `drift`.
        model: see `drift`.
        tolerance: of losses and gradient norms, relative.

    Raises:
        UserError: it is further off than rounding explains, or not finite.
    """
    first = run.snapshot_before(step - 1)
    # a run that was rebuilt from checkpoints estimates its moments, so its updates are only near those of the training
    if is_estimated(run.snapshot(first)) or is_estimated(run.snapshot(step)):
        return
    relative_drift = drift(run, step, model)
    # `not <=` and not `>`: NaN is refused too
    if not relative_drift <= _TOLERANCES * tolerance:
        raise UserError(
            f"replay of steps {first} to {step} ends {relative_drift:.2g} of their way off the snapshot of step "
            f"{step}, {_TOLERANCES * tolerance:g} is allowed: likely causes are gradients that were changed beside "
            "clip_grad_norm_ (clip_grad_value_, noise), weights that were changed without optimizer.step() (averaging, "
            "projection), or snapshots changed since; on other hardware raise --tolerance"
        )
