import numpy as np
import polars as pl
from hypothesis import given
from hypothesis import strategies as st
from polars.testing import assert_frame_equal

from curate.influence.draw import draw_measured
from curate.tables import Samples
from tests.frames import fill


def table(sizes, seed=0):
    random = np.random.default_rng(seed)
    rows = [(name, int(random.integers(1 << 60)), int(random.integers(1, 500))) for name, n in sizes for _ in range(n)]
    table = pl.DataFrame(rows, schema=["domain", "sample_id", "predicted_tokens"], orient="row")
    return fill(Samples, table.sort("domain", "sample_id"))


@given(st.integers(1, 400), st.integers(1, 50), st.integers(1, 60), st.integers(0, 5))
def test_every_domain_gives_as_many_as_it_should_or_all(a, b, wanted, seed):
    samples = table([("a", a), ("b", b)], seed)
    drawn = draw_measured(samples, wanted, 16, seed)
    for name, size in (("a", a), ("b", b)):
        own = drawn.filter(domain=name)
        assert len(own) == min(size, wanted)
        assert own["sample_id"].is_unique().all()
    assert drawn.select("domain", "sample_id").equals(drawn.sort("domain", "sample_id").select("domain", "sample_id"))
    assert_frame_equal(drawn, draw_measured(samples, wanted, 16, seed))


def test_the_measured_are_spread_over_lengths():
    samples = table([("a", 1000)])
    drawn = draw_measured(samples, 100, 16, 0)
    ranks = (
        samples["predicted_tokens"].rank("ordinal").to_numpy()[samples["sample_id"].is_in(drawn["sample_id"].implode())]
    )
    counts = np.histogram(ranks, bins=10, range=(0.5, 1000.5))[0]
    assert counts.max() - counts.min() <= 2
    other = draw_measured(samples, 100, 16, 1)
    assert set(other["sample_id"]) != set(drawn["sample_id"])


def test_groups_are_of_one_batch_and_at_least_eight():
    big = draw_measured(table([("a", 500)]), 250, 16, 0)
    assert big.group_by("step").len()["len"].max() == 16
    small = draw_measured(table([("a", 40)]), 20, 16, 0)
    assert small["step"].n_unique() >= 8
