"""A process that is started with this folder in PYTHONPATH kills its group, or itself, before a file operation.

CRASH_BEFORE is a regular expression for the path that a file or folder is renamed to, CRASH_AT which one of those it
is, in this process; CRASH_ALONE leaves the group alive. So a test kills at the same place however fast the machine is.
"""

import itertools
import os
import re
import signal
import sys

_places = itertools.count(1)


def _watch(event: str, arguments: tuple[str, ...]) -> None:
    if event != "os.rename" or not re.search(os.environ["CRASH_BEFORE"], os.fsdecode(arguments[1])):
        return
    if next(_places) == int(os.environ["CRASH_AT"]):
        if "CRASH_ALONE" in os.environ:
            os.kill(os.getpid(), signal.SIGKILL)
        os.killpg(os.getpgrp(), signal.SIGKILL)


if "CRASH_BEFORE" in os.environ:
    sys.addaudithook(_watch)
