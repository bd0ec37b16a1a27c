"""`python -m curate.report --run RUN`: render the report of a finished selection again and log it."""

import shlex
from pathlib import Path
from typing import Self

from pydantic import model_validator

from curate.core.config import Config, parse_command, run_command
from curate.core.errors import UserError
from curate.core.progress import say
from curate.core.tracking import TrackingConfig, TrackingMode
from curate.output.layout import SelectionFolder, newest_reported


class ReportConfig(Config):
    """Which report to render."""

    run: Path = Path("runs")
    """Recorded run, or a folder of runs."""
    select: Path | None = None
    """Folder of the selection; none: the newest one below `run`."""
    out: Path | None = None
    """HTML file to write; none: report.html in the selection's folder."""
    wandb: TrackingMode = "none"
    """Weights & Biases, as in curate.select; auto logs the report again."""
    wandb_texts: bool = False
    """Whether texts of training samples go there too."""

    @model_validator(mode="after")
    def _texts_go_somewhere(self) -> Self:
        if self.wandb_texts and self.wandb == "none":
            raise ValueError("wandb_texts has no effect here: wandb none tells nobody; set --wandb auto")
        return self


def main() -> None:
    """Parse the command line and render."""
    config = parse_command(ReportConfig, "python -m curate.report", "Render the report of a selection again.")
    render_again(config)


def render_again(config: ReportConfig) -> Path:
    """Write the report, log it, and say where it is.

    Raises:
        UserError: there is no selection, or its report data is incomplete.
    """
    # heavy imports stand here, so that --help and a wrong setting answer at once
    from curate.core.artifacts import checked, list_files, listed
    from curate.report.data import load_data
    from curate.report.page import write_report
    from curate.report.track import log_report

    selection = chosen_selection(config)
    data = load_data(selection)
    page = config.out or selection.report
    write_report(page, data)
    # A new version of curate may render other bytes than the selection listed: its list must get the new hash, or
    # whoever checks the selection later calls the report damaged.
    if page == selection.report and page.name in listed(selection.root):
        list_files(selection.root, [page])
    tracking = TrackingConfig(mode=config.wandb, texts=config.wandb_texts)
    log_report(data, checked(selection.mixture), tracking, config.run, f"{data.run}-{data.target}", "report")
    say(f"report: {page}")
    return page


def chosen_selection(config: ReportConfig) -> SelectionFolder:
    """The selection that is named, or the newest one.

    Raises:
        UserError: there is none.
    """
    if config.select is not None:
        chosen = SelectionFolder(config.select)
        if chosen.mixture.exists() and not chosen.report_data.exists():
            raise UserError(f"{config.select} has no report: its method values no samples; name another selection")
        return chosen
    newest = newest_reported(config.run)
    if newest is None:
        command = f"python -m curate.select --run {shlex.quote(str(config.run))}"
        raise UserError(f"{config.run} holds no selection with report data; run `{command}` first")
    return newest


if __name__ == "__main__":
    run_command(main)
