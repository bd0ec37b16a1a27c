"""Preparing data: what the streams hold, bytes that repeat, resuming, and every kind of bad input."""

import gzip
import json
from collections import Counter
from pathlib import Path
from typing import Any

import datasets
import polars as pl
import pytest
from tokenizers import Tokenizer, decoders, models

from curate.core.artifacts import read_json
from curate.core.config import parse_command
from curate.core.errors import UserError
from curate.data.documents import eot_id, load_tokenizer
from curate.data.mds import MdsStream, iterate
from curate.data.streams import load_streams
from pipelines import prepare as module
from pipelines.prepare import PrepareConfig, prepare

TEXTS = {
    "cats": [f"the cat number {number} sat on the mat \u00e9" * (number % 5 + 1) for number in range(60)],
    "dogs": [f"dog {number} barks; " * (number % 7 + 1) for number in range(40)],
}


def write_rows(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    folder = tmp_path / "corpus"
    folder.mkdir()
    for name, texts in TEXTS.items():
        write_rows(folder / f"{name}.jsonl", [{"id": f"{name}{n}", "text": text} for n, text in enumerate(texts)])
    return folder


def config(corpus: Path, out: str = "data", **options: Any) -> PrepareConfig:
    options = {"vocab_size": 300, "seq_len": 16, "tokenizer_megabytes": 0.01, "shard_bytes": 4000, **options}
    if options.get("tokenizer"):
        del options["vocab_size"]
    return PrepareConfig(**{"out": corpus.parent / out, "domains": str(corpus), **options})


def stored_documents(folder: Path) -> dict[str, list[int]]:
    """Document id -> its tokens, end-of-text included."""
    found: dict[str, list[int]] = {}
    stream = MdsStream(folder)
    for index in range(len(stream)):
        sample = stream[index]
        for name, start, stop in sample.documents:
            found.setdefault(name, []).extend(sample.tokens[start:stop].tolist())
    return found


def content(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def test_streams_hold_every_document(corpus: Path) -> None:
    facts = prepare(config(corpus))
    out = corpus.parent / "data"
    tokenizer = load_tokenizer(out / "tokenizer.json")
    for name, texts in TEXTS.items():
        documents = stored_documents(out / name)
        assert {tokens.pop() for tokens in documents.values()} == {eot_id(tokenizer)}
        assert [tokenizer.decode(documents[f"{name}{n}"]) for n in range(len(texts))] == texts
        catalogue = MdsStream(out / name).catalogue()
        assert len(set(catalogue["shard"])) > 1
        assert facts[name] == {
            "documents": len(texts),
            "dropped_duplicates": 0,
            "without_tokens": 0,
            "changed_by_tokenizer": 0,
            "tokens": sum(len(tokens) + 1 for tokens in documents.values()),
            "predicted_tokens": catalogue["predicted_tokens"].sum(),
            "padding": catalogue["stored_tokens"].sum() - sum(len(tokens) + 1 for tokens in documents.values()),
            "samples": len(catalogue),
        }
    assert read_json(out / "manifest.json")["domains"] == facts
    beside = ["curate.sums.json", "dogs", "manifest.json", "tokenizer.json"]
    assert sorted(path.name for path in out.iterdir()) == ["cats", *beside]


def test_a_plain_streaming_dataset_reads_them(corpus: Path) -> None:
    prepare(config(corpus))
    rows = list(iterate(corpus.parent / "data" / "dogs"))
    stream = MdsStream(corpus.parent / "data" / "dogs")
    assert [row["sample_id"] for row in rows] == stream.catalogue()["sample_id"].to_list()
    assert {row["domain"] for row in rows} == {"dogs"}


def test_the_same_input_gives_the_same_bytes_and_another_seed_another_order(corpus: Path) -> None:
    for out, seed in (("one", 0), ("two", 0), ("three", 1)):
        prepare(config(corpus, out, seed=seed))
    one, two, three = (content(corpus.parent / out) for out in ("one", "two", "three"))
    assert one == two
    assert one["cats/shard.00000.mds"] != three["cats/shard.00000.mds"]
    first, other = (stored_documents(corpus.parent / out / "cats") for out in ("one", "three"))
    assert list(first) != list(other)


def test_every_file_format_gives_the_same_stream(corpus: Path, tmp_path: Path) -> None:
    prepare(config(corpus))
    rows = [{"id": f"cats{n}", "text": text} for n, text in enumerate(TEXTS["cats"])]
    pl.DataFrame(rows).write_parquet(tmp_path / "cats.parquet")
    datasets.Dataset.from_list(rows).save_to_disk(tmp_path / "saved")
    (tmp_path / "parts").mkdir()
    write_rows(tmp_path / "parts" / "a.jsonl", rows[:11])
    pl.DataFrame(rows[11:]).write_parquet(tmp_path / "parts" / "b.parquet")
    tokenizer = tmp_path / "data" / "tokenizer.json"
    domains = {"cats": "", "dogs": str(corpus / "dogs.jsonl")}
    for number, name in enumerate(("cats.parquet", "saved", "parts")):
        given = config(corpus, f"out{number}", domains={**domains, "cats": str(tmp_path / name)}, tokenizer=tokenizer)
        prepare(given)
        assert content(given.out / "cats")["shard.00000.mds"] == content(tmp_path / "data" / "cats")["shard.00000.mds"]
        assert not (given.out / ".cache.part").exists()


def test_exact_duplicates_are_dropped_and_counted(corpus: Path) -> None:
    rows = [{"id": f"a{n}", "text": TEXTS["cats"][n % 10]} for n in range(25)]
    write_rows(corpus / "cats.jsonl", rows)
    facts = prepare(config(corpus))
    assert (facts["cats"]["documents"], facts["cats"]["dropped_duplicates"]) == (10, 15)
    assert set(stored_documents(corpus.parent / "data" / "cats")) == {f"a{n}" for n in range(10)}


def test_loss_masks_are_honoured(corpus: Path) -> None:
    prepare(config(corpus))
    tokenizer = corpus.parent / "data" / "tokenizer.json"
    eot = eot_id(load_tokenizer(tokenizer))
    rows: list[dict[str, Any]] = [
        {"id": "masked", "tokens": [5, 6, 7], "loss_mask": [0, 0, 0]},
        {"id": "half", "tokens": [8, 9], "loss_mask": [0, 1]},
        {"id": "all", "tokens": [10]},
        {"id": "pair", "prompt": "the", "completion": "cat"},
    ]
    write_rows(corpus / "cats.jsonl", rows)
    facts = prepare(config(corpus, "masked", tokenizer=tokenizer, seq_len=64))
    sample = MdsStream(corpus.parent / "masked" / "cats")[0]
    masks = {name: sample.loss_mask[start:stop].tolist() for name, start, stop in sample.documents}
    prompt = len(load_tokenizer(tokenizer).encode("the").ids)
    assert masks["masked"] == [False] * 4
    assert masks["half"] == [False, True, True]
    assert masks["all"] == [True, True]
    assert masks["pair"] == [False] * prompt + [True] * (len(masks["pair"]) - prompt)
    assert all(sample.tokens[stop - 1] == eot for _, _, stop in sample.documents)
    assert facts["cats"]["predicted_tokens"] == int(sample.loss_mask[1:].sum())


def test_prepared_data_is_reused_and_other_settings_are_refused(corpus: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    facts = prepare(config(corpus))
    monkeypatch.setattr(module, "catalogue", lambda *_: pytest.fail("read again"))
    assert prepare(config(corpus)) == facts
    with pytest.raises(UserError, match=r"made with other settings .seq_len: 16 there, 32 now"):
        prepare(config(corpus, seq_len=32))
    write_rows(corpus / "cats.jsonl", [{"text": "changed"}])
    with pytest.raises(UserError, match=r"made with other settings .domains"):
        prepare(config(corpus))


def test_an_interrupted_run_continues_with_the_next_domain(corpus: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    prepare(config(corpus, "whole"))
    written: Counter[str] = Counter()
    pack_domain = module._write_domain

    def interrupted(given: PrepareConfig, folder: Path, name: str, *rest: Any) -> dict[str, int]:
        written[name] += 1
        if name == "dogs" and written[name] == 1:
            raise KeyboardInterrupt
        return pack_domain(given, folder, name, *rest)

    monkeypatch.setattr(module, "_write_domain", interrupted)
    with pytest.raises(KeyboardInterrupt):
        prepare(config(corpus))
    left = ["cats", "settings.json", "tokenizer.json"]
    assert sorted(path.name for path in (corpus.parent / "data").iterdir()) == left
    with pytest.raises(UserError, match="data is not finished"):  # nobody trains on one domain of two
        load_streams(corpus.parent / "data")
    with pytest.raises(
        UserError, match=r"cats is complete but was made with other settings .*seq_len: 16 there, 32 now"
    ):
        prepare(config(corpus, seq_len=32))
    with pytest.raises(UserError, match="cats is in the way"):
        prepare(config(corpus, domains={"dogs": str(corpus / "dogs.jsonl")}))
    prepare(config(corpus))
    assert written == {"cats": 1, "dogs": 2}
    assert content(corpus.parent / "data") == content(corpus.parent / "whole")
    assert {Path(stream["local"]).name for stream in load_streams(corpus.parent / "data")} == {"cats", "dogs"}


def test_what_stands_in_the_output_folder_is_not_overwritten(corpus: Path) -> None:
    out = corpus.parent / "data"
    (out / "cats").mkdir(parents=True)
    write_rows(out / "cats" / "mine.txt", [])
    with pytest.raises(
        UserError, match="cats is in the way: this command would not write it like that; set another out"
    ):
        prepare(config(corpus))
    assert (out / "cats" / "mine.txt").exists()
    (out / "cats" / "mine.txt").unlink()
    (out / "cats").rmdir()
    (out / "tokenizer.json").write_text("mine")
    with pytest.raises(UserError, match=r"tokenizer.json is in the way"):
        prepare(config(corpus))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tokenizer": "tokenizer.json"}, "tokenizer tokenizer.json does not exist"),
        ({"domains": {}}, "there is no domain; set domains"),
        ({"domains": {"a": []}}, "domain 'a' has no files; set domains.a"),
        ({"domains": {"a/b": "x"}}, "domain 'a/b' cannot name a folder"),
        ({"domains": {"tokenizer.json": "x"}}, "domain 'tokenizer.json' cannot name a folder"),
        ({"domains": {"a.part": "x"}}, "domain 'a.part' cannot name a folder"),
        ({"domains": {"a": "s3://b/a.jsonl"}}, "domains.a: s3://b/a.jsonl is a URL"),
        ({"domains": {"a": "~nobody-here/a.jsonl"}}, "domains.a: ~nobody-here/a.jsonl names the home folder"),
        ({"domains": "gs://b/a"}, "domains: gs://b/a is a URL"),
        ({"domains": {"a": "none.jsonl"}}, "none.jsonl does not exist; expected .jsonl.* or .parquet, or a dataset"),
        ({"domains": "nowhere"}, "nowhere is not a folder; set domains"),
        ({"text_column": "body"}, r"cats.jsonl line 1: expected either 'body'.*it has 'id', 'text'"),
    ],
)
def test_bad_settings(corpus: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        prepare(config(corpus, **options))
    assert not (corpus.parent / "data" / "cats").exists()


def test_a_tokenizer_and_a_vocabulary_size_exclude_each_other(corpus: Path) -> None:
    given = PrepareConfig(out=corpus, domains=str(corpus), tokenizer=corpus / "tokenizer.json", vocab_size=300)
    with pytest.raises(UserError, match="tokenizer and vocab_size exclude each other"):
        prepare(given)


def test_bad_documents(corpus: Path) -> None:
    prepare(config(corpus, "good"))
    tokenizer = corpus.parent / "good" / "tokenizer.json"
    write_rows(corpus / "dogs.jsonl", [{"id": "t", "tokens": [1, 2]}])
    with pytest.raises(UserError, match="document 't' of domain 'dogs' holds token ids; set tokenizer"):
        prepare(config(corpus))
    write_rows(corpus / "dogs.jsonl", [{"id": "t", "tokens": [100_000]}])
    with pytest.raises(UserError, match="domain 'dogs': document 't' has token id 100000, the tokenizer has only"):
        prepare(config(corpus, tokenizer=tokenizer))
    write_rows(corpus / "dogs.jsonl", [{"id": "t", "tokens": [1, 2], "loss_mask": [0, 0]}])
    with pytest.raises(UserError, match="domain 'dogs' has no token to predict"):
        prepare(config(corpus, tokenizer=tokenizer, out="masked"))
    assert not list((corpus.parent / "masked").glob("dogs*"))
    (corpus / "dogs.jsonl").write_bytes(b'{"text": "ok"}\n{"text": "\xff"}\n')
    with pytest.raises(UserError, match=r"dogs.jsonl line 2: not UTF-8"):
        prepare(config(corpus))


def test_bad_folders(corpus: Path) -> None:
    (corpus / "birds").mkdir()
    with pytest.raises(UserError, match=r"birds holds no file of documents"):
        prepare(config(corpus))
    (corpus / "birds").rmdir()
    pl.DataFrame({"text": ["x"]}).write_parquet(corpus / "cats.parquet")
    with pytest.raises(UserError, match="several entries called 'cats'"):
        prepare(config(corpus))
    (corpus / "cats.parquet").rename(corpus / "fish.txt")
    with pytest.raises(UserError, match=r"fish.txt: hidden, or of an unknown kind"):
        prepare(config(corpus))


def test_a_folder_domain_is_read_whole_or_refused(corpus: Path) -> None:
    folder = corpus / "birds"
    (folder / "sub").mkdir(parents=True)
    rows = [{"text": f"bird {number}"} for number in range(30)]
    write_rows(folder / "0.jsonl", rows[:10])
    (folder / "1.jsonl.gz").write_bytes(gzip.compress(write_rows(folder / "x", rows[10:20]).read_bytes()))
    (folder / "x").unlink()
    write_rows(folder / "sub" / "0.JSONL", rows[20:])
    (corpus / "cats.jsonl").rename(corpus / "cats.NDJSON")
    (corpus / ".DS_Store").write_bytes(b"")
    facts = prepare(config(corpus))
    assert {name: counts["documents"] for name, counts in facts.items()} == {"birds": 30, "cats": 60, "dogs": 40}
    names = [f"{file}:{line}" for file in ("0.jsonl", "1.jsonl.gz", "sub/0.JSONL") for line in range(1, 11)]
    assert sorted(stored_documents(corpus.parent / "data" / "birds")) == sorted(names)
    (folder / "sub" / "notes.txt").write_text("what is this?")
    with pytest.raises(UserError, match=r"sub/notes.txt: hidden, or of an unknown kind"):
        prepare(config(corpus, out="other"))
    assert not (corpus.parent / "other").exists()


def test_a_tokenizer_that_truncates_and_pads_stores_whole_documents(corpus: Path) -> None:
    facts = prepare(config(corpus, "good"))
    tokenizer = load_tokenizer(corpus.parent / "good")
    tokenizer.enable_truncation(4)
    tokenizer.enable_padding()
    tokenizer.save(str(corpus.parent / "tokenizer.json"))
    assert prepare(config(corpus, tokenizer=corpus.parent)) == facts
    for name in TEXTS:
        assert stored_documents(corpus.parent / "data" / name) == stored_documents(corpus.parent / "good" / name)


def test_text_that_the_tokenizer_cannot_spell_is_counted_and_said(
    corpus: Path, caplog: pytest.LogCaptureFixture
) -> None:
    prepare(config(corpus, "good"))
    assert not caplog.records
    vocabulary = {token: number for number, token in enumerate(["<|endoftext|>", *"abdgkors "])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.decoder = decoders.Fuse()
    tokenizer.save(str(corpus.parent / "tokenizer.json"))
    write_rows(corpus / "dogs.jsonl", [{"text": "dog barks"}, {"id": "zh", "text": "\u72d7"}, {"text": "dog 1"}])
    domains = {"dogs": str(corpus / "dogs.jsonl")}
    facts = prepare(config(corpus, tokenizer=corpus.parent / "tokenizer.json", domains=domains))
    assert (facts["dogs"]["changed_by_tokenizer"], facts["dogs"]["without_tokens"]) == (2, 1)
    assert facts["dogs"]["documents"] == 3
    assert stored_documents(corpus.parent / "data" / "dogs")["zh"] == [0]
    (record,) = caplog.records
    assert "domain 'dogs'" in record.getMessage()
    assert "2 of 3 documents" in record.getMessage()


def test_columns_with_other_names(corpus: Path) -> None:
    prepare(config(corpus, "good"))
    rows = [{"input_ids": [5, 6, 7], "tokens": 3}, {"input_ids": [8], "loss_mask": [True]}]
    path = str(write_rows(corpus / "ids.jsonl", rows))
    given = config(corpus, domains={"ids": path}, tokenizer=corpus.parent / "good", tokens_column="input_ids")
    eot = eot_id(load_tokenizer(corpus.parent / "good"))
    prepare(given)
    assert stored_documents(corpus.parent / "data" / "ids") == {"ids.jsonl:1": [5, 6, 7, eot], "ids.jsonl:2": [8, eot]}


def test_the_shipped_config_is_valid() -> None:
    path = Path(__file__).parents[2] / "configs" / "demo" / "prepare.yaml"
    given = parse_command(PrepareConfig, "prepare", "", ["--config", str(path), "--seed", "3"])
    assert (given.seq_len, given.vocab_size, given.seed) == (128, 2048, 3)
    assert given.domains == "runs/demo/corpus/train"
