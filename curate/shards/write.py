"""Write the next stage's data: `streams.yaml` over the streams there are, or new MDS folders."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
from tqdm import tqdm

from curate.artifacts import replacing
from curate.escape import python_string
from curate.formats.mds import MdsStream, merge_indexes, write_stream
from curate.mixture.record import Phase
from curate.reading import dump_yaml
from curate.rng import generator
from curate.shards.plan import Plan

STREAMS = "streams.yaml"
SCHEDULE = "schedule.yaml"
DROPPED = "dropped.parquet"


def write_reweight(path: Path, streams: Mapping[str, Path], samples: Mapping[str, int]) -> None:
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
    entries = [
        {"local": str(streams[name].resolve()), "choose": samples[name]} for name in sorted(samples) if samples[name]
    ]
    with replacing(path) as part:
        part.write_text(dump_yaml(entries), encoding="utf-8")


def write_schedule(path: Path, streams: Mapping[str, str], phases: Sequence[Phase]) -> None:
    """Write the phases of a mixture as a schedule; see `curate.formats.phases`.

    Args:
        path: the YAML file.
        streams: what stands as `local` of each domain: an absolute folder, or one relative to the file.
        phases: with samples by domain.
    """
    entries = [
        {
            "start_step": phase.start_step,
            "streams": [{"local": streams[name], "choose": count} for name, count in phase.domains.items() if count],
        }
        for phase in phases
    ]
    with replacing(path) as part:
        part.write_text(
            "# start_step counts samples; served by curate.formats.dataset.open_dataset\n" + dump_yaml(entries),
            encoding="utf-8",
        )


def write_filter(folder: Path, streams: Mapping[str, MdsStream], plan: Plan, *, seed: int, shard_bytes: int) -> None:
    """Write `folder/<domain>/` with every planned sample as often as planned, all columns as stored, in random order.

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
        UserError: a shard cannot be read.
    """
    domains = plan.uses["domain"].unique().sort().to_list()
    total = int(plan.uses["uses"].sum())
    with replacing(folder) as part, tqdm(total=total, desc="writing", unit="sample", disable=None) as progress:
        for domain in domains:
            stream, order = streams[domain], _order(plan.uses.filter(domain=domain), seed, domain)
            write_stream(part / domain, stream.encodings, _rows(stream, order, progress), shard_bytes)
        merge_indexes(part, domains)
        plan.dropped.write_parquet(part / DROPPED)


def _order(uses: pl.DataFrame, seed: int, domain: str) -> list[int]:
    """Stream-wide indexes in the order they are written, repeats apart from each other."""
    indexes = np.repeat(uses["index"].to_numpy(), uses["uses"].to_numpy())
    order: list[int] = generator(seed, "order", domain).permutation(indexes).tolist()
    return order


def _rows(stream: MdsStream, order: list[int], progress: "tqdm[Any]") -> Iterator[dict[str, Any]]:
    for index in order:
        yield stream.row(index)
        progress.update()


def loader_line(kind: str, path: Path) -> str:
    """The line of Python that loads what was written, `kind` "filter" or "reweight"."""
    place = python_string(str(path.resolve()))
    if path.name == "schedule.yaml":
        return f"curate.formats.dataset.open_dataset(Path({place}), batch_size=..., seed=0)"
    if kind == "filter":
        return f"StreamingDataset(local={place}, batch_size=...)"
    return f"StreamingDataset(streams=[Stream(**s) for s in yaml.safe_load(open({place}))], batch_size=...)"
