"""Documents: every kind of row, every kind of bad row, and their tokens."""

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer

from curate.errors import UserError
from curate.formats.documents import (
    EOT,
    Document,
    Fields,
    encode,
    encode_many,
    eot_id,
    iterate_documents,
    load_tokenizer,
    parse_document,
    read_documents,
)
from pipelines.vocabulary import train_tokenizer


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    train_tokenizer(["the cat sat on the mat, and the dog sat on the log"] * 20, 300).save(str(path))
    return load_tokenizer(path)


def write_lines(path: Path, *lines: str | bytes) -> Path:
    path.write_bytes(b"".join((line.encode() if isinstance(line, str) else line) + b"\n" for line in lines))
    return path


def test_every_kind_of_document_is_read(tmp_path: Path) -> None:
    path = write_lines(
        tmp_path / "a.jsonl",
        '{"id": "x", "text": "some text", "source": "ignored"}',
        '{"prompt": "2+2=", "completion": "4"}',
        '{"id": 7, "tokens": [1, 2, 3], "loss_mask": [0, 1, 1]}',
        '{"id": null, "text": null, "tokens": [5]}',
    )
    assert read_documents(path) == [
        Document(id="x", text="some text"),
        Document(id="a.jsonl:2", prompt="2+2=", text="4"),
        Document(id="7", tokens=[1, 2, 3], loss_mask=[0, 1, 1]),
        Document(id="a.jsonl:4", tokens=[5]),
    ]


def test_other_column_names(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "a.jsonl", '{"body": "b", "key": "k", "text": "t"}')
    assert read_documents(path, Fields(id="key", text="body")) == [Document(id="k", text="b")]


@given(texts=st.lists(st.text(st.characters(exclude_categories=["Cs"]), min_size=1), min_size=1, max_size=150))
def test_texts_survive_the_file(texts: list[str], tmp_path_factory: pytest.TempPathFactory) -> None:
    path = write_lines(tmp_path_factory.mktemp("t") / "a.jsonl", *(json.dumps({"text": text}) for text in texts))
    assert [document.text for document in iterate_documents(path)] == texts


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("", "line 2: an empty line; expected one JSON object per line"),
        ('{"text": "a"', "line 2: not valid JSON"),
        (b'{"text": "\xff"}', "line 2: not UTF-8 .byte 0xff at position 10."),
        ("[1]", "line 2: holds list; expected one JSON object"),
        ("[" * 100_000, "line 2: not valid JSON"),
        ('{"body": "a"}', r"line 2: expected either 'text'.*it has \['body'\]"),
        ('{"text": "a", "tokens": [1]}', "line 2: expected either 'text'"),
        ('{"prompt": "a"}', "line 2: expected either 'text'"),
        ('{"text": ""}', "line 2: 'text' is empty"),
        ('{"text": 3}', "line 2: 'text' holds int, expected a string"),
        ('{"text": "\\ud800"}', "line 2: 'text' holds half of a surrogate pair"),
        ('{"text": "a", "id": [1]}', "line 2: 'id' holds list"),
        ('{"prompt": "", "completion": "b"}', "line 2: 'prompt' is empty"),
        ('{"tokens": []}', "line 2: 'tokens' must be a list of at least one integer"),
        ('{"tokens": "abc"}', "line 2: 'tokens' must be a list"),
        ('{"tokens": [1.5]}', "line 2: 'tokens' must hold integers"),
        ('{"tokens": [-1]}', "line 2: 'tokens' must hold integers"),
        (
            '{"tokens": [1, 2], "loss_mask": [1]}',
            "line 2: 'loss_mask' has 1 values; expected one 0 or 1 for each of the 2",
        ),
        ('{"tokens": [1], "loss_mask": [2]}', "line 2: 'loss_mask' has 1 values; expected one 0 or 1"),
    ],
)
def test_a_bad_line_names_file_line_and_expectation(tmp_path: Path, line: str | bytes, message: str) -> None:
    path = write_lines(tmp_path / "bad.jsonl", '{"text": "good"}', line, '{"text": "good"}')
    with pytest.raises(UserError, match=f"bad.jsonl {message}"):
        read_documents(path)


def test_a_file_that_is_missing_empty_or_a_folder(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"none.jsonl does not exist; expected a JSONL file"):
        read_documents(tmp_path / "none.jsonl")
    with pytest.raises(UserError, match="is a folder; expected a JSONL file"):
        read_documents(tmp_path)
    with pytest.raises(UserError, match=r"a.jsonl is empty; expected one JSON object per line"):
        read_documents(write_lines(tmp_path / "a.jsonl"))


def test_equal_content_has_equal_hash_whatever_its_id() -> None:
    documents = [
        Document(id="a", text="x"),
        Document(id="a", text="xx"),
        Document(id="a", text="x", prompt="x"),
        Document(id="a", tokens=[1]),
        Document(id="a", tokens=[1], loss_mask=[1]),
    ]
    assert len({document.content_hash for document in documents}) == len(documents)
    assert Document(id="b", text="x").content_hash == documents[0].content_hash


def test_text_is_predicted_and_decodes_to_itself(tokenizer: Tokenizer) -> None:
    tokens, mask = encode(Document(id="a", text="the cat \u00e9\U0001f600"), tokenizer)
    assert tokens.dtype == np.int32
    assert mask.dtype == np.bool_
    assert mask.all()
    assert tokenizer.decode(tokens.tolist()) == "the cat \u00e9\U0001f600"


def test_only_the_completion_is_predicted(tokenizer: Tokenizer) -> None:
    prompt, _ = encode(Document(id="p", text="the cat"), tokenizer)
    completion, _ = encode(Document(id="c", text=" sat"), tokenizer)
    tokens, mask = encode(Document(id="a", prompt="the cat", text=" sat"), tokenizer)
    assert tokens.tolist() == [*prompt, *completion]
    assert mask.tolist() == [False] * len(prompt) + [True] * len(completion)


def test_tokens_need_no_tokenizer_and_text_does() -> None:
    tokens, mask = encode(Document(id="a", tokens=[3, 1], loss_mask=[0, 1]), None)
    assert (tokens.tolist(), mask.tolist()) == ([3, 1], [False, True])
    with pytest.raises(UserError, match="document 'b' is text and there is no tokenizer"):
        encode(Document(id="b", text="x"), None)


def test_a_batch_is_its_documents_one_by_one(tokenizer: Tokenizer) -> None:
    documents = [
        Document(id="a", text="the dog"),
        Document(id="b", tokens=[1, 2]),
        Document(id="c", prompt="on", text=" the log"),
    ]
    for (tokens, mask), document in zip(encode_many(documents, tokenizer), documents, strict=True):
        one = encode(document, tokenizer)
        assert (tokens.tolist(), mask.tolist()) == (one[0].tolist(), one[1].tolist())


def test_a_token_outside_the_vocabulary_is_refused(tokenizer: Tokenizer) -> None:
    size = tokenizer.get_vocab_size()
    with pytest.raises(UserError, match=f"document 'a' has token id {size}, the tokenizer has only {size} tokens"):
        encode(Document(id="a", tokens=[size]), tokenizer)


def test_text_that_spells_end_of_text_does_not_end_the_document(tokenizer: Tokenizer) -> None:
    tokens, _ = encode(Document(id="a", text=f"a{EOT}b"), tokenizer)
    assert eot_id(tokenizer) not in tokens


def test_bad_tokenizers(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"tokenizer .*none.json does not exist"):
        load_tokenizer(tmp_path / "none.json")
    with pytest.raises(UserError, match=r"is not a tokenizer.json of the tokenizers library"):
        load_tokenizer(write_lines(tmp_path / "tokenizer.json", "{}"))
    from tokenizers import models

    with pytest.raises(UserError, match=r"no end-of-text token; add one of <\|endoftext\|>"):
        eot_id(Tokenizer(models.BPE()))


def test_where_is_named_for_rows_of_any_format() -> None:
    with pytest.raises(UserError, match=r"data.parquet row 3: 'text' is empty"):
        parse_document({"text": ""}, "data.parquet row 3", "id")
