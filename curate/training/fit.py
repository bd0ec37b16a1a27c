"""Do the samples of some streams fit the model and the tokenizer?"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import dataframely as dy
import polars as pl

from curate.core.errors import UserError
from curate.data.documents import load_tokenizer
from curate.tables import Catalogue

if TYPE_CHECKING:
    from torch import nn


def check_fit(
    catalogue: dy.DataFrame[Catalogue], streams: Mapping[str, Path], model: nn.Module, vocabulary: int | None = None
) -> None:
    """Refuse token ids and lengths that a model does not have, where it is known how many it has.

    Args:
        catalogue: as `Run.catalogue`.
        streams: MDS folder of each domain.
        model: a Hugging Face model, whose config says how many it has, or any other.
        vocabulary: of the model; None: what its config says.

    Raises:
        UserError: names the first such sample.
    """
    config: Any = getattr(model, "config", None)
    positions = getattr(config, "max_position_embeddings", None)
    vocabulary = getattr(config, "vocab_size", None) if vocabulary is None else vocabulary
    # isinstance: a model of the user's own may keep anything under these names
    if isinstance(vocabulary, int):
        where, largest = _first_above(catalogue, streams, "largest_token_id", vocabulary - 1)
        if where:
            raise UserError(
                f"{where} has token id {largest}, the model has a vocabulary of {vocabulary}: set vocab_size of the "
                "model, or write the stream with the model's tokenizer"
            )
    if isinstance(positions, int):
        where, longest = _first_above(catalogue, streams, "stored_tokens", positions)
        if where:
            raise UserError(
                f"{where} has {longest} tokens, the model has {positions} positions: set its max_position_embeddings, "
                "or write the stream with shorter sequences"
            )


def check_tokens(catalogue: dy.DataFrame[Catalogue], streams: Mapping[str, Path], tokenizer: Path) -> None:
    """Refuse token ids that a tokenizer does not have.

    Args:
        catalogue: as `Run.catalogue`.
        streams: MDS folder of each domain.
        tokenizer: its file.

    Raises:
        UserError: names the first such sample.
    """
    # the largest id, not the number of tokens: ids may have gaps, and added tokens may lie far above the others
    size = 1 + max(load_tokenizer(tokenizer).get_vocab(with_added_tokens=True).values())
    where, largest = _first_above(catalogue, streams, "largest_token_id", size - 1)
    if where:
        raise UserError(
            f"{where} has token id {largest}, the tokenizer {tokenizer} has {size} tokens: give the one that the "
            "stream was written with (tokenizer)"
        )


def _first_above(
    catalogue: dy.DataFrame[Catalogue], streams: Mapping[str, Path], column: str, limit: int
) -> tuple[str | None, int]:
    """Name the first sample whose `column` is above a limit, and give its number; (None, 0) where there is none."""
    above = catalogue.filter(pl.col(column) > limit)
    if above.is_empty():
        return None, 0
    row = above.row(0, named=True)
    return f"{streams[row['domain']]}, sample {row['index']}", row[column]
