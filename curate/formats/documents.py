"""Documents: the one place that knows what a row of a JSONL, Parquet or Hugging Face dataset must hold.

A row has `text` (every token is predicted), `prompt` and `completion` (only the completion is), or `tokens` with an
optional `loss_mask`. An `id` is optional (the default is the file's name and line), other keys are ignored.
"""

import hashlib
import json
from array import array
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from curate.artifacts import checked
from curate.errors import UserError

if TYPE_CHECKING:
    from tokenizers import Tokenizer

EOT = "<|endoftext|>"
END_OF_TEXT = (EOT, "<|end_of_text|>", "</s>", "<eos>")  # the first that a tokenizer has ends its documents

Tokens = npt.NDArray[np.int32]
Mask = npt.NDArray[np.bool_]


@dataclass(frozen=True, kw_only=True)
class Document:
    """One document: exactly one of `text` and `tokens` is set.

    Attributes:
        id: what reports call it.
        text: the text that is predicted; the completion where there is a prompt.
        prompt: text in front of it that is read but not predicted.
        tokens: token ids, for documents that are tokenised already.
        loss_mask: 1 where the token is predicted, one per token; None: all of them.
    """

    id: str
    text: str | None = None
    prompt: str | None = None
    tokens: list[int] | None = None
    loss_mask: list[int] | None = None

    @cached_property
    def content_hash(self) -> int:
        """64-bit hash of everything but the id: equal content, equal hash."""
        content = json.dumps([self.text, self.prompt, self.tokens, self.loss_mask], separators=(",", ":"))
        return int.from_bytes(hashlib.blake2b(content.encode(), digest_size=8).digest(), "little")


@dataclass(frozen=True, kw_only=True)
class Fields:
    """Names of the columns that are not called `id` and `text`."""

    id: str = "id"
    text: str = "text"


def parse_document(row: Mapping[str, Any], where: str, default_id: str, fields: Fields | None = None) -> Document:
    """Read one row, of whatever file format.

    Args:
        row: column name -> value; a column that is None counts as absent.
        where: file and line, for the error.
        default_id: the document's id where the row has none.
        fields: column names.

    Raises:
        UserError: no known column, an empty or non-string text, bad token ids, or a mask of another length.
    """
    fields = fields or Fields()
    present = {key for key in (fields.text, "prompt", "completion", "tokens", "loss_mask") if row.get(key) is not None}
    name = row.get(fields.id)
    if name is not None and not isinstance(name, str | int):
        raise UserError(f"{where}: {fields.id!r} holds {type(name).__name__}, expected a string")
    name = default_id if name is None else str(name)
    if present == {fields.text}:
        return Document(id=name, text=_string(row, fields.text, where))
    if present == {"prompt", "completion"}:
        return Document(id=name, prompt=_string(row, "prompt", where), text=_string(row, "completion", where))
    if present in ({"tokens"}, {"tokens", "loss_mask"}):
        tokens = _integers(row, "tokens", where)
        mask = _integers(row, "loss_mask", where) if "loss_mask" in present else None
        if mask is not None and (len(mask) != len(tokens) or not set(mask) <= {0, 1}):
            raise UserError(
                f"{where}: 'loss_mask' has {len(mask)} values; expected one 0 or 1 for each of the {len(tokens)} tokens"
            )
        return Document(id=name, tokens=tokens, loss_mask=mask)
    raise UserError(
        f"{where}: expected either {fields.text!r}, or 'prompt' and 'completion', or 'tokens' with an optional "
        f"'loss_mask'; it has {sorted(row)} (text_column and id_column set other names)"
    )


def _string(row: Mapping[str, Any], key: str, where: str) -> str:
    value = row[key]
    if not isinstance(value, str):
        raise UserError(f"{where}: {key!r} holds {type(value).__name__}, expected a string")
    if not value:
        raise UserError(f"{where}: {key!r} is empty; expected at least one character, remove the line")
    try:
        value.encode()
    except UnicodeEncodeError:
        raise UserError(f"{where}: {key!r} holds half of a surrogate pair (\\ud800-\\udfff), expected text") from None
    return value


def _integers(row: Mapping[str, Any], key: str, where: str) -> list[int]:
    value = row[key]
    if not isinstance(value, Sequence) or isinstance(value, str | bytes) or not value:
        raise UserError(f"{where}: {key!r} must be a list of at least one integer")
    if not all(isinstance(number, int) and 0 <= number < 1 << 31 for number in value):
        raise UserError(f"{where}: {key!r} must hold integers from 0 to {2**31 - 1} only")
    return [int(number) for number in value]


class JsonlFile:
    """Random access to the documents of a JSONL file; memory is 8 bytes a line.

    Args:
        path: one JSON object per line, UTF-8.
        fields: column names.

    Raises:
        UserError: the file is missing, is a folder or has no line.
    """

    def __init__(self, path: Path, fields: Fields | None = None) -> None:
        self.path = path
        self.fields = fields
        self._starts = array("q", [0])
        try:
            with path.open("rb") as file:
                for line in file:
                    self._starts.append(self._starts[-1] + len(line))
        except FileNotFoundError:
            raise UserError(f"{path} does not exist; expected a JSONL file, one document per line") from None
        except IsADirectoryError:
            raise UserError(f"{path} is a folder; expected a JSONL file, one document per line") from None
        if len(self) == 0:
            raise UserError(f"{path} is empty; expected one JSON object per line, e.g. {_EXAMPLE}")

    def __len__(self) -> int:
        """Number of documents."""
        return len(self._starts) - 1

    def read(self, indices: Sequence[int]) -> list[Document]:
        """The documents at these positions, in the order asked.

        Raises:
            UserError: a line is not a document; the message names file and line.
        """
        documents = []
        with self.path.open("rb") as file:
            for index in indices:
                file.seek(self._starts[index])
                line = file.read(self._starts[index + 1] - self._starts[index])
                documents.append(self._parse(line, index + 1))
        return documents

    def _parse(self, line: bytes, number: int) -> Document:
        where = f"{self.path} line {number}"
        return parse_document(_parse_line(line, where), where, f"{self.path.name}:{number}", self.fields)


_EXAMPLE = '{"id": "a", "text": "..."}'


def _parse_line(line: bytes, where: str) -> dict[str, Any]:
    try:
        row = json.loads(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        byte = f"byte {error.object[error.start]:#04x} at position {error.start}"
        raise UserError(f"{where}: not UTF-8 ({byte}); expected one JSON object per line, e.g. {_EXAMPLE}") from None
    except (ValueError, RecursionError) as error:
        found = "an empty line" if not line.strip() else f"not valid JSON ({error})"
        raise UserError(f"{where}: {found}; expected one JSON object per line, e.g. {_EXAMPLE}") from None
    if not isinstance(row, dict):
        raise UserError(f"{where}: holds {type(row).__name__}; expected one JSON object per line, e.g. {_EXAMPLE}")
    return row


def iterate_documents(path: Path, fields: Fields | None = None) -> Iterator[Document]:
    """The documents of a JSONL file in order, a few in memory at a time.

    Raises:
        UserError: the file is missing or empty, or a line is not a document (the message names file and line).
    """
    file = JsonlFile(path, fields)
    for start in range(0, len(file), 64):
        yield from file.read(range(start, min(start + 64, len(file))))


def read_documents(path: Path, fields: Fields | None = None) -> list[Document]:
    """All documents of a JSONL file (see `iterate_documents`)."""
    return list(iterate_documents(path, fields))


def load_tokenizer(path: Path) -> "Tokenizer":
    """Load a `tokenizer.json` of the tokenizers library.

    Text that spells a special token, such as `<|endoftext|>`, is read as plain text: no document can end itself.

    Raises:
        UserError: the file is missing or is not a tokenizer.
    """
    from tokenizers import Tokenizer

    if not path.is_file():
        raise UserError(f"tokenizer {path} does not exist; expected a tokenizer.json of the tokenizers library")
    checked(path)
    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as error:  # noqa: BLE001 - the library raises nothing more precise
        raise UserError(f"{path} is not a tokenizer.json of the tokenizers library: {error}") from None
    tokenizer.encode_special_tokens = True
    return tokenizer


def find_eot(tokenizer: "Tokenizer") -> int | None:
    """Id of the token that ends a document: the first of `END_OF_TEXT` that the tokenizer has, or None."""
    found = (tokenizer.token_to_id(name) for name in END_OF_TEXT)
    return next((int(number) for number in found if number is not None), None)


def eot_id(tokenizer: "Tokenizer") -> int:
    """`find_eot` where one is needed.

    Raises:
        UserError: the tokenizer has none.
    """
    number = find_eot(tokenizer)
    if number is not None:
        return number
    raise UserError(f"the tokenizer has no end-of-text token; add one of {', '.join(END_OF_TEXT)} to it")


def encode(document: Document, tokenizer: "Tokenizer | None") -> tuple[Tokens, Mask]:
    """Tokens of one document, without end-of-text.

    Args:
        document: the document.
        tokenizer: may be None for documents that hold tokens.

    Returns:
        Token ids, int32 (n,), and whether each token's loss counts, bool (n,).

    Raises:
        UserError: text without a tokenizer, or a token id that the tokenizer does not have.
    """
    return encode_many([document], tokenizer)[0]


def encode_many(documents: Sequence[Document], tokenizer: "Tokenizer | None") -> list[tuple[Tokens, Mask]]:
    """`encode` for many documents at once: the tokenizer's own threads share the texts."""
    if tokenizer is None:
        text = next((document.id for document in documents if document.text is not None), None)
        if text is not None:
            raise UserError(f"document {text!r} is text and there is no tokenizer; set tokenizer, or write tokens")
        return [_encoded(document, [], []) for document in documents]
    parts = [part for document in documents for part in (document.prompt, document.text) if part is not None]
    encoded = iter([encoding.ids for encoding in tokenizer.encode_batch_fast(parts, add_special_tokens=False)])
    size = tokenizer.get_vocab_size()
    result = []
    for document in documents:
        if document.tokens is not None and max(document.tokens) >= size:
            raise UserError(
                f"document {document.id!r} has token id {max(document.tokens)}, the tokenizer has only {size} tokens; "
                "the documents were made with another tokenizer, set tokenizer to that one"
            )
        prompt = next(encoded) if document.prompt is not None else []
        result.append(_encoded(document, prompt, next(encoded) if document.text is not None else []))
    return result


def _encoded(document: Document, prompt: list[int], text: list[int]) -> tuple[Tokens, Mask]:
    if document.tokens is not None:
        mask = document.loss_mask or [1] * len(document.tokens)
        return np.array(document.tokens, np.int32), np.array(mask, np.bool_)
    return np.array(prompt + text, np.int32), np.repeat([False, True], [len(prompt), len(text)])
