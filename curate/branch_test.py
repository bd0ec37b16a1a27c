"""`python -m curate.branch_test`: hold a selection's domain scores against short trainings (a microanneal)."""

import shlex

from curate.core.callable_module import make_callable
from curate.core.config import parse_command, run_command
from curate.core.progress import say, start_logging
from curate.evaluation.branch_record import read_branch_test, summary
from curate.evaluation.branch_test import BranchTestCommand, branch_test

__all__ = ["BranchTestCommand", "branch_test"]
make_callable(__name__, branch_test)


def main() -> None:
    """Entry point."""
    config = parse_command(
        BranchTestCommand,
        "python -m curate.branch_test",
        "Hold a selection's domain scores against short trainings with a little more of one domain each.",
    )
    start_logging()
    path = branch_test(config)
    for line in summary(read_branch_test(path)):
        say(line)
    say(f"wrote {path}")
    say(f"next: python -m curate.select ... --mixture.branch_test {shlex.quote(str(path))}")


if __name__ == "__main__":
    run_command(main)
