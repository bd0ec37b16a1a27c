"""Corpora of downloaded archives: on small archives made here; the full recipes are only checked for what they say."""

import io
import json
import random
import tarfile
import zipfile
from collections import Counter
from functools import partial
from pathlib import Path

import pytest

from curate.core.artifacts import read_json
from curate.core.errors import UserError
from pipelines.corpus import archives
from pipelines.corpus.build import CorpusConfig, build
from pipelines.corpus.catalogues import po_messages, translations
from pipelines.corpus.elsewhere import elsewhere
from pipelines.corpus.languages import languages
from pipelines.corpus.recipe import JUNK, Source, archived, candidates, domain, target

RECIPES = {"elsewhere": elsewhere(Path("packages")), "languages": languages(Path("packages"))}
TARGETS = ("target_inside", "target_new", "target_mix")


def write_wheel(folder: Path, name: str, files: dict[str, bytes]) -> None:
    with zipfile.ZipFile(folder / name, "w") as archive:
        for file, data in files.items():
            archive.writestr(file, data)


def write_sdist(folder: Path, name: str, files: dict[str, bytes]) -> None:
    with tarfile.open(folder / name, "w:gz") as archive:
        for file, data in files.items():
            member = tarfile.TarInfo(file)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
        link = tarfile.TarInfo("django-5.2.19/docs/link.txt")
        link.type, link.linkname = tarfile.SYMTYPE, "a.txt"
        archive.addfile(link)


def prose(seed: str, lines: int = 12) -> bytes:
    return "\n".join(f"line {n} of {seed} says what no other line in here says" for n in range(lines)).encode()


def message(reference: str, original: str, translated: str, flags: str = "") -> str:
    return f'#: {reference}:7\n{flags}msgid "{original}"\nmsgstr "{translated}"\n'


@pytest.mark.parametrize(
    ("package", "file"),
    [
        ("django==5.2.19", "Django-5.2.19.tar.gz"),
        ("django==5.2.19", "django-5.2.19.tar.gz"),
        ("plone-app-locales==7.0.4", "plone_app_locales-7.0.4-py3-none-any.whl"),
        ("plone-app-locales==7.0.4", "plone.app.locales-7.0.4-py3-none-any.whl"),
    ],
)
def test_an_archive_is_found_however_its_name_is_spelled(tmp_path: Path, package: str, file: str) -> None:
    for other in ("django-5.2.19-py3-none-any.whl", "django-5.2.1.tar.gz", "plone_app_locales-7.0.41-py3-none-any.whl"):
        (tmp_path / other).touch()
    assert archives.find(tmp_path, package) is None
    (tmp_path / file).touch()
    assert archives.find(tmp_path, package) == tmp_path / file


def test_the_command_for_what_is_missing_is_told_at_once(tmp_path: Path) -> None:
    (tmp_path / "weblate-5.14.3-py3-none-any.whl").touch()
    wanted = (
        rf"{tmp_path} lacks 2 of the archives that the corpus is text of; pip download --no-deps --dest {tmp_path} "
        r"--no-binary django django==5\.2\.19 twisted==26\.10\.0$"
    )
    packages = ["twisted==26.10.0", "weblate==5.14.3", "django==5.2.19"]
    with pytest.raises(UserError, match=wanted):
        archives.require(tmp_path, packages)
    with pytest.raises(UserError, match=rf"--dest {tmp_path} twisted==26.10.0"):
        list(archives.texts("twisted==26.10.0", tmp_path, ""))
    with pytest.raises(UserError, match=r"lacks 12 of the archives .*pip download --no-deps"):
        build(CorpusConfig(out=tmp_path / "out", packages=tmp_path, recipe="elsewhere"))
    assert not (tmp_path / "out").exists()


def test_a_damaged_archive_is_named(tmp_path: Path) -> None:
    for name, package in (("django-5.2.19.tar.gz", "django==5.2.19"), ("ckan-2.12.0-py3-none-any.whl", "ckan==2.12.0")):
        whole = tmp_path / name
        (write_sdist if name.endswith("gz") else write_wheel)(tmp_path, name, {"p/a.txt": random.randbytes(10_000)})
        data = whole.read_bytes()
        for damaged in (b"no archive", data[: len(data) // 2], data[:3000] + b"damaged" + data[3007:]):
            whole.write_bytes(damaged)
            with pytest.raises(UserError, match=rf"{name} cannot be read .*; delete it and download it again"):
                list(archives.texts(package, tmp_path, ""))


def test_files_are_documents_in_parts(tmp_path: Path) -> None:
    files = {
        "p/b.txt": prose("b", 100), "p/a.txt": prose("a"), "p/a.py": prose("c"), "p/short.txt": b"short",
        "p/latin.txt": "ä".encode("latin-1") * 300, "p/minified.txt": b"x" * 2000,
    }  # fmt: skip
    write_wheel(tmp_path, "p-1.0-py3-none-any.whl", files)
    found = list(archives.texts("p==1.0", tmp_path, r"\.txt$"))
    assert [text.id for text in found] == ["p/a.txt:0", "p/b.txt:0", "p/b.txt:1"]
    assert [text.group for text in found] == ["p/a.txt", "p/b.txt", "p/b.txt"]
    assert "".join(text.text for text in found[1:]).encode() == files["p/b.txt"]
    grouped = archives.texts("p==1.0", tmp_path, r"/[ab]\.", "^.*/", longest_line=40)
    assert list(grouped) == []
    grouped = archives.texts("p==1.0", tmp_path, r"/[ab]\.", "^.*/", limit=400)
    assert {text.group for text in grouped} == {"p/"}
    write_sdist(tmp_path, "django-5.2.19.tar.gz", {"django-5.2.19/docs/a.txt": prose("a")})
    (only,) = archives.texts("django==5.2.19", tmp_path, r"/docs/")
    assert only.source == "django-5.2.19/docs/a.txt"


def test_messages_of_a_catalogue() -> None:
    catalogue = "\n".join(
        [
            'msgid ""\nmsgstr ""\n"Language: de\\n"\n',
            message("a/views.py", "one", 'eins \\"so\\"\\n'),
            message("a/views.py", "guessed", "geraten", flags="#, fuzzy, python-format\n"),
            message("a/views.py", "same", "same"),
            message("a/views.py", "open", ""),
            '#: b/forms.py\nmsgctxt "c"\nmsgid ""\n"long "\n"one"\nmsgstr ""\n"lang "\n"ist es"\n',
            'msgid "%d thing"\nmsgid_plural "%d things"\nmsgstr[0] "%d Ding"\nmsgstr[1] "%d Dinge"\n',
            '#~ msgid "old"\n#~ msgstr "alt"\n',
        ]
    )
    expected = [("a/views.py", 'eins "so"\n'), ("b/forms.py", "lang ist es"), ("", "%d Ding"), ("", "%d Dinge")]
    assert list(po_messages(catalogue)) == expected
    assert list(po_messages(catalogue.replace("\n", "\r\n"))) == expected


def test_translations_are_grouped_by_what_they_translate(tmp_path: Path) -> None:
    def catalogue(word: str) -> bytes:
        named = [message("a/views.py", f"{n}", f"{word} Nummer {n} in der Ansicht") for n in range(20)]
        again = message("b/views.py", "x", f"{word} Nummer 1 in der Ansicht")
        return "\n".join([*named, again, message("b/views.py", "y", "kurz")]).encode()

    nameless = "\n".join(f'msgid "{n}"\nmsgstr "{n} steht in keiner Datei, doch hier"\n' for n in range(1000))
    english = {"title": {"a": "Both languages say exactly this about it"}}
    german = {
        "title": {"a": english["title"]["a"], "b": [1], **{f"{n}": f"Gerät Nummer {n} fehlt noch" for n in range(20)}}
    }
    files = {
        "p/locale/de/LC_MESSAGES/django.po": catalogue("Wort"),
        "p/locale/de_AT/LC_MESSAGES/django.po": catalogue("Anderes"),
        "p/locale/fr/LC_MESSAGES/django.po": catalogue("Mot"),
        "p/bare/de.po": nameless.encode(),
        "p/x/translations/en.json": json.dumps(english).encode(),
        "p/x/translations/de.json": json.dumps(german).encode(),
    }
    write_wheel(tmp_path, "p-1.0-py3-none-any.whl", files)
    found = list(translations("p==1.0", tmp_path, "de"))
    by_group = {text.group: text for text in found}
    blocks = [text.group for text in found if text.group.startswith("p/bare/de.po")]
    assert len(blocks) > 8
    assert set(blocks) == {f"p/bare/de.po::{n}" for n in range(len(blocks) // 8 + 1)}
    assert set(by_group) - set(blocks) == {"p==1.0:a/views.py", "p==1.0:p/x/translations"}
    assert "Both languages" not in by_group["p==1.0:p/x/translations"].text
    (french,) = translations("p==1.0", tmp_path, "fr")
    assert french.group == "p==1.0:a/views.py"
    assert list(translations("p==1.0", tmp_path, "pl")) == []


def small(folder: Path) -> tuple[Source, ...]:
    read = partial(archives.texts, folder=folder, group=r"[^/]+$")
    sources = (
        domain("ours", partial(read, include="^p/ours/"), "p==1.0", candidates=0.2, target_mix=0.2),
        target("target", partial(read, include="^p/theirs/"), "p==1.0"),
        candidates("fresh", partial(read, include="^p/fresh/"), "p==1.0", target_mix=0.2),
    )
    return tuple(map(archived, sources))


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("archives")
    files = {f"p/{part}/{n}": prose(f"{part}-{n}") for part in ("ours", "theirs", "fresh") for n in range(200)}
    # each quotes another file: one third of its text
    files |= {f"p/ours/quoting-{n}": prose(f"ours-{n}", 6) + b"\n" + prose(f"quoting-{n}", 12) for n in range(200)}
    write_wheel(folder, "p-1.0-py3-none-any.whl", files)
    build(CorpusConfig(out=folder / "out", packages=folder, target_documents=40), small(folder))
    return folder / "out"


def test_files_of_a_corpus_of_archives(corpus: Path) -> None:
    manifest = read_json(corpus / "manifest.json")
    assert manifest["settings"]["packages"] == {"p==1.0": "1.0"}
    assert set(manifest["files"]) == {
        "train/ours.jsonl", "candidates/ours.jsonl", "candidates/fresh.jsonl", "general.jsonl", "heldout/general.jsonl",
        *(f"{folder}{name}.jsonl" for folder in ("", "heldout/") for name in ("target", "target_mix")),
    }  # fmt: skip
    for file in ("target_mix.jsonl", "heldout/target_mix.jsonl"):
        mixed = Counter(json.loads(line)["domain"] for line in (corpus / file).read_text().splitlines())
        assert mixed == {"ours": 20, "fresh": 20}


def test_no_line_of_a_held_out_document_is_trained_on(corpus: Path) -> None:
    def lines(file: Path) -> set[str]:
        return {line for row in file.read_text().splitlines() for line in json.loads(row)["text"].splitlines()}

    held_out = set[str]().union(*map(lines, [*corpus.glob("*.jsonl"), *corpus.glob("heldout/*.jsonl")]))
    for file in (*corpus.glob("train/*.jsonl"), *corpus.glob("candidates/*.jsonl")):
        assert lines(file)
        assert not lines(file) & held_out
    facts = read_json(corpus / "manifest.json")["files"]
    assert facts["train/ours.jsonl"]["dropped_duplicates"] > 10


def test_the_same_archives_give_the_same_bytes_and_a_made_corpus_needs_none(corpus: Path, tmp_path: Path) -> None:
    config = CorpusConfig(out=tmp_path / "again", packages=corpus.parent, target_documents=40)
    build(config, small(corpus.parent))
    assert {path.relative_to(corpus): path.read_bytes() for path in corpus.rglob("*.json*")} == {
        path.relative_to(config.out): path.read_bytes() for path in config.out.rglob("*.json*")
    }
    without = config.model_copy(update={"packages": tmp_path})
    assert build(without, small(tmp_path)) == read_json(config.out / "manifest.json")["files"]


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_has_the_files_that_benchmarks_need(name: str) -> None:
    recipe = RECIPES[name]
    files = {file for source in recipe for file in source.shares}
    domains = {source.name for source in recipe if f"train/{source.name}.jsonl" in source.shares}
    natural = {source.name for source in recipe if "general.jsonl" in source.shares}
    assert len(domains) >= 8
    assert domains - natural == {source.name for source in recipe if JUNK in source.shares}
    assert {f"{half}{target}.jsonl" for target in TARGETS for half in ("", "heldout/")} <= files
    trained = {target: [s.name in domains for s in recipe if f"{target}.jsonl" in s.shares] for target in TARGETS}
    assert (trained["target_inside"], trained["target_new"]) == ([True], [False])
    assert set(trained["target_mix"]) == {True, False}
    for source in recipe:
        assert source.apart
        assert sum(source.shares.values()) == pytest.approx(1)
        assert min(source.shares.values()) > 0
        for package in source.packages:
            assert source.version(package).count(".") >= 1


def test_only_one_recipe_has_candidates_among_them_kinds_that_are_new() -> None:
    found = {
        name: {file for source in recipe for file in source.shares if file.startswith("candidates/")}
        for name, recipe in RECIPES.items()
    }
    assert found["languages"] == set()
    assert {"candidates/zig.jsonl", "candidates/stylesheets.jsonl", "candidates/manuals.jsonl"} <= found["elsewhere"]
