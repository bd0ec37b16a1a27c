"""Data and runs of the bench: domains split into training text, targets and anchors; one recorded run per seed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

from curate.artifacts import file_fingerprint, is_complete, replacing, seal
from curate.embeddings.anchors import GENERAL
from curate.errors import UserError
from curate.formats.documents import Document, read_documents
from curate.rng import generator
from curate.trajectory.recorder import RecorderConfig
from curate.trajectory.run import Run
from pipelines.corpus.build import CorpusConfig, build
from pipelines.prepare import PrepareConfig, prepare
from pipelines.pretrain import OptimizerConfig, PretrainConfig, train

if TYPE_CHECKING:
    from pipelines.fidelity.config import BenchConfig


def make_data(config: BenchConfig) -> Path:
    """Split the corpus and pack the training domains.

    Returns:
        Folder with `train/`, `targets/<domain>.jsonl` (and `general.jsonl`), `anchors/<domain>.jsonl` and `mds/`.

    Raises:
        UserError: the corpus lacks a domain of the config, or a domain is too small.
    """
    corpus = config.corpus
    if corpus is None:
        corpus = config.folder / "corpus" / "train"
        build(CorpusConfig(out=config.folder / "corpus"))
    files = {path.stem: path for path in sorted(corpus.glob("*.jsonl"))}
    missing = sorted({*config.foreign, *config.targets} - set(files))
    if missing:
        raise UserError(f"corpus {corpus} has no {missing[0]}.jsonl (it has {sorted(files)}); set foreign and targets")
    folder = config.folder / "data"
    settings = {
        "files": {name: file_fingerprint(path) for name, path in files.items()},
        **config.model_dump(
            mode="json",
            include={"foreign", "domain_megabytes", "target_documents", "excerpt_characters", "anchors_per_domain"},
        ),
    }
    if not is_complete(folder / "split", settings):
        with replacing(folder / "split") as part:
            _split(config, files, part)
            seal(part, "fidelity split", settings)
    prepare(
        PrepareConfig(
            out=folder / "mds",
            domains=str(folder / "split" / "train"),
            vocab_size=config.vocab_size,
            tokenizer_megabytes=2,
            seq_len=config.seq_len,
            shard_bytes=1_000_000,
        )
    )
    return folder


def _split(config: BenchConfig, files: dict[str, Path], out: Path) -> None:
    """Targets, anchors and training text share no document."""
    general = []
    for name, path in files.items():
        documents = list(read_documents(path))
        order = generator(0, "fidelity split", name).permutation(len(documents)).tolist()
        anchors = config.anchors_per_domain * config.target_documents
        needed = 2 * config.target_documents + anchors
        if len(documents) <= needed:
            raise UserError(f"{path} has {len(documents)} documents; the bench holds out {needed}, trains on the rest")
        held_out = [_excerpt(documents[i], config.excerpt_characters) for i in order[:needed]]
        _write(out / "targets" / f"{name}.jsonl", held_out[: config.target_documents])
        _write(out / "anchors" / f"{name}.jsonl", held_out[config.target_documents : -config.target_documents])
        if name not in config.foreign:
            general += held_out[-config.target_documents :][: max(2, config.target_documents // 4)]
            _write(
                out / "train" / f"{name}.jsonl", _first([documents[i] for i in order[needed:]], config.domain_megabytes)
            )
    _write(out / "targets" / f"{GENERAL}.jsonl", general)


def _excerpt(document: Document, characters: int) -> dict[str, str]:
    text = document.text or ""
    start = int(generator(0, "fidelity excerpt", document.id).integers(max(len(text) - characters, 0) + 1))
    return {"id": document.id, "text": text[start : start + characters]}


def _first(documents: list[Document], megabytes: float) -> list[dict[str, str]]:
    rows, size = [], 0
    for document in documents:
        if size >= megabytes * 1e6:
            break
        rows.append({"id": document.id, "text": document.text or ""})
        size += len(rows[-1]["text"].encode())
    return rows


def _write(path: Path, rows: list[dict[str, str]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def make_run(config: BenchConfig, data: Path, seed: int) -> Run:
    """Train one recorded stage, or open it."""
    warmup = config.steps // 10
    folder = config.folder / f"seed-{seed}" / "run"
    train(
        PretrainConfig(
            out=folder, data=data / "mds", model=config.model, steps=config.steps, batch_size=config.batch_size,
            seed=seed, optimizer=OptimizerConfig(lr=config.lr, warmup_steps=warmup),
            recorder=RecorderConfig(windows=dict(config.recorded_windows)),
        )
    )  # fmt: skip
    return Run(folder)
