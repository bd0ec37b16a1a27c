"""Pages about fidelity: structure, sentences, every number reachable, nothing broken by what is not known."""

import itertools
import json
import math
import re
import shutil
import subprocess
from pathlib import Path

import pytest
from plotly import graph_objects as go

from curate.core.rng import generator
from curate.report.fidelity import (
    best_sentence,
    cost_sentence,
    mean_rows,
    noise_sentence,
    pareto_page,
    smoothness_sentence,
    trust,
    verify_page,
)
from curate.report.fidelity_figures import front, grid, ordered, pareto_figure
from tests.report.test_page import Page

TARGETS = ["api_prose", "docstrings", "stdlib_python"]
CELLS = [(window, horizon) for horizon in ("window_end", "stage_end") for window in ("early", "late")]
QUALITY = {("early", "stage_end"): 0.42, ("early", "window_end"): 0.74, ("late", "stage_end"): 0.93}
ESTIMATORS = {
    "gradient dot product": (0.22, 0.4),
    "tracin": (0.24, 1.1),
    "dvemb": (0.26, 1.4),
    "dvemb-adam": (0.38, 1.9),
    "adjoint, curvature by differences": (0.74, 3.4),
    "adjoint, 16 anchors": (0.88, 4.2),
    "adjoint": (0.96, 3.6),
    "adjoint, own step exact": (0.98, 4.6),
}


def row(cell, target, spearman, **fields):
    window, horizon = cell
    return {
        "estimator": "adjoint",
        "window": window,
        "horizon": horizon,
        "target": target,
        "seed": 0,
        "n": 12,
        "spearman": spearman,
        "low": spearman - 0.2,
        "high": min(1.0, spearman + 0.06),
        "spearman_within_step": spearman - 0.07,
        "spearman_of_difference": spearman - 0.13,
        "group_lds": spearman - 0.03,
        "noise_cap": 0.995,
        "cost_units_per_step": 3.6,
        "bytes_per_sample": 64,
    } | fields


def pair(cell, target, index, random):
    value = random.standard_normal() * math.exp(random.standard_normal()) * (3e-4 if cell[0] == "late" else 4e-6)
    spoiled = 0.1 if cell[0] == "late" else 1.0
    estimate = value * (1 + spoiled * random.standard_normal())
    step = (270 if cell[0] == "late" else 3) + index // 4
    return {"window": cell[0], "horizon": cell[1], "target": target, "step": step, "value": value, "estimate": estimate}


def result():
    random = generator(0, "fidelity page")
    where = [(cell, target) for cell in CELLS for target in TARGETS]
    named = [({"window": cell[0], "horizon": cell[1], "target": target}, cell[0] == "late") for cell, target in where]
    return {
        "rows": [row(cell, target, QUALITY.get(cell, 0.97) - 0.01 * TARGETS.index(target)) for cell, target in where],
        "pairs": [pair(cell, target, index, random) for cell, target in where for index in range(12)],
        "smoothness": [
            {
                **at,
                "part": part,
                "relative_deviation": (0.05 if late else 0.6) * (1.2 - part) * share,
                "spearman": 0.9,
                "n": 2,
            }
            for (at, late), share in zip(named, itertools.cycle((1.0, 0.5, 0.2)), strict=False)
            for part in (0.1, 0.5)
        ],
        "noise": [{**at, "noise": 1.25e-7, "signal": 4e-4 if late else 5e-6} for at, late in named],
        "cost": {"rerun_units": 9437.0, "estimate_units": 432.0, "reruns": 48},
    }


def bench_rows():
    random = generator(0, "fidelity bench page")
    fall = {"early": 0.45, "middle": 0.85, "late": 1.0}
    return [
        row((window, horizon), target, spearman * factor + 0.03 * random.standard_normal(), estimator=estimator,
            seed=seed, cost_units_per_step=cost)
        for estimator, (spearman, cost) in ESTIMATORS.items()
        for window, factor in fall.items()
        for horizon in ("window_end", "stage_end")
        for target in TARGETS
        for seed in (0, 1)
    ]  # fmt: skip


def nothing_known(rows):
    kept = {"estimator", "window", "horizon", "target"}
    return [{name: value if name in kept else None for name, value in row.items()} for row in rows]


def figures(page):
    return [json.loads(script) for kind, script in page.scripts if kind == "application/json"]


@pytest.fixture(scope="module")
def verified(tmp_path_factory):
    path = tmp_path_factory.mktemp("verify") / "verify.html"
    verify_page(path, result())
    return Page(path.read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def compared(tmp_path_factory):
    path = tmp_path_factory.mktemp("pareto") / "pareto.html"
    pareto_page(path, bench_rows())
    return Page(path.read_text(encoding="utf-8"))


def test_a_verified_run_has_a_figure_per_question_and_a_panel_per_window_and_horizon(verified: Page) -> None:
    found = figures(verified)
    assert len(found) == 1 + len(CELLS) + len(CELLS)
    assert all(go.Figure(figure).data for figure in found)
    labels = [attributes["aria-label"] for _, attributes in verified.tags if attributes.get("role") == "img"]
    assert "Estimates against real values, late window, at stage end" in labels
    assert "src" not in {name for _, attributes in verified.tags for name in attributes}


def test_every_number_of_a_verified_run_stands_in_a_table(verified: Page) -> None:
    for text in (*TARGETS, "0.42", "0.995", "64\u202fB", "1.25e−07", "0.0350", "window end", "9437", "48 reruns"):
        assert text in verified.text
    for found in result()["pairs"]:
        assert f"{found['value']:#.3g}".rstrip(".").replace("-", "−") in verified.text


def test_the_noise_cap_and_the_intervals_are_drawn(verified: Page) -> None:
    marks, caps = figures(verified)[0]["data"][:2]
    assert marks["x"] == pytest.approx([0.74, 0.73, 0.72])
    assert marks["error_x"]["arrayminus"] == pytest.approx([0.2] * 3)
    assert caps["x"] == [0.995] * 3


def test_points_lie_on_the_diagonal_where_the_estimate_is_exact(tmp_path: Path) -> None:
    exact = [{**found, "estimate": found["value"]} for found in result()["pairs"]]
    verify_page(tmp_path / "verify.html", result() | {"pairs": exact})
    panel = figures(Page((tmp_path / "verify.html").read_text(encoding="utf-8")))[1]
    assert len(panel["data"]) == 1 + len(TARGETS)
    for trace in panel["data"]:
        assert trace["x"] == trace["y"]
        assert max(map(abs, trace["x"])) <= panel["layout"]["xaxis"]["range"][1]


def test_the_lede_says_where_values_can_be_trusted() -> None:
    assert trust(result()["rows"]) == (
        "Values by adjoint ranked the removed samples nearly as retraining did in the late window at window end and "
        "stage end (Spearman 0.91 to 0.97, intervals from 0.71); roughly as retraining did in the early window at "
        "window end (Spearman 0.72 to 0.74, intervals from 0.52); hardly as retraining did in the early window at "
        "stage end (Spearman 0.40 to 0.42, intervals from 0.20)."
    )
    late = [found for found in result()["rows"] if found["window"] == "late"]
    assert "nearly as retraining did in every window (Spearman" in trust(late)
    assert trust([]) == "No ranking was measured."


def test_noise_and_smoothness_name_the_worst_place() -> None:
    data = result()
    assert noise_sentence(data["noise"]) == (
        "Rounding alone moves a value by at most 2.5\u202f% of the spread of values "
        "(early window, at window end, api_prose)."
    )
    assert "no estimate can rank small values" in noise_sentence([{**data["noise"][0], "noise": 4e-6}])
    assert "removing 10\u202f% of a sample's weight differs in slope by 66\u202f%" in smoothness_sentence(
        data["smoothness"]
    )
    late = [row for row in data["smoothness"] if row["window"] == "late"]
    assert smoothness_sentence(late).startswith("Training is smooth in its data weights: parts")


def test_nothing_known_still_makes_both_pages(tmp_path: Path) -> None:
    data = result()
    unknown = {name: nothing_known(data[name]) for name in ("rows", "pairs", "smoothness", "noise")}
    nulls = dict.fromkeys(data["cost"])
    for number, found in enumerate(({**unknown, "cost": nulls}, {**{name: [] for name in unknown}, "cost": {}})):
        verify_page(tmp_path / f"{number}.html", found)
        pareto_page(tmp_path / f"pareto{number}.html", found["rows"])
        for name in (f"{number}.html", f"pareto{number}.html"):
            text = Page((tmp_path / name).read_text(encoding="utf-8")).text
            assert "No ranking was measured." in text
            assert "None" not in text
            assert "nan" not in text
    assert cost_sentence(nulls).count("–") == 3


@pytest.mark.slow
@pytest.mark.parametrize("name", ["spearman", "low", "noise_cap", "cost_units_per_step", "n", "seed"])
@pytest.mark.parametrize("value", [None, math.nan])
def test_a_single_unknown_number_breaks_nothing(tmp_path: Path, name: str, value: float | None) -> None:
    data = result()
    data["rows"][0][name] = value
    verify_page(tmp_path / "verify.html", data)
    pareto_page(tmp_path / "pareto.html", data["rows"])
    assert "–" in Page((tmp_path / "verify.html").read_text(encoding="utf-8")).text


def test_estimators_are_compared_at_their_means(compared: Page) -> None:
    rows = bench_rows()
    found = figures(compared)
    assert len(found) == 8
    mine = [
        row["spearman"]
        for row in rows
        if (row["estimator"], row["window"], row["horizon"]) == ("adjoint", "late", "stage_end")
    ]
    (mean,) = [
        row
        for row in mean_rows(rows)
        if (row["estimator"], row["window"], row["horizon"]) == ("adjoint", "late", "stage_end")
    ]
    assert mean["spearman"] == pytest.approx(sum(mine) / 6)
    assert (mean["lowest"], mean["highest"], mean["rankings"]) == (min(mine), max(mine), 6)
    assert f"{mean['spearman']:.2f}" in compared.text
    assert all(found["layout"]["xaxis"]["type"] == "log" for found in found[:6])
    assert {note["text"] for note in found[0]["layout"]["annotations"]} >= set(ESTIMATORS)


def test_labels_of_points_at_one_place_stand_apart() -> None:
    at = {"window": "late", "horizon": 300, "spearman": 0.5, "lowest": 0.4, "highest": 0.6, "cost": 2.0}
    names = "abcdefghijkl"
    for spearman in (-0.04, 0.5, 1.0):
        rows = [{**at, "spearman": spearman, "estimator": name} for name in names]
        figure = json.loads(pareto_figure(rows, ("late", 300)))
        places = [note["ay"] for note in figure["layout"]["annotations"] if note["text"] in set(names)]
        low, high = figure["layout"]["yaxis"]["range"]
        gaps = [one - other for one, other in itertools.pairwise(sorted(places, reverse=True))]
        assert min(gaps) >= 12 * (high - low) / 220
        assert low - 1e-9 <= min(places) <= max(places) <= high + 1e-9


def test_the_front_keeps_what_nothing_cheaper_beats() -> None:
    rows = [{"spearman": value} for value in (0.3, 0.2, 0.5, 0.5, 0.9)]
    assert [found["spearman"] for found in front(rows)] == [0.3, 0.5, 0.9]


def test_the_best_estimator_is_named_with_its_cost() -> None:
    early, late = ("early", 30), ("late", 300)
    rows = [
        row(early, "a", 0.5),
        row(early, "a", 0.6, estimator="dvemb", cost_units_per_step=1.5),
        row(late, "a", 0.9),
    ]
    assert best_sentence(mean_rows(rows)) == (
        "Best of 2 estimators in agreement with retraining: dvemb in the early window at step 30 (mean Spearman 0.60, "
        "1.50 passes per step); adjoint in the late window at step 300 (mean Spearman 0.90, 3.60 passes per step)."
    )


def test_windows_and_horizons_keep_one_order() -> None:
    rows = [{"window": window, "horizon": horizon} for window in ("late", "early") for horizon in (300, 60)]
    assert grid(rows) == [[("early", 60), ("late", 60)], [("early", 300), ("late", 300)]]
    assert ordered(["x", "stage_end", "late", "x", "window_end"]) == ["late", "window_end", "stage_end", "x"]


def test_names_that_look_like_markup_stay_text(tmp_path: Path) -> None:
    hostile = "</script><img src=x>"
    rows = [{**found, "target": hostile, "estimator": hostile} for found in result()["rows"]]
    verify_page(tmp_path / "verify.html", result() | {"rows": rows})
    pareto_page(tmp_path / "pareto.html", rows)
    for name in ("verify.html", "pareto.html"):
        page = Page((tmp_path / name).read_text(encoding="utf-8"))
        assert "img" not in {tag for tag, _ in page.tags}
        assert hostile in page.text


@pytest.mark.browser
@pytest.mark.parametrize("width", [390, 1280])
def test_a_browser_draws_every_panel(tmp_path: Path, width: int) -> None:
    browser = shutil.which("chromium") or shutil.which("google-chrome")
    assert browser, "install Chromium to run this test"
    verify_page(tmp_path / "verify.html", result())
    pareto_page(tmp_path / "pareto.html", bench_rows())
    for name, panels in (("verify.html", 9), ("pareto.html", 8)):
        command = [browser, "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-sync"]
        command += ["--disable-background-networking", "--disable-component-update", "--disable-quic"]
        command += [f"--user-data-dir={tmp_path / 'profile'}", f"--window-size={width},2000"]
        command += ["--virtual-time-budget=8000", "--enable-logging=stderr", "--dump-dom", (tmp_path / name).as_uri()]
        result_ = subprocess.run(command, capture_output=True, text=True, check=True)
        assert not re.findall(r"CONSOLE.*(?:rror|efused)", result_.stderr)
        drawn = [found for _, found in Page(result_.stdout).tags if found.get("data-drawn") == "yes"]
        assert len(drawn) == panels
