"""The demo corpus: its rules, on small packages; the full recipe is only checked for what it says."""

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from curate.core.artifacts import read_json
from curate.core.errors import UserError
from pipelines.corpus import sources
from pipelines.corpus.build import CorpusConfig, build
from pipelines.corpus.recipe import RECIPE, Source, domain, target
from pipelines.corpus.sources import Text

NATURAL = {"python", "api_prose", "docstrings", "headers", "tests"}
SMALL = (
    domain("python", sources.python_sources, "pluggy", "click"),
    domain("docstrings", sources.docstrings, "fsspec", "jinja2"),
    domain("tests", sources.test_sources, "joblib", target_tests=0.2),
    target("target", sources.docstrings, "hypothesis"),
)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("corpus") / "out"
    build(config(out), SMALL)
    return out


def config(out: Path, **options: Any) -> CorpusConfig:
    return CorpusConfig(
        out=out,
        **{"megabytes": 0.1, "target_documents": 20, "heldout_characters": 3000, "retain_characters": 2000, **options},
    )


def rows(path: Path) -> list[dict[str, str]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def all_rows(corpus: Path) -> dict[str, list[dict[str, str]]]:
    return {path.relative_to(corpus).as_posix(): rows(path) for path in sorted(corpus.rglob("*.jsonl"))}


def test_files_and_their_sizes(corpus: Path) -> None:
    found = all_rows(corpus)
    assert set(found) == {
        *(f"train/{name}.jsonl" for name in ("python", "docstrings", "tests")),
        *("target.jsonl", "heldout/target.jsonl", "target_tests.jsonl", "heldout/target_tests.jsonl"),
        *("general.jsonl", "heldout/general.jsonl"),
    }
    manifest = read_json(corpus / "manifest.json")
    for file, documents in found.items():
        size = sum(len(row["text"].encode()) for row in documents)
        assert manifest["files"][file]["documents"] == len(documents) > 0
        assert manifest["files"][file]["bytes"] == size
        assert not file.startswith("train/") or size < 100_000 + 2 * sources.MAX_CHARACTERS
    assert len(found["target.jsonl"]) == len(found["heldout/target.jsonl"]) == 20
    assert manifest["settings"]["packages"]["joblib"] == sources.package_version("joblib")


def test_general_text_is_about_equal_for_each_domain(corpus: Path) -> None:
    for file, most in (("general.jsonl", 2000), ("heldout/general.jsonl", 3000)):
        sizes: Counter[str] = Counter()
        for row in all_rows(corpus)[file]:
            sizes[row["domain"]] += len(row["text"])
        assert set(sizes) <= {"python", "docstrings", "tests"}
        assert all(size < most + sources.MAX_CHARACTERS for size in sizes.values())


def test_no_document_and_no_file_is_in_two_splits(corpus: Path) -> None:
    found = all_rows(corpus)
    texts = Counter(row["text"] for documents in found.values() for row in documents)
    ids = Counter(row["id"] for documents in found.values() for row in documents)
    assert max(texts.values()) == max(ids.values()) == 1
    homes: dict[str, set[str]] = {}
    for file, documents in found.items():
        for row in documents:
            homes.setdefault(row["source"], set()).add(file)
    assert all(len(files) == 1 for files in homes.values())


def test_no_row_names_a_path_of_this_machine(corpus: Path) -> None:
    for documents in all_rows(corpus).values():
        assert all(not row["source"].startswith("/") and "site-packages" not in row["source"] for row in documents)
        assert all(len(row["text"]) >= sources.MIN_CHARACTERS for row in documents)


def test_the_same_packages_give_the_same_bytes(corpus: Path, tmp_path: Path) -> None:
    build(config(tmp_path / "again"), SMALL)
    again = {path.relative_to(tmp_path / "again"): path.read_bytes() for path in (tmp_path / "again").rglob("*.json*")}
    assert again == {path.relative_to(corpus): path.read_bytes() for path in corpus.rglob("*.json*")}


def test_a_built_corpus_is_reused_and_other_options_are_refused(corpus: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipelines.corpus.build._read_sources", lambda _: pytest.fail("read again"))
    assert build(config(corpus), SMALL) == read_json(corpus / "manifest.json")["files"]
    with pytest.raises(UserError, match=r"megabytes: 0.1 there, 0.2 now"):
        build(config(corpus, megabytes=0.2), SMALL)


def test_a_folder_with_other_files_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("keep")
    with pytest.raises(UserError, match="exists and is not a corpus; set out to a folder that does not exist yet"):
        build(config(tmp_path), SMALL)
    assert (tmp_path / "mine.txt").exists()


def test_a_package_that_is_not_installed_is_named(tmp_path: Path) -> None:
    recipe = (domain("docs", sources.docstrings, "no_such_package"),)
    with pytest.raises(UserError, match="text of no_such_package, which is not installed; pip install no_such_package"):
        build(config(tmp_path / "out"), recipe)
    with pytest.raises(UserError, match=r"pluggy .* has no text for 'tests' of the demo corpus"):
        build(config(tmp_path / "out"), (domain("tests", sources.test_sources, "pluggy"),))


def test_held_out_text_wins_over_equal_training_text(tmp_path: Path) -> None:
    def read(package: str) -> list[Text]:
        return [Text(id=f"{n}", text=f"same text {n // 2}", source=f"{package}/{n}", group=f"{n}") for n in range(400)]

    build(config(tmp_path / "out"), (Source(name="d", read=read, packages=("pluggy",), shares=SMALL[0].shares),))  # type: ignore[arg-type]
    found = all_rows(tmp_path / "out")
    held_out = {row["text"] for row in found["heldout/general.jsonl"]}
    assert held_out
    assert not held_out & {row["text"] for row in found["train/python.jsonl"]}
    assert read_json(tmp_path / "out" / "manifest.json")["files"]["train/python.jsonl"]["dropped_duplicates"] > 100


def test_the_recipe_uses_no_package_twice() -> None:
    packages = Counter(package for source in RECIPE for package in source.packages)
    assert [package for package, count in packages.items() if count > 1] == ["botocore"]
    assert {source.name for source in RECIPE if "botocore" in source.packages} == {"api_prose", "endpoint_rules"}


def test_the_recipe_has_the_files_that_the_demo_needs() -> None:
    files = {file for source in RECIPE for file in source.shares}
    targets = {"target", "target_api", "target_python"}
    assert {file for file in files if file.startswith("train/")} == {
        f"train/{name}.jsonl" for name in (*NATURAL, "minified_js", "endpoint_rules")
    }
    assert {f"{name}.jsonl" for name in targets} | {f"heldout/{name}.jsonl" for name in targets} <= files
    for file in ("general.jsonl", "heldout/general.jsonl"):
        assert {source.name for source in RECIPE if file in source.shares} == NATURAL
    for source in RECIPE:
        assert sum(source.shares.values()) == pytest.approx(1)
        assert min(source.shares.values()) > 0


@given(text=st.text(st.sampled_from("ab;\n"), max_size=300), limit=st.integers(1, 50), boundary=st.sampled_from(";\n"))
def test_split_text_loses_nothing(text: str, limit: int, boundary: str) -> None:
    pieces = sources.split_text(text, limit, boundary)
    assert "".join(pieces) == text
    assert all(len(piece) <= limit for piece in pieces)
    assert all(pieces) or text == ""


def test_markup_becomes_plain_text() -> None:
    markup = "<p>Use <code>a &lt; b</code>.</p><ul> <li> <p>one\n  two</p></li></ul><note>three</note>"
    assert sources.plain(markup) == "Use a < b.\none two\nthree"


def test_docstrings_have_unique_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = "x" * sources.MIN_CHARACTERS
    definitions = ("if a:", "def f():", "1", "else:", "def f():", "2", "class C:", "3")
    indents = (0, 1, 2, 0, 1, 2, 1, 2)
    lines = [f'"{text}{line}"' if line.isdigit() else line for line in definitions]
    twice = "\n".join("    " * indent + line for indent, line in zip(indents, lines, strict=True))
    (tmp_path / "a.py").write_text(twice)
    (tmp_path / "template.py").write_text("{{ no python }} (")
    (tmp_path / "tests").mkdir()
    (tmp_path / "tests" / "test_a.py").write_text(f'"{text}"')
    monkeypatch.setattr(sources, "package_folder", lambda _: tmp_path)
    assert [text.id for text in sources.docstrings("p")] == ["p/a.py:f", "p/a.py:f#2", "p/a.py:C"]
    assert [text.source for text in sources.test_sources("p")] == ["p/tests/test_a.py"]


def test_botocore_and_headers_are_read_in_their_layout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    prose = {"operations": {"Op": {"documentation": "<p>" + "word " * 100 + "</p>"}, "Short": {"documentation": "no"}}}
    for version in ("2011-01-01", "2012-01-01"):
        folder = tmp_path / "data" / "svc" / version
        folder.mkdir(parents=True)
        (folder / "service-2.json").write_text(json.dumps(prose))
        (folder / "endpoint-rule-set-1.json").write_text(json.dumps({"rules": [version] * 2000}, indent=4))
    (tmp_path / "include").mkdir()
    (tmp_path / "include" / "a.h").write_text("int a;\n" * 100)
    (tmp_path / "include" / "b.h").write_text("// @generated\n" + "int a;\n" * 100)
    monkeypatch.setattr(sources, "package_folder", lambda _: tmp_path)
    (only,) = sources.api_prose("b")
    assert only.id == "b/data/svc/2012-01-01/service-2.json:operations/Op"
    rules = list(sources.endpoint_rules("b"))
    assert len(rules) == 5
    assert {(text.group, text.source) for text in rules} == {("svc", "b/data/svc/2012-01-01/endpoint-rule-set-1.json")}
    assert [text.source for text in sources.headers("b")] == ["b/include/a.h"]
