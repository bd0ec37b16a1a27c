import numpy as np
import polars as pl
import pytest

from curate.data.mds import COLUMNS, MdsStream, content_id, write_stream
from curate.tables import VALUES_TOTAL, Catalogue, SampleValues
from tests.frames import fill

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
def catalogue(streams):
    tables = [stream.catalogue().with_columns(domain=pl.lit(name)) for name, stream in streams.items()]
    return Catalogue.validate(pl.concat(tables))


@pytest.fixture(scope="session")
def values(catalogue):
    """Samples 0 to 19 of each domain were in the window, some twice; the value per token is the index / 100."""
    once = catalogue.filter(pl.col("index") < 20)
    twice = pl.concat([once, once.filter(pl.col("index") % 3 == 0)])
    value = pl.col("predicted_tokens") * pl.col("index") / 100
    return fill(SampleValues, twice.with_columns(value.alias(name) for name in VALUES_TOTAL))
