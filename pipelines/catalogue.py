"""The documents of a domain on disk, without duplicates, in any order and in bounded memory.

Every document is read once to check it and to hash its content. What stays in memory is 24 bytes a document (where its
line starts, its place among the kept ones, its place in the order; while hashes are compared, 24 more). Documents are
read again where they are needed, by random access.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path

import numpy as np
import numpy.typing as npt
from tqdm import tqdm

from curate.core.artifacts import file_fingerprint, fingerprint
from curate.core.errors import UserError
from curate.core.paths import local_path
from curate.data.documents import Document
from curate.data.files import DocumentFile, Reader, find_files, passed_over, suffix_of
from curate.data.streams import check_domain

BATCH = 256  # documents read and tokenised at once


@dataclass(frozen=True, kw_only=True)
class Catalogue:
    """What is left of a domain's documents when exact duplicates are dropped.

    Attributes:
        readers: the domain's files.
        kept: int64, positions in the concatenation of the files, ascending.
        duplicates: documents dropped because an earlier one had the same content.
    """

    readers: list[Reader]
    kept: npt.NDArray[np.int64]
    duplicates: int

    def batches(self, order: npt.NDArray[np.int64]) -> Iterator[list[Document]]:
        """The kept documents in the given order (indices into `kept`), `BATCH` at a time."""
        starts = list(accumulate((len(reader) for reader in self.readers), initial=0))
        for first in range(0, len(order), BATCH):
            positions = self.kept[order[first : first + BATCH]]
            owners = np.searchsorted(starts, positions, side="right") - 1
            batch: dict[int, Document] = {}
            for owner in np.unique(owners).tolist():
                places = np.flatnonzero(owners == owner).tolist()
                indices = [int(positions[place]) - starts[owner] for place in places]
                batch.update(zip(places, self.readers[owner].read(indices), strict=True))
            yield [batch[place] for place in range(len(positions))]


@dataclass(frozen=True, kw_only=True)
class Domain:
    """A domain of the configuration with its files found."""

    name: str
    files: list[DocumentFile]

    def inputs(self) -> list[str]:
        """Name and content fingerprint of each file; no path: streams do not depend on where the input lies."""
        return [f"{file.name} {input_fingerprint(file.path)}" for file in self.files]


def find_domains(domains: dict[str, str | list[str]] | str) -> list[Domain]:
    """Domains in the order of their names, each with its files.

    Raises:
        UserError: no domain, a name that cannot be a folder's, or a path that is no document file.
    """
    named = _entries(_local("domains", domains)) if isinstance(domains, str) else domains
    if not named:
        raise UserError("there is no domain; set domains to name: files pairs, or to a folder that holds some")
    found = []
    for name, paths in sorted(named.items()):
        check_domain(name)
        given = [paths] if isinstance(paths, str) else paths
        if not given:
            raise UserError(f"domain {name!r} has no files; set domains.{name}")
        files = [file for path in given for file in find_files(_local(f"domains.{name}", path))]
        found.append(Domain(name=name, files=files))
    return found


def _local(setting: str, path: str) -> Path:
    try:
        return local_path(Path(path))
    except ValueError as error:
        raise UserError(f"{setting}: {error}") from None


def _entries(folder: Path) -> dict[str, str | list[str]]:
    """What lies in a folder as domains: name without suffix -> path."""
    if not folder.is_dir():
        raise UserError(f"{folder} is not a folder; set domains to a folder of domains or to name: files pairs")
    named: dict[str, str | list[str]] = {}
    for path in sorted(folder.iterdir()):
        if passed_over(path):
            continue
        name = path.name if path.is_dir() else path.name.removesuffix(suffix_of(path) or path.suffix)
        if name in named:
            raise UserError(f"{folder} has several entries called {name!r}; set domains to name: files pairs")
        named[name] = str(path)
    return named


def input_fingerprint(path: Path) -> str:
    """Fingerprint of the bytes of a file, or of the files in a saved dataset's folder."""
    if path.is_file():
        return file_fingerprint(path)
    files = sorted(item for item in path.rglob("*") if item.is_file() and not item.name.startswith("cache-"))
    return fingerprint({str(item.relative_to(path)): file_fingerprint(item) for item in files})


def catalogue(readers: list[Reader], domain: str) -> Catalogue:
    """Read every document once; of equal ones the first stays.

    Raises:
        UserError: a document is not valid.
    """
    hashes = np.empty(sum(len(reader) for reader in readers), np.uint64)
    filled = 0
    with tqdm(total=len(hashes), desc=f"read {domain}", unit="doc") as bar:
        for reader in readers:
            for first in range(0, len(reader), BATCH):
                for document in reader.read(range(first, min(first + BATCH, len(reader)))):
                    hashes[filled] = document.content_hash
                    filled += 1
                bar.update(filled - bar.n)
    first_places = np.unique(hashes, return_index=True)[1]
    kept = np.sort(first_places).astype(np.int64)
    return Catalogue(readers=readers, kept=kept, duplicates=len(hashes) - len(kept))
