"""Text that tokenizers drop or change is counted; what decodes to itself is not."""

import logging

import pytest
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers

from curate.data.documents import Document
from curate.data.spelling import Spelling
from pipelines.vocabulary import train_tokenizer

TEXT = "The cat  sat\n\ton a mat, caf\u00e9 \u72d7 \U0001f600"


def byte_level(**changes: object) -> Tokenizer:
    tokenizer = train_tokenizer(["the cat sat on the mat"] * 9, 270)
    for name, value in changes.items():
        setattr(tokenizer, name, value)
    return tokenizer


def words() -> Tokenizer:
    tokenizer = Tokenizer(models.WordLevel({"?": 0, "The": 1, "cat": 2}, unk_token="?"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return tokenizer


def spaced() -> Tokenizer:
    """As Llama's: a space is put in front and taken away again."""
    alphabet = {token: number for number, token in enumerate(sorted(set(TEXT.replace(" ", "\u2581") + "\u2581")))}
    tokenizer = Tokenizer(models.BPE(vocab=alphabet, merges=[]))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
    tokenizer.decoder = decoders.Sequence([decoders.Replace("\u2581", " "), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    return tokenizer


@pytest.mark.parametrize(
    ("tokenizer", "changed"),
    [
        (byte_level(), 0),
        (byte_level(pre_tokenizer=pre_tokenizers.ByteLevel(add_prefix_space=True)), 0),
        (spaced(), 0),
        (byte_level(normalizer=normalizers.Lowercase()), 1),
        (byte_level(normalizer=normalizers.NFKC()), 0),
        (byte_level(normalizer=normalizers.Sequence([normalizers.NFD(), normalizers.StripAccents()])), 1),
        (byte_level(normalizer=normalizers.Strip()), 0),
        (byte_level(normalizer=normalizers.Replace("  ", " ")), 1),
        (words(), 1),
    ],
)
def test_a_text_counts_where_it_does_not_decode_to_itself(tokenizer: Tokenizer, changed: int) -> None:
    for document in (Document(id="a", text=TEXT), Document(id="a", prompt=TEXT, text="The cat")):
        spelling = Spelling("x", tokenizer)
        spelling.encode([document, Document(id="b", tokens=[1, 2])])
        assert (spelling.texts, spelling.changed, spelling.empty) == (1, changed, 0)


def test_the_first_changed_document_and_those_without_a_token_are_said(caplog: pytest.LogCaptureFixture) -> None:
    tokenizer = Tokenizer(models.BPE(vocab={"a": 0, "b": 1}, merges=[]))
    tokenizer.decoder = decoders.Fuse()
    spelling = Spelling("some.jsonl", tokenizer)
    with caplog.at_level(logging.INFO):
        spelling.encode([Document(id="fine", text="abba")])
        spelling.warn()
        assert not caplog.records
        spelling.encode([Document(id="", text="\u72d7"), Document(id="later", prompt="ab", text="\u72d7")])
        spelling.encode([Document(id="part", text="a\u72d7b")])
        spelling.warn()
    assert (spelling.texts, spelling.changed, spelling.empty) == (4, 3, 2)
    (record,) = caplog.records
    assert record.args == ("some.jsonl", 3, 4, "", 2)


def test_documents_of_tokens_need_no_tokenizer() -> None:
    spelling = Spelling("x", None)
    assert len(spelling.encode([Document(id="a", tokens=[1])])) == 1
    assert spelling.texts == 0
