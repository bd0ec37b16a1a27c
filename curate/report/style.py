"""How numbers, domains and sources look, in figures and tables alike: one scale, one colour per domain, one order."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from curate.training.source import CANDIDATES, CURRENT

# Each has a contrast of at least 3 to white and to the dark background. Colour is never the only carrier of a fact:
# every mark is labelled with its domain.
_PALETTE = (
    "#0072b2",
    "#c75300",
    "#00875f",
    "#a05aa8",
    "#a87400",
    "#2b8fa8",
    "#c2434e",
    "#6f7f1f",
    "#7a6bd1",
    "#8a6d5b",
)
# Blue and orange stay apart for every common colour blindness; red and green would not.
HELPED, HURT, QUIET = "#0072b2", "#c75300", "#8b8f94"
_SUPERSCRIPT = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")


@dataclass(frozen=True)
class Scale:
    """A power of 1000 that makes numbers readable, e.g. 1e6 with the unit "10⁻⁶ nats"."""

    factor: float
    unit: str


def scale_of(values: Iterable[float | None], unit: str = "nats") -> Scale:
    """The scale that puts the largest magnitude of `values` between 1 and 1000."""
    largest = max((abs(value) for value in values if value is not None and math.isfinite(value)), default=0.0)
    # multiples of 3, as in milli and micro; all zero needs no scale
    exponent = 3 * math.floor(math.log10(largest) / 3) if largest > 0 else 0
    if exponent == 0:
        return Scale(1.0, unit)
    return Scale(10.0**-exponent, f"{power_of_ten(exponent)} {unit}")


def power_of_ten(exponent: int) -> str:
    """10 with a superscript."""
    return f"10{str(exponent).translate(_SUPERSCRIPT)}"


def colours(domains: Iterable[str]) -> dict[str, str]:
    """A fixed colour per domain: by alphabetical order, so that it survives any sorting of a figure."""
    return {domain: _PALETTE[index % len(_PALETTE)] for index, domain in enumerate(sorted(set(domains)))}


def number(value: float | None, digits: int = 3) -> str:
    """A number to that many significant digits, with a true minus sign; an en dash where there is none."""
    if value is None or not math.isfinite(value):
        return "–"
    # "#" keeps trailing zeros, which are significant; it leaves a bare point behind whole numbers
    return f"{value:#.{digits}g}".rstrip(".").replace("-", "−")


def signed(value: float | None, places: int = 2) -> str:
    """A number with its sign."""
    return "–" if value is None or not math.isfinite(value) else f"{value:+.{places}f}".replace("-", "−")


def decimal(value: float | None, places: int = 2) -> str:
    """A number with that many decimals."""
    return "–" if value is None or not math.isfinite(value) else f"{value:.{places}f}".replace("-", "−")


def count(value: float | None) -> str:
    """A whole number with thin spaces between thousands."""
    return "–" if value is None else f"{round(value):,}".replace(",", "\u202f")


def percent(value: float | None, places: int = 1) -> str:
    """A share as percent."""
    return "–" if value is None or not math.isfinite(value) else f"{100 * value:.{places}f}\u202f%".replace("-", "−")


def size(value: float | None) -> str:
    """Bytes in decimal units."""
    if value is None:
        return "–"
    for unit in ("B", "kB", "MB", "GB"):
        if value < 1000:
            return f"{value:.3g}\u202f{unit}"
        value /= 1000
    return f"{value:.3g}\u202fTB"


def duration(value: float | None) -> str:
    """Seconds as a reader says them."""
    if value is None:
        return "–"
    if value < 120:
        return f"{value:.3g}\u202fs"
    return f"{value / 60:.1f}\u202fmin" if value < 7200 else f"{value / 3600:.1f}\u202fh"


def source_name(source: str) -> str:
    """A source in words."""
    return {CURRENT: "current state", CANDIDATES: "candidates"}.get(source, f"{source} window")


def listed(names: Sequence[str]) -> str:
    """`a, b and c`."""
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"
