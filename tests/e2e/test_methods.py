"""Every `--method` of `curate.select` through the same line: exact totals, the method's own weights, refusals."""

from collections import Counter
from typing import get_args

import numpy as np
import polars as pl
import pytest
from pydantic import ValidationError

from curate.core.artifacts import read_json
from curate.core.config import parse_command
from curate.core.errors import UserError
from curate.data.mds import iterate
from curate.mixture.constraints import MixtureConfig
from curate.mixture.record import read_mixture
from curate.domains.importance import gumbel_keys
from curate.domains.methods import VALUED, Method
from curate.select import select
from curate.selection import SelectConfig
from curate.core.tracking import TrackingConfig
from curate.training.run import Run
from tests.tiny import SEQ_LEN

METHODS = sorted(set(get_args(Method)) - {"given"})


def run_select(folder, **settings):
    config = SelectConfig(
        **{
            "run": folder / "run", "target": folder / "target.jsonl", "min_target_tokens": 100, "window": "late",
            "budget_tokens": 60 * SEQ_LEN, "tracking": TrackingConfig(mode="none"), **settings,
        }
    )  # fmt: skip
    return select(config, Run(config.run))


@pytest.mark.parametrize("method", METHODS)
def test_every_method_writes_its_mixture_exactly(folder, method):
    out = run_select(folder, method=method, mode="both")
    mixture = read_mixture(out / "mixture.yaml")
    assert (mixture.samples, mixture.tokens) == (60, 60 * SEQ_LEN)
    found = Counter(row["domain"] for row in iterate(out / "data" / "mds"))
    assert found == {name: part.samples for name, part in mixture.domains.items()}
    assert (out / "report.html").exists() == (method in VALUED)
    assert (len(pl.read_parquet(out / "scores.parquet")) > 0) == (method in VALUED)
    assert run_select(folder, method=method, mode="both") == out


def weights(out):
    return {name: part.weight for name, part in read_mixture(out / "mixture.yaml").domains.items()}


def test_methods_with_weights_deliver_them_at_any_temperature(folder):
    assert weights(run_select(folder, method="proportional")) == pytest.approx({"dataclasses": 0.5, "json": 0.5})
    assert weights(run_select(folder, method="uniform")) == pytest.approx({"dataclasses": 0.5, "json": 0.5})
    given = {"dataclasses": 0.8, "json": 0.2}
    assert weights(run_select(folder, method="given", weights=given)) == pytest.approx(given)
    warm = weights(run_select(folder, method="given", weights=given, mixture=MixtureConfig(temperature=2.0)))
    assert warm == pytest.approx(given)
    capped = run_select(folder, method="given", weights=given, mixture=MixtureConfig(max_weight=0.6))
    assert weights(capped) == pytest.approx({"dataclasses": 0.6, "json": 0.4})
    assert read_mixture(capped / "mixture.yaml").domains["dataclasses"].binding == "ceiling"


def test_random_and_dsir_write_the_samples_of_the_largest_keys(folder):
    run = Run(folder / "run")
    out = run_select(folder, method="random", mode="filter")
    keys = gumbel_keys(run.catalogue, None, 0)
    wanted = set()
    for name, part in read_mixture(out / "mixture.yaml").domains.items():
        wanted |= set(keys.filter(domain=name)["sample_id"][: part.samples])
    assert {row["sample_id"] for row in iterate(out / "data" / "mds")} == wanted
    other = run_select(folder, method="random", mode="filter", seed=1)
    assert {row["sample_id"] for row in iterate(other / "data" / "mds")} != wanted


def test_dsir_finds_the_text_that_resembles_the_target(folder, tmp_path):
    """A target made of one domain's own unused text."""
    run = Run(folder / "run")
    rows = [run.streams["dataclasses"][index].tokens.tolist() for index in range(40, 80)]
    (tmp_path / "own.jsonl").write_text("".join(f'{{"tokens": {row}}}\n' for row in rows))
    out = run_select(folder, method="dsir", target=tmp_path / "own.jsonl", mode="filter")
    part = read_mixture(out / "mixture.yaml").domains["dataclasses"]
    assert part.shrunk > 0.05
    assert part.delivered_weight > 0.6
    written = {row["sample_id"] for row in iterate(out / "data" / "mds")}
    own = {run.streams["dataclasses"][index].sample_id for index in range(40, 80)}
    assert len(written & own) > 30
    hot = run_select(folder, method="dsir", target=tmp_path / "own.jsonl", mode="filter", importance_temperature=1e4)
    assert read_mixture(hot / "mixture.yaml").domains["dataclasses"].delivered_weight == pytest.approx(0.5, abs=0.12)
    assert len({row["sample_id"] for row in iterate(hot / "data" / "mds")} & own) < 25


def test_likeness_moves_what_curate_chooses_and_no_other_method(folder):
    def chosen(method, share):
        part = {"likeness_share": share}
        out = run_select(folder, method=method, mode="filter", mixture=part, shards=part)
        domains = pl.read_parquet(out / "domains.parquet").filter(pl.col("window") != "next_step")
        return domains, {row["sample_id"] for row in iterate(out / "data" / "mds")}

    (values, some), (likeness, others) = (chosen("curate", share) for share in (0.0, 1.0))
    assert values["score"].to_list() == values["value_score"].to_list()
    assert likeness["score"].to_list() == likeness["likeness"].to_list()
    assert likeness["value_score"].to_list() == values["value_score"].to_list()
    assert some != others
    (one, some), (other, others) = (chosen("less", share) for share in (0.0, 1.0))
    assert one["likeness"].null_count() == len(one)
    assert one["score"].to_list() == other["score"].to_list()
    assert some == others


def test_values_of_shuffled_are_those_of_curate_in_another_order(folder):
    ours, null = (
        pl.read_parquet(run_select(folder, method=method) / "scores.parquet") for method in ("curate", "shuffled")
    )
    per_token = [np.sort((frame["value"] / frame["tokens"]).to_numpy()) for frame in (ours, null)]
    np.testing.assert_allclose(*per_token, rtol=1e-12)
    assert (ours["value"] != null["value"]).mean() > 0.8


def test_contradictions_are_refused(folder):
    for wrong, message in (
        ({"method": "less", "estimator": "dvemb"}, "estimator dvemb does not go with method less"),
        ({"estimator": "less"}, "estimator less does not go with method curate"),
        ({"method": "given"}, "weights are for method given"),
        ({"weights": {"json": 1.0}}, "weights are for method given"),
    ):
        with pytest.raises(ValidationError, match=message):
            SelectConfig(target=folder / "target.jsonl", **wrong)
    with pytest.raises(UserError, match=r"weights are needed for \['dataclasses', 'json'\]"):
        run_select(folder, method="given", weights={"poetry": 1.0})
    arguments = ["--target", "t.jsonl", "--method", "less", "--window", "late"]
    assert parse_command(SelectConfig, "select", "", arguments).estimator == "less"
    with pytest.raises(UserError, match="does not go with method uniform"):
        parse_command(SelectConfig, "select", "", ["--target", "t", "--method", "uniform", "--estimator", "dvemb"])
    arguments = ["--target", "t.jsonl", "--method", "given", "--weights", '{"a": 0.5, "b": 0.5}']
    assert parse_command(SelectConfig, "select", "", arguments).weights == {"a": 0.5, "b": 0.5}


def test_the_branch_test_tempers_the_mixture_and_is_kept_in_the_manifest(folder):
    settings = {"branch_test": True, "branches": {"steps": 2, "repeats": 1, "share": 0.5}}
    out = run_select(folder, **settings)
    found = read_json(out / "manifest.json")["branch_test"]
    assert set(found["changes"]) == {"dataclasses", "json"}
    # two domains have no rank correlation: scores are not trusted
    wanted = MixtureConfig().temperature / 0.05
    assert found["temperature"] == pytest.approx(wanted)
    assert read_mixture(out / "mixture.yaml").temperature == pytest.approx(wanted)
    assert run_select(folder, **settings) == out


@pytest.mark.parametrize("more", [{"guard": "general.jsonl"}, {"more_targets": {"other.jsonl": 1.0}}])
def test_methods_without_values_take_one_target(folder, more):
    with pytest.raises(ValueError, match=r"method dsir scores domains for one target at most: leave out guard"):
        run_select(folder, method="dsir", **more)
