"""The report: one HTML file and the same numbers in the tracker."""

from __future__ import annotations

from typing import TYPE_CHECKING

from curate.callable_module import calls_module

if TYPE_CHECKING:
    from pathlib import Path

    from curate.report.__main__ import ReportConfig


@calls_module
def report(config: ReportConfig) -> Path:
    """Render the report of a finished selection again, see `curate.report.__main__.render_again`."""
    from curate.report import __main__ as command

    return command.render_again(config)
