"""Every text that the stage can draw is read once, for n-gram ratios, predicted values and overlaps together.

Reading and hashing tokens is what costs on large streams, so nothing else in a selection reads texts a second time.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import polars as pl

from curate.filter.overlap import HeldOut, OverlapScan, scan
from curate.filter.pipeline import read_held_out
from curate.ngrams.ratios import mean_log_ratios

if TYPE_CHECKING:
    import dataframely as dy
    import numpy.typing as npt

    from curate.data.mds import Sample
    from curate.domains.ngram_scores import TargetRatios
    from curate.influence.predict_next_step import NextStepPredictor
    from curate.selection.resolve import Resolved
    from curate.selection.source import Source
    from curate.tables import Samples

    Floats = npt.NDArray[np.floating[Any]]


@dataclass(frozen=True, kw_only=True)
class Texts:
    """What the texts say; N samples that may be used, T targets.

    Attributes:
        held: documents that must not be trained on.
        overlaps: of every sample of the catalogue, by domain and index.
        ratios: (N, T) n-gram log-likelihood ratios; None: they have no share.
        predicted: (N,) values per token for the next step; None: they are not asked for.
    """

    held: HeldOut
    overlaps: OverlapScan
    ratios: Floats | None
    predicted: Floats | None


def read_texts(
    plan: Resolved, source: Source, ratios: TargetRatios | None, predictor: NextStepPredictor | None
) -> Texts:
    """Read every sample of the catalogue once.

    Where nothing can be left out and nothing is held out, none is read.

    Args:
        plan: of the selection.
        source: what is drawn from.
        ratios: of the targets; None: n-grams have no share.
        predictor: of the next step; None: it is not asked for.
    """
    config = plan.config
    target_files = [config.target, *map(Path, config.more_targets), *([config.retain] if config.retain else [])]
    held = read_held_out(target_files, config.filter, plan.run.spec.tokenizer)
    catalogue = source.catalogue.sort("domain", "index")
    # weights of whole streams without held-out text: nothing depends on a text, and none is read
    wanted = config.takes_samples or not held.grams.is_empty()
    # rows in the order of the catalogue, a batch at a time
    means: list[Floats] = []
    predicted: list[Floats] = []
    also: list[Callable[[list[Sample]], None]] = []
    if ratios is not None and config.takes_samples:
        also.append(lambda batch: means.append(mean_log_ratios(batch, ratios.ratios)))
    if predictor is not None:
        also.append(lambda batch: predicted.append(predictor.predict(batch)))
    overlaps = scan(catalogue if wanted else catalogue.clear(), source.streams, held, also)
    # ratios and predictions are of the usable samples only; overlaps stay of the whole catalogue
    rows = _rows_of(source.usable, catalogue)
    return Texts(
        held=held,
        overlaps=overlaps,
        ratios=np.concatenate(means).astype(np.float64)[rows] if means else None,
        predicted=np.concatenate(predicted)[rows] if predicted else None,
    )


def _rows_of(samples: dy.DataFrame[Samples], catalogue: pl.DataFrame) -> npt.NDArray[np.int64]:
    """(N,) row of each sample in the sorted catalogue."""
    numbered = catalogue.select("domain", "index").with_row_index("row")
    rows = samples.join(numbered, on=["domain", "index"], how="left", maintain_order="left")["row"]
    return rows.to_numpy().astype(np.int64)
