"""The value index: rows of samples in FAISS, asked for the samples of most and least value for any target.

Samples are indexed in groups of at most 2^20, each complete in a folder of its own, so that new shards become a group
beside the others. Groups that are not larger than what is new are made again together with it: few stay, whatever the
number of calls. Beside its FAISS index a group holds the sums of its rows by domain, so that means of domains read no
row.

N samples, D numbers of a row.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
import polars as pl

from curate.core.arrays import read_arrays, read_table, write_arrays, write_table
from curate.core.artifacts import MANIFEST, checked, finalize, fingerprint, hash_of, making, read_json, write_json
from curate.core.errors import UserError
from curate.core.lock import locked
from curate.index.build import RECALL_AT, IndexConfig, build
from curate.index.exact import chunks, exact_search
from curate.index.open import open_index
from curate.influence.rows import embed_samples, open_rows
from curate.influence.space import open_space
from curate.tables import IndexedSamples, Samples
from curate.training.samples import usable_samples

if TYPE_CHECKING:
    from pathlib import Path

    import dataframely as dy
    import numpy.typing as npt

    from curate.influence.rows import RowStore
    from curate.influence.space import RowSpace
    from curate.training.replay import Replay
    from curate.training.run import Run
    from curate.training.source import SampleSource

    Floats = npt.NDArray[np.float32]

_log = logging.getLogger(__name__)
_GROUP = 1 << 20  # samples: an index of bfloat16 of them has half a GiB
_SAMPLES, _SUMS, _RECALL = "samples.parquet", "sums.npz", "recall"
_INDEX = IndexConfig()
_KEY = ["domain", "shard", "index", "sample_id"]


@dataclass(frozen=True, kw_only=True)
class _Rows:
    """Rows of some samples as a matrix float32 (N, D), read from the store when they are asked for."""

    store: RowStore
    sample_ids: npt.NDArray[np.int64]

    @property
    def shape(self) -> tuple[int, int]:
        return len(self.sample_ids), self.store.numbers

    def __len__(self) -> int:
        return len(self.sample_ids)

    def __getitem__(self, rows: Any) -> Floats:
        return self.store.take(self.sample_ids[rows])


@dataclass(frozen=True, kw_only=True)
class Group:
    """One group of samples and its FAISS index.

    Attributes:
        folder: of the group.
        store: of the rows.
    """

    folder: Path
    store: RowStore

    @cached_property
    def samples(self) -> dy.DataFrame[Samples]:
        """Its samples; position = row of the index."""
        return Samples.validate(read_table(self.folder / _SAMPLES))

    @property
    def rows(self) -> _Rows:
        """(N, D) of its samples."""
        return _Rows(store=self.store, sample_ids=self.samples["sample_id"].to_numpy())

    @cached_property
    def sums(self) -> dict[str, tuple[int, Floats]]:
        """Domain -> predicted tokens and the sum of rows times predicted tokens, float64 (D,)."""
        arrays = read_arrays(self.folder / _SUMS)
        return {
            str(name): (int(tokens), rows)
            for name, tokens, rows in zip(arrays["domains"], arrays["tokens"], arrays["rows"], strict=True)
        }

    def search(self, vector: Floats, k: int) -> tuple[npt.NDArray[np.int64], float]:
        """Rows of largest product with a vector (D,), best first, and the share of the exact ones that are among them.

        A compressed index visits as many lists as this very vector needs; what was needed is kept, so that the exact
        search that it is measured against is done once.
        """
        index = open_index(self.folder / "faiss")
        recall = 1.0
        if index.lists:
            k = max(k, RECALL_AT)
            path = self.folder / _RECALL / f"{hash_of(vector.tobytes())[:16]}-{k}.json"
            if path.exists():
                stored = read_json(path)
                index.visit(stored["lists_visited"])
                recall = stored["recall"]
            else:
                exact = exact_search(self.rows, vector[None], k)[1]
                recall = index.widen(vector[None], exact, _INDEX.recall_target)
                path.parent.mkdir(exist_ok=True)
                write_json(path, {"recall": recall, "lists_visited": index.lists_visited})
        rows = index.search(vector[None], k)[1][0]
        return rows[rows >= 0], recall


@dataclass(frozen=True, kw_only=True)
class ValueIndex:
    """The groups that hold the samples of a source.

    Attributes:
        groups: disjoint, all samples of the source together.
        store: of their rows.
    """

    groups: Sequence[Group]
    store: RowStore

    def __len__(self) -> int:
        """N."""
        return sum(len(group.samples) for group in self.groups)

    def search(self, vector: Floats, k: int) -> tuple[dy.DataFrame[IndexedSamples], float]:
        """Find the samples of largest inner product; for the smallest search for `-vector`.

        Args:
            vector: (D,), see `RowSpace.vectors`.
            k: samples wanted; `min(k, N)` come back.

        Returns:
            The samples, largest product first, products computed from the rows themselves.
            The least of the groups' recalls: the share of the exact k best (at least 100) that are found.
        """
        found, recalls = [], [1.0]
        for group in self.groups:
            rows, recall = group.search(vector, k)
            found.append(group.samples[rows])
            recalls.append(recall)
        samples = pl.concat(found)
        products = self.store.products(samples["sample_id"].to_numpy(), vector[None])[:, 0]
        scored = samples.with_columns(product=pl.Series(products.astype(np.float64)))
        # by content where products are equal: groups and shards do not decide
        best = scored.sort("product", "sample_id", descending=[True, False]).head(k)
        return IndexedSamples.validate(best), min(recalls)

    def domain_means(self, vectors: Floats) -> dict[str, npt.NDArray[np.float64]]:
        """Domain -> (T,) mean product with vectors (T, D), weighted by predicted tokens: values per token."""
        tokens: dict[str, int] = {}
        rows: dict[str, npt.NDArray[np.float64]] = {}
        for group in self.groups:
            for domain, (count, summed) in group.sums.items():
                tokens[domain] = tokens.get(domain, 0) + count
                rows[domain] = rows.get(domain, 0.0) + summed
        return {domain: vectors.astype(np.float64) @ rows[domain] / tokens[domain] for domain in sorted(rows)}


def make_value_index(run: Run, source: SampleSource, replay: Replay) -> ValueIndex:
    """The value index of all samples of a source; rows that are missing are made, after their cost is logged.

    Raises:
        UserError: see `rows.embed_samples`.
    """
    space, samples = open_space(run, replay), usable_samples(source.unique_samples)
    embed_samples(run, source, samples, space, replay)
    return build_value_index(space, samples)


def build_value_index(space: RowSpace, samples: dy.DataFrame[Samples], seed: int = 0) -> ValueIndex:
    """Index samples that have rows; complete groups are kept.

    Args:
        space: of the rows.
        samples: N samples.
        seed: of k-means' training rows.
    """
    store, folder = open_rows(space), space.folder / "groups"
    folder.mkdir(exist_ok=True)
    with locked(folder, wait=True):
        kept, rest = _kept(folder, store, samples)
        # small groups join what is new: their number stays of the order of log N
        while len(rest) and kept and len(kept[-1].samples) <= min(len(rest), _GROUP // 2):
            rest = pl.concat([rest, kept.pop().samples])
        for part in rest.sort(_KEY).iter_slices(_GROUP):
            kept.append(_build_group(space, store, folder, Samples.validate(part), seed))
    return ValueIndex(groups=kept, store=store)


def open_value_index(run_folder: Path, space: RowSpace, samples: dy.DataFrame[Samples], command: str) -> ValueIndex:
    """Open the index of samples that were all indexed.

    Raises:
        UserError: some are not (says how many, and the command that does it).
    """
    store = open_rows(space)
    kept, rest = _kept(space.folder / "groups", store, samples)
    # a file of rows may have been deleted since
    rest = pl.concat([rest, store.missing(samples).select(rest.columns)]).unique("sample_id")
    if len(rest):
        domains = ", ".join(f"{name} {count:,}" for name, count in rest.group_by("domain").len().sort("domain").rows())
        raise UserError(
            f"{len(rest):,} of {len(samples):,} samples are not in the value index of {run_folder} ({domains}): it is "
            f"not finished, or they are new or changed since; {command} makes what is missing"
        )
    return ValueIndex(groups=kept, store=store)


def _kept(folder: Path, store: RowStore, samples: dy.DataFrame[Samples]) -> tuple[list[Group], pl.DataFrame]:
    """The complete groups that hold some of the samples and no others, the largest first, and the samples left."""
    groups = [Group(folder=checked(path).parent, store=store) for path in sorted(folder.glob(f"*/{MANIFEST}"))]
    kept: list[Group] = []
    rest = pl.DataFrame(samples)
    for group in sorted(groups, key=lambda group: -len(group.samples)):
        left = rest.join(group.samples, on=_KEY, how="anti")
        if len(rest) - len(left) == len(group.samples):
            kept.append(group)
            rest = left
    return kept, rest


def _build_group(space: RowSpace, store: RowStore, folder: Path, samples: dy.DataFrame[Samples], seed: int) -> Group:
    # with their places: a re-sharded stream has the same samples in others
    settings = {"space": space.fingerprint, "samples": hash_of(samples.select(_KEY).write_csv().encode())}
    group = Group(folder=folder / fingerprint(settings)[:8], store=store)
    with making(group.folder, settings) as missing:
        if missing:
            _log.info("indexing %s rows of %d numbers", f"{len(samples):,}", store.numbers)
            write_table(group.folder / _SAMPLES, samples)
            write_arrays(group.folder / _SUMS, _sums(samples, group.rows))
            none = np.zeros((0, store.numbers), np.float32)  # real targets are asked when they come, `Group.search`
            build(group.rows, group.folder / "faiss", _INDEX, queries=none, seed=seed, parents=settings)
            finalize(group.folder, "value index", settings, parts=(_SAMPLES, _SUMS, "faiss"), rows=len(samples))
    return group


def _sums(samples: pl.DataFrame, rows: _Rows) -> dict[str, npt.NDArray[Any]]:
    names = sorted(samples["domain"].unique())
    tokens = samples["predicted_tokens"].to_numpy()
    domains = np.searchsorted(names, samples["domain"].to_numpy().astype(str))
    sums = np.zeros((len(names), rows.shape[1]))
    for start, taken in chunks(rows):
        here = slice(start, start + len(taken))
        for domain in np.unique(domains[here]):
            own = domains[here] == domain
            sums[domain] += tokens[here][own] @ taken[own].astype(np.float64)
    counts = np.bincount(domains, tokens, len(names)).astype(np.int64)
    return {"domains": np.array(names), "tokens": counts, "rows": sums}
