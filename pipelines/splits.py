"""Parts of a corpus of JSONL files, one per domain: what benches hold out, and what they train on."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from curate.core.errors import UserError
from curate.core.rng import generator
from curate.data.documents import Document
from pipelines.corpus.build import CorpusConfig, build


def corpus_files(corpus: Path | None, folder: Path, needed: Sequence[str]) -> dict[str, Path]:
    """The files of a corpus by domain; none given: the demo's corpus, built in `folder`.

    Raises:
        UserError: a needed domain is not there.
    """
    if corpus is None:
        corpus = folder / "corpus" / "train"
        build(CorpusConfig(out=folder / "corpus"))
    files = {path.stem: path for path in sorted(corpus.glob("*.jsonl"))}
    missing = sorted(set(needed) - set(files))
    if missing:
        raise UserError(f"corpus {corpus} has no {missing[0]}.jsonl (it has {sorted(files)}); set other domains")
    return files


def excerpt(document: Document, characters: int) -> dict[str, str]:
    """A piece of a document from a place that belongs to its id, as a row."""
    text = document.text or ""
    start = int(generator(0, "fidelity excerpt", document.id).integers(max(len(text) - characters, 0) + 1))
    return {"id": document.id, "text": text[start : start + characters]}


def first_megabytes(documents: Sequence[Document], megabytes: float) -> list[dict[str, str]]:
    """Whole documents as rows until there are so many megabytes of text."""
    rows, size = [], 0
    for document in documents:
        if size >= megabytes * 1e6:
            break
        rows.append({"id": document.id, "text": document.text or ""})
        size += len(rows[-1]["text"].encode())
    return rows


def write_rows(path: Path, rows: Sequence[Mapping[str, str]]) -> None:
    """Write JSONL."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
