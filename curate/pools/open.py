"""A pool on disk, held against a run: MDS streams of the run's own kind, and which of their samples are new."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import polars as pl

from curate.artifacts import file_fingerprint, fingerprint
from curate.errors import UserError
from curate.formats.streams import check_same_tokenizer, domain_folders, find_tokenizer, load_streams
from curate.trajectory.run import Run
from curate.trajectory.samples import usable_samples

_log = logging.getLogger(__name__)

Overlap = Literal["remove", "keep", "refuse"]


@dataclass(frozen=True, kw_only=True)
class Pool:
    """A pool.

    Attributes:
        stock: the run as if it had the pool's streams; what reads streams and catalogue of a run reads the pool.
        samples: each distinct sample that may be used and predicts a token, once, by domain and content id: `domain`,
            `index`, `shard`, `sample_id`, `length`, `tokens` (predicted).
        tokens: stored tokens of each domain that may be used; a domain without any has no entry.
        old: samples that were trained on.
    """

    stock: Run
    samples: pl.DataFrame
    tokens: Mapping[str, int]
    old: int

    @property
    def fingerprint(self) -> str:
        """Identity of the pool's data."""
        return pool_fingerprint(self.stock.spec.streams)


def pool_fingerprint(streams: Mapping[str, Path]) -> str:
    """Identity of the data in some streams, by their indexes."""
    return fingerprint({domain: file_fingerprint(folder / "index.json") for domain, folder in streams.items()})


def pool_streams(folder: Path) -> dict[str, Path]:
    """Domain -> MDS folder of a pool: a folder of domains as of `pipelines.prepare`, or a streams.yaml.

    Raises:
        UserError: there are none, or a domain has no usable name.
    """
    if not folder.exists():
        raise UserError(f"the pool {folder} does not exist; make one with python -m pipelines.prepare")
    streams = load_streams(folder)
    try:
        return domain_folders(streams)
    except UserError as error:
        raise UserError(f"the pool {folder}: {error}") from None


def open_pool(folder: Path, run: Run, used: pl.DataFrame, overlap: Overlap) -> Pool:
    """Open a pool and hold it against what was trained on.

    Args:
        folder: see `pool_streams`.
        run: supplies columns, tokenizer and sequence length.
        used: `sample_id` and `uses` of all stages, see `trajectory.ledger.consumed`.
        overlap: what to do about samples that were trained on.

    Raises:
        UserError: the pool was not made like the run's data, all of it was trained on, or some of it was and that is
            refused.
    """
    streams = pool_streams(folder)
    _check_tokenizer(folder, run)
    stock = run.over(streams)
    places = stock.places
    longest = int(places["length"].max())  # type: ignore[arg-type]
    if longest > run.spec.seq_len:
        raise UserError(
            f"the pool {folder} has sequences of {longest} tokens, the run trains on {run.spec.seq_len}: write it "
            f"again with --seq_len {run.spec.seq_len}"
        )
    old = places.join(used, on="sample_id", how="semi")
    if not old.is_empty():
        _say_overlap(old, places, overlap)
    if overlap == "remove":
        places = places.join(used, on="sample_id", how="anti")
    if places.is_empty():
        raise UserError(
            f"every sample of the pool {folder} was trained on already: give another pool, or set probe.overlap keep"
        )
    tokens = dict(places.group_by("domain").agg(pl.col("length").sum()).sort("domain").iter_rows())
    gone = sorted(set(streams) - set(tokens))
    if gone:
        _log.warning("nothing of %s is left: the next stage does without", ", ".join(gone))
    return Pool(stock=stock, samples=usable_samples(places), tokens=tokens, old=len(old))


def leaves_out_old(pool: Pool, overlap: Overlap, *, filtered: bool) -> bool:
    """Whether samples that were trained on have to be left out of what is written.

    Raises:
        UserError: they have to, and cannot be.
    """
    if overlap == "remove" and pool.old and not filtered:
        raise UserError(
            f"{pool.old} samples of the pool were trained on already, and reweighted streams hold every sample: set "
            "--mode filter to leave them out, or probe.overlap keep"
        )
    return overlap == "remove" and pool.old > 0


def _say_overlap(old: pl.DataFrame, places: pl.DataFrame, overlap: Overlap) -> None:
    counts = old.group_by("domain").len().sort("domain").iter_rows()
    named = ", ".join(f"{domain} {count:,}" for domain, count in counts)
    told = f"{len(old):,} of the pool's {len(places):,} samples were trained on already ({named})"
    if overlap == "refuse":
        raise UserError(f"{told}; set probe.overlap remove to leave them out, or keep")
    what = "they are left out (probe.overlap keep would keep them)" if overlap == "remove" else "they are kept"
    _log.warning("%s; %s", told, what)


def _check_tokenizer(folder: Path, run: Run) -> None:
    own, theirs = run.spec.tokenizer, find_tokenizer(folder, load_streams(folder))
    if own is not None and own.exists() and theirs is not None:
        check_same_tokenizer(theirs, own, "of the run")
