"""What the next stage draws from: the run's own samples, or candidates that were never trained on."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import dataframely as dy
import polars as pl

from curate.core.errors import UserError
from curate.mixture.conflicts import check_settings
from curate.mixture.constraints import Supply
from curate.output.write import columns_of
from curate.selection.candidates import open_candidates, unseen_samples
from curate.tables import Catalogue, Samples
from curate.training.samples import samples_fingerprint, usable_samples

if TYPE_CHECKING:
    from pathlib import Path

    from curate.data.mds import MdsStream
    from curate.selection.resolve import Resolved
    from curate.training.source import SampleSource


@dataclass(frozen=True, kw_only=True)
class Source:
    """What the next stage draws from.

    Attributes:
        samples: where samples are read from: streams, and the catalogue of every sample in them.
        prior_tokens: stored tokens of each domain that the weights stay near: as many as the run trained on, or as the
            candidates have. Domains without an entry are not drawn from.
        usable: distinct samples that the stage may take and that predict a token, by domain and content id; all of
            them where every one was trained on and that is not wanted.
    """

    samples: SampleSource
    prior_tokens: Mapping[str, int]
    usable: dy.DataFrame[Samples]

    @property
    def streams(self) -> dict[str, MdsStream]:
        """The stream of each domain."""
        return self.samples.streams

    @property
    def folders(self) -> dict[str, Path]:
        """The MDS folder of each domain."""
        return self.samples.folders

    @property
    def catalogue(self) -> dy.DataFrame[Catalogue]:
        """Every sample of the domains that are drawn from."""
        drawn = pl.col("domain").is_in(list(self.prior_tokens))
        return Catalogue.validate(self.samples.catalogue.filter(drawn))

    @property
    def fingerprint(self) -> str:
        """Identity of the samples by content."""
        return samples_fingerprint(self.samples.catalogue.sort("domain", "sample_id"))


def open_source(plan: Resolved) -> Source:
    """Open what the next stage draws from.

    Raises:
        UserError: bad candidates, or constraints and streams that could not be satisfied or written after the values
            were paid for.
    """
    source = _run_source(plan) if plan.config.candidates is None else _candidates(plan, plan.config.candidates)
    check_settings(plan.mixture, source.prior_tokens, _supply(plan, source), plan.budget_tokens)
    # streams whose shards differ in a column cannot be written as one: better refused now than after hours of measuring
    for stream in source.streams.values() if plan.config.takes_samples else ():
        columns_of(stream)
    return source


def _run_source(plan: Resolved) -> Source:
    drawn = pl.col("domain").is_in(list(plan.trained))
    usable = usable_samples(Catalogue.validate(plan.run.unique_samples.filter(drawn)))
    unseen = usable
    if plan.unseen_only:
        unseen = Samples.validate(usable.join(plan.seen, on="sample_id", how="anti", maintain_order="left"))
    # All were seen: `solve_mixture` refuses that, because only there all reasons for leaving samples out are known.
    return Source(samples=plan.run.source, prior_tokens=plan.trained, usable=usable if unseen.is_empty() else unseen)


def _candidates(plan: Resolved, folder: Path) -> Source:
    source = open_candidates(folder, plan.run)
    kept = unseen_samples(folder, source.unique_samples, plan.seen, unseen_only=plan.unseen_only)
    seen = len(source.unique_samples) - len(kept)
    if seen and plan.config.mode != "samples":
        raise UserError(
            f"{seen} of the candidates were trained on already, and the streams of mode {plan.config.mode} hold every "
            "sample: set --mode samples to leave them out, or filter.unseen_only false"
        )
    tokens = dict(kept.group_by("domain").agg(pl.col("stored_tokens").sum()).sort("domain").iter_rows())
    return Source(samples=source, prior_tokens=tokens, usable=usable_samples(kept))


def _supply(plan: Resolved, source: Source) -> dict[str, Supply]:
    """All that there is of each domain, before anything but seen samples is left out."""
    # copies of a sample share its content id: its uses count at its first place
    first = source.catalogue.unique("sample_id", keep="first", maintain_order=True).select(
        "domain", "index", "sample_id"
    )
    uses = first.join(plan.seen, on="sample_id")
    counted = source.catalogue.join(uses.select("domain", "index", "uses"), on=["domain", "index"], how="left")
    counted = counted.with_columns(pl.col("uses").fill_null(0))
    if plan.unseen_only:
        counted = counted.join(plan.seen, on="sample_id", how="anti")
    sums = counted.group_by("domain").agg(
        samples=pl.len(), tokens=pl.col("stored_tokens").sum(), seen=(pl.col("stored_tokens") * pl.col("uses")).sum()
    )
    supply = dict.fromkeys(source.prior_tokens, Supply(samples=0, tokens=0))
    for domain, samples, tokens, seen in sums.iter_rows():
        supply[domain] = Supply(samples=samples, tokens=tokens, seen_tokens=seen)
    return supply
