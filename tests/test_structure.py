"""`scripts/structure.py` counts what its docstring says, on a tree that can be counted by hand."""

import subprocess
import sys

from tests.test_project import ROOT

TREE = {
    "curate/__init__.py": "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from curate.select import select\n",
    "curate/select.py": """
from typing import TYPE_CHECKING
from pydantic import BaseModel
from curate import tables  # the module
import curate.data.read
if TYPE_CHECKING:
    from curate.report import page

class Group(BaseModel):
    a: int = 1
    b: int = 2

class SelectConfig(BaseModel):
    group: Group = Group()
    other: Group | None = None
    c: str = "c"

# one line alone
def select(config, run):
    from curate.data.read import rows  # noqa: F401
    out = [row for row in rows]
    return out

if __name__ == "__main__":
    print("usage", "options", sep=chr(10))
""",
    "curate/tables.py": "def long():\n" + "    x = 1\n" * 60,
    "curate/data/__init__.py": "",
    "curate/data/read.py": "def rows():\n    from curate.tables import long\n",
    "curate/report.py": "from curate.select import select\npage = 1\n",
    "pipelines/demo.py": "from curate.select import select\nimport curate.tables\n",
    "scripts/bench.py": "import curate.tables\n",
}


def test_counters_of_a_small_tree(tmp_path):
    for name, text in TREE.items():
        (tmp_path / name).parent.mkdir(exist_ok=True, parents=True)
        (tmp_path / name).write_text(text)
    command = [sys.executable, ROOT / "scripts" / "structure.py", tmp_path]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    lines = sum(text.count("\n") for name, text in TREE.items() if not name.startswith("scripts"))
    assert [line[40:] for line in done.stdout.splitlines()] == [
        f"{lines} in 7 files",
        f"{2 / lines:.1%}: 1 begin with one, 1 end in one",
        "1, curate.tables.long",
        "5",
        "4 lines, 3 local variables",
        "2",
        # report -> select -> data -> tables; with types, report and select are one
        "4 floors, 7 arrows, 0 circles",
        "4 floors, 4 arrows, 0 circles",
        "4 floors, 8 arrows, 1 circles (curate.report, curate.select)",
        "3 floors, 5 arrows, 1 circles (curate.report, curate.select)",
    ]
