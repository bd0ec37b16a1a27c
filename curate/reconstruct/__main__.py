"""`python -m curate.reconstruct --config description.yaml`: a finished run without a recorder, rebuilt and checked."""

from __future__ import annotations

import logging
import shlex

from curate.core.config import parse_command, run_command
from curate.core.progress import start_logging
from curate.reconstruct.description import ReconstructConfig

_log = logging.getLogger(__name__)


def main() -> None:
    """Entry point."""
    config = parse_command(
        ReconstructConfig,
        "python -m curate.reconstruct",
        "Rebuild a finished run on StreamingDataset that had no recorder, and check it against its log.",
    )
    start_logging()
    from curate.reconstruct.build import reconstruct

    out = reconstruct(config)
    _log.info(
        "reconstructed -> %s; now: python -m curate.select --run %s --target FILE.jsonl", out, shlex.quote(str(out))
    )


if __name__ == "__main__":
    run_command(main)
