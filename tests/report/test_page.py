"""The page: one file that loads nothing, equal bytes for equal data, every text escaped, every number reachable."""

import dataclasses
import json
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path

import polars as pl
import pytest
from plotly import graph_objects as go

from curate.output.layout import SelectionFolder
from curate.report import tables
from curate.report.collect import contamination_table
from curate.report.data import ReportData, load_data, save_data
from curate.report.page import domain_order, group_steps, render, write_report
from curate.report.sentences import facts, headline, warnings
from curate.report.style import percent
from tests.report.synthetic import DOMAINS, TEXTS, report_data


class Page(HTMLParser):
    """Tags with their attributes, visible text, and what stands in scripts."""

    def __init__(self, source: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.scripts: list[tuple[str | None, str]] = []
        self.text = ""
        self._script: str | None = None
        self.feed(source)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        self._script = (dict(attrs).get("type") or "text/javascript") if tag == "script" else None

    def handle_endtag(self, tag):
        self._script = None

    def handle_data(self, data):
        if self._script is None:
            self.text += data
        else:
            self.scripts.append((self._script, data))


@pytest.fixture(scope="module")
def data() -> ReportData:
    return report_data()


@pytest.fixture(scope="module")
def source(data: ReportData) -> str:
    return render(data)


@pytest.fixture(scope="module")
def page(source: str) -> Page:
    return Page(source)


def test_nothing_is_loaded_from_anywhere(page: Page) -> None:
    for tag, attributes in page.tags:
        assert "src" not in attributes, tag
        assert (attributes.get("href") or "#").startswith("#"), attributes
        assert tag not in {"link", "iframe", "img", "object", "base"}
    (policy,) = [found["content"] for _, found in page.tags if found.get("http-equiv") == "Content-Security-Policy"]
    assert policy is not None
    assert policy.startswith("default-src 'none'")
    assert "http" not in policy
    assert sum("plotly.js v" in script for _, script in page.scripts) == 1


def test_equal_data_gives_equal_bytes(source: str, tmp_path: Path) -> None:
    write_report(tmp_path / "report.html", report_data())
    assert (tmp_path / "report.html").read_text(encoding="utf-8") == source


def test_texts_are_escaped_and_keep_their_whitespace(page: Page, source: str) -> None:
    assert "<script>alert(1)" not in source
    assert TEXTS["least"] in page.text
    assert TEXTS["most"] in page.text


def test_names_that_look_like_markup_stay_text() -> None:
    hostile = "</script><img src=x>"
    frames = {
        name: getattr(report_data(), name).with_columns(pl.col("domain").replace("api_prose", hostile))
        for name in ("curve", "domains", "mixture", "examples", "shards")
    }
    page = Page(render(dataclasses.replace(report_data(target=hostile), **frames)))
    assert "img" not in {tag for tag, _ in page.tags}
    assert hostile in page.text


def test_figures_are_valid_and_every_button_shows_one(page: Page) -> None:
    figures = [json.loads(script) for kind, script in page.scripts if kind == "application/json"]
    assert len(figures) == 5
    for figure in figures:
        assert go.Figure(figure).data
    ids = {attributes.get("id") for _, attributes in page.tags}
    buttons = [attributes for tag, attributes in page.tags if tag == "button"]
    assert buttons
    assert {name for button in buttons for name in (button["data-show"], button["data-hide"])} <= ids
    links = {str(attributes["href"])[1:] for tag, attributes in page.tags if tag == "a"}
    assert links <= ids


def test_every_number_of_a_figure_stands_in_a_table(page: Page, data: ReportData) -> None:
    for domain in DOMAINS:
        assert domain in page.text
    assert page.text.count("stdlib_python") > data.curve.filter(domain="stdlib_python").height
    for text in ("38.5\u202f%", "epoch cap", "floor", "946\u202f176", "+0.40", "2.1\u202fmin", "3.41\u202fMB"):
        assert text in page.text
    assert data.sign[1:] in page.text
    assert data.loader in page.text


def test_domains_keep_one_order_everywhere(data: ReportData) -> None:
    order = domain_order(data)
    assert order[0] == "docstrings"
    assert sorted(order) == DOMAINS
    shuffled = dataclasses.replace(data, domains=data.domains.sample(fraction=1, shuffle=True, seed=1))
    assert domain_order(shuffled) == order


def test_the_headline_names_best_worst_and_their_shares(data: ReportData) -> None:
    said = headline(data)
    assert said.index("late window") < said.index("docstrings") < said.index("minified_js")
    shares = re.findall(r"(\w+) from ([\d.]+)\u202f% to ([\d.]+)\u202f%", said)
    assert shares == [("docstrings", "14.3", "38.5"), ("minified_js", "14.3", "1.4")]
    nothing = headline(dataclasses.replace(data, domains=data.domains.with_columns(samples=pl.lit(0))))
    assert "late window" in nothing
    assert not [domain for domain in DOMAINS if domain in nothing]


@pytest.mark.parametrize("source", ["current", "candidates"])
def test_a_report_of_the_next_step_says_nothing_of_windows(data: ReportData, source: str) -> None:
    of_source = {
        name: frame.filter(source="late").with_columns(source=pl.lit(source))
        for name in ("domains", "reliability", "shards", "examples")
        if (frame := getattr(data, name)) is not None
    }
    facts_of = {"horizons": {source: "1_steps_on"}, "mixture_source": source, "curve": data.curve.clear()}
    page = Page(render(dataclasses.replace(data, **of_source, **facts_of)))
    words = re.sub(r"\s+", " ", page.text)
    assert "window" not in words.split("How to read this")[0]
    assert {"current": "current state", "candidates": "candidates"}[source] in words
    assert "values" not in {attributes.get("id") for _, attributes in page.tags}
    links = {str(attributes["href"])[1:] for tag, attributes in page.tags if tag == "a"}
    assert links <= {attributes.get("id") for _, attributes in page.tags}


def test_it_is_said_where_nothing_was_retained(data: ReportData) -> None:
    nothing = dataclasses.replace(data, retain=None)
    assert len(warnings(nothing)) == len(warnings(data)) + 1
    assert any("3.9 %" in said for said in warnings(nothing))
    assert dict(facts(data))["retained text"] == "general"


def test_phases_are_shown_where_there_are_several(page: Page, data: ReportData, tmp_path: Path) -> None:
    first = {"start_sample": 0, "samples": 480, "blend": 1.0, "domains": {"docstrings": 360, "api_prose": 120}}
    basin = {"start_sample": 480, "samples": 4320, "blend": 0.0, "domains": {"docstrings": 2160, "api_prose": 2160}}
    phased = dataclasses.replace(data, phases=[first, basin])
    assert "<h3>Phases</h3>" in render(phased)
    assert "<h3>Phases</h3>" not in render(dataclasses.replace(data, phases=[first]))
    shown = tables.phase_table(phased.phases, ["docstrings", "minified_js"])
    assert shown.rows[0] == ["0", "480", "100\u202f%", "75.0\u202f%", "0.0\u202f%"]
    assert shown.rows[1][:4] == ["480", "4\u202f320", "0\u202f%", "50.0\u202f%"]
    save_data(SelectionFolder(tmp_path), phased)
    assert render(load_data(SelectionFolder(tmp_path))) == render(phased)


def test_values_that_go_with_length_are_said():
    data = dataclasses.replace(report_data(), length_bias={"early": 0.1, "late": -0.62})
    (said,) = [one for one in warnings(data) if "length" in one]
    assert "late window" in said
    assert "0.62" in said


def test_text_that_is_held_out_is_shown_and_said_where_it_is_still_there(data: ReportData, tmp_path):
    hits = pl.DataFrame(
        {
            "domain": ["web", "web", "web", "code"],
            "sample_id": [1, 1, 2, 3],
            "file": ["bench.jsonl"] * 4,
            "id": ["a", "b", "a", "c"],
            "of_sample": [0.3, 0.9, 0.2, 1.0],
            "removed": [True] * 4,
        }
    )
    found = contamination_table(hits).to_dicts()
    assert [(row["domain"], row["samples"], row["documents"], row["of_sample"]) for row in found] == [
        ("web", 2, 2, 0.9), ("code", 1, 1, 1.0)
    ]  # fmt: skip
    clean = dataclasses.replace(data, contamination=found)
    assert warnings(clean) == warnings(data)
    assert 'id="contamination"' in render(clean)
    assert 'id="contamination"' not in render(data)
    assert tables.contamination_table(found).rows[0] == ["web", "bench.jsonl", "2", "2", percent(0.9), "left out"]
    left = dataclasses.replace(data, contamination=contamination_table(hits.with_columns(removed=False)).to_dicts())
    (said,) = set(warnings(left)) - set(warnings(data))
    assert said.startswith("3 ")
    save_data(SelectionFolder(tmp_path), left)
    assert render(load_data(SelectionFolder(tmp_path))) == render(left)


def test_weak_targets_and_unseen_domains_are_said(data: ReportData) -> None:
    (unmeasured,) = warnings(data)
    assert "minified_js" in unmeasured
    assert "early window" in unmeasured
    (weak,) = set(warnings(report_data(late_reliability=0.1))) - {unmeasured}
    assert "late window" in weak
    assert "+0.18" in weak


def test_a_target_that_the_anchors_do_not_express_is_said(data: ReportData) -> None:
    assert "unexplained by the anchors" not in dict(facts(data))
    solved = dataclasses.replace(data, residuals={"early": 0.31, "late": 0.74})
    assert dict(facts(solved))["unexplained by the anchors"] == (
        f"early window {percent(0.31)}; late window {percent(0.74)}"
    )
    (said,) = set(warnings(solved)) - set(warnings(data))
    assert "late window" in said
    assert percent(0.74) in said


def test_long_windows_and_stages_are_grouped_and_say_so(data: ReportData) -> None:
    steps = pl.DataFrame({"step": range(10, 311)})
    curve = steps.join(data.curve.filter(step=0).drop("step"), how="cross").with_columns(value=pl.col("step") * 1e-6)
    grouped, size = group_steps(curve, 150, "source", "domain")
    assert size == 3
    first = grouped.filter(step=10, domain="cpp_headers")
    assert first["value"].to_list() == pytest.approx([11e-6])
    training = pl.concat([data.training, data.training.with_columns(pl.col("step") + 300)] * 2)
    training = training.with_columns(step=pl.int_range(pl.len()))
    text = Page(render(dataclasses.replace(data, curve=curve.select(data.curve.columns), training=training))).text
    assert "Each bar is the mean of 3 consecutive steps." in text
    assert "Each point is the mean of 2 consecutive steps." in text


def test_grouping_keeps_short_frames_as_they_are(data: ReportData) -> None:
    assert group_steps(data.training, 300)[0] is data.training
    assert group_steps(data.training.clear(), 300)[1] == 1


def test_empty_frames_still_make_a_page(data: ReportData) -> None:
    empty = {name: getattr(data, name).clear() for name in ("examples", "shards", "reliability", "costs", "curve")}
    page = Page(render(dataclasses.replace(data, **empty)))
    assert "None were recorded." in page.text


def test_saved_data_renders_to_the_same_page(source: str, data: ReportData, tmp_path: Path) -> None:
    save_data(SelectionFolder(tmp_path), data)
    assert render(load_data(SelectionFolder(tmp_path))) == source


def test_a_frame_without_its_columns_is_refused(data: ReportData) -> None:
    with pytest.raises(ValueError, match="'costs' of a report lacks the columns note"):
        dataclasses.replace(data, costs=data.costs.drop("note"))


@pytest.mark.browser
@pytest.mark.parametrize("width", [390, 1280])
def test_a_browser_draws_every_figure(data: ReportData, tmp_path: Path, width: int) -> None:
    browser = shutil.which("chromium") or shutil.which("google-chrome")
    assert browser, "install Chromium to run this test"
    write_report(tmp_path / "report.html", data)
    command = [browser, "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-sync"]
    command += ["--disable-background-networking", "--disable-component-update", "--disable-quic"]
    command += [f"--user-data-dir={tmp_path / 'profile'}", f"--window-size={width},2000", "--virtual-time-budget=8000"]
    command += ["--enable-logging=stderr", "--dump-dom", (tmp_path / "report.html").as_uri()]
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    assert not re.findall(r"CONSOLE.*(?:rror|efused)", result.stderr)
    drawn = [found for _, found in Page(result.stdout).tags if found.get("data-drawn") == "yes"]
    assert [found["id"] for found in drawn] == ["mixture-figure", "score-figure", "curve-figure", "training-figure"]
