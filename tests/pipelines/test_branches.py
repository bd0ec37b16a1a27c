"""The branch bench: its arithmetic on rows made by hand, its noise, and all of it on a tiny model and real text."""

import ast
import inspect
import textwrap
from html import unescape

import numpy as np
import pytest

from curate.core.errors import UserError
from curate.data.documents import Document
from curate.data.files import read_documents
from curate.evaluation.branches import BranchTestConfig
from curate.report.branches import best_sentence, branches_page
from pipelines.branches.__main__ import bench, show
from pipelines.branches.config import DEFAULT_STRENGTH, BranchesConfig, small
from pipelines.branches.oracle import draw_mixture, slopes, tempered
from pipelines.branches.pools import noise_documents
from pipelines.branches.rows import (
    against_constant,
    at_equal_kl,
    at_limit,
    best_within_limit,
    interval,
    token_speedup,
)
from tests.pipelines.bench_data import write_bench_data

KEYS = {
    "case", "model", "method", "seed", "temperature", "kl_to_prior", "schedule", "is_default", "target_loss",
    "general_loss", "tokens", "token_speedup", "selection_cost_units", "stage_cost_units",
}  # fmt: skip


def test_speedup_is_read_off_proportionals_own_losses():
    along = [5.0, 4.0, 3.5, 3.5, 3.4]
    assert token_speedup(4.0, along) == 1.0
    assert token_speedup(3.75, along) == 1.5
    assert token_speedup(4.5, along) == 0.5
    assert token_speedup(6.0, along) == 0.0
    assert token_speedup(3.5, along) == 2.0
    assert token_speedup(3.0, along) == "> 4x"


def test_intervals_are_students():
    found = interval([0.1, 0.2, 0.3])
    assert found["mean"] == pytest.approx(0.2)
    assert found["half_width"] == pytest.approx(4.302653 * 0.1 / 3**0.5, rel=1e-6)
    assert interval([0.5]) == {"mean": 0.5, "half_width": None}


def row(method, seed, temperature, kl, target, general):
    return {
        "case": "inside", "method": method, "seed": seed, "temperature": temperature, "kl_to_prior": kl,
        "schedule": "constant", "is_default": temperature == 1.0, "target_loss": target, "general_loss": general,
    }  # fmt: skip


ROWS = [
    row("proportional", 0, 1.0, 0.0, 5.0, 4.0), row("proportional", 1, 1.0, 0.0, 6.0, 4.0),
    row("curate", 0, 1.0, 0.2, 4.8, 4.01), row("curate", 1, 1.0, 0.3, 5.7, 4.02),
    row("curate", 0, 0.5, 0.6, 4.5, 4.2), row("curate", 1, 0.5, 0.7, 5.4, 4.2),
    row("dsir", 0, 1.0, 0.4, 4.9, 4.04), row("dsir", 1, 1.0, 0.5, 5.95, 4.02),
    row("uniform", 0, 1.0, 0.1, 5.1, 4.1), row("uniform", 1, 1.0, 0.1, 6.1, 4.1),
]  # fmt: skip


def test_equal_kl_reads_each_curve_from_proportional_on():
    found = {line["method"]: line for line in at_equal_kl(ROWS)}
    assert set(found) == {"curate", "dsir"}  # uniform ends below curate's KL
    assert found["curate"]["target"]["mean"] == pytest.approx(-0.25)
    assert found["curate"]["kl_to_prior"] == pytest.approx(0.25)
    # half of dsir's way in seed 0 (-0.1), three fifths in seed 1 (-0.05)
    assert found["dsir"]["target"]["mean"] == pytest.approx((-0.05 - 0.03) / 2)
    assert found["dsir"]["general"]["mean"] == pytest.approx((0.02 + 0.012) / 2)


def test_a_method_of_fewer_seeds_is_compared_on_its_own():
    rows = [line for line in ROWS if (line["method"], line["seed"]) != ("dsir", 1)]
    found = {line["method"]: line for line in at_equal_kl(rows)}
    assert found["dsir"]["seeds"] == 1
    assert found["dsir"]["target"] == {"mean": pytest.approx(-0.05), "half_width": None}


def test_gains_are_given_as_shares_of_the_oracles():
    oracle = [{**line, "method": "oracle"} for line in ROWS if line["method"] == "dsir"]
    rows = [*ROWS, *oracle]
    found = {line["method"]: line for line in at_limit(rows, rows, 9.0)}
    assert found["oracle"]["oracle_share"] == pytest.approx(1)
    assert found["curate"]["oracle_share"] == pytest.approx(
        found["curate"]["target"]["mean"] / found["oracle"]["target"]["mean"]
    )
    assert "oracle_share" not in at_limit(ROWS, ROWS, 9.0)[0]
    none = [{**line, "target_loss": 99.0} if line["method"] == "oracle" else line for line in rows]
    assert all("oracle_share" not in line for line in at_limit(none, none, 9.0))  # it stays at proportional


def test_the_best_temperature_is_chosen_on_another_split_within_the_limit():
    tuning = [dict(line) for line in ROWS]
    found = {line["method"]: line for line in best_within_limit(ROWS, tuning, 1.01)}
    assert found["curate"]["temperature"] == 1.0  # 0.5 is better and breaks the limit
    assert found["curate"]["target"]["mean"] == pytest.approx(-0.25)
    assert found["curate"]["same_sign"]
    assert found["uniform"]["temperature"] is None
    assert found["uniform"]["target"]["mean"] == 0.0
    for line in tuning:
        line["general_loss"] = 4.0
        if line["method"] == "curate" and line["temperature"] == 1.0:
            line["target_loss"] = 9.0
    found = {line["method"]: line for line in best_within_limit(ROWS, tuning, 1.01)}
    assert found["curate"]["temperature"] == 0.5
    assert found["curate"]["target"]["mean"] == pytest.approx(-0.55)
    assert found["curate"]["general_share"]["mean"] == pytest.approx(0.05)


def test_the_place_at_the_limit_is_between_temperatures():
    found = {line["method"]: line for line in at_limit(ROWS, ROWS, 1.01)}
    # general loss +.375 % at T 1 and +5 % at T .5: the limit of 1 % is .625 / 4.625 of the way
    way = 0.625 / 4.625
    curate, dsir, uniform = (found[name] for name in ("curate", "dsir", "uniform"))
    assert curate["target"]["mean"] == pytest.approx(-0.25 + way * -0.3)
    assert curate["general_share"]["mean"] == pytest.approx(0.01)
    assert curate["kl_to_prior"] == pytest.approx(0.25 + way * 0.4)
    assert curate["temperature"] is None
    assert (dsir["temperature"], dsir["target"]["mean"]) == (1.0, pytest.approx(-0.075))  # within the limit: its end
    assert uniform["target"]["mean"] == 0.0  # worse than proportional all along
    first, second = (-0.1 - (-0.2 + way * -0.3), -0.05 - (-0.3 + way * -0.3))
    assert dsir["minus_curate"]["mean"] == pytest.approx((first + second) / 2)
    assert dsir["minus_curate"]["half_width"] == pytest.approx(interval([first, second])["half_width"])
    assert curate["minus_curate"] == {"mean": 0.0, "half_width": 0.0}


def test_methods_with_other_seeds_are_paired_on_those_that_they_share():
    rows = [*ROWS, row("proportional", 2, 1.0, 0.0, 7.0, 4.0), row("dsir", 2, 1.0, 0.4, 6.5, 4.0)]
    dsir = next(line for line in at_limit(rows, rows, 1.01) if line["method"] == "dsir")
    assert (dsir["seeds"], dsir["target"]["mean"]) == (3, pytest.approx((-0.1 - 0.05 - 0.5) / 3))
    both = {line["method"]: line for line in at_limit(ROWS, ROWS, 1.01)}
    assert dsir["minus_curate"]["mean"] == pytest.approx(both["dsir"]["minus_curate"]["mean"])
    lacking = [line for line in ROWS if (line["method"], line["seed"], line["temperature"]) != ("curate", 1, 0.5)]
    curate = next(line for line in at_limit(lacking, lacking, 1.01) if line["method"] == "curate")
    assert curate["seeds"] == 1


def test_the_place_at_the_limit_is_chosen_on_the_tuning_split():
    tuning = [{**line, "general_loss": 4.0} for line in ROWS]
    found = {line["method"]: line for line in at_limit(ROWS, tuning, 1.01)}
    assert found["curate"]["temperature"] == 0.5
    assert found["curate"]["target"]["mean"] == pytest.approx(-0.55)


def test_a_schedules_gain_stands_beside_that_of_the_same_mixture_at_a_constant_one():
    scheduled = [
        {**row("curate", seed, 1.0, 0.1, target, 4.0), "schedule": "anneal"} for seed, target in ((0, 4.9), (1, 5.8))
    ]
    (found,) = against_constant([*ROWS, *scheduled])
    assert (found["case"], found["method"], found["schedule"]) == ("inside", "curate", "anneal")
    assert found["gain"]["mean"] == pytest.approx((0.1 + 0.2) / 2)
    assert found["constant"]["mean"] == pytest.approx((0.2 + 0.3) / 2)


def test_noise_is_of_four_kinds_in_equal_parts_and_of_new_texts():
    documents = [Document(id=str(i), text=textwrap.dedent(inspect.getsource(ast))[i * 300 :][:900]) for i in range(40)]
    junk = [Document(id=f"j{i}", text=f"var a{i}=function(){{return {i}}};" * 20) for i in range(30)]
    rows = noise_documents(documents, junk, "python", 0.02)
    assert rows == noise_documents(documents, junk, "python", 0.02)
    sizes: dict[str, int] = {}
    for one in rows:
        kind = one["id"].split("/")[1]
        sizes[kind] = sizes.get(kind, 0) + len(one["text"])
    assert set(sizes) == {"junk", "shuffled", "minified", "repeated"}
    assert all(5_000 <= size <= 6_500 for size in sizes.values())
    known = {document.text for document in documents}
    assert not known & {one["text"] for one in rows if not one["id"].startswith("noise/junk")}
    words = [sorted(one["text"].split()) for one in rows if one["id"].startswith("noise/shuffled")]
    assert words[0] == sorted((documents[0].text or "").split())


def test_the_oracles_regression_finds_slopes_and_ignores_what_all_domains_share():
    shares = np.array([0.2, 0.3, 0.1, 0.4])
    weights = np.stack([draw_mixture(shares, 0, member) for member in range(24)])
    np.testing.assert_allclose(weights.sum(axis=1), 1)
    assert weights.min() > 0
    np.testing.assert_allclose(weights.mean(axis=0), shares, atol=0.12)
    found = slopes(weights, 7.0 - weights @ np.array([1.0, 3.0, 0.0, 2.0]))
    assert np.argsort(found).tolist() == [2, 0, 3, 1]
    assert found.std() == pytest.approx(1)
    assert (slopes(weights, np.full(24, 3.0)) == 0).all()
    mixed = tempered(dict(zip("abcd", shares.tolist(), strict=True)), found, 1.0)
    assert sum(mixed.values()) == pytest.approx(1)
    assert mixed["b"] > 0.3
    assert mixed["c"] < 0.1


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    folder = tmp_path_factory.mktemp("branches")
    write_bench_data(folder)
    return BranchesConfig(
        folder=folder / "out", corpus=folder / "corpus", inside="ast", foreign="inspect", junk=("typing",),
        cases=("foreign", "noisy"), methods=("curate", "ngrams", "oracle", "proportional", "windowed"),
        prior_strengths=(0.5,), oracle_temperatures=(2.0,), dsir_temperatures=(2.0,), seeds=(0,),
        model=folder / "model.json", vocab_size=300, steps=12, branch_steps=4, window_steps=4, continued=2,
        batch_size=4, seq_len=16, branch_test=BranchTestConfig(steps=2, repeats=1),
        target_documents=6, excerpt_characters=80, domain_megabytes=0.008, lr=3e-3, swarm=4,
    )  # fmt: skip


@pytest.mark.slow
def test_every_method_has_rows_that_differ_in_data_only_and_finished_branches_are_kept(config):
    result = bench(config)
    rows = result["rows"]
    assert all(set(one) == KEYS for one in rows)
    found = {(one["case"], one["method"], one["temperature"]) for one in rows}
    assert found == {
        ("foreign", "proportional", DEFAULT_STRENGTH), ("noisy", "proportional", DEFAULT_STRENGTH),
        ("noisy", "oracle", 1.0),
        *((case, ours, at) for case in ("foreign", "noisy") for at in (DEFAULT_STRENGTH, 0.5)
          for ours in ("curate", "ngrams", "windowed")),
        ("foreign", "oracle", 1.0), ("foreign", "oracle", 2.0),
    }  # fmt: skip
    assert [(one["case"], one["schedule"]) for one in result["schedules"]] == [
        ("foreign", "early-and-late"), ("noisy", "early-and-late")
    ]  # fmt: skip
    assert {one["tokens"] for one in rows} == {4 * 4 * 16}
    for one in rows:
        if one["method"] == "proportional":
            assert one["kl_to_prior"] < 0.02  # whole samples only
            assert one["token_speedup"] == 1.0
        assert (one["selection_cost_units"] > 0) == (one["method"] in ("curate", "windowed"))
    assert len({round(one["target_loss"], 9) for one in rows}) > len(rows) / 2
    clean = config.folder / "data" / "split" / "train"
    for path in sorted((clean / "noisy").glob("*.jsonl")):
        ids = [document.id for document in read_documents(path)]
        kept = [document.id for document in read_documents(clean / "clean" / path.name)]
        assert [one for one in ids if not one.startswith("noise/")] == kept
        assert len(ids) > len(kept)
    assert not list(config.folder.glob("**/*.part"))
    left = [path for path in config.folder.glob("*/seed-0/*/*/stage") if path.exists()]
    assert not left
    tested = {(one["case"], one["method"]) for one in result["branch_test"]}
    assert tested == {("foreign", "curate"), ("noisy", "curate")}
    assert all(-1 <= one["spearman"] <= 1 for one in result["branch_test"])
    again = bench(config)
    assert again == result
    printed: list[str] = []
    show(result, printed.append)
    assert any(line.startswith("noisy") and "curate" in line for line in printed)
    page = config.folder / "page.html"
    branches_page(page, result)
    assert best_sentence(result["best"]) in unescape(page.read_text(encoding="utf-8"))


def test_a_lost_proportional_state_is_made_again(config):
    config = config.model_copy(update={"cases": ("foreign",), "methods": ("proportional",)})
    first = bench(config)
    (continued,) = config.folder.glob("plain/seed-0/shared-*/continued-2.json")
    continued.unlink()
    assert bench(config) == first


def test_bad_settings_are_refused(config):
    for changes, named in (
        ({"methods": ("curate",)}, "proportional"),
        ({"methods": ("proportional", "probes")}, "probes"),
        ({"window_steps": 7}, "12"),
        ({"foreign": "ast"}, "foreign"),
    ):
        with pytest.raises(ValueError, match=named):
            BranchesConfig(**{**config.model_dump(), **changes})
    with pytest.raises(UserError, match=r"poetry\.jsonl"):
        bench(config.model_copy(update={"foreign": "poetry", "folder": config.folder / "other"}))
    with pytest.raises(UserError, match="300"):
        bench(config.model_copy(update={"target_documents": 100, "folder": config.folder / "other"}))


def test_the_small_bench_keeps_what_it_was_given(config):
    made = small(config)
    assert made.corpus == config.corpus
    assert made.steps < BranchesConfig().steps
    assert made.folder != config.folder
