"""`curate COMMAND` and `python -m curate COMMAND`: the commands of `python -m curate.COMMAND`, under one name.

Only the module of the chosen command is imported.
"""

import sys
from importlib import import_module

from curate.core.escape import terminal
from curate.core.interrupts import leave_on_signals

COMMANDS = {  # name -> module that has its `main`, and what it does
    "select": ("curate.select", "which data moved the model towards the target: write the next stage's data"),
    "embed": ("curate.embed", "the value index of a run or of candidates; value embeddings of windows"),
    "search": ("curate.search", "which samples are worth most and least for a target, by the value index"),
    "verify": ("curate.verify", "compare the values of a run with training that is run again"),
    "reconstruct": ("curate.reconstruct.__main__", "rebuild a finished run that had no recorder, and check it"),
    "schedule": ("curate.schedule", "train, embed, select, train ...: carry out a plan of stages"),
    "report": ("curate.report.__main__", "render the report of a selection again"),
    "seen": ("curate.seen", "tokens, epochs and samples of each domain that all stages trained on"),
    "branch_test": ("curate.branch_test", "train short branches to see whether scores predict what domains do"),
}


def main() -> None:
    """Entry point of the console script `curate`.

    Raises:
        SystemExit: 0 after `--help`, 2 where no command of that name is there, else the status of the command.
    """
    name, *arguments = sys.argv[1:] or [""]
    if name in ("-h", "--help"):
        sys.stdout.write(f"{_overview()}\n")
    elif name not in COMMANDS:
        missing = f"there is no command {terminal(name)!r}" if name else "no command is given"
        sys.stderr.write(f"error: {missing}; choose one of these\n{_overview()}\n")
        raise SystemExit(2)
    else:
        sys.argv[1:] = arguments
        _run(COMMANDS[name][0])


def _overview() -> str:
    """How commands are called, and one line for each."""
    width = max(map(len, COMMANDS))
    lines = (f"  {name:<{width}}  {purpose}" for name, (_, purpose) in COMMANDS.items())
    return "\n".join(["usage: curate COMMAND [OPTIONS]; curate COMMAND --help shows the options", "", *lines])


def _run(module: str) -> None:
    leave_on_signals()  # until the command has begun
    if not sys.flags.safe_path:
        # the working folder, where `python -m` finds the code of a model too, see curate.core.trust
        sys.path.append("")
    command = import_module(module)
    from curate.core.config import run_command

    run_command(command.main)


if __name__ == "__main__":
    main()
