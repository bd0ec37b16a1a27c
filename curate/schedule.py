"""`python -m curate.schedule --plan plan.yaml`: train, embed, select, train ... without anyone watching.

What is done is what lies there complete; nothing else is remembered. So the runner can be stopped at any instant and
run again, by hand, by cron or in a batch job: `--once` does one piece of work and says by its exit status whether more
is left.

    0  everything is done            3  a piece was done, more is left (--once)
    2  bad input                     4  the trainer failed          5  another runner works on the plan
"""

from __future__ import annotations

import logging
from pathlib import Path

from curate.core.config import Config, parse_command, run_command
from curate.core.lock import BusyError
from curate.core.progress import start_logging
from curate.core.trust import trust
from curate.plans.plan import load_plan
from curate.plans.runner import BUSY, TRAINER_FAILED, carry_out, describe
from curate.plans.trainer import TrainerError

_log = logging.getLogger(__name__)


class ScheduleConfig(Config):
    """Which plan, and how much of it."""

    plan: Path
    """YAML file; its settings are described in `curate.plans.plan`."""
    once: bool = False
    """Do the next piece of work only."""
    dry_run: bool = False
    """Print what is done and what is left, with tokens, bytes and cost, and do nothing."""


def main() -> None:
    """Entry point."""
    config = parse_command(
        ScheduleConfig, "python -m curate.schedule", "Train, embed, select, train ...: a plan of stages."
    )
    start_logging()
    plan = load_plan(config.plan)
    # before any stage is opened: a run's model may be code of the user's own
    trust(plan.trust)
    if config.dry_run:
        for line in describe(plan):
            _log.info("%s", line)
        return
    try:
        status = carry_out(plan, once=config.once)
    except BusyError as error:
        _log.error("%s", error)
        status = BUSY
    except TrainerError as error:
        _log.error("%s", error)
        status = TRAINER_FAILED
    raise SystemExit(status)


if __name__ == "__main__":
    run_command(main)
