"""What is installed: `curate` whole, its command, and nothing else of the checkout."""

import shutil
import subprocess
import sys
import tarfile
from configparser import ConfigParser
from zipfile import ZipFile

import pytest

from tests.test_project import ROOT


@pytest.fixture(scope="module")
def dist(tmp_path_factory):
    """A wheel and an sdist, built offline from a copy of the checkout, where no earlier build has left files."""
    place = tmp_path_factory.mktemp("checkout")
    for name in ("curate", "pipelines", "tests", "scripts", "configs", "docs"):
        shutil.copytree(ROOT / name, place / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "MANIFEST.in"):
        shutil.copy(ROOT / name, place / name)
    offline = ["--no-deps", "--no-build-isolation", "--no-index"]
    pip = [sys.executable, "-m", "pip", "wheel", *offline, "-w", "dist"]
    sdist = [sys.executable, "-c", "from setuptools.build_meta import build_sdist as build; build('dist')"]
    for command in ([*pip, "."], sdist):
        done = subprocess.run(command, cwd=place, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr[-2000:]
    return place / "dist"


@pytest.fixture(scope="module")
def wheel(dist):
    (file,) = dist.glob("*.whl")
    return ZipFile(file)


@pytest.fixture(scope="module")
def package():
    """All that lies below curate/ is code, or belongs to it."""
    files = {path.relative_to(ROOT).as_posix() for path in ROOT.glob("curate/**/*") if path.is_file()}
    files = {name for name in files if "__pycache__" not in name}
    assert {"curate/py.typed", "curate/__main__.py", "curate/report/template.html", "curate/report/page.css"} <= files
    return files


def test_the_wheel_holds_every_file_of_the_package_and_none_besides(wheel, package):
    assert {name for name in wheel.namelist() if ".dist-info/" not in name} == package


def test_the_wheel_has_the_command(wheel):
    (name,) = (name for name in wheel.namelist() if name.endswith(".dist-info/entry_points.txt"))
    points = ConfigParser()
    points.read_string(wheel.read(name).decode())
    assert dict(points["console_scripts"]) == {"curate": "curate.__main__:main"}


def test_the_sdist_holds_what_the_wheel_is_built_from(dist, package):
    (file,) = dist.glob("*.tar.gz")
    with tarfile.open(file) as archive:
        files = {name.partition("/")[2] for name in archive.getnames() if archive.getmember(name).isfile()}
    assert {name for name in files if name.startswith("curate/")} == package
    assert "pyproject.toml" in files
    assert not [name for name in files if name.startswith(("pipelines/", "tests/", "scripts/"))]
