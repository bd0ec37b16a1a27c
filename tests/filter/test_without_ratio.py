"""Samples without an n-gram ratio: seen ones where that is not wanted, and those that predict no token."""

import numpy as np
import polars as pl

from curate.filter.choose import FilterConfig, choose, top_k
from curate.filter.overlap import OverlapScan
from curate.tables import SamplePool

NO_HASHES = pl.DataFrame(schema={"row": pl.Int64, "hash": pl.UInt64})
NOTHING = pl.DataFrame(schema={"row": pl.Int64, "file": pl.String, "id": pl.String})


def test_a_sample_without_a_ratio_is_drawn_last():
    ratios = [None, 0.5, None, -0.5, 0.1, 0.2]
    pool = pl.DataFrame(
        {
            "domain": "a", "index": range(6), "sample_id": range(6), "stored_tokens": 8,
            "value_per_token": [0.1 * index for index in range(6)], "ngram_ratio": ratios, "uses_so_far": 0,
            "reason": ["seen", *[None] * 5], "detail": None, "kept": [False, *[True] * 5],
        }
    ).with_columns(
        pl.col("index", "sample_id", "stored_tokens", "uses_so_far").cast(pl.Int64), pl.col("detail").cast(pl.String),
        value_half_a_per_token="value_per_token", value_half_b_per_token="value_per_token",
    )  # fmt: skip
    scan = OverlapScan(ngrams=np.zeros(6, np.int64), grams=NO_HASHES, shared=NO_HASHES)
    config = FilterConfig(drop_fraction=0.0)
    ranked = choose(SamplePool.validate(pool, cast=True), scan, NOTHING, config, 0, ngram_share=0.5)
    assert ranked.filter(key=-np.inf)["index"].to_list() == [0, 2]
    drawn = top_k(ranked, {"a": 4})
    assert drawn["reason"].to_list() == ["seen", None, "not_sampled", None, None, None]
