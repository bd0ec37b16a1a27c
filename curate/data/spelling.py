"""Text that a tokenizer drops or changes: counts the documents whose tokens do not decode to their text."""

import logging
from collections.abc import Sequence
from typing import TYPE_CHECKING

from curate.core.errors import UserError
from curate.data.documents import Document, Mask, Tokens, encode_many

if TYPE_CHECKING:
    from tokenizers import Tokenizer

_log = logging.getLogger(__name__)


class Spelling:
    """Encodes documents and counts those that their tokens do not spell; decoding adds a fifth to the time.

    Args:
        source: where the documents are from, for messages.
        tokenizer: may be None for documents that hold tokens, which are not counted.

    Attributes:
        texts: documents of text.
        changed: of them, those whose tokens do not decode to their text. A space in front is not compared: many
            tokenizers add one and take it away again.
        empty: of them, those without a token to predict.
    """

    def __init__(self, source: str, tokenizer: "Tokenizer | None") -> None:
        self.source = source
        self.texts, self.changed, self.empty = 0, 0, 0
        self._tokenizer = tokenizer
        self._first: str | None = None

    def encode(self, documents: Sequence[Document]) -> list[tuple[Tokens, Mask]]:
        """Encode documents as `encode_many` does, and count.

        Raises:
            UserError: a document cannot be encoded; the message names the source and the document.
        """
        try:
            encoded = encode_many(documents, self._tokenizer)
        except UserError as error:
            raise UserError(f"{self.source}: {error}") from None
        texts = [(document, *pair) for document, pair in zip(documents, encoded, strict=True) if document.text]
        if self._tokenizer is None or not texts:
            return encoded
        # The mask tells the prompt (not predicted) from the text; of plain text the prompt is empty.
        halves = [tokens[where].tolist() for _, tokens, mask in texts for where in (~mask, mask)]
        decoded = iter(self._tokenizer.decode_batch(halves, skip_special_tokens=False))
        for document, _, mask in texts:
            # A list, not a generator in `all`: both halves must be taken from `decoded`.
            spelled = [_same(next(decoded), text or "") for text in (document.prompt, document.text)]
            self.texts += 1
            self.empty += not mask.any()
            self.changed += not all(spelled)
            if self._first is None and not all(spelled):
                self._first = document.id
        return encoded

    def warn(self) -> None:
        """Log how many documents the tokenizer changed, where it changed any."""
        if self.changed:
            _log.warning(
                "%s: the tokenizer drops or changes text of %d of %d documents (the first is %r); %d have no token",
                self.source,
                self.changed,
                self.texts,
                self._first,
                self.empty,
            )


def _same(decoded: str, text: str) -> bool:
    # SentencePiece puts a space in front when encoding, and some decoders take it away again.
    return decoded.removeprefix(" ") == text.removeprefix(" ")
