"""Token ids and loss masks as an MDS row stores them, checked before they are used.

T tokens of a sample.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from curate.core.errors import UserError

if TYPE_CHECKING:
    import numpy.typing as npt

# Of a label: the loss of this token does not count (torch's and transformers' default).
IGNORED = -100
_LARGEST = (1 << 31) - 1


def token_ids(stored: Any, dtype: str, where: str) -> npt.NDArray[np.int32]:
    """Read the token ids of one sample: int32 (T,), T at least 1.

    Args:
        stored: an array or list of integers, or raw bytes of `dtype`.
        dtype: the setting `columns.tokens_dtype`.
        where: stream and sample, for the error.

    Raises:
        UserError: no integers, not one row of them, none at all, or one that is no token id.
    """
    try:
        ids = np.frombuffer(stored, dtype) if isinstance(stored, bytes) else np.asarray(stored)
    except (ValueError, TypeError) as error:
        raise UserError(
            f"the token ids of {where} do not fit columns.tokens_dtype {dtype} ({error}); set it to the type they were "
            "written with"
        ) from None
    if ids.dtype.kind not in "iu" or ids.ndim != 1 or not len(ids):
        raise UserError(
            f"the token ids of {where} are {ids.dtype} of shape {ids.shape}; write one row of at least one integer"
        )
    # Bytes read in the wrong width give huge or negative numbers, so the range shows most wrong settings.
    smallest, largest = int(ids.min()), int(ids.max())
    if smallest < 0 or largest > _LARGEST:
        hint = "; set columns.tokens_dtype to the type they were written with" if isinstance(stored, bytes) else ""
        raise UserError(
            f"the token ids of {where}, read as {ids.dtype}, go from {smallest} to {largest}, expected 0 to {_LARGEST}"
            f"{hint}"
        )
    return ids.astype(np.int32)


def loss_mask(stored: Any, tokens: npt.NDArray[np.int32], where: str) -> npt.NDArray[np.bool_]:
    """Read where the loss of one sample counts: bool (T,).

    Args:
        stored: T values 0 or 1, as any numbers or as raw bytes; or T labels: -100 where the loss does not count, else
            the token itself. Values that are all 0 or 1 are a mask.
        tokens: (T,) token ids.
        where: stream and sample, for the error.

    Raises:
        UserError: another number of values, or neither a mask nor labels.
    """
    # Raw bytes hold no labels: those are negative or larger than a byte.
    values = np.frombuffer(stored, np.uint8) if isinstance(stored, bytes) else np.asarray(stored)
    if values.shape != tokens.shape or values.dtype.kind not in "biuf":
        raise UserError(
            f"the loss mask of {where} is {values.dtype} of shape {values.shape} for {len(tokens)} tokens; write one 0 "
            "or 1 for each (columns.loss_mask names the column, raw bytes are read as uint8)"
        )
    # A mask first: labels that are all 0 or 1 would be tokens 0 and 1 alone.
    mask: npt.NDArray[np.bool_] = values == 1
    if bool((mask | (values == 0)).all()):
        return mask
    counted: npt.NDArray[np.bool_] = values != IGNORED
    if bool((values[counted] == tokens[counted]).all()):
        return counted
    # Labels shifted by one token, as some collators make them, end here.
    wrong = int(np.argmax(counted & (values != tokens)))
    raise UserError(
        f"the loss mask of {where} holds {values[wrong]} at token {wrong}, which is {tokens[wrong]}; write 0 or 1 for "
        f"each token, or labels: the token itself, unshifted, or {IGNORED}"
    )
