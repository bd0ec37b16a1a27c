"""Which text goes into which file of a corpus, and the recipe of the demo's.

No package of the demo's recipe feeds two sources, so that no domain shares text with a target (botocore's service
models and its endpoint rule sets, files without common text, are the one exception). What is held out is held out by
file, service or block.
"""

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial

from pipelines.corpus import archives, sources
from pipelines.corpus.sources import STANDARD_LIBRARY, Reader, package_version

GENERAL, JUNK = "heldout/general.jsonl", "heldout/junk.jsonl"
RETAIN = "general.jsonl"  # natural text that a selection may see, and no final loss does
_HELD_OUT_SHARE = 0.06  # of the groups of each domain


@dataclass(frozen=True, kw_only=True)
class Source:
    """One kind of text and the files that it feeds.

    Attributes:
        name: domain name, or what the target is called.
        read: yields the texts of one package.
        packages: import names of the packages that are read, or requirements of archives.
        shares: file of the corpus -> share of the groups that go there; they add to 1.
        version: version of one of its packages.
        apart: documents that share much of their text with a held-out one, not even all of it, are left out.
    """

    name: str
    read: Reader
    packages: tuple[str, ...]
    shares: Mapping[str, float]
    version: Callable[[str], str] = package_version
    apart: bool = False

    def file_of(self, group: str) -> str:
        """The file that a group belongs to, by a hash of its name: the same whatever else is installed."""
        # a number in [0, 1) that depends on the name alone
        position = int.from_bytes(hashlib.blake2b(group.encode(), digest_size=8).digest(), "little") / 2**64
        border = 0.0
        for file, share in self.shares.items():
            border += share
            if position < border:
                return file
        # shares add to 1 up to rounding: a position just below 1 may pass all borders
        return list(self.shares)[-1]


def domain(
    name: str, read: Reader, *packages: str, held_out: str = GENERAL, candidates: float = 0.0, **targets: float
) -> Source:
    """A training domain; `targets` are the shares of groups of each target's two halves."""
    # junk has no part for retention: nobody wants to keep it
    shares = {held_out: _HELD_OUT_SHARE}
    if held_out == GENERAL:  # half of it for selection, half for the final loss alone
        shares = {GENERAL: _HELD_OUT_SHARE / 2, RETAIN: _HELD_OUT_SHARE / 2}
    shares |= _halves(targets)
    if candidates:
        shares[f"candidates/{name}.jsonl"] = candidates
    # last: a group that is held out nowhere is trained on
    shares[f"train/{name}.jsonl"] = 1 - sum(shares.values())
    return Source(name=name, read=read, packages=packages, shares=shares)


def target(name: str, read: Reader, *packages: str) -> Source:
    """A target from text that no domain has: half for selection, half for the final loss alone."""
    return Source(name=name, read=read, packages=packages, shares=_halves({name: 0.5}))


def candidates(name: str, read: Reader, *packages: str, **targets: float) -> Source:
    """Text of a kind that nothing is trained on: what is not held out for a target is for a later stage to choose."""
    shares = _halves(targets)
    shares[f"candidates/{name}.jsonl"] = 1 - sum(shares.values())
    return Source(name=name, read=read, packages=packages, shares=shares)


def archived(source: Source) -> Source:
    """The same source, its packages being archives that were downloaded."""
    return replace(source, version=archives.version, apart=True)


def _halves(targets: Mapping[str, float]) -> dict[str, float]:
    """For each target as many groups for selection as for the final loss alone."""
    return {file: share for target, share in targets.items() for file in (f"{target}.jsonl", f"heldout/{target}.jsonl")}


RECIPE = (
    domain("python", sources.python_sources, STANDARD_LIBRARY),
    domain("api_prose", sources.api_prose, "botocore", target_api=0.04),
    domain("docstrings", sources.docstrings, "numpy", "scipy", "sklearn"),
    domain("headers", sources.headers, "torch"),
    domain("tests", sources.test_sources, "pandas", "sympy"),
    domain("minified_js", sources.minified_javascript, "plotly", held_out=JUNK),
    domain("endpoint_rules", sources.endpoint_rules, "botocore", held_out=JUNK),
    target("target", sources.docstrings, "networkx"),
    # parts of 4000 characters: matplotlib has few files, the target needs hundreds of documents
    target("target_python", partial(sources.python_sources, limit=4_000), "matplotlib"),
)
