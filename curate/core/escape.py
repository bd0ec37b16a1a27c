"""Escapes foreign text in our output: one function for each place where a character can be more than text.

Sample text, ids, and names of domains, windows and files are data. Jinja's autoescape handles HTML, and the libraries
of JSON and YAML their formats; this module does the rest.
"""

import hashlib
import json
import unicodedata
from collections.abc import Mapping
from pathlib import Path
from typing import Any

# Control, format (text direction), half surrogates, line and paragraph ends.
_UNSEEN = {"Cc", "Cf", "Cs", "Zl", "Zp"}
# Soft hyphen and the two joiners: languages are written with them.
_WRITTEN = "\u00ad\u200c\u200d"
_COMPRESSED = (".gz", ".zst")
# A folder's name has at most 255 bytes, and ours have more than this one name in them.
_NAME_BYTES = 120


def visible(text: str, keep: str = "") -> str:
    """Replace invisible characters, which would act instead of being seen, by their Python escapes.

    Args:
        text: any text.
        keep: invisible characters that stay.
    """
    if text.isprintable():  # nearly all texts; saves the walk over characters
        return text
    return "".join(
        character.encode("unicode_escape").decode("ascii")
        if unicodedata.category(character) in _UNSEEN and character not in keep and character not in _WRITTEN
        else character
        for character in text
    )


def terminal(text: str) -> str:
    """Make one line for a terminal or a log: a line end would forge another line, a control sequence could do more."""
    return visible(text)


def page_text(text: str) -> str:
    """Prepare text for an HTML page, before `&<>` and quotes are escaped; it keeps its lines."""
    return visible(text, keep="\n\t")


def script_json(text: str) -> str:
    """Make JSON safe in a script element of a page: the same value, but nothing in it opens or closes an element."""
    # Escapes of JSON itself, so that a reader gets the same value; the last two end lines in old JavaScript.
    for character in "<>&\u2028\u2029":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return text


def visible_json(value: Any) -> Any:
    """Apply `visible` to all texts and keys of a JSON value."""
    if isinstance(value, Mapping):
        return {visible(str(key)): visible_json(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [visible_json(inner) for inner in value]
    return visible(value, keep="\n\t") if isinstance(value, str) else value


def plot_label(text: str) -> str:
    """Escape text for a Plotly figure, which reads every text as HTML and `%{...}` in hover texts as a template."""
    # `&` first: the entities of the others hold one.
    for character, entity in {"&": "&amp;", "<": "&lt;", ">": "&gt;", "%{": "%&#123;"}.items():
        text = text.replace(character, entity)
    return visible(text)


def python_string(text: str) -> str:
    """Write text as a Python string literal in double quotes."""
    return visible(json.dumps(text, ensure_ascii=False))


def name_of(path: Path) -> str:
    """Name a file for artifacts, folders and reports: its stem, visible and of at most 120 bytes."""
    plain = path.with_suffix("") if path.suffix.lower() in _COMPRESSED else path
    name = visible(plain.stem)
    if len(name.encode()) <= _NAME_BYTES:
        return name
    # 9 bytes for the hash and its dash; a character that the cut halves is dropped.
    start = name.encode()[: _NAME_BYTES - 9].decode(errors="ignore")
    return f"{start}-{hashlib.blake2b(name.encode(), digest_size=4).hexdigest()}"
