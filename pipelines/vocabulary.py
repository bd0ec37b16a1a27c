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
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
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
    order = generator(seed, "tokenizer", name).permutation(len(documents.kept))
    for batch in documents.batches(order):
        for document in batch:
            if document.text is None:
                raise UserError(
                    f"document {document.id!r} of domain {name!r} holds token ids; set tokenizer to what made them"
                )
            text = ((document.prompt or "") + document.text)[:limit]
            limit -= len(text)
            yield text
            if limit <= 0:
                return
