"""Text that a tokenizer drops or changes: documents are encoded, and those that do not decode to themselves counted."""

import logging
from collections.abc import Sequence
from typing import TYPE_CHECKING

from curate.formats.documents import Document, Mask, Tokens, encode_many

if TYPE_CHECKING:
    from tokenizers import Tokenizer

_log = logging.getLogger(__name__)


class Spelling:
    """Encodes documents and counts what their tokens do not spell; decoding adds a fifth to the time of encoding.

    Args:
        tokenizer: may be None for documents that hold tokens, which are not counted.

    Attributes:
        texts: documents of text.
        changed: of them, those whose tokens do not decode to their text. A space in front is not compared: many
            tokenizers add one and take it away again.
        empty: of them, those without a token to predict.
    """

    def __init__(self, tokenizer: "Tokenizer | None") -> None:
        self.texts, self.changed, self.empty = 0, 0, 0
        self._tokenizer = tokenizer
        self._first = ""

    def encode(self, documents: Sequence[Document]) -> list[tuple[Tokens, Mask]]:
        """`encode_many`, counted."""
        encoded = encode_many(documents, self._tokenizer)
        texts = [(document, *pair) for document, pair in zip(documents, encoded, strict=True) if document.text]
        if self._tokenizer is None or not texts:
            return encoded
        parts = [tokens[part].tolist() for _, tokens, mask in texts for part in (~mask, mask)]
        decoded = iter(self._tokenizer.decode_batch(parts, skip_special_tokens=False))
        for document, _, mask in texts:
            # both are taken from the row before any is compared
            spelled = [_same(next(decoded), text or "") for text in (document.prompt, document.text)]
            self.texts += 1
            self.empty += not mask.any()
            self.changed += not all(spelled)
            self._first = self._first or ("" if all(spelled) else document.id)
        return encoded

    def warn(self, source: str) -> None:
        """Say what was lost of a source, where anything was."""
        if self.changed:
            _log.warning(
                "%s: the tokenizer drops or changes text of %d of %d documents (the first is %r); %d have no token",
                source, self.changed, self.texts, self._first, self.empty,
            )  # fmt: skip


def _same(decoded: str, text: str) -> bool:
    return decoded.removeprefix(" ") == text.removeprefix(" ")
