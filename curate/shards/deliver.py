"""The next stage's data, in the forms that were asked for, read back after it is written."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from curate.shards.check import check_filter, check_reweight, check_schedule
from curate.shards.write import SCHEDULE, STREAMS, write_filter, write_reweight, write_schedule

if TYPE_CHECKING:
    from curate.mixture.record import Mixture
    from curate.shards.plan import Plan
    from curate.trajectory.run import Run

Mode = Literal["reweight", "filter", "both"]


def deliver(
    folder: Path,
    run: Run,
    mixture: Mixture,
    plan: Plan,
    *,
    mode: Mode,
    scheduled: bool,
    seed: int,
    shard_bytes: int,
) -> dict[str, Path]:
    """Write `streams.yaml`, MDS folders, or both; with phases a `schedule.yaml` of each.

    Args:
        folder: where to.
        run: the streams, their columns and the tokenizer.
        mixture: samples of each domain and phase.
        plan: which samples filtered data holds.
        mode: the forms.
        scheduled: whether the mixture's phases are served one after the other.
        seed: of the order of filtered samples.
        shard_bytes: size limit of a shard.

    Returns:
        Form -> the file or folder that a loader opens.

    Raises:
        UserError: what was written does not hold what the mixture says.
    """
    streams = {domain: stream.folder for domain, stream in run.streams.items()}
    written = {}
    if mode in ("reweight", "both"):
        path = written["reweight"] = folder / (SCHEDULE if scheduled else STREAMS)
        if scheduled:
            write_schedule(path, {name: str(place.resolve()) for name, place in streams.items()}, mixture.phases)
            check_schedule(path, streams, mixture)
        else:
            write_reweight(path, streams, {name: part.samples for name, part in mixture.domains.items()})
            check_reweight(path, streams, mixture)
    if mode in ("filter", "both"):
        mds = written["filter"] = folder / "mds"
        write_filter(mds, run.streams, plan, seed=seed, shard_bytes=shard_bytes)
        check_filter(mds, mixture, run.spec.columns)
        if scheduled:
            written["filter"] = mds / SCHEDULE
            write_schedule(written["filter"], {name: name for name in streams}, mixture.phases)
            check_schedule(written["filter"], {name: mds / name for name in streams}, mixture)
        if run.spec.tokenizer is not None:
            shutil.copyfile(run.spec.tokenizer, mds / "tokenizer.json")
    return written
