"""Text out of archives that `pip download` fetched: nothing is installed, and no code of theirs runs here.

An archive is named by its requirement, `name==version`, and read as whole files, one document each or in parts.
"""

import gzip
import io
import re
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from curate.core.errors import UserError
from pipelines.corpus.sources import Text, parts

PIECE = 4_000  # characters of a document: targets need hundreds, and few packages have hundreds of files
SDISTS = frozenset({"django", "docutils"})  # their documentation is not in their wheels
LONGEST_LINE = 1_000  # longer ones are minified code or encoded data


def version(package: str) -> str:
    """Version that a requirement pins."""
    return package.partition("==")[2]


def require(folder: Path, packages: Iterable[str]) -> None:
    """Check that every archive is there.

    Raises:
        UserError: some are missing; the message has the command that fetches them.
    """
    missing = sorted({package for package in packages if find(folder, package) is None})
    if missing:
        sources = ",".join(sorted(SDISTS & {_name(package) for package in missing}))
        no_binary = f"--no-binary {sources} " if sources else ""
        raise UserError(
            f"{folder} lacks {len(missing)} of the archives that the corpus is text of; "
            f"pip download --no-deps --dest {folder} {no_binary}{' '.join(missing)}"
        )


def find(folder: Path, package: str) -> Path | None:
    """Archive of a requirement: the source distribution of `SDISTS`, the wheel of others."""
    name, pinned = _name(package), version(package)
    # file names spell a package with underscores, older ones as its author did
    spelled = re.sub("[-_.]+", "[-_.]+", name)
    ending = r"\.tar\.gz" if name in SDISTS else r"-.*\.whl"
    wanted = re.compile(f"{spelled}-{re.escape(pinned)}{ending}", re.IGNORECASE)
    found = sorted(path for path in folder.glob("*") if wanted.fullmatch(path.name))
    return found[0] if found else None


def files(folder: Path, package: str, include: str) -> list[tuple[str, str]]:
    """(name, text) of the UTF-8 files of an archive whose names match, in the order of the names.

    Raises:
        UserError: the archive is missing or damaged.
    """
    path = find(folder, package)
    if path is None:
        require(folder, [package])
        raise AssertionError(package)
    wanted = re.compile(include)
    try:
        read = list((_wheel if path.suffix == ".whl" else _sdist)(path, lambda name: bool(wanted.search(name))))
    except (OSError, EOFError, zlib.error, tarfile.TarError, zipfile.BadZipFile) as error:
        raise UserError(f"{path} cannot be read ({error}); delete it and download it again") from None
    return sorted((name, text) for name, data in read if (text := _decoded(data)) is not None)


def texts(
    package: str,
    folder: Path,
    include: str,
    group: str = "",
    limit: int = PIECE,
    longest_line: int = LONGEST_LINE,
) -> Iterator[Text]:
    """Files of an archive as documents.

    Args:
        package: requirement.
        folder: where the archives are.
        include: pattern of the names that are read.
        group: pattern whose match in a name is what is held out as a whole; where it has none, that is the file.
        limit: characters of a document; longer files are split.
        longest_line: files with a longer line are left out.
    """
    for name, text in files(folder, package, include):
        if max(map(len, text.splitlines()), default=0) <= longest_line:
            found = re.search(group, name) if group else None
            yield from parts(name, text, limit, found[0] if found else name)


def _name(package: str) -> str:
    return package.partition("==")[0]


def _wheel(path: Path, wanted: Callable[[str], bool]) -> Iterator[tuple[str, bytes]]:
    with zipfile.ZipFile(path) as archive:
        for name in archive.namelist():
            if wanted(name):
                yield name, archive.read(name)


def _sdist(path: Path, wanted: Callable[[str], bool]) -> Iterator[tuple[str, bytes]]:
    # whole: the check sum stands at the end, and whoever reads members only never comes to it
    with tarfile.open(fileobj=io.BytesIO(gzip.decompress(path.read_bytes()))) as archive:
        for member in archive:
            # a link would be a second name of a file that is read already
            file = archive.extractfile(member) if member.isreg() and wanted(member.name) else None
            if file is not None:
                yield member.name, file.read()


def _decoded(data: bytes) -> str | None:
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError:
        return None
