"""Which samples of a pool are probed. Tables in, tables out."""

from __future__ import annotations

from math import ceil

import numpy as np
import polars as pl

from curate.rng import generator


def draw_probes(samples: pl.DataFrame, share: float, least: int, batch: int, seed: int) -> pl.DataFrame:
    """Draw probes from every domain, spread evenly over the lengths of its samples.

    A systematic sample: every k-th one of a domain in the order of length, ties in random order, from a random start.
    Nothing depends on the order of the samples in shards.

    Args:
        samples: `domain`, `sample_id` and `tokens`, by domain and content id.
        share: of each domain's samples.
        least: at least so many of each domain, or all where it has fewer.
        batch: probes in a group.
        seed: of the draw.

    Returns:
        Rows of the probes, in the order of `samples`, with `step`: the group that a probe is dealt to. Groups stand
        for the steps of a window, whose samples are compared with each other and resampled together; at least eight
        where there are as many probes.
    """
    parts = []
    for (domain,), own in samples.group_by("domain", maintain_order=True):
        random = generator(seed, "probes", str(domain))
        wanted = min(len(own), max(ceil(share * len(own)), least))
        ordered = own.with_columns(noise=pl.Series(random.random(len(own)))).sort("tokens", "noise").drop("noise")
        places = np.floor((np.arange(wanted) + random.random()) * len(own) / wanted).astype(np.int64)
        parts.append(ordered[places])
    drawn: pl.DataFrame = pl.concat(parts).sort("domain", "sample_id")
    size = max(1, min(batch, len(drawn) // 8))
    dealt = generator(seed, "probe groups").permutation(len(drawn)) // size
    return drawn.with_columns(step=pl.Series(dealt, dtype=pl.Int64))
