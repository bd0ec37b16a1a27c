"""`python -m curate.embed`: the value index of a run or of candidates, or value embeddings of a run's windows."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

from curate.core.callable_module import make_callable
from curate.core.config import parse_command, run_command
from curate.core.progress import start_logging
from curate.embeddings.embed import EmbedConfig
from curate.embeddings.embed import embed as embed_windows
from curate.influence.value_index import make_value_index
from curate.selection.candidates import open_candidates
from curate.training.replay import Replay
from curate.training.run import open_run

if TYPE_CHECKING:
    from curate.embeddings.store import Embedding
    from curate.influence.value_index import ValueIndex
    from curate.training.run import Run

__all__ = ["EmbedConfig", "embed", "embed_windows"]

_log = logging.getLogger(__name__)


def embed(config: EmbedConfig, run: Run) -> ValueIndex | dict[str, list[Embedding]]:
    """Make the value index, or with `config.window` the embeddings of windows; what is complete is opened.

    Args:
        config: what to embed, and how.
        run: a finished run.

    Returns:
        The value index of all samples of the run or of the candidates; with a window see `embed_windows`.

    Raises:
        UserError: bad run, candidates, target or settings.
    """
    if config.window is not None:
        return embed_windows(config, run)
    source = run.source if config.candidates is None else open_candidates(config.candidates, run)
    return make_value_index(run, source, Replay(run, config.device, config.tolerance))


make_callable(__name__, embed)


def main() -> None:
    """Entry point."""
    config = parse_command(
        EmbedConfig,
        "python -m curate.embed",
        "The value index of a run or of candidates, or value embeddings of a run's windows.",
    )
    start_logging()
    run = open_run(config.run, config.streams, config.tokenizer)
    made = embed(config, run)
    if isinstance(made, dict):
        for window, (embedding, *_) in made.items():
            _log.info("%s: %d rows x %d -> %s", window, *embedding.vectors.shape, embedding.folder)
    else:
        _log.info("%d samples x %d numbers -> %s", len(made), made.store.numbers, made.store.folder.parent)


if __name__ == "__main__":
    run_command(main)
