"""The report: one HTML file and the same numbers in the tracker."""

from __future__ import annotations

from typing import TYPE_CHECKING

from curate.core.callable_module import make_callable

if TYPE_CHECKING:
    from pathlib import Path

    from curate.report.__main__ import ReportConfig


def report(config: ReportConfig) -> Path:
    """Render the report of a finished selection again, see `curate.report.__main__.render_again`."""
    # imported on the call: `import curate` must not load Plotly, Jinja and their like
    from curate.report import __main__ as command

    return command.render_again(config)


make_callable(__name__, report)
