"""What n-grams are counted in: anything with token ids and a loss mask."""

from typing import Any, Protocol

import numpy as np
import numpy.typing as npt


class Text(Protocol):
    """A sequence of T tokens."""

    @property
    def tokens(self) -> npt.NDArray[np.integer[Any]]:
        """(T,) token ids."""

    @property
    def loss_mask(self) -> npt.NDArray[np.bool_]:
        """(T,) whether each token's loss counts."""
