"""The next stage's data, in the forms that were asked for, read back after it is written."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from curate.output.check import check_samples, check_schedule, check_weights
from curate.output.write import write_samples, write_schedule, write_weights

if TYPE_CHECKING:
    from curate.mixture.record import Mixture
    from curate.output.layout import SelectionFolder
    from curate.output.plan import SamplePlan
    from curate.training.run import RunSpec
    from curate.training.source import SampleSource

Mode = Literal["samples", "weights", "both"]


def export(
    folder: SelectionFolder,
    source: SampleSource,
    spec: RunSpec,
    mixture: Mixture,
    chosen: SamplePlan,
    *,
    mode: Mode,
    scheduled: bool,
    seed: int,
    shard_bytes: int,
) -> dict[str, Path]:
    """Write `streams.yaml`, MDS folders, or both; with phases a `schedule.yaml` of each.

    Args:
        folder: where to.
        source: the streams.
        spec: of the run: columns and tokenizer.
        mixture: samples of each domain and phase.
        chosen: which samples the MDS folders hold.
        mode: the forms.
        scheduled: whether the mixture's phases are served one after the other.
        seed: of the order of samples.
        shard_bytes: size limit of a shard.

    Returns:
        Form -> the file or folder that a loader opens.

    Raises:
        UserError: what was written does not hold what the mixture says.
    """
    # each form is read back where it is written: an error leaves nothing sealed
    written = {}
    if mode in ("weights", "both"):
        path = written["weights"] = folder.weights_for(scheduled=scheduled)
        if scheduled:
            write_schedule(
                path, {name: str(stream.resolve()) for name, stream in source.folders.items()}, mixture.phases
            )
            check_schedule(path, source.folders, mixture)
        else:
            write_weights(path, source.folders, {name: domain.samples for name, domain in mixture.domains.items()})
            check_weights(path, source.folders, mixture)
    if mode in ("samples", "both"):
        write_samples(folder.samples, source.streams, chosen, seed=seed, shard_bytes=shard_bytes)
        check_samples(folder.samples, mixture, spec.columns)
        path = written["samples"] = folder.samples_for(scheduled=scheduled)
        if scheduled:
            # relative: the folders were just written beside it, and may be moved together
            write_schedule(path, {name: name for name in source.folders}, mixture.phases)
            check_schedule(path, {name: folder.samples / name for name in source.folders}, mixture)
        if spec.tokenizer is not None:
            # so that the data can be read, and curate run on the next stage, without the old run
            shutil.copyfile(spec.tokenizer, folder.samples / "tokenizer.json")
    return written
