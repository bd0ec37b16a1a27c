"""`python -m curate.report --run RUN`: render the report of a finished selection again and log it."""

import shlex
from pathlib import Path

from curate.core.config import Config, parse_command, run_command
from curate.core.errors import UserError
from curate.core.progress import say
from curate.core.tracking import TrackingConfig


class ReportConfig(Config):
    """Which report to render."""

    run: Path
    """Folder of the recorded run."""
    select: Path | None = None
    """Folder of the selection; none: the newest one inside the run's folder."""
    out: Path | None = None
    """HTML file to write; none: report.html in the selection's folder."""
    tracking: TrackingConfig = TrackingConfig(mode="none")
    """Where the numbers go besides; --tracking.mode=auto logs them to W&B."""


def main() -> None:
    """Parse the command line and render."""
    config = parse_command(ReportConfig, "python -m curate.report", "Render the report of a selection again.")
    render_again(config)


def render_again(config: ReportConfig) -> Path:
    """Write the report, log it, and say where it is.

    Raises:
        UserError: there is no selection, or its report data is incomplete.
    """
    from curate.core.artifacts import checked, list_files, listed
    from curate.report.data import load_data
    from curate.report.page import write_report
    from curate.report.track import log_report

    selection = config.select or newest_selection(config.run)
    data = load_data(selection)
    path = config.out or selection / "report.html"
    write_report(path, data)
    if path == selection / "report.html" and path.name in listed(selection):
        list_files(selection, [path])
    mixture = checked(selection / "mixture.yaml")
    log_report(data, mixture, config.tracking, config.run, f"{data.run}-{data.target}", "report")
    say(f"report: {path}")
    return path


def newest_selection(run: Path) -> Path:
    """The folder below `run` whose report data was written last.

    Raises:
        UserError: there is none.
    """
    from curate.report.data import FACTS, FOLDER

    found = sorted(run.glob(f"**/{FOLDER}/{FACTS}"), key=lambda path: (path.stat().st_mtime_ns, path))
    if not found:
        command = f"python -m curate.select --run {shlex.quote(str(run))}"
        raise UserError(f"{run} holds no selection with report data; run `{command}` first")
    return found[-1].parent.parent


if __name__ == "__main__":
    run_command(main)
