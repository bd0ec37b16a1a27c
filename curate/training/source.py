"""Where samples come from: named MDS streams with their catalogue, of a run or of candidates never trained on."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Final

import dataframely as dy
import polars as pl

from curate.core.arrays import read_table
from curate.core.artifacts import checked, file_fingerprint, fingerprint, folder_bytes, list_files, listed
from curate.core.errors import UserError
from curate.core.lock import locked
from curate.core.writing import atomic_write
from curate.data.mds import CATALOGUE, Columns, MdsStream
from curate.tables import Catalogue

if TYPE_CHECKING:
    from curate.data.mds import Sample

_log = logging.getLogger(__name__)
CURRENT: Final = "current"
"""Name of the run's own samples, measured at its last state."""
CANDIDATES: Final = "candidates"
"""Name of samples that were never trained on, measured at the same state."""


class SampleSource:
    """The samples of some streams.

    Args:
        folder: of the run that keeps the catalogue.
        streams: domain -> MDS folder.
        columns: names of the streams' columns.
    """

    def __init__(self, folder: Path, streams: Mapping[str, Path], columns: Columns) -> None:
        self._folder, self.folders, self._columns = folder, dict(streams), columns

    @cached_property
    def streams(self) -> dict[str, MdsStream]:
        """The opened streams, by domain."""
        return {domain: MdsStream(folder, self._columns) for domain, folder in self.folders.items()}

    @cached_property
    def catalogue(self) -> dy.DataFrame[Catalogue]:
        """Every sample: `MdsStream.catalogue` plus `domain`; read once, then kept in the run's folder."""
        return read_catalogue(self._folder, self.streams)

    @cached_property
    def unique_samples(self) -> dy.DataFrame[Catalogue]:
        """The catalogue with each distinct sample once, at its first row; a warning counts copies in other domains.

        Raises:
            UserError: every sample of a domain is a copy of another domain's.
        """
        # the first by the order of the domains in the run, which the catalogue keeps
        first = self.catalogue.unique("sample_id", keep="first", maintain_order=True)
        copies = self.catalogue.join(first.select("sample_id", owner="domain"), on="sample_id")
        copies = copies.filter(pl.col("domain") != pl.col("owner"))
        if len(copies):
            _log.warning("%d samples are exact copies of samples of an earlier domain and count there", len(copies))
        # a domain without samples could have no score and no weight
        empty_domains = sorted(set(self.folders) - set(first["domain"]))
        if empty_domains:
            raise UserError(
                f"domain {empty_domains[0]} holds only exact copies of other domains' samples; leave it out of the "
                "streams"
            )
        return Catalogue.validate(first)

    @property
    def novel_shares(self) -> dict[str, float]:
        """Share of each domain's n-grams that occur for the first time in its stream (`curate.ngrams`)."""
        # clip: samples shorter than an n-gram have none
        shares = self.catalogue.group_by("domain").agg(pl.col("novel_ngrams").sum() / pl.col("ngrams").sum().clip(1))
        return dict(shares.sort("domain").iter_rows())

    @property
    def stored_bytes_per_token(self) -> float:
        """Bytes of the streams on disk, per stored token."""
        return sum(folder_bytes(folder) for folder in self.folders.values()) / int(
            self.catalogue["stored_tokens"].sum()
        )

    def read_batches(self, samples: pl.DataFrame, size: int) -> Iterator[list[Sample]]:
        """Read the samples of a table (`domain`, `index`) in its order, `size` at a time."""
        for batch in samples.iter_slices(size):
            yield [self.streams[domain][index] for domain, index in batch.select("domain", "index").iter_rows()]


def read_catalogue(folder: Path, streams: Mapping[str, MdsStream]) -> dy.DataFrame[Catalogue]:
    """Every sample of some streams, by domain.

    The table is kept in the folder of their run; its name has a fingerprint of the streams, so changed streams are read
    anew.
    """
    # the index of a stream names its shards with their hashes, so it stands for the content
    indexes = {
        domain: [file_fingerprint(stream.folder / "index.json"), stream.columns.model_dump()]
        for domain, stream in streams.items()
    }
    path = folder / f"catalogue-{fingerprint([CATALOGUE, indexes])}.parquet"
    # a file that is not listed was left by a process that was killed between the two
    if not path.exists() or path.name not in listed(folder):
        with locked(folder, f".{path.name}.lock", wait=True):
            # another process may have written it while this one waited
            if not path.exists() or path.name not in listed(folder):
                _write_catalogue(path, streams)
                list_files(folder, [path])
    return Catalogue.validate(read_table(checked(path, remedy="delete it, and it is made again")))


def _write_catalogue(path: Path, streams: Mapping[str, MdsStream]) -> None:
    frames = [stream.catalogue().with_columns(domain=pl.lit(domain)) for domain, stream in streams.items()]
    with atomic_write(path) as part:
        pl.concat(frames).write_parquet(part)
