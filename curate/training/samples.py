"""The samples of a run: read by content id, and listed as the rows of a window."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import TYPE_CHECKING

import dataframely as dy
import numpy as np
import polars as pl

from curate.core.errors import UserError
from curate.data.documents import load_tokenizer
from curate.tables import DOCUMENTS, Catalogue, Samples, WindowRows
from curate.training.run import sample_uses

if TYPE_CHECKING:
    from pathlib import Path

    from curate.data.mds import Sample
    from curate.training.run import Run
    from curate.training.source import SampleSource


class SampleReader:
    """Random access to the samples of a source by content id.

    Args:
        source: its catalogue is read once. An exact duplicate is read at its first row.
    """

    def __init__(self, source: SampleSource) -> None:
        self._source = source
        # sorted for a binary search: arrays take a tenth of the memory of a dictionary
        catalogue = source.unique_samples.sort("sample_id")
        self._ids = catalogue["sample_id"].to_numpy()
        self._indexes = catalogue["index"].to_numpy()
        self._domains = catalogue["domain"].to_list()

    def samples(self, sample_ids: Sequence[int]) -> list[Sample]:
        """Read samples in the order of their ids.

        Raises:
            UserError: a sample is not in the streams (they were changed after training).
        """
        wanted = np.asarray(sample_ids, np.int64)
        # an id above all others lands one past the end; clipped, it is compared with the last one and differs
        rows = np.searchsorted(self._ids, wanted).clip(max=len(self._ids) - 1)
        missing = self._ids[rows] != wanted
        if missing.any():
            raise UserError(
                f"sample {wanted[int(missing.argmax())]} is not in the streams {', '.join(self._source.folders)}: they "
                "were changed after training (restore them), or other "
                "rows than theirs were trained on (other labels, special tokens, packing)"
            )
        return [self._source.streams[self._domains[row]][int(self._indexes[row])] for row in rows]


def sample_texts(source: SampleSource, tokenizer_file: Path | None, sample_ids: Sequence[int]) -> list[str]:
    """Texts of samples to read, in the order of their ids; special tokens show where packed documents end.

    Args:
        source: of the samples.
        tokenizer_file: that made the tokens; None: the token ids are the text.
        sample_ids: content ids: the streams may have been sharded anew since.
    """
    tokenizer = load_tokenizer(tokenizer_file) if tokenizer_file else None
    tokens = [sample.tokens.tolist() for sample in SampleReader(source).samples(sample_ids)]
    return [
        tokenizer.decode(ids, skip_special_tokens=False) if tokenizer else " ".join(map(str, ids)) for ids in tokens
    ]


def window_rows(run: Run, window: str, start: int, stop: int, horizon: str) -> dy.DataFrame[WindowRows]:
    """The row table of a window: one row per (sample, step), in step order, then rank, micro-batch and position.

    Args:
        run: the run.
        window: name of the window.
        start: its first step.
        stop: step after its last.
        horizon: name of the evaluation checkpoint.

    Returns:
        Rows without values; `source` is the window.
    """
    steps = run.steps.filter(pl.col("step").is_between(start, stop, closed="left"))
    rows = steps.select("step", sample_id="sample_ids", weight="weights").explode("sample_id", "weight")
    # row i of the table is row i of the arrays that an estimator writes, hence the order, and the index after the join
    joined = rows.join(run.unique_samples, on="sample_id", how="left", maintain_order="left").with_row_index("row")
    documents = [sample.document_tokens() for sample in SampleReader(run.source).samples(joined["sample_id"].to_list())]
    return WindowRows.validate(
        joined.with_columns(
            pl.col("row").cast(pl.Int64),
            source=pl.lit(window),
            horizon=pl.lit(horizon),
            documents=pl.Series(documents, dtype=DOCUMENTS),
        )
    )


def trained_tokens(run: Run) -> dict[str, int]:
    """Stored tokens of each domain that the run trained on, repeats counted.

    Raises:
        UserError: no sample that it trained on is in its streams.
    """
    # some unknown samples are only warned of; without any known one the sums below would be empty
    if len(run.unknown) == len(sample_uses(run.steps)):
        raise UserError(
            f"none of the {len(run.unknown):,} samples that run {run.folder} trained on is in its streams: they were "
            "changed since (restore them), or other rows than theirs were trained on"
        )
    samples = run.unique_samples.join(sample_uses(run.steps), on="sample_id")
    tokens = samples.group_by("domain").agg((pl.col("stored_tokens") * pl.col("uses")).sum())
    return dict(tokens.sort("domain").iter_rows())


def usable_samples(samples: dy.DataFrame[Catalogue]) -> dy.DataFrame[Samples]:
    """The samples that predict a token, sorted by domain and content id.

    The order depends on nothing but content, so seeded draws from it survive re-sharding.

    Args:
        samples: as `SampleSource.unique_samples`.
    """
    return Samples.validate(samples.filter(pl.col("predicted_tokens") > 0).sort("domain", "sample_id"))


def samples_fingerprint(samples: pl.DataFrame) -> str:
    """Identity of a table of samples: domains and content ids, in the table's order."""
    digest = hashlib.blake2b(digest_size=8)
    for (domain,), domain_samples in samples.group_by("domain", maintain_order=True):
        digest.update(str(domain).encode())
        # little-endian, so that every machine gives the same digest
        digest.update(domain_samples["sample_id"].to_numpy().astype("<i8").tobytes())
    return digest.hexdigest()
