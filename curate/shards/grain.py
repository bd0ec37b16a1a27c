"""What gets a weight in the mixture: domains, or parts of them where domains are missing or too coarse."""

from __future__ import annotations

import logging
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np
import polars as pl
from pydantic import Field

from curate.config import Config
from curate.formats.ngrams import DIMENSION, text_features
from curate.index.clusters import clusters
from curate.progress import progress

if TYPE_CHECKING:
    from curate.mixture.constraints import MixtureConfig
    from curate.trajectory.run import Run

_log = logging.getLogger(__name__)


class GrainConfig(Config):
    """What gets a weight in the mixture."""

    by: Literal["domains", "clusters", "shards"] = "domains"
    """clusters: of similar text in each domain (FAISS k-means). shards: as they are on disk. Both need mode filter, as
    they are written anew; their names are the domain's with a number."""
    clusters: int = Field(default=8, ge=2)
    """Clusters of each domain; at most one for every 8 samples are made."""


@dataclass(frozen=True, kw_only=True)
class Grain:
    """A run's domains divided into parts.

    Attributes:
        stock: the run as if each part were a domain; what reads streams and catalogue of a run reads the parts.
        parents: part -> domain.
        trained: part -> stored tokens: the domain's, by the part's share of the domain's text. (Not what was trained on
            of the part itself: a shard that the last stage did not reach is no worse for it.)
    """

    stock: Run
    parents: Mapping[str, str]
    trained: Mapping[str, int]

    def without(self, spent: Collection[str], shares: Mapping[str, float]) -> dict[str, float]:
        """Shares of the parts but for some, whose shares go to the other parts of their domain."""
        found = {part: share for part, share in shares.items() if part not in spent}
        for part in spent:
            if part in shares:
                own = [other for other in found if self.parents[other] == self.parents[part]]
                whole = sum(shares[other] for other in own)
                found |= {other: found[other] + shares[part] * shares[other] / whole for other in own}
        return found

    def of_parts(self, values: pl.DataFrame) -> pl.DataFrame:
        """A values frame with the part's name as `domain`."""
        parts = self.stock.places.select("sample_id", part="domain")
        joined = values.join(parts, on="sample_id", maintain_order="left")
        return joined.with_columns(domain="part").drop("part")


def divide(run: Run, trained: Mapping[str, int], config: GrainConfig, seed: int) -> Grain:
    """Divide the domains of a run.

    A sample that is in several places of a domain counts in the part of the first one; in the domain of the first one
    only.

    Args:
        run: its catalogue is read, and for clusters every sample.
        trained: stored tokens that the run trained on, by domain.
        config: into what.
        seed: of the clusters.
    """
    places = run.places.filter(pl.col("domain").is_in(list(trained)))
    numbers = places["shard"] if config.by == "shards" else _clusters(run, places, config.clusters, seed)
    name = pl.format("{}.{}", "domain", numbers.cast(pl.String).str.zfill(len(str(numbers.max()))))
    named = places.select("domain", "sample_id", "length", part=name)
    sizes = named.group_by("domain", "part").agg(pl.col("length").sum()).sort("part")
    shares = sizes.with_columns(share=pl.col("length") / pl.col("length").sum().over("domain"))
    parents = dict(shares.select("part", "domain").iter_rows())
    tokens = {
        part: max(1, round(trained[parents[part]] * share))
        for part, share in shares.select("part", "share").iter_rows()
    }
    _log.info("%d domains are divided into %d %s", len(trained), len(parents), config.by)
    catalogue = run.catalogue.join(named.drop("length"), on=["domain", "sample_id"], maintain_order="left")
    streams = {part: run.streams[domain] for part, domain in parents.items()}
    stock = run.divided(streams, catalogue.with_columns(domain="part").drop("part"))
    return Grain(stock=stock, parents=parents, trained=tokens)


def mixture_of_parts(config: MixtureConfig, grain: Grain) -> MixtureConfig:
    """The same constraints on parts: domains named as general data or in the prior stand for all of their parts.

    Floors and ceilings are of the parts that they name.
    """
    parts: dict[str, list[str]] = {}
    for part, domain in grain.parents.items():
        parts.setdefault(domain, []).append(part)
    general = tuple(part for name in config.replay_domains for part in parts.get(name, [name]))
    prior: dict[str, float] = {}
    for name, share in config.prior.items():
        own = parts.get(name, [name])
        whole = sum(grain.trained.get(part, 1) for part in own)
        prior |= {part: share * grain.trained.get(part, 1) / whole for part in own}
    return config.model_copy(update={"replay_domains": general, "prior": prior})


def _clusters(run: Run, places: pl.DataFrame, count: int, seed: int) -> pl.Series:
    """The cluster of each sample in its domain, by what sets its text apart from the domain's mean.

    Of texts, not of value embeddings: those hold the noise of the very samples that clusters are then scored by.
    """
    rows = places.select("domain", "index").iter_rows()
    features = np.empty((len(places), DIMENSION), np.float32)
    for row, (domain, index) in enumerate(progress(rows, total=len(places), what="compare texts", unit="sample")):
        features[row] = text_features(run.streams[domain][index].tokens)
    found = np.empty(len(places), np.int64)
    order = places.with_row_index("row").sort("domain", "sample_id")
    for (_,), group in order.group_by("domain", maintain_order=True):
        own = group["row"].to_numpy()
        found[own] = clusters(features[own] - features[own].mean(0), count, seed)
    return pl.Series(found)
