"""Documents: every kind of row, every kind of bad row, and their tokens."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers, processors

from curate.core.errors import UserError
from curate.data.documents import (
    EOT,
    Document,
    Fields,
    encode,
    encode_many,
    eot_id,
    load_tokenizer,
    parse_document,
)
from curate.data.files import read_documents
from curate.data.jsonl import JsonlFile
from pipelines.vocabulary import train_tokenizer

KEYS = st.sampled_from(["id", "text", "prompt", "completion", "tokens", "loss_mask"])


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
    file = JsonlFile(path, tmp_path, Fields(id="key", text="body"))
    assert file.read([0]) == [Document(id="k", text="b")]
    path = write_lines(tmp_path / "b.jsonl", '{"input_ids": [4, 2], "tokens": 2}')
    assert JsonlFile(path, tmp_path, Fields(tokens="input_ids")).read([0]) == [Document(id="b.jsonl:1", tokens=[4, 2])]


@given(texts=st.lists(st.text(st.characters(exclude_categories=["Cs"]), min_size=1), min_size=1, max_size=150))
def test_texts_survive_the_file(texts: list[str], tmp_path_factory: pytest.TempPathFactory) -> None:
    path = write_lines(tmp_path_factory.mktemp("t") / "a.jsonl", *(json.dumps({"text": text}) for text in texts))
    assert [document.text for document in read_documents(path)] == texts


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("", "line 2: an empty line; expected one JSON object per line"),
        ('{"text": "a"', "line 2: not valid JSON"),
        (b'{"text": "\xff"}', "line 2: not UTF-8 .byte 0xff at position 10."),
        ("[1]", "line 2: holds list; expected one JSON object"),
        ("[" * 100_000, "line 2: not valid JSON"),
        ('{"body": "a"}', r"line 2: expected either 'text'.*: it has 'body'$"),
        ("{}", "line 2: expected either 'text'.*: it has no columns$"),
        ('{"text": "a", "tokens": 1}', "line 2: expected .*: 'text', 'tokens' are more than one form"),
        (
            '{"text": "a", "prompt": "b", "completion": "c"}',
            "line 2: expected .*: 'text', 'prompt', 'completion' are more",
        ),
        ('{"id": "a", "text": null}', "line 2: expected .*: null stands in 'text'"),
        ('{"prompt": "a", "completion": null}', "line 2: expected .*: null stands in 'completion'"),
        ('{"prompt": "a"}', "line 2: expected either 'text'.*: it has 'prompt'$"),
        ('{"text": "a", "text": "b"}', "line 2: not valid JSON .the key 'text' stands twice"),
        ('{"text": "a", "n": ' + "9" * 5000 + "}", "line 2: not valid JSON"),
        ('{"text": ""}', "line 2: 'text' is empty"),
        ('{"text": 3}', "line 2: 'text' holds int, expected a string"),
        ('{"text": "\\ud800"}', "line 2: 'text' holds half of a surrogate pair"),
        ('{"text": "a", "id": [1]}', "line 2: 'id' holds list"),
        ('{"text": "a", "id": "\\ud83d1"}', "line 2: 'id' holds half of a surrogate pair"),
        ('{"prompt": "\\udc00", "completion": "b"}', "line 2: 'prompt' holds half of a surrogate pair"),
        ('{"prompt": "", "completion": "b"}', "line 2: 'prompt' is empty"),
        ('{"tokens": []}', "line 2: 'tokens' must be a list of at least one integer"),
        ('{"tokens": "abc"}', "line 2: 'tokens' must be a list"),
        ('{"tokens": [1.5]}', "line 2: 'tokens' must hold integers"),
        ('{"tokens": [-1]}', "line 2: 'tokens' must hold integers"),
        ('{"tokens": [true]}', "line 2: 'tokens' must hold integers"),
        ('{"tokens": [1, null]}', "line 2: 'tokens' must hold integers"),
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


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(st.characters()),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(KEYS | st.text(max_size=3), inner, max_size=4),
    max_leaves=8,
)


@given(line=st.binary(max_size=60) | st.dictionaries(KEYS, JSON, max_size=5) | JSON)
def test_any_line_is_a_document_or_is_named(line: Any, tmp_path_factory: pytest.TempPathFactory) -> None:
    content = line.replace(b"\n", b" ") if isinstance(line, bytes) else json.dumps(line)
    path = write_lines(tmp_path_factory.mktemp("t") / "a.jsonl", '{"text": "good"}', content)
    try:
        document = read_documents(path)[1]
    except UserError as error:
        assert str(error).startswith(f"{path} line 2: ")  # noqa: PT017 - either is right
        str(error).encode()
        return
    assert (document.text is None) == (document.tokens is not None)
    f"{document.id}{document.text}{document.prompt}".encode()


def test_a_file_that_is_missing_empty_or_a_folder(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"none.jsonl does not exist; expected .jsonl"):
        read_documents(tmp_path / "none.jsonl")
    with pytest.raises(UserError, match="is a folder; expected one file of documents"):
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


def test_a_tokenizer_that_truncates_pads_or_adds_tokens_reads_whole_documents(
    tokenizer: Tokenizer, tmp_path: Path
) -> None:
    text = "the cat sat on the mat, and the dog sat on the log"
    documents = [Document(id="a", text=text), Document(id="b", prompt="the", text=" cat")]
    wanted = [tokens.tolist() for tokens, _ in encode_many(documents, tokenizer)]
    path = tmp_path / "tokenizer.json"
    altered = Tokenizer.from_str(tokenizer.to_str())
    altered.enable_truncation(3)
    altered.enable_padding(length=50)
    altered.model.dropout = 0.9
    altered.post_processor = processors.TemplateProcessing(single=f"{EOT} $A {EOT}", special_tokens=[(EOT, 0)])
    altered.save(str(path))
    assert [tokens.tolist() for tokens, _ in encode_many(documents, load_tokenizer(path))] == wanted


def test_a_folder_stands_for_its_tokenizer(tokenizer: Tokenizer, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"tokenizer .*tokenizer.json does not exist"):
        load_tokenizer(tmp_path)
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    assert load_tokenizer(tmp_path).to_str() == tokenizer.to_str()


def test_ids_behind_a_hole_of_the_vocabulary_are_known() -> None:
    sparse = Tokenizer(models.WordLevel({"a": 0, "b": 9}, unk_token="a"))
    assert encode(Document(id="x", tokens=[9]), sparse)[0].tolist() == [9]
    with pytest.raises(UserError, match="document 'x' has token id 10"):
        encode(Document(id="x", tokens=[9, 10]), sparse)


def test_a_document_that_the_tokenizer_refuses_is_named() -> None:
    words = Tokenizer(models.WordLevel({"a": 0}, unk_token="?"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    with pytest.raises(UserError, match="document 'y' cannot be encoded by the tokenizer"):
        encode_many([Document(id="x", text="a"), Document(id="y", text="b")], words)


def test_bad_tokenizers(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"tokenizer .*none.json does not exist"):
        load_tokenizer(tmp_path / "none.json")
    with pytest.raises(UserError, match=r"is not a tokenizer.json of the tokenizers library"):
        load_tokenizer(write_lines(tmp_path / "tokenizer.json", "{}"))
    with pytest.raises(UserError, match=r"no end-of-text token; add one of <\|endoftext\|>"):
        eot_id(Tokenizer(models.BPE()))


def test_where_is_named_for_rows_of_any_format() -> None:
    with pytest.raises(UserError, match=r"data.parquet row 3: 'text' is empty"):
        parse_document({"text": ""}, "data.parquet row 3", "id")
