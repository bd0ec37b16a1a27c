"""Are the samples that a training sees in the streams that replay will read? Checked while it can still be mended."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from curate.core.errors import UserError
from curate.data.mds import Columns, MdsStream
from curate.training.source import read_catalogue

_log = logging.getLogger(__name__)
# batches in which an unknown sample stops the training; later too much work would be lost, so it is only counted
_FIRST_BATCHES = 20


class KnownSamples:
    """The content ids of a run's streams. They are read once, before training; the first selection reuses the table.

    Args:
        folder: the run; keeps what was read.
        streams: domain -> MDS folder.
        columns: of the streams.

    Attributes:
        unknown: trained samples so far that are in no stream, repeats counted.
    """

    def __init__(self, folder: Path, streams: Mapping[str, Path], columns: Columns | None) -> None:
        opened = {domain: MdsStream(Path(path), columns) for domain, path in streams.items()}
        _log.info("reading the streams once, to know their samples")
        # only the ids are kept: 8 bytes per sample for the whole training
        self._ids = np.sort(read_catalogue(folder, opened)["sample_id"].to_numpy())
        self._domains = ", ".join(streams)
        self.unknown = self._batches = 0

    def check(self, sample_ids: Sequence[int]) -> None:
        """Look up a batch.

        Raises:
            UserError: it is one of the first, and has samples that are in no stream.
        """
        wanted = np.asarray(sample_ids, np.int64)
        # an id above all others lands one past the end; clipped, it is compared with the last one and differs
        rows = np.searchsorted(self._ids, wanted).clip(max=len(self._ids) - 1)
        missing = int((self._ids[rows] != wanted).sum())
        self._batches += 1
        if missing and self._batches <= _FIRST_BATCHES:
            raise UserError(
                f"{missing} of {len(wanted)} samples of batch {self._batches} are in none of the streams "
                f"({self._domains}), which must hold every row that is trained on, tokens and predicted places alike. "
                "Likely causes are a collator with pad = eos, which sets the labels of real eos to -100 (give the "
                "tokenizer a pad token of its own, or the rows labels), packed or cut rows, and other special tokens"
            )
        # once: the total is said at the end
        if missing and not self.unknown:
            _log.warning("%d samples of batch %d are in none of the streams", missing, self._batches)
        self.unknown += missing

    def warn(self) -> None:
        """Warn at the end of the training, where samples were in no stream."""
        if self.unknown:
            _log.warning("%d samples that were trained on are in none of the streams", self.unknown)
