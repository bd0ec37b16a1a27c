"""Data and runs of the bench: domains split into training text, targets and anchors; one recorded run per seed."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from curate.core.artifacts import file_fingerprint, finalize, is_complete
from curate.core.errors import UserError
from curate.core.rng import generator
from curate.core.writing import atomic_write
from curate.data.files import read_documents
from curate.embeddings.anchors import GENERAL
from curate.training.recorder import RecorderConfig
from curate.training.run import Run
from pipelines.optimizers import OptimizerConfig
from pipelines.prepare import PrepareConfig, prepare
from pipelines.pretrain import PretrainConfig, train
from pipelines.splits import corpus_files, excerpt, first_megabytes, write_rows

if TYPE_CHECKING:
    from pipelines.fidelity.config import BenchConfig


def make_data(config: BenchConfig) -> Path:
    """Split the corpus and pack the training domains.

    Returns:
        Folder with `train/`, `targets/<domain>.jsonl` (and `general.jsonl`), `anchors/<domain>.jsonl` and `mds/`.

    Raises:
        UserError: the corpus lacks a domain of the config, or a domain is too small.
    """
    files = corpus_files(config.corpus, config.folder, [*config.foreign, *config.targets])
    folder = config.folder / "data"
    settings = {
        "files": {name: file_fingerprint(path) for name, path in files.items()},
        **config.model_dump(
            mode="json",
            include={"foreign", "domain_megabytes", "target_documents", "excerpt_characters", "anchors_per_domain"},
        ),
    }
    if not is_complete(folder / "split", settings):
        with atomic_write(folder / "split") as part:
            _split(config, files, part)
            finalize(part, "fidelity split", settings)
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
        # seed 0: all seeds of the bench share their data, and differ in training alone
        order = generator(0, "fidelity split", name).permutation(len(documents)).tolist()
        anchors = config.anchors_per_domain * config.target_documents
        needed = 2 * config.target_documents + anchors
        if len(documents) <= needed:
            raise UserError(f"{path} has {len(documents)} documents; the bench holds out {needed}, trains on the rest")
        held_out = [excerpt(documents[i], config.excerpt_characters) for i in order[:needed]]
        write_rows(out / "targets" / f"{name}.jsonl", held_out[: config.target_documents])
        write_rows(out / "anchors" / f"{name}.jsonl", held_out[config.target_documents : -config.target_documents])
        if name not in config.foreign:
            # the last held-out documents, which are in no target and no anchor, some of each domain
            general += held_out[-config.target_documents :][: max(2, config.target_documents // 4)]
            write_rows(
                out / "train" / f"{name}.jsonl",
                first_megabytes([documents[i] for i in order[needed:]], config.domain_megabytes),
            )
    write_rows(out / "targets" / f"{GENERAL}.jsonl", general)


def make_run(config: BenchConfig, data: Path, seed: int) -> Run:
    """Train one recorded stage, or open it."""
    warmup = config.steps // 10
    folder = config.folder / f"seed-{seed}" / "run"
    train(
        PretrainConfig(
            out=folder,
            data=data / "mds",
            model=config.model,
            steps=config.steps,
            batch_size=config.batch_size,
            seed=seed,
            optimizer=OptimizerConfig(lr=config.lr, warmup_steps=warmup),
            recorder=RecorderConfig(windows=dict(config.recorded_windows)),
        )
    )
    return Run(folder)
