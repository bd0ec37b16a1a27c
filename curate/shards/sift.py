"""From a run and its values to the pool of samples that may be used, and what held-out text was found in it."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import polars as pl

from curate.errors import UserError
from curate.formats.documents import encode, load_tokenizer
from curate.formats.files import read_documents
from curate.shards.choose import ScreenConfig, ShardsConfig, choose
from curate.shards.scan import HeldOut, Sight, held_out, leaks, scan, sight

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    from curate.formats.mds import MdsStream
    from curate.trajectory.run import RunSpec

_log = logging.getLogger(__name__)
_SHOWN = 3  # files named in a line of the log


def read_held_out(aimed: Sequence[Path], config: ScreenConfig, spec: RunSpec) -> HeldOut:
    """The documents that must not be trained on, tokenised as the run's data was: those aimed at and the screen's.

    Raises:
        UserError: a file is missing or unreadable.
    """
    tokenizer = load_tokenizer(spec.tokenizer) if spec.tokenizer else None
    files = [] if config.mode == "none" else [*aimed, *map(Path, config.files)]
    documents: list[tuple[str, str, npt.NDArray[np.int32]]] = []
    for path in files:
        documents += [(path.name, document.id, encode(document, tokenizer)[0]) for document in read_documents(path)]
    return held_out(documents)


def sift(
    pool: pl.DataFrame,
    streams: Mapping[str, MdsStream],
    held: HeldOut,
    config: ShardsConfig,
    *,
    filtered: bool,
    seed: int,
    parents: Mapping[str, str] | None = None,
) -> tuple[pl.DataFrame, pl.DataFrame]:
    """Screen a pool and choose among its samples.

    Args:
        pool: see `plan.make_pool`.
        streams: the stream of each domain.
        held: documents that must not be trained on.
        config: what is left out.
        filtered: whether samples can be left out; else they are only screened.
        seed: of the draws.
        parents: the larger domain of each one, where they are parts.

    Returns:
        The pool, and the hits of the screen: `domain`, `index`, `sample_id`, `file`, `id`, `shared` (n-grams),
        `of_sample`, `of_document`, `removed`.
    """
    wanted = filtered or not held.grams.is_empty()  # else there is nothing to compare samples with
    if filtered:
        _say_sight(sight(pool, config.duplicate_overlap))
    found = scan(pool if wanted else pool.clear(), streams, held, clusters=filtered and config.clusters > 0)
    hits = leaks(found, held, config.screen.overlap).filter("hit")
    removing = filtered and config.screen.mode == "remove"
    if filtered:
        pool = choose(pool, found, hits if removing else hits.clear(), config, seed, parents)
    places = pool.with_row_index("place").with_columns(pl.col("place").cast(pl.Int64))
    report = hits.join(places.select("place", "domain", "index", "sample_id"), on="place", maintain_order="left")
    _say(report, held, removing=removing)
    columns = ("domain", "index", "sample_id", "file", "id", "shared", "of_sample", "of_document")
    return pool, report.select(*columns, removed=pl.lit(removing))


def check_reweighted(config: ShardsConfig) -> None:
    """Refuse settings that reweighted streams cannot follow.

    Raises:
        UserError: names the setting.
    """
    if config.consume_once:
        raise UserError("shards.consume_once needs --mode filter: reweighted streams hold every sample")


def _say_sight(seen: Sight | None) -> None:
    if seen:
        _log.warning(
            "near-duplicates are looked for by %.2g %% of the n-grams, %.1f of %d in a median sample: of copies with "
            "%.0f %% of their n-grams in common %.0f %% are found",
            100 * seen.share, seen.held, seen.ngrams, 100 * seen.alike, 100 * seen.recall,
        )  # fmt: skip


def _say(report: pl.DataFrame, held: HeldOut, *, removing: bool) -> None:
    short = int((held.documents["ngrams"] == 0).sum())
    if short:
        _log.info("%d of %d held-out documents are too short to be screened (13 tokens)", short, len(held.documents))
    if report.is_empty():
        return
    samples = report.unique("sample_id", keep="first", maintain_order=True)
    domains = samples.group_by("domain").len().sort("len", "domain", descending=[True, False])
    told = ", ".join(f"{domain} {count}" for domain, count in domains.iter_rows())
    files = ", ".join(report["file"].unique().sort().to_list()[:_SHOWN])
    what = "they are left out" if removing else "they stay in: select with --mode filter to leave them out"
    _log.warning("%d samples hold text of %s (%s); %s; see leaks.parquet", len(samples), files, told, what)
