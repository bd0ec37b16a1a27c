"""Read back what was written and compare it with the mixture; a difference is an error, never a rounding."""

from collections.abc import Mapping
from pathlib import Path

from curate.core.errors import UserError
from curate.core.reading import read_yaml
from curate.data.mds import Columns, MdsStream
from curate.data.phases import load_schedule
from curate.mixture.record import Mixture


def check_samples(folder: Path, mixture: Mixture, columns: Columns | None = None) -> None:
    """Count samples and stored tokens of every domain's folder, and of the folder that joins them.

    Raises:
        UserError: a shard is corrupted, or a count differs from the mixture's.
    """
    for name, domain in mixture.domains.items():
        if domain.samples:
            _compare(folder / name, (domain.samples, domain.stored_tokens), columns)
        # a folder that should not be there would be served by a loader that lists folders
        elif (folder / name).exists():
            raise UserError(f"{folder / name} exists, the mixture has no sample of {name}; write the data again")
    _compare(folder, (mixture.samples, mixture.stored_tokens), columns)


def _compare(folder: Path, expected: tuple[int, int], columns: Columns | None) -> None:
    stream = MdsStream(folder, columns)
    stored = (len(stream), sum(len(stream[index].tokens) for index in range(len(stream))))
    if stored != expected:
        raise UserError(
            f"{folder} holds {stored[0]:,} samples and {stored[1]:,} tokens, the mixture says {expected[0]:,} and "
            f"{expected[1]:,}; delete it and select again"
        )


def check_weights(path: Path, streams: Mapping[str, Path], mixture: Mixture) -> None:
    """Compare `choose` of every stream in `streams.yaml` with the mixture's samples, and open every stream.

    Tokens follow from samples where the samples of a domain have one length.

    Raises:
        UserError: a stream is missing or corrupted, or a count differs.
    """
    written = {Path(entry["local"]): entry["choose"] for entry in read_yaml(path)}
    expected = {streams[name].resolve(): domain.samples for name, domain in mixture.domains.items() if domain.samples}
    if written != expected:
        raise UserError(f"{path} holds {written}, the mixture says {expected}; delete it and select again")
    for folder in written:
        MdsStream(folder)


def check_schedule(path: Path, streams: Mapping[str, Path], mixture: Mixture) -> None:
    """Compare start and samples of every phase in `schedule.yaml` with the mixture's, and open every stream.

    Raises:
        UserError: a stream is missing or corrupted, or a count differs.
    """
    schedule = load_schedule(path)
    names = {str(folder.resolve()): name for name, folder in streams.items()}
    written = [
        (entry.start_sample, {names[stream.local]: stream.choose for stream in entry.streams})
        for entry in (schedule.entries if schedule else ())
    ]
    expected = [
        (phase.start_sample, {name: count for name, count in phase.domains.items() if count})
        for phase in mixture.phases
    ]
    if written != expected:
        raise UserError(f"{path} holds {written}, the mixture says {expected}; delete it and select again")
    for domain in {name for _, domains in expected for name in domains}:
        MdsStream(streams[domain])
