"""Values of samples outside of the valued window, predicted from those inside.

A window holds a small part of what the next stage chooses among; the rest is predicted from its text, by the fit and
under the conditions of `curate.pools`: only in domains where held-out samples are ranked well enough.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import numpy as np
import polars as pl

from curate.formats.bags import bag
from curate.pools.features import log_ratios
from curate.pools.spread import VALUES, FeatureReader, settled, spread
from curate.rng import generator
from curate.trajectory.samples import usable_samples

if TYPE_CHECKING:
    from curate.formats.mds import Sample
    from curate.target import Target
    from curate.trajectory.run import Run

_LEAST = 20  # valued samples of a domain from which a rank correlation says something
_MOST = 10_000  # valued samples that the fit is made from, by chance: 4,096 features of each are held at once
_BATCH = 64  # samples read at a time
_JUDGED = ("domain", "samples", "probed", "spearman", "low", "high", "used")


def predict_rest(
    run: Run, values: pl.DataFrame, targets: Sequence[Target], least: float, seed: int
) -> tuple[pl.DataFrame, pl.DataFrame]:
    """Predict the values of the samples of a run's streams that have none.

    Features are n-grams and how like the targets a text is; no pass through the model.

    Args:
        run: the streams.
        values: the values frame of one window and one target (or of several, combined).
        targets: what the values are for.
        least: held-out rank correlation from which a domain's predictions are used, if it is certainly positive.
        seed: of folds and intervals.

    Returns:
        The values, and below them those that were predicted.
        `domain`, `samples`, `probed` (valued), `spearman` (held out) with `low` and `high`, and `used`, as of
        `curate.pools.PoolValues.domains`; without domains that have fewer than 20 valued samples.
    """
    per_token = (pl.col(name).sum() / pl.col("tokens").sum() for name in VALUES)
    seen = values.filter(pl.col("tokens") > 0).group_by("domain", "sample_id").agg(pl.col("step").min(), *per_token)
    known = seen.filter(pl.len().over("domain") >= _LEAST)
    samples = usable_samples(run).join(known.select("domain").unique(), on="domain", how="semi", maintain_order="left")
    probes = samples.join(known, on=["domain", "sample_id"], maintain_order="left")
    if probes.is_empty():
        return values, pl.DataFrame(schema=dict.fromkeys(_JUDGED, pl.String))
    if len(probes) > _MOST:
        chosen = generator(seed, "fitted").choice(len(probes), _MOST, replace=False)
        probes = probes[np.sort(chosen)]

    def read(rows: pl.DataFrame) -> Iterator[list[Sample]]:
        for part in rows.iter_slices(_BATCH):
            yield [run.streams[domain][index] for domain, index in part.select("domain", "index").iter_rows()]

    pool = bag((sample.tokens, sample.loss_mask) for batch in read(probes) for sample in batch)
    reader = FeatureReader(samples, read, None, log_ratios([bag(target.sequences()) for target in targets], pool))
    every, judged = settled(*spread(samples, probes, probes.select(VALUES).to_numpy(), reader, seed), least)
    rest = every.filter(source="predicted").join(seen, on=["domain", "sample_id"], how="anti", maintain_order="left")
    places = rest.join(samples, on=["domain", "sample_id"], maintain_order="left")
    columns = ("window", "target", "domain", "index", "sample_id", "tokens", *VALUES)
    predicted = places.with_columns(
        *(pl.col(name) * pl.col("tokens") for name in VALUES),
        *(pl.lit(values[name][0]).alias(name) for name in columns[:2]),
    )
    return pl.concat([values.select(columns), predicted.select(columns)]), judged.select(_JUDGED)
