"""The samples of a run: read by content id, and listed as the rows of a window."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import numpy as np
import polars as pl

from curate.artifacts import folder_bytes
from curate.errors import UserError
from curate.trajectory.run import sample_uses

if TYPE_CHECKING:
    from curate.formats.mds import Sample
    from curate.trajectory.run import Run


class SampleReader:
    """Random access to the samples of a run's streams by content id.

    Args:
        run: the run; its catalogue is read once. Exact duplicates resolve to their first place.
    """

    def __init__(self, run: Run) -> None:
        self._run = run
        catalogue = run.places.sort("sample_id")
        self._ids = catalogue["sample_id"].to_numpy()
        self._indexes = catalogue["index"].to_numpy()
        self._domains = catalogue["domain"].to_list()

    def samples(self, sample_ids: Sequence[int]) -> list[Sample]:
        """Read samples in the order of their ids.

        Raises:
            UserError: a sample is not in the streams (they were changed after training).
        """
        wanted = np.asarray(sample_ids, np.int64)
        places = np.searchsorted(self._ids, wanted).clip(max=len(self._ids) - 1)
        missing = self._ids[places] != wanted
        if missing.any():
            raise UserError(
                f"sample {wanted[int(missing.argmax())]} of run {self._run.folder} is not in its streams "
                f"({', '.join(self._run.spec.streams)}): they were changed after training (restore them), or other "
                "rows than theirs were trained on (other labels, special tokens, packing)"
            )
        return [self._run.streams[self._domains[place]][int(self._indexes[place])] for place in places]


def window_rows(run: Run, window: str, start: int, stop: int, horizon: str) -> pl.DataFrame:
    """The row table of a window: one row per (sample, step), in step order, then rank, micro-batch and position.

    Args:
        run: the run.
        window: name of the window.
        start: its first step.
        stop: step after its last.
        horizon: state that the target is read at.

    Returns:
        row, step, sample_id, weight (`c_z`), tokens (predicted), length (stored), window, horizon, domain, index
        (stream-wide), shard, documents (id and predicted tokens of each document in the sample).
    """
    steps = run.steps.filter(pl.col("step").is_between(start, stop, closed="left"))
    rows = steps.select("step", sample_id="sample_ids", weight="weights").explode("sample_id", "weight")
    joined = rows.join(run.places, on="sample_id", how="left", maintain_order="left").with_row_index("row")
    documents = [sample.document_tokens() for sample in SampleReader(run).samples(joined["sample_id"].to_list())]
    return joined.select(
        pl.col("row").cast(pl.Int64), "step", "sample_id", "weight", "tokens", "length",
        pl.lit(window).alias("window"), pl.lit(horizon).alias("horizon"), "domain", "index", "shard",
        pl.Series("documents", documents, dtype=pl.List(pl.Struct({"id": pl.String, "tokens": pl.Int64}))),
    )  # fmt: skip


def trained_tokens(run: Run) -> dict[str, int]:
    """Stored tokens of each domain that the run trained on, repeats counted.

    Raises:
        UserError: nothing that it trained on is in its streams.
    """
    if len(run.unknown) == len(sample_uses(run.steps)):
        raise UserError(
            f"none of the {len(run.unknown):,} samples that run {run.folder} trained on is in its streams: they were "
            "changed since (restore them), or other rows than theirs were trained on"
        )
    samples = run.places.join(sample_uses(run.steps), on="sample_id")
    tokens = samples.group_by("domain").agg((pl.col("length") * pl.col("uses")).sum())
    return dict(tokens.sort("domain").iter_rows())


def usable_samples(places: pl.DataFrame) -> pl.DataFrame:
    """The samples that predict a token, by domain and content id.

    Args:
        places: as `Run.places`.

    Returns:
        domain, index, shard, sample_id, length, tokens (predicted).
    """
    usable = places.filter(pl.col("tokens") > 0).sort("domain", "sample_id")
    return usable.select("domain", "index", "shard", "sample_id", "length", "tokens")


def read_batches(run: Run, samples: pl.DataFrame, size: int) -> Iterator[list[Sample]]:
    """Read the samples of a table (`domain`, `index`) in its order, `size` at a time."""
    for part in samples.iter_slices(size):
        yield [run.streams[domain][index] for domain, index in part.select("domain", "index").iter_rows()]


def stored_bytes_per_token(run: Run) -> float:
    """Bytes of the run's streams on disk, per stored token."""
    return sum(folder_bytes(stream.folder) for stream in run.streams.values()) / int(run.catalogue["length"].sum())


def fresh_shares(run: Run) -> dict[str, float]:
    """Share of new text in each domain's stream: n-grams that occur for the first time (`formats.ngrams`)."""
    shares = run.catalogue.group_by("domain").agg(pl.col("fresh").sum() / pl.col("ngrams").sum().clip(1))
    return dict(shares.sort("domain").iter_rows())


def samples_fingerprint(samples: pl.DataFrame) -> str:
    """Identity of samples by domain and content, in that order."""
    digest = hashlib.blake2b(digest_size=8)
    for (domain,), own in samples.group_by("domain", maintain_order=True):
        digest.update(str(domain).encode())
        digest.update(own["sample_id"].to_numpy().astype("<i8").tobytes())
    return digest.hexdigest()
