"""Every `--method` of `curate.select` through the same line: exact totals, the method's own weights, refusals."""

from collections import Counter
from typing import get_args

import numpy as np
import polars as pl
import pytest

from curate.core.config import parse_command
from curate.core.errors import UserError
from curate.data.mds import iterate
from curate.domains.importance import gumbel_keys
from curate.domains.methods import VALUED, Method
from curate.mixture.record import read_mixture
from curate.select import SelectConfig, select
from curate.training.run import Run
from tests.tiny import SEQ_LEN

METHODS = sorted(get_args(Method))


def run_select(folder, *, values=None, **settings):
    if values is None:
        values = {"sources": ("late",)} if settings.get("method", "curate") in VALUED else {}
    config = SelectConfig(
        **{
            "run": folder / "run", "target": folder / "target.jsonl", "budget_tokens": 60 * SEQ_LEN,
            "values": {"min_target_tokens": 100, **values}, "output": {"wandb": "none"}, **settings,
        }
    )  # fmt: skip
    return select(config, Run(config.run))


@pytest.mark.parametrize("method", METHODS)
def test_every_method_writes_its_mixture_exactly(folder, method):
    out = run_select(folder, method=method, mode="both")
    mixture = read_mixture(out / "mixture.yaml")
    assert (mixture.samples, mixture.stored_tokens) == (60, 60 * SEQ_LEN)
    found = Counter(row["domain"] for row in iterate(out / "data" / "mds"))
    assert found == {name: part.samples for name, part in mixture.domains.items()}
    assert (out / "report.html").exists() == (method in VALUED)
    assert (len(pl.read_parquet(out / "scores.parquet")) > 0) == (method in VALUED)
    assert run_select(folder, method=method, mode="both") == out


def weights(out):
    return {name: part.weight for name, part in read_mixture(out / "mixture.yaml").domains.items()}


def test_methods_with_weights_deliver_them_within_the_bounds(folder):
    assert weights(run_select(folder, method="proportional")) == pytest.approx({"dataclasses": 0.5, "json": 0.5})
    assert weights(run_select(folder, method="uniform")) == pytest.approx({"dataclasses": 0.5, "json": 0.5})
    given = {"dataclasses": 0.8, "json": 0.2}
    assert weights(run_select(folder, method="proportional", mixture={"prior": given})) == pytest.approx(given)
    capped = run_select(folder, method="proportional", mixture={"prior": given, "max_weight": 0.6})
    assert weights(capped) == pytest.approx({"dataclasses": 0.6, "json": 0.4})
    assert read_mixture(capped / "mixture.yaml").domains["dataclasses"].binding == "ceiling"


def test_random_and_dsir_write_the_samples_of_the_largest_keys(folder):
    run = Run(folder / "run")
    out = run_select(folder, method="random", mode="samples")
    keys = gumbel_keys(run.catalogue, None, 0)
    wanted = set()
    for name, part in read_mixture(out / "mixture.yaml").domains.items():
        wanted |= set(keys.filter(domain=name)["sample_id"][: part.samples])
    assert {row["sample_id"] for row in iterate(out / "data" / "mds")} == wanted
    other = run_select(folder, method="random", mode="samples", seed=1)
    assert {row["sample_id"] for row in iterate(other / "data" / "mds")} != wanted


def test_dsir_finds_the_text_that_resembles_the_target(folder, tmp_path):
    """A target made of one domain's own unused text."""
    run = Run(folder / "run")
    rows = [run.streams["dataclasses"][index].tokens.tolist() for index in range(40, 80)]
    (tmp_path / "own.jsonl").write_text("".join(f'{{"tokens": {row}}}\n' for row in rows))
    out = run_select(folder, method="dsir", target=tmp_path / "own.jsonl", mode="samples")
    part = read_mixture(out / "mixture.yaml").domains["dataclasses"]
    assert part.shrunk > 0.05
    assert part.delivered_weight > 0.6
    written = {row["sample_id"] for row in iterate(out / "data" / "mds")}
    own = {run.streams["dataclasses"][index].sample_id for index in range(40, 80)}
    assert len(written & own) > 30
    hot = run_select(
        folder, method="dsir", target=tmp_path / "own.jsonl", mode="samples", values={"dsir_temperature": 1e4}
    )
    assert read_mixture(hot / "mixture.yaml").domains["dataclasses"].delivered_weight == pytest.approx(0.5, abs=0.12)
    assert len({row["sample_id"] for row in iterate(hot / "data" / "mds")} & own) < 25


def test_ngrams_move_what_curate_chooses(folder):
    def chosen(share):
        out = run_select(folder, values={"sources": ("late",), "ngram_share": share})
        domains = pl.read_parquet(out / "domains.parquet").filter(source="late")
        return domains, {row["sample_id"] for row in iterate(out / "data" / "mds")}

    (values, some), (ngrams, others) = chosen(0.0), chosen(1.0)
    assert values["score"].to_list() == values["value_score"].to_list()
    assert ngrams["score"].to_list() == ngrams["ngram_ratio"].to_list()
    assert ngrams["value_score"].to_list() == values["value_score"].to_list()
    assert some != others
    less = pl.read_parquet(run_select(folder, method="less") / "domains.parquet")
    assert less["ngram_ratio"].null_count() == len(less)


def test_values_of_shuffled_are_those_of_curate_in_another_order(folder):
    ours, null = (
        pl.read_parquet(run_select(folder, method=method) / "scores.parquet").filter(source="late")
        for method in ("curate", "shuffled")
    )
    per_token = [np.sort((frame["value_total_nats"] / frame["predicted_tokens"]).to_numpy()) for frame in (ours, null)]
    np.testing.assert_allclose(*per_token, rtol=1e-12)
    assert (ours["value_total_nats"] != null["value_total_nats"]).mean() > 0.8


def test_an_estimator_is_that_of_its_method(folder, tmp_path):
    path = tmp_path / "embed.yaml"
    for method, estimator, named in (("less", "dvemb", "less"), ("curate", "less", "--method")):
        path.write_text(f"estimator: {estimator}")
        with pytest.raises(UserError, match=rf"{path}: estimator {estimator} .*{named}"):
            run_select(folder, method=method, values={"sources": ("late",), "embed_config": path})
    with pytest.raises(UserError, match=r"mixture.prior names poetry and lacks dataclasses, json"):
        run_select(folder, method="proportional", mixture={"prior": {"poetry": 1.0}})
    line = ["--target", "t", "--method", "proportional", "--mixture.prior", '{"a": 0.5, "b": 0.5}']
    assert parse_command(SelectConfig, "select", "", line).mixture.prior == {"a": 0.5, "b": 0.5}
