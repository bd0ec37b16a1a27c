"""Documents: what a row of a JSONL, Parquet or Hugging Face dataset must hold, in one place.

A row has `text` (every token is predicted), `prompt` and `completion` (only the completion is), or `tokens` with an
optional `loss_mask`. An `id` is optional (the default is the file's name and line), other keys are ignored.
"""

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from curate.core.artifacts import checked
from curate.core.errors import UserError

if TYPE_CHECKING:
    from tokenizers import Tokenizer

EOT = "<|endoftext|>"
# Of GPT-2 and OLMo, Llama 3, Llama 2, and Gemma; the first that a tokenizer has ends its documents.
END_OF_TEXT = (EOT, "<|end_of_text|>", "</s>", "<eos>")

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
        # As JSON, so that the borders between the fields count: ("ab", "c") is not ("a", "bc").
        content = json.dumps([self.text, self.prompt, self.tokens, self.loss_mask], separators=(",", ":"))
        return int.from_bytes(hashlib.blake2b(content.encode(), digest_size=8).digest(), "little")


@dataclass(frozen=True, kw_only=True)
class Fields:
    """Names of the columns that a user may rename."""

    id: str = "id"
    text: str = "text"
    tokens: str = "tokens"

    def content(self) -> tuple[str, ...]:
        """The columns that a document is made of."""
        return (self.text, "prompt", "completion", self.tokens, "loss_mask")


_SHOWN = 12  # columns named in an error


def parse_document(row: Mapping[str, Any], where: str, default_id: str, fields: Fields | None = None) -> Document:
    """Read one row of any file format.

    Args:
        row: column name -> value; a column that is None counts as absent.
        where: file and line, for the error.
        default_id: the document's id where the row has none.
        fields: column names.

    Raises:
        UserError: no or several forms of a document, an empty or non-string text, bad token ids, a mask of another
            length, or a string that is not valid Unicode.
    """
    columns = fields or Fields()
    # Table formats fill absent columns with null, so null is absent.
    present = {key for key in columns.content() if row.get(key) is not None}
    name = _id(row, columns.id, where, default_id)
    if present == {columns.text}:
        return Document(id=name, text=_string(row, columns.text, where))
    if present == {"prompt", "completion"}:
        return Document(id=name, prompt=_string(row, "prompt", where), text=_string(row, "completion", where))
    if present in ({columns.tokens}, {columns.tokens, "loss_mask"}):
        tokens = _integers(row, columns.tokens, where, (int,))
        mask = _integers(row, "loss_mask", where, (int, bool)) if "loss_mask" in present else None
        if mask is not None and (len(mask) != len(tokens) or not set(mask) <= {0, 1}):
            raise UserError(
                f"{where}: 'loss_mask' has {len(mask)} values; expected one 0 or 1 for each of the {len(tokens)} tokens"
            )
        return Document(id=name, tokens=tokens, loss_mask=mask)
    raise UserError(f"{where}: {_wrong_form(row, present, columns, named=fields is not None)}")


def _wrong_form(row: Mapping[str, Any], present: set[str], columns: Fields, *, named: bool) -> str:
    """Say why a row is no document; `named`: whether settings can name its columns."""
    # The most telling reason first: too many forms, then a null that hides one, else the columns there are.
    null = [key for key in columns.content() if key in row and row[key] is None]
    forms = [{columns.text}, {"prompt", "completion"}, {columns.tokens, "loss_mask"}]
    if sum(bool(form & present) for form in forms) > 1:
        what = f"{_listed(key for key in columns.content() if key in present)} are more than one form of a document"
    elif null:
        what = f"null stands in {_listed(null)}; fill it, or remove the line"
    else:
        what = f"it has {_listed(sorted(row)) or 'no columns'}"
    wanted = f"expected either {columns.text!r}, or 'prompt' and 'completion', or {columns.tokens!r} with an optional "
    settings = " (text_column, tokens_column and id_column set other names)" if named else ""
    return f"{wanted}'loss_mask': {what}{settings}"


def _listed(keys: Iterable[str]) -> str:
    names = [repr(key) if len(key) <= 40 else f"{key[:40]!r}..." for key in keys]
    return ", ".join(names[:_SHOWN]) + (f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else "")


def _id(row: Mapping[str, Any], key: str, where: str, default: str) -> str:
    value = row.get(key)
    if value is None:
        return default
    if not isinstance(value, str | int):
        raise UserError(f"{where}: {key!r} holds {type(value).__name__}, expected a string")
    return _unicode(str(value), key, where)


def _string(row: Mapping[str, Any], key: str, where: str) -> str:
    value = row[key]
    if not isinstance(value, str):
        raise UserError(f"{where}: {key!r} holds {type(value).__name__}, expected a string")
    if not value:
        raise UserError(f"{where}: {key!r} is empty; expected at least one character, remove the line")
    return _unicode(value, key, where)


def _unicode(value: str, key: str, where: str) -> str:
    """Return a text that can be encoded; JSON can spell half of a surrogate pair, which nothing else takes."""
    try:
        value.encode()
    except UnicodeEncodeError:
        raise UserError(f"{where}: {key!r} holds half of a surrogate pair (\\ud800-\\udfff), expected text") from None
    return value


def _integers(row: Mapping[str, Any], key: str, where: str, types: tuple[type, ...]) -> list[int]:
    value = row[key]
    if not isinstance(value, Sequence) or isinstance(value, str | bytes) or not value:
        raise UserError(f"{where}: {key!r} must be a list of at least one integer")
    # `type`, not `isinstance`: True is an int, and no token id.
    if not all(type(number) in types and 0 <= number < 1 << 31 for number in value):
        raise UserError(f"{where}: {key!r} must hold integers from 0 to {2**31 - 1} only")
    return [int(number) for number in value]


def tokenizer_file(path: Path) -> Path:
    """Find the `tokenizer.json` that a path stands for: itself, or the one in the folder.

    Raises:
        UserError: there is none.
    """
    file = path / "tokenizer.json" if path.is_dir() else path
    if not file.is_file():
        raise UserError(f"tokenizer {file} does not exist; expected a tokenizer.json of the tokenizers library")
    return file


def load_tokenizer(path: Path) -> "Tokenizer":
    """Load a `tokenizer.json` of the tokenizers library, or the one in a folder, to read whole documents with.

    Settings that belong to another use are switched off: truncation, padding and dropped merges (`dropout` of BPE).
    Text that spells a special token, such as `<|endoftext|>`, is read as plain text: no document can end itself.

    Raises:
        UserError: the file is missing or is not a tokenizer.
    """
    from tokenizers import Tokenizer

    file = checked(tokenizer_file(path))
    try:
        tokenizer = Tokenizer.from_file(str(file))
    except Exception as error:  # noqa: BLE001 - the library raises nothing more precise
        raise UserError(f"{file} is not a tokenizer.json of the tokenizers library: {error}") from None
    tokenizer.no_truncation()
    tokenizer.no_padding()
    if getattr(tokenizer.model, "dropout", None) is not None:
        tokenizer.model.dropout = None
    # Despite its name: special tokens in a text are split as plain text.
    tokenizer.encode_special_tokens = True
    return tokenizer


def find_eot(tokenizer: "Tokenizer") -> int | None:
    """Find the id of the token that ends a document: the first of `END_OF_TEXT` that the tokenizer has, or None."""
    ids = (tokenizer.token_to_id(name) for name in END_OF_TEXT)
    return next((int(number) for number in ids if number is not None), None)


def eot_id(tokenizer: "Tokenizer") -> int:
    """Return the id of the token that ends a document, see `find_eot`.

    Raises:
        UserError: the tokenizer has no such token.
    """
    number = find_eot(tokenizer)
    if number is not None:
        return number
    raise UserError(f"the tokenizer has no end-of-text token; add one of {', '.join(END_OF_TEXT)} to it")


def encode(document: Document, tokenizer: "Tokenizer | None") -> tuple[Tokens, Mask]:
    """Encode one document, without end-of-text.

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
    """Encode many documents at once, see `encode`: the tokenizer's own threads share the texts."""
    if tokenizer is None:
        text = next((document.id for document in documents if document.text is not None), None)
        if text is not None:
            raise UserError(f"document {text!r} is text and there is no tokenizer; set tokenizer, or write tokens")
        return [_encoded(document, [], []) for document in documents]
    encoded = iter(_ids(documents, tokenizer))
    pairs = []
    for document in documents:
        if document.tokens is not None:
            _check_ids(document, tokenizer)
        # In the order of `_ids`: the prompt of a document, then its text.
        prompt = next(encoded) if document.prompt is not None else []
        pairs.append(_encoded(document, prompt, next(encoded) if document.text is not None else []))
    return pairs


def _ids(documents: Sequence[Document], tokenizer: "Tokenizer") -> list[list[int]]:
    """Encode every prompt and text, in order."""
    texts = [text for document in documents for text in (document.prompt, document.text) if text is not None]
    try:
        # Prompt and completion apart, so that no token spans their border; the fast form leaves out the offsets.
        return [encoding.ids for encoding in tokenizer.encode_batch_fast(texts, add_special_tokens=False)]
    except Exception as error:  # noqa: BLE001 - the library raises nothing more precise
        if len(documents) == 1:
            raise UserError(f"document {documents[0].id!r} cannot be encoded by the tokenizer: {error}") from None
        # The batch does not say which text failed; one by one the error names its document.
        return [ids for document in documents for ids in _ids([document], tokenizer)]


def _check_ids(document: Document, tokenizer: "Tokenizer") -> None:
    largest = max(document.tokens or [0])
    size = tokenizer.get_vocab_size()
    # A vocabulary can have holes, and then ids beyond its size.
    if largest >= size and tokenizer.id_to_token(largest) is None:
        raise UserError(
            f"document {document.id!r} has token id {largest}, the tokenizer has only {size} tokens; "
            "the documents were made with another tokenizer, set tokenizer to that one"
        )


def _encoded(document: Document, prompt: list[int], text: list[int]) -> tuple[Tokens, Mask]:
    if document.tokens is not None:
        mask = document.loss_mask or [1] * len(document.tokens)
        return np.array(document.tokens, np.int32), np.array(mask, np.bool_)
    return np.array(prompt + text, np.int32), np.repeat([False, True], [len(prompt), len(text)])
