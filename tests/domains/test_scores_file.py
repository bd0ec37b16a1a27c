import polars as pl
import pytest
from polars.testing import assert_frame_equal

from curate.core.errors import UserError
from curate.domains.scores_file import read_scores, write_scores
from curate.tables import Scores


def test_round_trip_without_documents(tmp_path, values):
    write_scores(tmp_path / "scores.parquet", values)
    assert_frame_equal(read_scores(tmp_path / "scores.parquet"), values.select(Scores.column_names()))


def test_same_bytes_twice(tmp_path, values):
    for name in ("a", "b"):
        write_scores(tmp_path / name, values)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda frame: frame.drop("value_total_nats"), "value_total_nats"),
        (lambda frame: frame.with_columns(value_total_nats=pl.lit(float("nan"))), "'value_total_nats'.*nan"),
        (lambda frame: frame.with_columns(step=pl.lit(-1, pl.Int64)), "'step'.*min"),
        (lambda frame: frame.with_columns(domain=pl.lit(3)), "domain"),
    ],
)
def test_bad_values_are_refused(tmp_path, values, change, message):
    with pytest.raises(UserError, match=message):
        write_scores(tmp_path / "scores.parquet", change(values))
    assert not list(tmp_path.iterdir())


def test_missing_and_truncated(tmp_path, values):
    path = tmp_path / "scores.parquet"
    with pytest.raises(UserError, match=r"scores\.parquet"):
        read_scores(path)
    write_scores(path, values)
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(UserError, match=r"scores\.parquet"):
        read_scores(path)
