import numpy as np
import polars as pl
import pytest

from curate.data.mds import COLUMNS, MdsStream, content_id, write_stream

SIZES = {"a": 40, "b": 25, "c": 10}
LENGTH = 8


@pytest.fixture(scope="session")
def folders(tmp_path_factory):
    """Three MDS streams of several shards each; read only."""
    base = tmp_path_factory.mktemp("data")
    random = np.random.default_rng(0)
    for domain, size in SIZES.items():
        rows = []
        for index in range(size):
            tokens, mask = random.integers(0, 1000, LENGTH, dtype=np.int32), np.ones(LENGTH, np.uint8)
            documents = [[f"{domain}{index}", 0, LENGTH]]
            ids = {"sample_id": content_id(tokens, mask), "domain": domain}
            rows.append({"tokens": tokens, "loss_mask": mask, **ids, "documents": documents})
        write_stream(base / domain, COLUMNS, rows, shard_bytes=1500)
    return {domain: base / domain for domain in SIZES}


@pytest.fixture(scope="session")
def streams(folders):
    return {domain: MdsStream(folder) for domain, folder in folders.items()}


@pytest.fixture(scope="session")
def catalogues(streams):
    return {domain: stream.catalogue() for domain, stream in streams.items()}


@pytest.fixture(scope="session")
def values(catalogues):
    """Samples 0 to 19 of each domain were in the window, some twice; the value per token is the index / 100."""
    tables = [
        table.filter(pl.col("index") < 20).with_columns(domain=pl.lit(name)) for name, table in catalogues.items()
    ]
    once = pl.concat(tables).with_columns(step=0)
    twice = pl.concat([once, once.filter(pl.col("index") % 3 == 0).with_columns(step=1)])
    value = pl.col("tokens") * pl.col("index") / 100
    return twice.with_columns(source=pl.lit("late"), target=pl.lit("t"), value=value, value_a=value, value_b=value)
