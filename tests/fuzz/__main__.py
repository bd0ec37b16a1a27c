"""`scripts/fuzz --inputs N [--seed S] [--target NAME]`: many inputs for every reader, with what became of them.

A failing input is made as small as hypothesis can, saved, and named; the exit status is then 1.
"""

import argparse
import contextlib
import signal
import sys
import tempfile
import traceback
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import Any

from hypothesis import HealthCheck, given, seed, settings

from tests.fuzz.outcome import FuzzTarget
from tests.fuzz.targets import all_targets

PATIENCE = 60  # seconds for one input, which takes milliseconds; what takes longer hangs
BLOCK = 500  # inputs drawn from one seed


class HangError(AssertionError):
    """An input kept its reader for longer than `PATIENCE`."""


def main() -> None:
    """Try the inputs of every target in turn."""
    parser = argparse.ArgumentParser(prog="scripts/fuzz", description=__doc__)
    parser.add_argument("--inputs", type=int, default=10_000, help="of all readers together")
    parser.add_argument(
        "--seed", type=int, default=0, help="of the first inputs; each further block takes the next one"
    )
    parser.add_argument("--target", action="append", help="only these readers")
    parser.add_argument("--failures", type=Path, default=Path("fuzz-failures"), help="folder for inputs that fail")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="curate-fuzz-") as place:
        folder = Path(place)
        (folder / "inputs").mkdir()
        targets = [each for each in all_targets(folder) if not options.target or each.name in options.target]
        each, failed = -(-options.inputs // len(targets)), 0
        for target in targets:
            counts, last = Counter[str](), options.seed
            while counts.total() < each and "failed" not in counts:
                block = min(BLOCK, each - counts.total())
                counts += try_block(target, folder / "inputs", last, block, options.failures)
                last += 1
            failed += counts["failed"]
            said = ", ".join(f"{count:,} {name}" for name, count in sorted(counts.items()))
            sys.stdout.write(f"{target.name:12} seeds {options.seed} to {last - 1}: {said}\n")
            sys.stdout.flush()
    raise SystemExit(1 if failed else 0)


def try_block(target: FuzzTarget, folder: Path, number: int, inputs: int, failures: Path) -> Counter[str]:
    """Outcomes of some inputs; a failing one ends the block."""
    counts, last = Counter[str](), b""

    @seed(number)
    @settings(
        max_examples=inputs, database=None, deadline=None, derandomize=False, suppress_health_check=list(HealthCheck)
    )
    @given(target.inputs)
    def attempt(data: bytes) -> None:
        nonlocal last
        last = data
        with patience():
            counts[target.outcome(data, folder)] += 1

    try:
        attempt()
    except KeyboardInterrupt:
        raise
    except BaseException:  # noqa: BLE001 - whatever it is (a panic of polars is no Exception), it was looked for
        failures.mkdir(exist_ok=True)
        path = failures / f"{target.name}-{number}-{target.file}"
        path.write_bytes(last)
        sys.stdout.write(f"{traceback.format_exc(limit=-3)}\n{target.name}: seed {number}, input saved as {path}\n")
        counts["failed"] += 1
    return counts


@contextlib.contextmanager
def patience() -> Iterator[None]:
    """Interrupt what hangs."""

    def stop(number: int, frame: FrameType | None) -> Any:
        raise HangError(f"no outcome within {PATIENCE} seconds")

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, PATIENCE)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


if __name__ == "__main__":
    main()
