"""Candidates on disk, held against a run: MDS streams of the run's own kind, and which of their samples are new."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path

import dataframely as dy

from curate.core.artifacts import file_fingerprint, fingerprint
from curate.core.errors import UserError
from curate.data.streams import check_same_tokenizer, domain_folders, find_tokenizer, load_streams
from curate.tables import Catalogue, SampleUses
from curate.training.run import Run
from curate.training.source import SampleSource

_log = logging.getLogger(__name__)


def streams_fingerprint(streams: Mapping[str, Path]) -> str:
    """Identity of the data in some streams, by their indexes."""
    # an index has the size of every shard and, as curate writes it, its hash: no shard has to be read
    return fingerprint({domain: file_fingerprint(folder / "index.json") for domain, folder in streams.items()})


def candidate_streams(folder: Path) -> dict[str, Path]:
    """Domain -> MDS folder of candidates: a folder of domains as of `pipelines.prepare`, or a streams.yaml.

    Raises:
        UserError: there are none, or a domain has no usable name.
    """
    if not folder.exists():
        raise UserError(f"the candidates {folder} do not exist; make them with python -m pipelines.prepare")
    streams = load_streams(folder)
    try:
        return domain_folders(streams)
    except UserError as error:
        raise UserError(f"the candidates {folder}: {error}") from None


def open_candidates(folder: Path, run: Run) -> SampleSource:
    """Open candidates and hold them against the run.

    Args:
        folder: see `candidate_streams`.
        run: supplies columns, tokenizer and sequence length.

    Raises:
        UserError: they were not made like the run's data.
    """
    tokenizer, theirs = run.spec.tokenizer, find_tokenizer(folder, load_streams(folder))
    # without both files nothing can be compared here; `check_fit` still refuses ids beyond the model's vocabulary
    if tokenizer is not None and tokenizer.exists() and theirs is not None:
        check_same_tokenizer(theirs, tokenizer, "of the run")
    source = SampleSource(run.folder, candidate_streams(folder), run.spec.columns)
    # positions beyond the training's length are positions that the model never learned
    longest = int(source.unique_samples["stored_tokens"].max())  # type: ignore[arg-type]
    if longest > run.spec.seq_len:
        raise UserError(
            f"the candidates {folder} have sequences of {longest} tokens, the run trains on {run.spec.seq_len}: write "
            f"them again with --seq_len {run.spec.seq_len}"
        )
    return source


def unseen_samples(
    folder: Path, samples: dy.DataFrame[Catalogue], seen: dy.DataFrame[SampleUses], *, unseen_only: bool
) -> dy.DataFrame[Catalogue]:
    """The candidates that may be used; logs which were trained on already.

    Args:
        folder: of the candidates.
        samples: as `SampleSource.unique_samples`.
        seen: `sample_id` and `uses` of all stages.
        unseen_only: leave out what was trained on.

    Raises:
        UserError: nothing is left.
    """
    seen_samples = samples.join(seen, on="sample_id", how="semi")
    if seen_samples.is_empty():
        return samples
    counts = seen_samples.group_by("domain").len().sort("domain").iter_rows()
    named = ", ".join(f"{domain} {count:,}" for domain, count in counts)
    what = "they are left out (filter.unseen_only false would keep them)" if unseen_only else "they are kept"
    _log.warning(
        "%s of %s candidates were trained on already (%s); %s",
        f"{len(seen_samples):,}",
        f"{len(samples):,}",
        named,
        what,
    )
    if not unseen_only:
        return samples
    unseen = Catalogue.validate(samples.join(seen, on="sample_id", how="anti", maintain_order="left"))
    if unseen.is_empty():
        raise UserError(
            f"every sample of the candidates {folder} was trained on already: give others, or set filter.unseen_only "
            "false"
        )
    gone = sorted(set(samples["domain"]) - set(unseen["domain"]))
    if gone:
        _log.warning("nothing of %s is left: the next stage does without", ", ".join(gone))
    return unseen
