"""`python -m pipelines.prepare`: documents of each domain -> tokenizer -> packed sequences -> one MDS stream each.

A domain is any number of JSONL files (plain, gzip or Zstandard), Parquet files or Hugging Face datasets on disk, or
folders of them. A file that cannot be read is refused by its name. Its documents are shuffled by the seed, joined by
end-of-text and cut into sequences of exactly `seq_len` tokens. Only exact duplicates inside a domain and text that the
tokenizer cannot spell are lost; both are counted. Memory is a batch of documents, a shard or two (`shard_bytes`) and 24
bytes for each document; it does not grow with the text. Parquet and compressed files are copied uncompressed to OUT
while they are read.

The result is `OUT/tokenizer.json`, `OUT/<domain>/` (MDS) and `OUT/manifest.json`. A stream appears when it is complete,
so an interrupted run continues with the next domain; reading and training the tokenizer are repeated, with the same
result.
"""

import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import Field
from tqdm import tqdm

from curate.core.artifacts import (
    MANIFEST,
    STARTED,
    check_contents,
    file_fingerprint,
    finalize,
    fingerprint,
    is_complete,
    making,
    read_json,
    write_json,
)
from curate.core.config import Config, parse_command, run_command
from curate.core.errors import UserError
from curate.core.progress import say, start_logging
from curate.core.rng import generator
from curate.core.writing import atomic_write
from curate.data.documents import Document, Fields, eot_id, load_tokenizer, tokenizer_file
from curate.data.files import open_reader
from curate.data.mds import COLUMNS, Sample, write_stream
from curate.data.spelling import Spelling
from pipelines.catalogue import Catalogue, Domain, catalogue, find_domains
from pipelines.packing import Encoded, pack
from pipelines.vocabulary import SMALLEST_VOCABULARY, train_tokenizer, training_text

if TYPE_CHECKING:
    from tokenizers import Tokenizer

TOKENIZER = "tokenizer.json"
_CACHE = ".cache.part"  # no domain can have this name: it starts with a dot
_VOCABULARY = 32_768  # where neither a tokenizer nor a size is given


class PrepareConfig(Config):
    """Options of `python -m pipelines.prepare`."""

    out: Path
    """Folder to write the tokenizer and the streams to."""
    domains: dict[str, str | list[str]] | str
    """Domain name -> its files (JSONL, Parquet, a dataset saved by `save_to_disk`, or a folder that holds such, at any
    depth); or one folder, each entry of which is a domain called by its name."""
    tokenizer: Path | None = None
    """A `tokenizer.json` to use, or a folder with one; without it a byte-level BPE tokenizer is trained on the
    documents."""
    vocab_size: int | None = Field(default=None, ge=SMALLEST_VOCABULARY)
    """Size of the vocabulary to train (32768 by default); not allowed together with `tokenizer`."""
    tokenizer_megabytes: float = Field(default=32.0, gt=0, allow_inf_nan=False)
    """Text that the tokenizer is trained on, in millions of characters, in equal parts from every domain."""
    seq_len: int = Field(default=1024, ge=2)
    """Stored tokens of each sequence."""
    text_column: str = "text"
    """Column with the text (`prompt`, `completion` and `loss_mask` have fixed names)."""
    tokens_column: str = "tokens"
    """Column with token ids, such as `input_ids`."""
    id_column: str = "id"
    """Column with the document's id; where it is absent, file name and line number are the id."""
    split: str = "train"
    """Split to read where a saved dataset has several."""
    seed: int = Field(default=0, ge=0)
    """Seed of the order of the documents."""
    shard_bytes: int = Field(default=1 << 26, gt=0)
    """Size limit of one MDS shard."""


def prepare(config: PrepareConfig) -> dict[str, dict[str, int]]:
    """Write the tokenizer and every stream, or reuse what is there.

    Returns:
        Domain -> documents, dropped duplicates, documents without a token and documents whose tokens do not decode to
        their text, stored and predicted tokens, padding, samples.

    Raises:
        UserError: bad input, or `out` was made with other settings.
    """
    if config.tokenizer is not None and config.vocab_size is not None:
        raise UserError("tokenizer and vocab_size exclude each other: a tokenizer has its vocabulary; set only one")
    domains = find_domains(config.domains)
    inputs = {domain.name: domain.inputs() for domain in domains}
    settings = {**_common_settings(config), "domains": inputs}
    with making(config.out, settings) as missing:
        if missing:
            # a killed command may have left half a file there
            cache = config.out / _CACHE
            shutil.rmtree(cache, ignore_errors=True)
            try:
                facts = _write(config, domains, inputs, cache)
            finally:
                shutil.rmtree(cache, ignore_errors=True)
            finalize(config.out, "data", settings, parts=[TOKENIZER, *inputs], domains=facts)
        else:
            check_contents(config.out)
        # after finalize: a crash in between leaves the mark on a complete folder, and the next call removes it
        (config.out / STARTED).unlink(missing_ok=True)
    return _facts(config.out)


def _write(
    config: PrepareConfig, domains: list[Domain], inputs: dict[str, list[str]], cache: Path
) -> dict[str, dict[str, int]]:
    fields = Fields(id=config.id_column, text=config.text_column, tokens=config.tokens_column)
    # before anything is written: bad input costs no output
    catalogues = {
        domain.name: catalogue([open_reader(file, fields, config.split, cache) for file in domain.files], domain.name)
        for domain in domains
    }
    serialised = _tokenizer(config, catalogues)
    # a trained tokenizer depends on all domains: with one more domain every stream is made anew
    common = {**_common_settings(config), "tokenizer_fingerprint": fingerprint(serialised)}
    settings = {name: {**common, "inputs": files} for name, files in inputs.items()}
    done = {name for name in catalogues if is_complete(config.out / name, settings[name])}
    for name in done:
        check_contents(config.out / name)
    _refuse_strangers(config.out, set(catalogues), done, serialised)
    write_json(config.out / STARTED, settings)  # until all domains are there nothing is trained on them
    # before the streams: a stream without its tokenizer could not be read
    with atomic_write(config.out / TOKENIZER) as part:
        part.write_text(serialised, encoding="utf-8")
    tokenizer = load_tokenizer(config.out / TOKENIZER)
    facts: dict[str, dict[str, int]] = {}
    for name, documents in catalogues.items():
        if name not in done:
            # the stream appears with its manifest in it: complete or not at all
            with atomic_write(config.out / name) as part:
                counts = _write_domain(config, part, name, documents, tokenizer)
                finalize(part, "stream", settings[name], domains={name: counts})
        facts |= _facts(config.out / name)
    return facts


def _refuse_strangers(out: Path, domains: set[str], done: set[str], tokenizer: str) -> None:
    """Refuse an output folder with anything in the way that this command did not write for these domains."""
    sealed_streams = {path.parent.name for path in out.glob(f"*/{MANIFEST}") if not path.parent.name.startswith(".")}
    # a folder of that name that is not this command's stream must not be replaced
    in_the_way = [name for name in sorted(domains - done) if (out / name).exists()]
    if (out / TOKENIZER).exists() and (out / TOKENIZER).read_text(encoding="utf-8") != tokenizer:
        in_the_way.append(TOKENIZER)
    if sealed_streams - domains or in_the_way:
        first_in_the_way = [*sorted(sealed_streams - domains), *in_the_way][0]
        raise UserError(
            f"{out / first_in_the_way} is in the way: this command would not write it like that; set another out"
        )


def _common_settings(config: PrepareConfig) -> dict[str, Any]:
    """Settings that every stream depends on."""
    columns = {"text_column", "tokens_column", "id_column"}
    trained = config.tokenizer is None
    return {
        "tokenizer": "trained" if config.tokenizer is None else _given_fingerprint(config.tokenizer),
        "vocab_size": (config.vocab_size or _VOCABULARY) if trained else None,
        "tokenizer_megabytes": config.tokenizer_megabytes if trained else None,
        **config.model_dump(include=columns | {"seq_len", "split", "seed", "shard_bytes"}),
    }


def _given_fingerprint(path: Path) -> str:
    # raises where it has no end-of-text, before anything is read
    eot_id(load_tokenizer(path))
    return file_fingerprint(tokenizer_file(path))


def _tokenizer(config: PrepareConfig, catalogues: dict[str, Catalogue]) -> str:
    """The tokenizer's JSON: read, or trained on text of all domains."""
    if config.tokenizer is not None:
        return tokenizer_file(config.tokenizer).read_text(encoding="utf-8")
    # the library has no seed: its training text alone decides the result
    texts = training_text(catalogues, round(config.tokenizer_megabytes * 1e6), config.seed)
    return str(train_tokenizer(texts, config.vocab_size or _VOCABULARY).to_str(pretty=True))


def _write_domain(
    config: PrepareConfig, folder: Path, name: str, documents: Catalogue, tokenizer: "Tokenizer"
) -> dict[str, int]:
    # by the domain's name: another domain more or less does not change the order
    order = generator(config.seed, "documents", name).permutation(len(documents.kept))
    counts = {
        "documents": len(order),
        "dropped_duplicates": documents.duplicates,
        "without_tokens": 0,
        "changed_by_tokenizer": 0,
        "tokens": 0,  # stored, end-of-text included, padding not
        "predicted_tokens": 0,
        "padding": 0,
        "samples": 0,
    }
    with tqdm(total=len(order), desc=f"pack {name}", unit="doc") as bar:
        spelling = Spelling(f"domain {name!r}", tokenizer)
        encoded = _encoded(documents.batches(order), spelling, bar)
        samples = pack(encoded, config.seq_len, eot_id(tokenizer))
        write_stream(folder, COLUMNS, _rows(samples, name, counts), config.shard_bytes)
    spelling.warn()
    counts |= {"without_tokens": spelling.empty, "changed_by_tokenizer": spelling.changed}
    return counts


def _encoded(batches: Iterable[list[Document]], spelling: Spelling, bar: "tqdm[Any]") -> Iterator[Encoded]:
    for batch in batches:
        for document, (tokens, mask) in zip(batch, spelling.encode(batch), strict=True):
            yield document.id, tokens, mask
        bar.update(len(batch))


def _rows(samples: Iterable[Sample], domain: str, counts: dict[str, int]) -> Iterator[dict[str, Any]]:
    """Samples as rows of `COLUMNS`; adds them to `counts` on the way."""
    for sample in samples:
        stored = sum(stop - start for _, start, stop in sample.documents)
        counts["tokens"] += stored
        counts["padding"] += len(sample.tokens) - stored
        counts["predicted_tokens"] += sample.predicted_tokens
        counts["samples"] += 1
        yield {
            "tokens": sample.tokens,
            # MDS has no encoding of booleans
            "loss_mask": sample.loss_mask.astype("uint8"),
            "sample_id": sample.sample_id,
            "domain": domain,
            "documents": [list(span) for span in sample.documents],
        }
    if counts["predicted_tokens"] == 0:
        raise UserError(
            f"domain {domain!r} has no token to predict: all is masked, or nothing the tokenizer can spell; remove it"
        )


def _facts(folder: Path) -> dict[str, dict[str, int]]:
    facts: dict[str, dict[str, int]] = read_json(folder / MANIFEST)["domains"]
    return facts


def main() -> None:
    """Prepare the data and list the streams."""
    config = parse_command(PrepareConfig, "python -m pipelines.prepare", __doc__ or "")
    start_logging()
    for name, facts in prepare(config).items():
        counted = ", ".join(f"{count} {what.replace('_', ' ')}" for what, count in facts.items())
        say(f"{config.out / name}: {counted}")
    say(f"{config.out / TOKENIZER}")


if __name__ == "__main__":
    run_command(main)
