"""Every sink is given the same hostile texts, and what it wrote is read with a parser of its own kind."""

import ast
import dataclasses
import html
import json
import logging
import os
import re
import shutil
import subprocess
import sys
from collections import Counter
from html.parser import HTMLParser
from pathlib import Path

import polars as pl
import pytest
import yaml

from curate.core.artifacts import read_json, write_json
from curate.core.config import run_command
from curate.core.errors import UserError
from curate.core.escape import name_of, page_text, plot_label, script_json, terminal, visible
from curate.core.progress import progress, say, start_logging
from curate.core.tracking import TrackingConfig, open_tracker
from curate.mixture.record import Phase
from curate.output.write import loader_line, write_schedule, write_weights
from curate.plans.plan import PlanConfig
from curate.reconstruct.description import LogConfig
from curate.reconstruct.records import read_log
from curate.report.branches import branches_page
from curate.report.charts import fidelity_figure, write_page
from curate.report.data import ReportData
from curate.report.page import render
from curate.report.track import log_report
from curate.training.declared import window_steps
from tests.hostile import HOSTILE, SURROGATES
from tests.report.synthetic import DOMAINS, report_data

ROOT = Path(__file__).resolve().parents[1]
EVERY = {**HOSTILE, **SURROGATES}
PATHS = {what: text.replace("\x00", "").replace("/", "-")[:50] for what, text in EVERY.items() if what != "half a pair"}
"""Names that a file can have; no system has one with half a pair."""
ACTIVE = re.compile("[\x00-\x1f\x7f-\x9f\u200b\u200e\u200f\u2028-\u202e\u2060-\u206f\ufeff\ud800-\udfff]")
"""What a terminal obeys, what turns text around, what shows nothing, what is not text."""


class Page(HTMLParser):
    """Tags, attributes, text, and the scripts by their type."""

    def __init__(self, source: str) -> None:
        super().__init__()
        self.tags: Counter[str] = Counter()
        self.attributes: list[tuple[str, str | None]] = []
        self.scripts: list[tuple[str, str]] = []
        self.text = ""
        self._script: str | None = None
        self.feed(source)

    def handle_starttag(self, tag, attrs):
        self.tags[tag] += 1
        self.attributes += attrs
        self._script = (dict(attrs).get("type") or "") if tag == "script" else None

    def handle_endtag(self, tag):
        self._script = None

    def handle_data(self, data):
        if self._script is None:
            self.text += data
        else:
            self.scripts.append((self._script, data))

    @property
    def figures(self) -> list[str]:
        return [script for kind, script in self.scripts if kind == "application/json"]


def texts_of(value: object) -> list[str]:
    """All texts of a JSON value."""
    if isinstance(value, dict):
        return [text for pair in value.items() for part in pair for text in texts_of(part)]
    if isinstance(value, list):
        return [text for part in value for text in texts_of(part)]
    return [value] if isinstance(value, str) else []


def checked(source: str, like: Page) -> Page:
    """A page that has the elements of a harmless one, and nothing that acts in its texts."""
    source.encode()
    page = Page(source)
    assert page.tags == like.tags
    assert not [name for name, _ in page.attributes if name.startswith("on")]
    assert {value for name, value in page.attributes if name in ("href", "src")} == {
        value for name, value in like.attributes if name in ("href", "src")
    }
    assert not ACTIVE.search(page.text.replace("\n", "").replace("\t", ""))
    assert len(page.scripts) == len(like.scripts)
    for figure in page.figures:
        assert not set(figure) & set("<>&\u2028\u2029")
        json.loads(figure)
    return page


def renamed(data: ReportData, names: dict[str, str], **facts) -> ReportData:
    frames = {
        name: frame.with_columns(pl.col("domain").replace(names))
        for name in ("curve", "domains", "mixture", "targets", "examples", "shards")
        if "domain" in (frame := getattr(data, name)).columns
    }
    frames["sweep"] = data.sweep.rename({f"share_{old}": f"share_{new}" for old, new in names.items()})
    return dataclasses.replace(data, **{**frames, **facts})


@pytest.mark.slow
def test_a_report_shows_hostile_names_and_texts_as_text():
    benign, seen = Page(render(report_data())), set()
    values = list(HOSTILE.values())
    for at in range(0, len(values), len(DOMAINS)):
        some = values[at : at + len(DOMAINS)]
        names = dict(zip(DOMAINS, some, strict=False))
        data = renamed(report_data(target=some[0]), names)
        sample = data.examples.with_columns(text=pl.lit("".join(some)))
        costs = data.costs.with_columns(note=pl.lit(some[-1]), phase=pl.lit(some[0]))
        facts = {"run": some[-1], "loader": some[0], "settings": {text: text for text in some}}
        page = checked(render(dataclasses.replace(data, examples=sample, costs=costs, **facts)), benign)
        labels = [html.unescape(text) for figure in page.figures for text in texts_of(json.loads(figure))]
        for text in some:
            assert page_text(text) in page.text
            assert visible(text) in labels, text
            seen.add(text)
    assert seen == set(values)


def test_a_file_name_that_is_no_text_does_not_end_a_report():
    for text in SURROGATES.values():
        checked(render(dataclasses.replace(report_data(), target=text, run=text)), Page(render(report_data())))


@pytest.mark.slow
def test_pages_of_recipes_show_hostile_names_as_text(tmp_path):
    write_page(tmp_path / "benign.html", "title", "lede", {"a": "{}", "b": "{}"})
    benign = Page((tmp_path / "benign.html").read_text(encoding="utf-8"))
    for text in HOSTILE.values():
        row = {"method": text, "epoch": None, "activation": text, "lr": 0.1, "spearman": 0.5, "low": 0.4, "high": 0.6}
        write_page(tmp_path / "page.html", text, text, {text: fidelity_figure([row]), f"{text}.": "{}"})
        page = checked((tmp_path / "page.html").read_text(encoding="utf-8"), benign)
        assert page.text.count(page_text(text)) >= 4
    point = {"schedule": "constant", "seed": 0, "kl_to_prior": 0.1, "target_loss": 1.0, "general_loss": 1.0}
    for text in HOSTILE.values():
        rows = [{**point, "case": text, "method": method, "temperature": 1.0} for method in ("proportional", text)]
        branches_page(tmp_path / "page.html", {"rows": rows, "best": [], "at_limit": [], "equal_kl": []})
        page = Page((tmp_path / "page.html").read_text(encoding="utf-8"))
        assert not page.tags & Counter({"img": 1, "a": 1, "b": 1, "iframe": 1})
        assert page_text(text) in page.text


@pytest.mark.parametrize("text", EVERY.values(), ids=EVERY)
def test_what_an_escape_gives_is_the_text_again(text):
    assert json.loads(script_json(json.dumps({text: text}))) == {text: text}
    assert json.loads(script_json(json.dumps({text: text}, ensure_ascii=False))) == {text: text}
    assert html.unescape(plot_label(text)) == visible(text)
    assert not re.search("<|%{", plot_label(text))
    shown = terminal(text)
    assert "\n" not in shown
    assert not ACTIVE.search(shown)
    if "\\" not in text and text.isascii():
        assert ast.literal_eval(f'"{shown.replace(chr(34), chr(92) + chr(34))}"') == text
    assert terminal(shown) == shown


def test_text_that_is_only_foreign_stays():
    for text in (
        HOSTILE["right to left"],
        HOSTILE["joiners"],
        HOSTILE["combining"],
        HOSTILE["empty looking"],
        "naïve 中文",
    ):
        assert visible(text) == text


@pytest.mark.parametrize("text", EVERY.values(), ids=EVERY)
def test_errors_logs_bars_and_prints_are_one_line(text, capsys, monkeypatch):
    def fail() -> None:
        raise UserError(f"domain {text} is not there")

    with pytest.raises(SystemExit, match="2"):
        run_command(fail)
    root = logging.getLogger()
    monkeypatch.setattr(root, "handlers", [])
    start_logging()
    logging.getLogger("curate.x").warning("domain %s is empty", text)
    say(f"wrote {text}")
    list(progress(iter([1]), total=1, what=text))
    said = capsys.readouterr()
    assert said.out == f"wrote {visible(text)}\n"
    error, line, *_ = said.err.split("\n")
    assert error == f"error: domain {visible(text)} is not there"
    assert line == f"domain {visible(text)} is empty"
    assert not ACTIVE.search(said.err.replace("\n", "").replace("\r", ""))


def test_a_traceback_of_ours_keeps_its_lines(capsys, monkeypatch):
    monkeypatch.setattr(logging.getLogger(), "handlers", [])
    start_logging()
    try:
        raise ValueError("x")
    except ValueError:
        logging.getLogger("curate.x").exception("failed")
    assert len(capsys.readouterr().err.splitlines()) >= 4


def test_yaml_and_json_files_give_the_texts_again(tmp_path):
    texts = list(EVERY.values())
    write_json(tmp_path / "file.json", {text: [text] for text in HOSTILE.values()})
    assert read_json(tmp_path / "file.json") == {text: [text] for text in HOSTILE.values()}
    for text in SURROGATES.values():
        with pytest.raises(UserError, match="cannot be kept in JSON"):  # nobody could read it again
            write_json(tmp_path / "file.json", {"x": text})
    write_weights(tmp_path / "streams.yaml", {"x": Path("/data")}, {"x": 1})
    phase = Phase(start_sample=0, samples=len(texts), blend=1.0, domains=dict.fromkeys(texts, 1))
    write_schedule(tmp_path / "schedule.yaml", {text: text for text in texts}, [phase])
    (entry,) = yaml.safe_load((tmp_path / "schedule.yaml").read_text(encoding="utf-8"))
    assert [stream["local"] for stream in entry["streams"]] == texts
    for name in PATHS.values():
        folder = Path("/data", name)
        write_weights(tmp_path / "streams.yaml", {"x": folder}, {"x": 1})
        (entry,) = yaml.safe_load((tmp_path / "streams.yaml").read_text(encoding="utf-8"))
        assert entry["local"] == str(folder.resolve())


@pytest.mark.parametrize("name", PATHS.values(), ids=PATHS)
@pytest.mark.parametrize("kind", ["samples", "weights", "schedule"])
def test_the_line_that_loads_data_is_python_with_the_path_in_it(kind, name):
    path = Path("/data") / name / ("schedule.yaml" if kind == "schedule" else "x")
    line = loader_line("samples" if kind == "schedule" else kind, path)
    constants = [node.value for node in ast.walk(ast.parse(line)) if isinstance(node, ast.Constant)]
    assert str(path.resolve()) in constants
    assert not ACTIVE.search(line)


def test_a_tracker_takes_hostile_names(tmp_path, monkeypatch, caplog):
    for name in ("DATA", "CACHE", "CONFIG"):
        monkeypatch.setenv(f"WANDB_{name}_DIR", str(tmp_path / name))
    (tmp_path / "mixture.yaml").write_text("a: 1\n")
    values = list(HOSTILE.values())
    data = renamed(report_data(target=HOSTILE["traversal"] + HOSTILE["long"]), dict(zip(DOMAINS, values, strict=False)))
    data = dataclasses.replace(data, run=HOSTILE["script end"], settings={text: text for text in values})
    log_report(data, tmp_path / "mixture.yaml", TrackingConfig(mode="offline"), tmp_path / "run", values[0], "select")
    tracker = open_tracker(TrackingConfig(mode="offline"), tmp_path / "table", HOSTILE["line ends"], "select")
    tracker.log_table("texts", pl.DataFrame({"name": list(HOSTILE), "text": values}))
    tracker.finish()
    assert not [record.getMessage() for record in caplog.records if record.name.startswith("curate")]
    (table,) = (tmp_path / "table").glob("wandb/offline-run-*/files/media/table/texts_*.table.json")
    assert dict(json.loads(table.read_text(encoding="utf-8"))["data"]) == HOSTILE
    assert {path.name for path in tmp_path.iterdir()} == {"DATA", "CACHE", "CONFIG", "mixture.yaml", "run", "table"} & {
        path.name for path in tmp_path.iterdir()
    }


@pytest.mark.parametrize("text", EVERY.values(), ids=EVERY)
def test_a_file_of_any_name_has_a_name_that_a_folder_can_have(text, tmp_path):
    name = name_of(Path("folder", text.replace("\x00", "") + ".jsonl"))
    made = tmp_path / f"next-{name}-01234567.part"
    made.mkdir()
    assert made.parent == tmp_path
    assert [path.name for path in tmp_path.iterdir()] == [made.name]
    assert pl.Series([name]).to_list() == [name]
    assert not ACTIVE.search(name)


def test_long_names_stay_apart():
    assert name_of(Path("x" * 200 + "a.jsonl")) != name_of(Path("x" * 200 + "b.jsonl"))
    assert name_of(Path("short.jsonl")) == "short"


@pytest.mark.parametrize("text", EVERY.values(), ids=EVERY)
def test_a_window_is_called_as_a_folder_can_be(text):
    if re.fullmatch(r"\w[\w.-]*", text):
        assert window_steps({text: (0, 4)}, 9) == {text: (0, 4)}
        return
    with pytest.raises(UserError, match="rename it"):
        window_steps({text: (0, 4)}, 9)


def test_one_word_of_a_command_stays_one_word(tmp_path):
    texts = {what: text for what, text in EVERY.items() if what not in ("nul", "half a pair", "long")}
    program = "import json, os, sys; print(json.dumps([os.fsencode(word).hex() for word in sys.argv[1:]]))"
    template = f"{sys.executable} -c '{program}' {{data}} --out={{out}} '{{extra}} {{extra}}' {{checkpoint}}"
    for what, text in texts.items():
        plan = PlanConfig(
            folder=tmp_path / text.lstrip("/"), data=text, target="t.jsonl", train=template, train_first="first {data}",
            checkpoint="x" if ".." in Path(text).parts else text.lstrip("/") or "x",  # it must lie in {out}
            stages=[
                {"name": "one", "steps": 1}, {"name": "two", "steps": 1, "settings": {"extra": text}},
            ],
        )  # fmt: skip
        words = plan.arguments(1)
        assert len(words) == 7, what
        ran = subprocess.run(words, capture_output=True, text=True, check=True)
        received = [os.fsdecode(bytes.fromhex(word)) for word in json.loads(ran.stdout)]
        assert received == words[3:]
        assert received[2] == f"{text} {text}"
        assert plan.arguments(0) == ["first", str(Path(text).expanduser())]


@pytest.mark.slow
def test_a_selection_in_places_of_hostile_names(folder, tmp_path):
    """The run lies in a folder, and the target has a name, that is a pattern, a markup, a command and a second line."""
    place = tmp_path / "[1]*?{x} 'q' \"p\" <b> %s $(touch marker)"
    shutil.copytree(folder / "run", place / "run")
    target = place / f"a<b>[0-9]*\x1b[31m\u202e $(touch marker) ; 'q' \"p\" \udcff\nerror: forged{'y' * 150}.jsonl"
    shutil.copyfile(folder / "target.jsonl", target)
    made = ["curate.select", "--target", str(target), "--values.min_target_tokens", "100", "--budget_tokens", "500"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    made += ["--values.sources", "late", "--mode", "both", "--output.wandb", "none"]
    for words in (made, ["curate.report"]):
        command = [sys.executable, "-m", *words, "--run", str(place / "run")]
        ran = subprocess.run(command, capture_output=True, cwd=tmp_path, env=environment, check=False)
        said = (ran.stdout + ran.stderr).decode()
        assert ran.returncode == 0, said
        assert not ACTIVE.search(re.sub("[\n\r]", "", said))
        assert "error: forged" not in said.splitlines()
    assert [path.name for path in tmp_path.iterdir()] == [place.name]
    assert {path.name for path in place.iterdir()} == {"run", target.name}
    (selection,) = (place / "run" / "selections").iterdir()
    page = Page((selection / "report.html").read_text(encoding="utf-8"))
    assert name_of(target) in page.text
    assert page.tags["b"] == Page(render(report_data())).tags["b"] - 12 + page.tags["article"]
    streams = yaml.safe_load((selection / "data" / "streams.yaml").read_text(encoding="utf-8"))
    assert all(Path(stream["local"]).is_dir() for stream in streams)


def test_a_log_may_have_any_name(tmp_path):
    for suffix in (".csv", ".jsonl", ".parquet"):
        path = tmp_path / f"[1]*?{suffix}"
        frame = pl.DataFrame({"step": [0, 1], "loss": [2.0, 1.0]})
        {".csv": frame.write_csv, ".jsonl": frame.write_ndjson, ".parquet": frame.write_parquet}[suffix](path)
        assert read_log(LogConfig(file=path), 2)["loss"].to_list() == [2.0, 1.0]


def test_no_file_is_read_as_a_pattern():
    """Polars takes `[1]`, `*` and `?` of a path for a pattern unless it is told not to."""
    for file in [*ROOT.glob("curate/**/*.py"), *ROOT.glob("pipelines/**/*.py")]:
        for call in re.findall(r"pl\.(?:read|scan)_(?:parquet|csv|ndjson|ipc)\(.*", file.read_text(encoding="utf-8")):
            assert "glob=False" in call or "(content)" in call, (file, call)
