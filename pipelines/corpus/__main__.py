"""`python -m pipelines.corpus --out DIR`: build the demo corpus from the text of the installed packages."""

from curate.core.config import parse_command, run_command
from curate.core.progress import say
from pipelines.corpus.build import CorpusConfig, build


def main() -> None:
    """Build the corpus and list its files."""
    config = parse_command(CorpusConfig, "python -m pipelines.corpus", __doc__ or "")
    for file, facts in build(config).items():
        counted = f"{facts['documents']} documents, {facts['bytes'] / 1e6:.2f} MB"
        say(f"{config.out / file}: {counted} ({facts['dropped_duplicates']} duplicates dropped)")


if __name__ == "__main__":
    run_command(main)
