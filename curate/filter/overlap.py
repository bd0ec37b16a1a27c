"""One pass over the samples of a pool: which n-grams their texts share with each other and with held-out documents.

Held-out documents are the decontamination set: the targets, the retention target and what `filter.held_out` names.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import polars as pl
from scipy.stats import binom

from curate.core.progress import progress
from curate.data.mds import MdsStream, Sample
from curate.ngrams.hashes import Hashes, N, ngram_hashes, sampled

MEMORY = 30_000_000  # n-gram hashes kept for near-duplicates; larger pools compare an even sample of the n-grams
_BATCH = 64  # samples read at a time
_GRAMS = pl.Schema({"row": pl.Int64, "hash": pl.UInt64})


@dataclass(frozen=True, kw_only=True)
class HeldOut:
    """Documents that must not be trained on.

    Args:
        documents: one row each: `document` (position), `file`, `id`, `ngrams` (distinct; 0: too short to be compared).
        grams: one row per distinct n-gram of a document: `document`, `hash`.
    """

    documents: pl.DataFrame
    grams: pl.DataFrame


@dataclass(frozen=True, kw_only=True)
class OverlapScan:
    """What one pass over the texts of a pool has seen; `row` is a row of the pool.

    Args:
        ngrams: int64 [N], distinct n-grams of each sample.
        grams: `row`, `hash`: the n-grams that near-duplicates are found by.
        shared: `row`, `hash`: the n-grams that a held-out document has too.
    """

    ngrams: npt.NDArray[np.int64]
    grams: pl.DataFrame
    shared: pl.DataFrame


def held_out(documents: Sequence[tuple[str, str, npt.NDArray[np.int32]]]) -> HeldOut:
    """The n-grams of documents, each given as its file, its id and its token ids."""
    # distinct ones: a document that repeats itself shares no more for that
    hashes = [np.unique(ngram_hashes(tokens)) for _, _, tokens in documents]
    table = pl.DataFrame(
        {
            "document": np.arange(len(documents)),
            "file": [file for file, _, _ in documents],
            "id": [name for _, name, _ in documents],
            "ngrams": [len(document_hashes) for document_hashes in hashes],
        },
        schema={"document": pl.Int64, "file": pl.String, "id": pl.String, "ngrams": pl.Int64},
    )
    grams = _long(hashes).rename({"row": "document"})
    return HeldOut(documents=table, grams=grams)


def scan(
    pool: pl.DataFrame,
    streams: Mapping[str, MdsStream],
    held: HeldOut,
    also: Sequence[Callable[[list[Sample]], None]] = (),
) -> OverlapScan:
    """Read every sample of a table once.

    Args:
        pool: columns `domain`, `index` and `stored_tokens`.
        streams: the stream of each domain.
        held: what must not be trained on.
        also: are given the samples too, some at a time, in the order of the table: text is read once for all.
    """
    # sorted once: a binary search for each sample, and no set of Python objects
    reference = np.unique(held.grams["hash"].to_numpy())
    total = int(pool["stored_tokens"].sum())
    remembered: list[Hashes] = []
    common: list[Hashes] = []
    counts: list[int] = []
    batches = pool.select("domain", "index").iter_slices(_BATCH)
    for batch in progress(batches, total=-(-len(pool) // _BATCH), what="read texts", unit="batch"):
        samples = [streams[domain][index] for domain, index in batch.iter_rows()]
        for sample in samples:
            hashes = np.unique(ngram_hashes(sample.tokens))
            counts.append(len(hashes))
            remembered.append(sampled(hashes, total, MEMORY))
            # kept by hash, not by sample: both copies of a text keep the same n-grams, and can be compared
            # searchsorted may point behind the last one, hence the clip
            at = np.searchsorted(reference, hashes).clip(max=max(len(reference) - 1, 0))
            common.append(hashes[reference[at] == hashes] if len(reference) else hashes[:0])
        for take in also:
            take(samples)
    return OverlapScan(ngrams=np.array(counts, np.int64), grams=_long(remembered), shared=_long(common))


@dataclass(frozen=True, kw_only=True)
class Sight:
    """How many near-duplicates are found in a pool of more n-grams than are kept.

    Args:
        share: of the n-grams that are kept.
        ngrams: n-grams of a sample of median length.
        held: how many of these are kept, on average.
        alike: share of its n-grams that a copy has in common, half way from the smallest that counts to all.
        recall: share of such copies of a sample of median length that are found.
    """

    share: float
    ngrams: int
    held: float
    alike: float
    recall: float


def sight(pool: pl.DataFrame, overlap: float) -> Sight | None:
    """What `near_duplicates` finds in a pool, of which `stored_tokens` is read; None: it finds everything."""
    total = int(pool["stored_tokens"].sum())
    if total <= MEMORY:
        return None
    share, alike = MEMORY / total, (1 + overlap) / 2
    ngrams = max(int(np.median(pool["stored_tokens"].to_numpy())) - N + 1, 0)
    # of the copy's n-grams k are kept, of which a share of `overlap` must be the original's; k is binomial too
    held = np.arange(1, ngrams + 1)
    detected = binom.sf(np.ceil(overlap * held - 1e-9) - 1, held, alike)
    recall = float((binom.pmf(held, ngrams, share) * detected).sum())
    return Sight(share=share, ngrams=ngrams, held=share * ngrams, alike=alike, recall=recall)


def _long(parts: Sequence[Hashes]) -> pl.DataFrame:
    """One row per hash, with the position of its part."""
    rows = np.repeat(np.arange(len(parts)), [len(hashes) for hashes in parts])
    return pl.DataFrame({"row": rows, "hash": np.concatenate([*parts, np.zeros(0, np.uint64)])}, schema=_GRAMS)


def contamination(overlaps: OverlapScan, held: HeldOut, overlap: float) -> pl.DataFrame:
    """Samples that share text with held-out documents.

    Args:
        overlaps: of the pass over the samples.
        held: the documents.
        overlap: share of the sample's or of the document's n-grams from which a sample is a hit.

    Returns:
        One row per sample and document that share an n-gram, most in common first: `row`, `file`, `id`, `shared`
        (n-grams), `of_sample`, `of_document` (shares), `hit`.
    """
    sizes = pl.DataFrame({"row": np.arange(len(overlaps.ngrams)), "of_row": overlaps.ngrams})
    pairs = overlaps.shared.join(held.grams, on="hash").group_by("row", "document").agg(shared=pl.len().cast(pl.Int64))
    shares = (
        pairs.join(held.documents, on="document")
        .join(sizes, on="row")
        .with_columns(of_sample=pl.col("shared") / pl.col("of_row"), of_document=pl.col("shared") / pl.col("ngrams"))
        # either way round: a benchmark question hidden in a long sample, or a sample cut from a long document
        .with_columns(hit=pl.max_horizontal("of_sample", "of_document") >= overlap)
    )
    columns = ("row", "file", "id", "shared", "of_sample", "of_document", "hit")
    return shares.sort(["shared", "row", "document"], descending=[True, False, False]).select(columns)


def near_duplicates(overlaps: OverlapScan, order: pl.DataFrame, overlap: float) -> pl.DataFrame:
    """Samples that repeat a better one of their domain.

    Every n-gram belongs to the best sample that has it; a sample of whose n-grams one better sample owns at least
    `overlap` is its near-duplicate. Exact over all pairs of a sample and an owner, in one sort of the n-grams: no
    candidates are missed by chance, as with MinHash, and a template that hundreds of samples share costs no pairs.
    Pools of more than `MEMORY` tokens are compared by a sample of their n-grams: `sight` says what that misses.

    Args:
        overlaps: of the pass over the samples.
        order: `row`, `domain`, `rank` (unique; the smallest is the best) of the samples that compete.
        overlap: share of the sample's n-grams, above 0.

    Returns:
        `row` and `of`, the row of the sample that it repeats.
    """
    grams = overlaps.grams.join(order, on="row")
    # within domains: a text that two domains share stays in both, as each is weighted by itself
    owners = grams.group_by("domain", "hash").agg(owner=pl.col("rank").min())
    counts = grams.join(owners, on=["domain", "hash"]).group_by("row", "rank", "owner").len("common")
    sizes = grams.group_by("row").len("ngrams")
    repeated = (
        counts.filter(pl.col("owner") < pl.col("rank"))
        .join(sizes, on="row")
        .filter(pl.col("common") >= overlap * pl.col("ngrams"))
        .sort(["row", "common", "owner"], descending=[False, True, False])
        .unique("row", keep="first", maintain_order=True)
    )
    names = order.select(owner="rank", of="row")
    return repeated.join(names, on="owner").select("row", "of").sort("row")
