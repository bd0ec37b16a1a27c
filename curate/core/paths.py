"""Paths as users write them."""

import os
import re
from pathlib import Path

from curate.core.errors import UserError

# `Path` folds the two slashes of a URL into one, so either stands for it; some schemes (dbfs:/) have only one.
_URL = re.compile(r"([A-Za-z][A-Za-z0-9+.-]+|(?=://)):/+(.*)", re.DOTALL)


def local_path(value: Path | str) -> Path:
    """Read a path of this machine; `~` is the home folder.

    Raises:
        UserError: it is a URL, its `~name` is no user, or no file can have that name.
    """
    url = _URL.match(str(value))
    if url:
        raise UserError(
            f"{url[1]}://{url[2]} is a URL; only files of this machine are read and written: mount it, or copy it"
        )
    # Both would fail only when a file is opened, far from the setting.
    try:
        os.fsencode(value)
    except UnicodeEncodeError:
        raise UserError(f"{str(value)!r} is no path: it holds half of a surrogate pair") from None
    if "\0" in str(value):
        raise UserError(f"{str(value)!r} is no path: it holds a NUL character")
    try:
        return Path(value).expanduser()
    except RuntimeError:
        raise UserError(f"{value} names the home folder of a user that this machine does not know") from None
