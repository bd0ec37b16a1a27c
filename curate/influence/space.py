"""The space of the value index: what a sample's gradient at the run's last state is cut to, fitted once for a run.

The next step's influence of a sample is an inner product of its gradient with one direction for each target
(`influence.direction`), so a row `E_z` of few numbers that keeps what gradients differ in serves every target:

    E_z = V^T vec_l( P_o,l^T g_z,l P_i,l )        t = V^T vec_l( P_o,l^T u_l P_i,l )        <g_z, u> ~ <E_z, t>

over the linear layers l. `P` are the leading eigenvectors of a layer's inputs and output gradients, `V` the leading
singular vectors of the rows of some samples (`gradients.subspace`); nothing in them depends on a target. Norms, biases,
token embeddings and the head are left out.

k width, L layers, S = L k^2 numbers before compression, D after it, P parameters, T targets.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from math import ceil
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import polars as pl

from curate.core.arrays import read_arrays, write_arrays
from curate.core.artifacts import MANIFEST, finalize, fingerprint, is_complete, making, read_json
from curate.core.errors import UserError
from curate.gradients.projection import LayerProjection
from curate.influence.current import read_together, step_samples
from curate.influence.draw import draw_measured
from curate.tables import DrawnSamples
from curate.training.samples import samples_fingerprint, usable_samples
from curate.training.task import collate

if TYPE_CHECKING:
    from collections.abc import Sequence

    import dataframely as dy
    import numpy.typing as npt
    from torch import Tensor

    from curate.data.mds import Sample
    from curate.gradients.capture import GradientCapture
    from curate.training.replay import Replay
    from curate.training.run import Run

_log = logging.getLogger(__name__)
_ROW_PASSES = 0.9  # of a forward+backward pass of a sample: what its row costs
_SPACE = "space.npz"
VERSION = 1
"""Of the rules of this module and of `gradients.subspace`: who changes them changes it."""
# Not one that selections use: what they measure is a draw of its own.
_FIT_SEED = 8191


@dataclass(frozen=True, kw_only=True)
class SpaceOptions:
    """How a space is fitted; what was measured beside the defaults: docs/benchmarks.md, "The value index".

    Attributes:
        width: k, numbers that each side of a layer keeps.
        numbers: D; with the scale of a row, a float32, 252 of them are 256 bytes.
        side_samples: samples that the sides of layers are fitted on, some of the others.
        fit_samples: samples that the compression is fitted on: an even part of each domain.
    """

    width: int = 32
    numbers: int = 252
    side_samples: int = 64
    fit_samples: int = 1024


DEFAULT = SpaceOptions()


@dataclass(frozen=True, kw_only=True)
class RowSpace:
    """A fitted space.

    Attributes:
        folder: of the value index.
        fingerprint: identity of the space.
        projections: of each layer, (I, k_i) and (O, k_o).
        compression: (S, D) float32.
        fitted: content ids of the samples that the compression was fitted on, whose rows say nothing of how good it is.
    """

    folder: Path
    fingerprint: str
    projections: Mapping[str, LayerProjection]
    compression: Tensor
    fitted: npt.NDArray[np.int64]

    @property
    def numbers(self) -> int:
        """D."""
        return int(self.compression.shape[1])

    def vectors(self, directions: Tensor, replay: Replay) -> npt.NDArray[np.float32]:
        """What targets ask for, in this space.

        Args:
            directions: (T, P), see `direction.target_directions`.
            replay: of the run; knows the layout of P and how the weights of layers lie.

        Returns:
            (T, D) `t`, whose inner products with rows are directional derivatives of samples.
        """
        import torch

        capture, layout, rows = _capture(replay), replay.layout, []
        for direction in directions:
            parameters = layout.views(direction.cpu())
            rows.append(
                torch.cat(
                    [
                        layer.of_gradient(capture.oriented(name, parameters[capture.parameter_name(name)]))
                        for name, layer in self.projections.items()
                    ]
                )
            )
        vectors: npt.NDArray[np.float32] = (torch.stack(rows) @ self.compression).numpy()
        return vectors


def open_space(run: Run, replay: Replay, options: SpaceOptions = DEFAULT) -> RowSpace:
    """The space of a run's last state; it is fitted where there is none, and the cost is logged before.

    Args:
        run: a finished run.
        replay: of it.
        options: how it is fitted.

    Raises:
        UserError: the model has no linear layer, or a gradient is not finite.
    """
    capture, fit_samples = _capture(replay), _fit_samples(run, options)
    settings = _settings(run, capture, fit_samples, options)
    folder = index_folder(run, settings)
    with making(folder, settings) as missing:
        if missing:
            _log.info(
                "the space of the value index is fitted on %d samples, for about %.0f forward+backward passes",
                len(fit_samples),
                row_passes(run, len(fit_samples) + options.side_samples),
            )
            _write(folder, run, replay, capture, fit_samples, options)
            finalize(folder, "value index", settings, parts=(_SPACE,))
    return _read(folder, settings)


def check_layers(replay: Replay) -> None:
    """Refuse a model that has no layers for a space.

    Raises:
        UserError: it has no trained linear layer beside the head.
    """
    _capture(replay)


def existing_space(run: Run, replay: Replay) -> RowSpace:
    """The space of a run's last state, which must be there.

    Raises:
        UserError: there is none (names the command), or it was made with other settings or another torch (names them).
    """
    settings = _settings(run, _capture(replay), _fit_samples(run, DEFAULT), DEFAULT)
    folder = index_folder(run, settings)
    if is_complete(folder, settings):
        return _read(folder, settings)
    for manifest in sorted((run.folder / "index").glob(f"*/{MANIFEST}")):
        stored = read_json(manifest)["settings"]
        differing = [name for name, value in settings.items() if stored.get(name) != value]
        if "run" not in differing:
            raise UserError(
                f"{manifest.parent} has rows of other {' and '.join(differing)} than would be made now: go back to "
                f"what it was made with ({', '.join(f'{name} {stored.get(name)}' for name in differing)[:200]}), or "
                f"make new rows with python -m curate.embed --run {run.folder}"
            )
    raise UserError(f"run {run.folder} has no value index: make it with python -m curate.embed --run {run.folder}")


def index_folder(run: Run, settings: Mapping[str, Any]) -> Path:
    """Folder of the value index with these settings."""
    return run.folder / "index" / fingerprint(settings)[:8]


def space_passes(run: Run, replay: Replay) -> float:
    """Forward+backward passes of a training batch that fitting the space costs; 0 where it is fitted."""
    fit_samples = _fit_samples(run, DEFAULT)
    settings = _settings(run, _capture(replay), fit_samples, DEFAULT)
    if is_complete(index_folder(run, settings), settings):
        return 0.0
    return row_passes(run, len(fit_samples) + DEFAULT.side_samples)


def row_passes(run: Run, samples: int) -> float:
    """Forward+backward passes of a training batch that the rows of some samples cost."""
    return _ROW_PASSES * samples / step_samples(run)


@contextmanager
def row_capture(space: RowSpace, replay: Replay) -> Iterator[GradientCapture]:
    """Captures rows before compression (B, S) of the replay's model."""
    capture = _capture(replay)
    capture.project_onto(space.projections)
    with capture:
        yield capture


def captured_rows(
    replay: Replay, capture: GradientCapture, samples: Sequence[Sample], compression: Tensor | None = None
) -> Tensor:
    """(B, S) rows of some samples before compression, of the gradient of each one's mean loss, or (B, D) after it.

    Raises:
        UserError: one is not finite (names the sample).
    """
    import torch

    weights = np.ones(len(samples), np.float32)
    batch = collate(samples, weights).to(replay.device)
    replay.task.sample_losses(batch).sum().backward()
    rows = capture.take(torch.from_numpy(weights).to(replay.device))
    if compression is not None:
        rows = rows @ compression
    finite = torch.isfinite(rows).all(dim=1)
    if not finite.all():
        raise UserError(
            f"sample {samples[int((~finite).int().argmax())].sample_id} has a gradient that is not finite at the run's "
            "last state; leave it out of the streams"
        )
    return rows


def _capture(replay: Replay, *, keep: bool = False) -> GradientCapture:
    from curate.gradients.capture import GradientCapture

    try:
        # width 1: the drawn projections are replaced before anything is captured
        return GradientCapture(replay.model, 1, 0, keep=keep, frozen=True)
    except UserError as error:
        raise UserError(
            f"the value index needs trained linear layers beside the head ({error}): do without it, curate.select "
            "values samples by derivatives and n-grams (values.rows false)"
        ) from None


def _fit_samples(run: Run, options: SpaceOptions) -> dy.DataFrame[DrawnSamples]:
    samples = usable_samples(run.unique_samples)
    drawn = draw_measured(samples, ceil(options.fit_samples / samples["domain"].n_unique()), 1, _FIT_SEED)
    # at most half of a domain: the others tell how good the space is for it
    halves = samples.group_by("domain").agg(half=(pl.len() + 1) // 2)
    place = pl.int_range(pl.len()).over("domain")
    kept = drawn.join(halves, on="domain", maintain_order="left").filter(place < pl.col("half"))
    return DrawnSamples.validate(kept.drop("half"))


def _settings(
    run: Run, capture: GradientCapture, fit_samples: dy.DataFrame[DrawnSamples], options: SpaceOptions
) -> dict[str, Any]:
    import torch

    return {
        "run": run.fingerprint,
        **asdict(options),
        "layers": {name: list(sides) for name, sides in capture.features.items()},
        "fitted_on": samples_fingerprint(fit_samples),
        "version": VERSION,
        # its kernels and its linear algebra may change with it
        "torch": torch.__version__,
    }


def _write(
    folder: Path,
    run: Run,
    replay: Replay,
    capture: GradientCapture,
    fit_samples: dy.DataFrame[DrawnSamples],
    options: SpaceOptions,
) -> None:
    import torch

    from curate.gradients.subspace import leading_rows

    replay.model_at(run.spec.steps)
    # every k-th one: the table is by domain, and each domain has its part
    few = fit_samples[:: ceil(len(fit_samples) / options.side_samples)]
    sides = _fit_sides(run, replay, few, options.width)
    projections = {name: LayerProjection(input=sides[name][0], output=sides[name][1]) for name in capture.layers}
    capture.project_onto(projections)
    batches = read_together(run, run.source, fit_samples)
    with capture:
        rows = torch.cat([captured_rows(replay, capture, batch).cpu() for batch in batches])
    compression = leading_rows(rows, options.numbers)
    if compression.shape[1] == 0:
        raise UserError(f"no sample of {run.folder} has a gradient in the linear layers at the run's last state")
    arrays = {"compression": compression.numpy(), "fitted": fit_samples["sample_id"].to_numpy()}
    for name, layer in projections.items():
        arrays |= {f"{name}:input": layer.input.numpy(), f"{name}:output": layer.output.numpy()}
    write_arrays(folder / _SPACE, arrays)


def _fit_sides(run: Run, replay: Replay, samples: pl.DataFrame, width: int) -> dict[str, tuple[Tensor, Tensor]]:
    """The leading directions of each layer's inputs and output gradients."""
    import torch

    from curate.gradients.subspace import SideSketch

    capture = _capture(replay, keep=True)
    sketches = {
        name: tuple(
            SideSketch(size, width, 0, name, side, replay.device)
            for side, size in zip(("input", "output"), sizes, strict=True)
        )
        for name, sizes in capture.features.items()
    }
    with capture:
        for samples_read in read_together(run, run.source, samples):
            batch = collate(samples_read, np.ones(len(samples_read), np.float32)).to(replay.device)
            replay.task.sample_losses(batch).sum().backward()
            for name, calls in capture.take_factors(torch.ones(len(batch))).factors.items():
                for factors in calls:
                    # padding has no gradient: its inputs are part of nobody's row
                    used = (factors[1] != 0).any(dim=-1)
                    for sketch, factor in zip(sketches[name], factors, strict=True):
                        sketch.add(factor[used])
    try:
        return {name: (inputs.leading(), outputs.leading()) for name, (inputs, outputs) in sketches.items()}
    except ValueError:
        raise UserError(
            f"a gradient of the samples {samples['sample_id'].to_list()[:5]} ... is not finite at the last state of "
            f"{run.folder}: the training had diverged"
        ) from None


def _read(folder: Path, settings: Mapping[str, Any]) -> RowSpace:
    import torch

    arrays = read_arrays(folder / _SPACE)
    projections = {
        name: LayerProjection(
            input=torch.from_numpy(arrays[f"{name}:input"]), output=torch.from_numpy(arrays[f"{name}:output"])
        )
        for name in settings["layers"]
    }
    return RowSpace(
        folder=folder,
        fingerprint=fingerprint(settings),
        projections=projections,
        compression=torch.from_numpy(arrays["compression"]),
        fitted=arrays["fitted"],
    )
