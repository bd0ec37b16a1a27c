"""`python -m pipelines.corpus --out DIR`: build the demo corpus from the text of the installed packages."""

import sys

from curate.config import parse_command, run_command
from pipelines.corpus.build import CorpusConfig, build


def main() -> None:
    """Build the corpus and list its files."""
    config = parse_command(CorpusConfig, "python -m pipelines.corpus", __doc__ or "")
    for file, facts in build(config).items():
        counted = f"{facts['documents']} documents, {facts['bytes'] / 1e6:.2f} MB"
        sys.stdout.write(f"{config.out / file}: {counted} ({facts['dropped_duplicates']} duplicates dropped)\n")


if __name__ == "__main__":
    run_command(main)
