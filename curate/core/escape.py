"""Text of others in what we write: one function for each place where a character can be more than text.

Sample text, ids, and names of domains, windows and files are data. HTML itself is escaped by jinja's autoescape, and
JSON and YAML by their libraries; what they leave over is done here.
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
    """Text without characters that act instead of being seen: they are shown as Python writes them.

    Args:
        text: any.
        keep: characters that stay as they are.
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
    """One line for a terminal or a log: a line end in it would forge another line, a control sequence could do more."""
    return visible(text)


def page_text(text: str) -> str:
    """Text for an HTML page, before `&<>` and quotes are escaped; it keeps its lines."""
    return visible(text, keep="\n\t")


def script_json(text: str) -> str:
    """JSON for a script element of an HTML page: the same value, and nothing in it opens or closes an element."""
    # Escapes of JSON itself, so that a reader gets the same value; the last two end lines in old JavaScript.
    for character in "<>&\u2028\u2029":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return text


def visible_json(value: Any) -> Any:
    """A JSON value whose texts are all visible."""
    if isinstance(value, Mapping):
        return {visible(str(key)): visible_json(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [visible_json(inner) for inner in value]
    return visible(value, keep="\n\t") if isinstance(value, str) else value


def plot_label(text: str) -> str:
    """Text for a Plotly figure, which takes every text for HTML and `%{...}` in hover texts for a place to fill in."""
    # `&` first: the entities of the others hold one.
    for character, entity in {"&": "&amp;", "<": "&lt;", ">": "&gt;", "%{": "%&#123;"}.items():
        text = text.replace(character, entity)
    return visible(text)


def python_string(text: str) -> str:
    """A Python string literal in double quotes."""
    return visible(json.dumps(text, ensure_ascii=False))


def name_of(path: Path) -> str:
    """A file's name without suffix, as artifacts, folders and reports call it: visible, storable, of bounded length."""
    plain = path.with_suffix("") if path.suffix.lower() in _COMPRESSED else path
    name = visible(plain.stem)
    if len(name.encode()) <= _NAME_BYTES:
        return name
    # 9 bytes for the hash and its dash; a character that the cut halves is dropped.
    start = name.encode()[: _NAME_BYTES - 9].decode(errors="ignore")
    return f"{start}-{hashlib.blake2b(name.encode(), digest_size=4).hexdigest()}"
