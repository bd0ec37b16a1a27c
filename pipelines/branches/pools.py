"""Data of the branch bench: held-out splits, and the pools that stage 1 trains on and branches draw from.

Every target domain gives three splits without a common document: `select` (what selection sees), `tune` (what a
temperature is chosen by) and `report` (what is reported). So does general text, which methods may retain. The
noisy pool has noise inside each domain: a weight for a whole domain cannot avoid it.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from curate.core.artifacts import file_fingerprint, finalize, is_complete
from curate.core.errors import UserError
from curate.core.rng import generator
from curate.core.writing import atomic_write
from curate.data.documents import Document
from curate.data.files import read_documents
from pipelines.prepare import PrepareConfig, prepare
from pipelines.splits import corpus_files, excerpt, first_megabytes, write_rows

if TYPE_CHECKING:
    from pipelines.branches.config import BranchesConfig

SPLITS = ("select", "tune", "report")
NOISE = "noise"  # first part of the ids of documents that are noise
_REPEATED_CHARACTERS = 600  # of the document that is repeated with a number behind it


def make_pools(config: BranchesConfig) -> Path:
    """Split the corpus, write targets, and pack the pools that the cases need.

    Returns:
        Folder with `split/` and `plain/`, `noisy/` and `clean/` (the noisy pool without its noise), as far as needed.

    Raises:
        UserError: the corpus lacks a domain of the config, or a domain is too small.
    """
    files = corpus_files(config.corpus, config.folder, [config.inside, config.foreign, *config.junk])
    folder = config.folder / "data"
    names = {"inside", "foreign", "junk", "noise_share", "domain_megabytes", "target_documents", "excerpt_characters"}
    settings = {
        "files": {name: file_fingerprint(path) for name, path in files.items()},
        **config.model_dump(mode="json", include=names),
    }
    if not is_complete(folder / "split", settings):
        with atomic_write(folder / "split") as part:
            _split(config, files, part)
            finalize(part, "branches split", settings)
    for pool in sorted({config.case(name).pool for name in config.cases}):
        _pack(config, folder, pool, None)
        if pool == "noisy":
            # the noisy pool's tokenizer: the branch starts from a model that knows its tokens
            _pack(config, folder, "clean", folder / "noisy" / "tokenizer.json")
    return folder


def target_file(data: Path, target: str, split: str) -> Path:
    """Documents of a target in one split."""
    return data / "split" / split / "targets" / f"{target}.jsonl"


def general_file(data: Path, split: str) -> Path:
    """Held-out natural text of the domains trained on, about as many documents as of a target; rows have `domain`."""
    return data / "split" / split / "general.jsonl"


def _pack(config: BranchesConfig, folder: Path, pool: str, tokenizer: Path | None) -> None:
    prepare(
        PrepareConfig(
            out=folder / pool,
            domains=str(folder / "split" / "train" / pool),
            tokenizer=tokenizer,
            vocab_size=None if tokenizer else config.vocab_size,
            tokenizer_megabytes=2,
            seq_len=config.seq_len,
            shard_bytes=1_000_000,
        )
    )


def _split(config: BranchesConfig, files: dict[str, Path], out: Path) -> None:
    training: dict[str, list[Document]] = {}
    held_out: dict[str, list[list[dict[str, str]]]] = {}
    size = config.target_documents
    for name, path in files.items():
        documents = list(read_documents(path))
        # seed 0: all seeds of the bench share their data
        order = generator(0, "branches split", name).permutation(len(documents)).tolist()
        needed = len(SPLITS) * size
        if len(documents) <= needed:
            raise UserError(
                f"{path} has {len(documents)} documents; the bench holds out {needed}, trains on the rest: lower "
                "target_documents"
            )
        rows = [excerpt(documents[i], config.excerpt_characters) for i in order[:needed]]
        held_out[name] = [rows[at * size : (at + 1) * size] for at in range(len(SPLITS))]
        training[name] = [documents[i] for i in order[needed:]]
    natural = [name for name in files if name not in config.junk and name != config.foreign]
    for at, split in enumerate(SPLITS):
        for targets in ((config.inside,), (config.foreign,), (config.inside, config.foreign)):
            rows = [row for name in targets for row in held_out[name][at]]
            write_rows(out / split / "targets" / f"{'-and-'.join(targets)}.jsonl", rows)
        # rounded up: a few documents of every domain, about as many in all as one target has
        share = -(-size // len(natural))
        general = [{**row, "domain": name} for name in natural for row in held_out[name][at][-share:]]
        write_rows(out / split / "general.jsonl", general)
    for name in sorted({*natural, *config.junk}):
        write_rows(out / "train" / "plain" / f"{name}.jsonl", first_megabytes(training[name], config.domain_megabytes))
    junk = [document for name in config.junk for document in training[name]]
    for name in natural:
        # the noisy pool is as large as the plain one: noise takes the place of text
        clean = first_megabytes(training[name], config.domain_megabytes * (1 - config.noise_share))
        noise = noise_documents(
            # text that the clean part does not use: shuffled words of it would be near-duplicates
            training[name][len(clean) :] or training[name],
            junk,
            name,
            config.domain_megabytes * config.noise_share,
        )
        write_rows(out / "train" / "clean" / f"{name}.jsonl", clean)
        write_rows(out / "train" / "noisy" / f"{name}.jsonl", [*clean, *noise])


def noise_documents(
    documents: Sequence[Document], junk: Sequence[Document], name: str, megabytes: float
) -> list[dict[str, str]]:
    """A quarter of the text each: junk of other kinds, shuffled words, text without white space, near-duplicates.

    Args:
        documents: text that noise is made of.
        junk: documents of another kind, taken as they are.
        name: of the domain; with it the draw is fixed.
        megabytes: of noise.

    Returns:
        Rows whose ids start with `noise/<kind>/`; no two have the same text.
    """
    random = generator(0, "branches noise", name)
    order = random.permutation(len(junk))
    texts = [document.text or "" for document in documents]
    repeated = " ".join(texts[0].split())[:_REPEATED_CHARACTERS]

    def noise_text(kind: str, index: int) -> str:
        text = texts[index % len(texts)]
        if kind == "junk":
            return junk[order[index % len(order)]].text or ""
        if kind == "shuffled":
            return " ".join(random.permutation(text.split()).tolist())
        if kind == "minified":
            return re.sub(r"\s+", "", text)
        # near-duplicates: the number keeps exact deduplication from dropping them
        return f"{repeated} ({index})"

    rows = []
    for kind in ("junk", "shuffled", "minified", "repeated"):
        size = index = 0
        while size < megabytes * 1e6 / 4:
            text = noise_text(kind, index)
            if text:
                rows.append({"id": f"{NOISE}/{kind}/{name}-{index}", "text": text})
                size += len(text.encode())
            index += 1
            # some texts give nothing (no junk text): a source that never fills its share must end
            if kind != "repeated" and index >= 50 * len(texts):
                break
    return rows
