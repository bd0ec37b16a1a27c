"""Sentences of one language out of message catalogues: gettext's .po files, and translations in JSON."""

import ast
import json
import re
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from pipelines.corpus.archives import PIECE, files
from pipelines.corpus.sources import Text, parts

# Shorter messages are labels. Bytes of UTF-8, since a character of Japanese says more than one of German.
_SHORTEST_MESSAGE = 20
_BLOCK_PIECES = 8
_ENTRY = re.compile(r'^(msgid|msgstr(?:\[\d\])?)\s+((?:"(?:[^"\\\n]|\\.)*"\s*)+)', re.MULTILINE)
_STRING = re.compile(r'"(?:[^"\\\n]|\\.)*"')
_REFERENCE = re.compile(r"^#: (\S+?)(?::\d+)?(?:\s|$)", re.MULTILINE)
_FUZZY = re.compile(r"^#,.*\bfuzzy\b", re.MULTILINE)


def translations(package: str, folder: Path, language: str) -> Iterator[Text]:
    """Translated messages, those of one file of the translated program as one document, long ones in parts.

    What is held out as a whole is that file, whatever the language: its translations are held out together.
    """
    catalogues = files(folder, package, rf"/{language}(/LC_MESSAGES/[^/]+)?\.po$|/translations/({language}|en)\.json$")
    english = {
        text for name, data in catalogues if name.endswith("/en.json") for _, text in _strings(json.loads(data), name)
    }
    # programs say the same in many places: a message again would be a sibling of a held-out one
    seen = set(english)
    for name, data in catalogues:
        if name.endswith("/en.json"):
            continue
        messages = po_messages(data) if name.endswith(".po") else _strings(json.loads(data), str(Path(name).parent))
        documents: dict[str, list[str]] = defaultdict(list)
        for origin, text in messages:
            if len(text.encode()) >= _SHORTEST_MESSAGE and text not in seen:
                seen.add(text)
                documents[origin].append(text)
        for origin, found in documents.items():
            for part in parts(f"{name}:{origin}", "\n".join(found), PIECE, f"{package}:{origin}"):
                yield part if origin else replace(part, group=_block(part.id))


def _block(identity: str) -> str:
    """What is held out as a whole where a catalogue says nothing of files: some parts in a row."""
    name, _, number = identity.rpartition(":")
    return f"{name}:{int(number) // _BLOCK_PIECES}"


def po_messages(data: str) -> Iterator[tuple[str, str]]:
    """(source file, translation) of every message that someone translated; plural forms are messages of their own."""
    for entry in re.split(r"\n\s*\n", data.replace("\r\n", "\n")):
        reference = _REFERENCE.search(entry)
        values: dict[str, str] = {
            key: "".join(map(ast.literal_eval, _STRING.findall(quoted))) for key, quoted in _ENTRY.findall(entry)
        }
        original = values.pop("msgid", "")
        # the empty message is the header
        if original and not _FUZZY.search(entry):
            for text in values.values():
                if text not in ("", original):
                    yield reference[1] if reference else "", text


def _strings(value: Any, origin: str) -> Iterator[tuple[str, str]]:
    if isinstance(value, dict):
        for child in value.values():
            yield from _strings(child, origin)
    elif isinstance(value, str):
        yield origin, value
