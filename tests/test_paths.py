"""Paths: home folders are found, URLs and what cannot be a file's name are refused."""

import os
from pathlib import Path

import pytest

from curate.core.paths import local_path


def test_home_folders(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    assert local_path(Path("~/x")) == Path("/home/me/x")
    assert local_path(Path("~")) == Path("/home/me")
    assert local_path(Path("x/~/y~")) == Path("x/~/y~")
    with pytest.raises(ValueError, match="~nobody-here/x"):
        local_path(Path("~nobody-here/x"))


@pytest.mark.parametrize("url", ["s3://b/o", "gs://b/o", "http://h/a.jsonl", "file:///a", "hf://datasets/a", "dbfs:/a"])
def test_a_url_is_refused_by_its_scheme(url: str) -> None:
    scheme = url.partition(":")[0]
    with pytest.raises(ValueError, match=f"{scheme}://.* is a URL"):
        local_path(Path(url))


@pytest.mark.parametrize("url", ["s3://", "://", "://x"])
def test_a_url_without_a_place_or_a_scheme_is_refused_as_it_was_written(url: str) -> None:
    with pytest.raises(ValueError, match="is a URL"):
        local_path(url)


@pytest.mark.parametrize("path", ["a:b", "a/s3://b", "C:/x", "/s3:/x", ".", "runs/2026-01-01T10:00/x"])
def test_colons_in_names_are_no_url(path: str) -> None:
    assert local_path(Path(path)) == Path(path)


@pytest.mark.parametrize("path", ["a\0b", "a\ud800b"])
def test_what_no_file_can_be_called_is_refused(path: str) -> None:
    with pytest.raises(ValueError, match="is no path"):
        local_path(Path(path))


def test_names_that_are_not_utf_8_are_paths() -> None:
    path = Path(os.fsdecode(b"a\xffb"))
    assert local_path(path) == path
