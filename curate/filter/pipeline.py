"""From every sample that the stage can draw to those that are good enough, and what held-out text was found in them."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import dataframely as dy
import polars as pl

from curate.core.escape import visible
from curate.data.documents import encode, load_tokenizer
from curate.data.files import read_documents
from curate.filter.choose import FilterConfig, choose
from curate.filter.overlap import HeldOut, OverlapScan, Sight, contamination, held_out, sight
from curate.tables import Contamination, RankedPool, SamplePool

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt


_log = logging.getLogger(__name__)
_SHOWN = 3  # files named in a line of the log


def read_held_out(target_files: Sequence[Path], config: FilterConfig, tokenizer_file: Path | None) -> HeldOut:
    """The documents that must not be trained on, tokenised as the run's data was.

    Args:
        target_files: the targets and the retention target, which no training sample may give away.
        config: names more of them, or none are looked for (`contamination_overlap` none).
        tokenizer_file: of the run; None: documents hold token ids.

    Raises:
        UserError: a file is missing or unreadable.
    """
    tokenizer = load_tokenizer(tokenizer_file) if tokenizer_file else None
    files = [] if config.contamination_overlap is None else [*target_files, *map(Path, config.held_out)]
    documents: list[tuple[str, str, npt.NDArray[np.int32]]] = []
    for path in files:
        documents += [
            (visible(path.name), document.id, encode(document, tokenizer)[0]) for document in read_documents(path)
        ]
    return held_out(documents)


def filter_pool(
    pool: dy.DataFrame[SamplePool],
    overlaps: OverlapScan,
    held: HeldOut,
    config: FilterConfig,
    *,
    leave_out: bool,
    ngram_share: float,
    seed: int,
) -> tuple[dy.DataFrame[SamplePool] | dy.DataFrame[RankedPool], dy.DataFrame[Contamination]]:
    """Give every sample of a pool that is not good enough its reason.

    Args:
        pool: see `output.plan.make_pool`.
        overlaps: of its samples; of none where nothing is left out and nothing held out.
        held: documents that must not be trained on.
        config: what is left out.
        leave_out: whether samples can be left out; else contamination is only reported.
        ngram_share: see `choose`.
        seed: of the draws.

    Returns:
        The pool, ranked where samples can be left out, and the contamination that was found.
    """
    if leave_out:
        _log_recall(sight(pool, config.duplicate_overlap))
    # where contamination is not looked for there is no held-out document, so that the 1 is never compared with
    hits = contamination(overlaps, held, config.contamination_overlap or 1.0).filter("hit")
    if leave_out:
        pool = choose(pool, overlaps, hits, config, seed, ngram_share=ngram_share)
    # `choose` keeps the order of the pool, so that a row is the same sample before and after it
    rows = pool.with_row_index("row").select(pl.col("row").cast(pl.Int64), "domain", "index", "sample_id")
    report = hits.join(rows, on="row", maintain_order="left")
    _log_contamination(report, held, removing=leave_out)
    return pool, Contamination.validate(report.with_columns(removed=pl.lit(leave_out)))


def _log_recall(recall: Sight | None) -> None:
    if recall:
        _log.warning(
            "near-duplicates are looked for by %.2g %% of the n-grams, %.1f of %d in a median sample: of copies with "
            "%.0f %% of their n-grams in common %.0f %% are found",
            100 * recall.share,
            recall.held,
            recall.ngrams,
            100 * recall.alike,
            100 * recall.recall,
        )


def _log_contamination(report: pl.DataFrame, held: HeldOut, *, removing: bool) -> None:
    short = int((held.documents["ngrams"] == 0).sum())
    if short:
        _log.info("%d of %d held-out documents are too short to be compared (13 tokens)", short, len(held.documents))
    if report.is_empty():
        return
    samples = report.unique("sample_id", keep="first", maintain_order=True)
    domains = samples.group_by("domain").len().sort("len", "domain", descending=[True, False])
    by_domain = ", ".join(f"{domain} {count}" for domain, count in domains.iter_rows())
    files = ", ".join(report["file"].unique().sort().to_list()[:_SHOWN])
    what = "they are left out" if removing else "they stay in: select with --mode samples to leave them out"
    _log.warning("%d samples hold text of %s (%s); %s; see contamination.parquet", len(samples), files, by_domain, what)
