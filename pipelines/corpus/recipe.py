"""Which text goes into which file of the demo corpus.

No package feeds two sources, so that no domain shares text with a target (botocore's service models and its endpoint
rule sets, files without common text, are the one exception). What is held out is held out by file, service or block.
"""

import hashlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial

from pipelines.corpus import sources
from pipelines.corpus.sources import STANDARD_LIBRARY, Text

GENERAL, JUNK = "heldout/general.jsonl", "heldout/junk.jsonl"
RETAIN = "general.jsonl"  # natural text that a selection may see, and no final loss does
_HELD_OUT_SHARE = 0.06


@dataclass(frozen=True, kw_only=True)
class Source:
    """One kind of text and the files that it feeds.

    Attributes:
        name: domain name, or what the target is called.
        read: yields the texts of one package.
        packages: import names of the packages that are read.
        shares: file of the corpus -> share of the groups that go there; they add to 1.
    """

    name: str
    read: Callable[[str], Iterator[Text]]
    packages: tuple[str, ...]
    shares: Mapping[str, float]

    def file_of(self, group: str) -> str:
        """The file that a group belongs to, by a hash of its name: the same whatever else is installed."""
        position = int.from_bytes(hashlib.blake2b(group.encode(), digest_size=8).digest(), "little") / 2**64
        border = 0.0
        for file, share in self.shares.items():
            border += share
            if position < border:
                return file
        return list(self.shares)[-1]


def domain(
    name: str, read: Callable[[str], Iterator[Text]], *packages: str, held_out: str = GENERAL, **targets: float
) -> Source:
    """A training domain; `targets` are the shares of groups of each target's two halves."""
    shares = {held_out: _HELD_OUT_SHARE}
    if held_out == GENERAL:  # half of it for selection, half for the final loss alone
        shares = {GENERAL: _HELD_OUT_SHARE / 2, RETAIN: _HELD_OUT_SHARE / 2}
    for target, share in targets.items():
        shares |= {f"{target}.jsonl": share, f"heldout/{target}.jsonl": share}
    shares[f"train/{name}.jsonl"] = 1 - sum(shares.values())
    return Source(name=name, read=read, packages=packages, shares=shares)


def target(name: str, read: Callable[[str], Iterator[Text]], *packages: str) -> Source:
    """A target from packages that no domain reads: half for selection, half for the final loss alone."""
    shares = {f"{name}.jsonl": 0.5, f"heldout/{name}.jsonl": 0.5}
    return Source(name=name, read=read, packages=packages, shares=shares)


RECIPE = (
    domain("python", sources.python_sources, STANDARD_LIBRARY),
    domain("api_prose", sources.api_prose, "botocore", target_api=0.04),
    domain("docstrings", sources.docstrings, "numpy", "scipy", "sklearn"),
    domain("headers", sources.headers, "torch"),
    domain("tests", sources.test_sources, "pandas", "sympy"),
    domain("minified_js", sources.minified_javascript, "plotly", held_out=JUNK),
    domain("endpoint_rules", sources.endpoint_rules, "botocore", held_out=JUNK),
    target("target", sources.docstrings, "networkx"),
    target("target_python", partial(sources.python_sources, limit=4_000), "matplotlib"),
)
