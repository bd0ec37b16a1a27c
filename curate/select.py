"""`python -m curate.select --target domain.jsonl`: the main job, run between two training stages.

Which of the data that the last stage trained on moved the model towards the target, and what should the next stage
train on? The line itself is `curate.selection.pipeline`.
"""

from curate.core.callable_module import make_callable
from curate.core.config import parse_command, run_command
from curate.core.progress import start_logging
from curate.selection.config import SelectConfig
from curate.selection.pipeline import is_selected, select
from curate.training.run import open_run

__all__ = ["SelectConfig", "is_selected", "select"]
make_callable(__name__, select)


def main() -> None:
    """Entry point."""
    from curate.report.summary import say_mixture  # here: `import curate.select` needs no report

    config = parse_command(
        SelectConfig,
        "python -m curate.select",
        "Select the next stage's data: which of the data trained on helped the target?",
    )
    start_logging()
    run = open_run(config.run, config.source.streams, config.source.tokenizer)
    say_mixture(select(config, run))


if __name__ == "__main__":
    run_command(main)
