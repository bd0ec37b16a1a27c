"""`python -m curate.embed`: value embeddings of a run's windows, and their index."""

import logging

from curate.core.callable_module import make_callable
from curate.core.config import parse_command, run_command
from curate.core.progress import start_logging
from curate.embeddings.embed import EmbedConfig, embed
from curate.training.run import open_run

__all__ = ["EmbedConfig", "embed"]

_log = logging.getLogger(__name__)
make_callable(__name__, embed)


def main() -> None:
    """Entry point."""
    config = parse_command(
        EmbedConfig, "python -m curate.embed", "Value embeddings of a run's windows, and their index."
    )
    start_logging()
    run = open_run(config.run, config.streams, config.tokenizer)
    embeddings = embed(config, run)
    for window, (embedding, *_) in embeddings.items():
        _log.info("%s: %d rows x %d -> %s", window, *embedding.vectors.shape, embedding.folder)


if __name__ == "__main__":
    run_command(main)
