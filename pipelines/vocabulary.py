"""The tokenizer of prepared data: byte-level BPE, trained on a bounded and balanced part of the documents."""

from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING

from tqdm import tqdm

from curate.core.errors import UserError
from curate.core.rng import generator
from curate.data.documents import EOT
from pipelines.catalogue import Catalogue

if TYPE_CHECKING:
    from tokenizers import Tokenizer

SMALLEST_VOCABULARY = 257  # every byte and end-of-text


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> "Tokenizer":
    """Train a byte-level BPE tokenizer with the special token `EOT`; the same texts give the same tokenizer.

    Args:
        texts: training text.
        vocab_size: upper limit; less text than it takes gives fewer tokens.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    # no normalizer and no prefix space: decode(encode(text)) is the text, byte for byte
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    # all 256 bytes, also those that the text lacks, so that any document can be spelled; sorted, because the library
    # lists them in no fixed order
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=[EOT], initial_alphabet=sorted(alphabet), show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def training_text(catalogues: Mapping[str, Catalogue], characters: int, seed: int) -> Iterator[str]:
    """Random documents, about `characters` of them, the same amount from every domain that has as much.

    Raises:
        UserError: a document holds token ids instead of text.
    """
    with tqdm(total=characters, desc="train tokenizer on", unit="char", unit_scale=True) as bar:
        for name, documents in catalogues.items():
            for text in _texts(documents, name, characters // len(catalogues), seed):
                bar.update(len(text))
                yield text


def _texts(documents: Catalogue, name: str, limit: int, seed: int) -> Iterator[str]:
    # at random: a file may be sorted by topic or length
    order = generator(seed, "tokenizer", name).permutation(len(documents.kept))
    for batch in documents.batches(order):
        for document in batch:
            if document.text is None:
                raise UserError(
                    f"document {document.id!r} of domain {name!r} holds token ids; set tokenizer to what made them"
                )
            # one huge document must not take more than the share of its domain
            text = ((document.prompt or "") + document.text)[:limit]
            limit -= len(text)
            yield text
            if limit <= 0:
                return
