"""Write the next stage's data: `streams.yaml` over the streams there are, or new MDS folders."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
from tqdm import tqdm

from curate.core.errors import UserError
from curate.core.escape import python_string
from curate.core.reading import dump_yaml
from curate.core.rng import generator
from curate.core.writing import atomic_write
from curate.data.mds import COLUMNS, MdsStream, as_sample, merge_indexes, write_stream
from curate.mixture.record import Phase
from curate.output.layout import DROPPED, SCHEDULE
from curate.output.plan import SamplePlan


def write_weights(path: Path, streams: Mapping[str, Path], samples: Mapping[str, int]) -> None:
    """Write the arguments of one `Stream` per domain, to be loaded in one line.

        StreamingDataset(streams=[Stream(**stream) for stream in yaml.safe_load(open(path))], batch_size=...)

    `choose` is an integer, so an epoch has exactly that many samples at world size 1 (at a larger one streaming repeats
    or leaves out a few samples so that every rank has as many): each sample of the domain `choose // n` times, and a
    random part of them once more. A domain without samples has no entry.

    Args:
        path: the YAML file; the streams' paths in it are absolute.
        streams: MDS folder of each domain.
        samples: samples per epoch and domain.
    """
    # absolute: the file is read from wherever the trainer runs
    entries = [
        {"local": str(streams[name].resolve()), "choose": samples[name]} for name in sorted(samples) if samples[name]
    ]
    with atomic_write(path) as temporary:
        temporary.write_text(dump_yaml(entries), encoding="utf-8")


def write_schedule(path: Path, streams: Mapping[str, str], phases: Sequence[Phase]) -> None:
    """Write the phases of a mixture as a schedule; see `curate.data.phases`.

    Args:
        path: the YAML file.
        streams: what stands as `local` of each domain: an absolute folder, or one relative to the file.
        phases: with samples by domain.
    """
    entries = [
        {
            "start_sample": phase.start_sample,
            "streams": [{"local": streams[name], "choose": count} for name, count in phase.domains.items() if count],
        }
        for phase in phases
    ]
    with atomic_write(path) as temporary:
        temporary.write_text(
            "# start_sample counts samples from the start of the stage; served by curate.open_dataset\n"
            + dump_yaml(entries),
            encoding="utf-8",
        )


def write_samples(
    folder: Path, streams: Mapping[str, MdsStream], plan: SamplePlan, *, seed: int, shard_bytes: int
) -> None:
    """Write `folder/<domain>/` with every planned sample as often as planned, in random order.

    All columns are as stored; where a stream's shards differ in type, see `columns_of`.

    Each sub-folder is a valid MDS dataset; `folder/index.json` joins them, so `StreamingDataset(local=folder)` delivers
    the mixture. `folder/dropped.parquet` says which samples were left out and why. The folder appears at once when it
    is complete; written again it has the same bytes. Memory: one sample and the order of one domain.

    Args:
        folder: replaced as a whole.
        streams: the stream of each domain of the plan.
        plan: which sample how often.
        seed: of the order.
        shard_bytes: size limit of a shard.

    Raises:
        UserError: a shard cannot be read, or a stream's shards have different columns.
    """
    domains = plan.uses["domain"].unique().sort().to_list()
    total = int(plan.uses["uses"].sum())
    with atomic_write(folder) as temporary, tqdm(total=total, desc="writing", unit="sample", disable=None) as progress:
        for domain in domains:
            stream, order = streams[domain], _order(plan.uses.filter(domain=domain), seed, domain)
            write_stream(temporary / domain, columns_of(stream), _rows(stream, order, progress), shard_bytes)
        merge_indexes(temporary, domains)
        plan.dropped.write_parquet(temporary / DROPPED)


def _order(uses: pl.DataFrame, seed: int, domain: str) -> list[int]:
    """Stream-wide indexes in the order they are written, repeats apart from each other."""
    # a permutation of the repeated list: copies of a sample lie apart, as they should in training
    indexes = np.repeat(uses["index"].to_numpy(), uses["uses"].to_numpy())
    order: list[int] = generator(seed, "order", domain).permutation(indexes).tolist()
    return order


def _rows(stream: MdsStream, order: list[int], progress: "tqdm[Any]") -> Iterator[dict[str, Any]]:
    # rows pass through as stored wherever they can: re-encoding would cost time and could change bytes
    columns, differing = columns_of(stream), len(stream.encodings) > 1
    for index in order:
        row = stream.row(index)
        yield row | _unified(row, stream, columns) if differing else row
        progress.update()


def columns_of(stream: MdsStream) -> dict[str, str]:
    """Column name -> MDS encoding that every sample of a stream can be written with.

    As stored; where shards of a merged stream differ in tokens, loss mask or documents, one encoding that holds the
    numbers of all.

    Raises:
        UserError: its shards differ in another column.
    """
    names = {name for encodings in stream.encodings for name in encodings}
    differing = sorted(name for name in names if len({encodings.get(name) for encodings in stream.encodings}) > 1)
    wide = {
        stream.columns.tokens: COLUMNS["tokens"],
        stream.columns.loss_mask: "ndarray:int64",  # 0 and 1, or labels
        stream.columns.documents: COLUMNS["documents"],
    }
    other = [name for name in differing if name not in wide]
    if other:
        types = ", ".join(str(encodings.get(other[0])) for encodings in stream.encodings)
        raise UserError(
            f"the shards of {stream.folder} hold column {other[0]!r} as {types}, and cannot be written as one stream: "
            "write it again with one set of columns, or select with --mode weights"
        )
    return {**stream.encodings[0], **{name: wide[name] for name in differing}}


def _unified(row: Mapping[str, Any], stream: MdsStream, columns: Mapping[str, str]) -> dict[str, Any]:
    """Tokens, loss mask and documents of a row in the encodings that `columns_of` gives them."""
    names, sample = stream.columns, as_sample(row, stream.columns, str(stream.folder))
    mask = row.get(names.loss_mask, sample.loss_mask)
    values = {
        names.tokens: sample.tokens,
        names.loss_mask: np.asarray(np.frombuffer(mask, np.uint8) if isinstance(mask, bytes) else mask, np.int64),
        names.documents: [list(span) for span in sample.documents],
    }
    differing = {name for shard in stream.encodings for name in columns if shard.get(name) != columns[name]}
    return {name: value for name, value in values.items() if name in differing}


def loader_line(kind: str, path: Path) -> str:
    """The line of Python that loads what was written, `kind` "samples" or "weights"."""
    # a schedule needs curate's own loader: streaming knows no phases
    quoted = python_string(str(path.resolve()))
    if path.name == SCHEDULE:
        return f"curate.open_dataset(Path({quoted}), batch_size=..., seed=0)"
    if kind == "samples":
        return f"StreamingDataset(local={quoted}, batch_size=...)"
    return f"StreamingDataset(streams=[Stream(**s) for s in yaml.safe_load(open({quoted}))], batch_size=...)"
