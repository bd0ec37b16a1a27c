"""Ask the value index for a target: which samples are worth most and least, what each domain is worth, and the trust.

The target's own passes apart, a few samples of each domain are measured exactly; all else are inner products.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import polars as pl

from curate.influence.current import target_positions, value_next_step
from curate.influence.row_values import calibrate, target_vectors
from curate.influence.space import existing_space
from curate.influence.value_index import open_value_index
from curate.tables import FoundSamples, IndexedDomains, RowTrust
from curate.training.samples import sample_texts, usable_samples
from curate.training.source import CANDIDATES

if TYPE_CHECKING:
    from collections.abc import Mapping

    import dataframely as dy
    import numpy.typing as npt

    from curate.influence.current import NextStepOptions
    from curate.influence.row_values import Calibration
    from curate.training.replay import Replay
    from curate.training.run import Run
    from curate.training.source import SampleSource
    from curate.training.target import Target

# How many samples of each end are valued for each one that is shown, and at least: of smaller sources all are.
_WIDER, _WIDEST = 20, 10_000
SourceName = Literal["current", "candidates"]


@dataclass(frozen=True, kw_only=True)
class Found:
    """What the index says for a target.

    Attributes:
        samples: of most and least value, with their texts.
        domains: the value of each, best first.
        trust: how well rows give exact values in each domain.
        recall: share of the samples that an exact search would find, see `value_index.ValueIndex.search`.
    """

    samples: dy.DataFrame[FoundSamples]
    domains: dy.DataFrame[IndexedDomains]
    trust: dy.DataFrame[RowTrust]
    recall: float


def ask(
    run: Run,
    source: SampleSource,
    name: SourceName,
    target: Target,
    top: int,
    options: NextStepOptions,
    replay: Replay,
    tokenizer: Any,
) -> Found:
    """Search the index of a source for a target.

    Args:
        run: a finished run, whose last state is the current one.
        source: of the samples; all that predict a token must be in the index.
        name: of the source.
        target: what is asked for.
        top: samples of most value, and as many of least.
        options: how many samples of each domain are measured, and how.
        replay: of the run.
        tokenizer: file that made the tokens; None: texts are token ids.

    Raises:
        UserError: samples are not in the index (names the command), or the target is not of the model's tokens.
    """
    space, samples = existing_space(run, replay), usable_samples(source.unique_samples)
    index = open_value_index(run.folder, space, samples, _command(run, name))
    next_step = value_next_step(run, source, samples, [target], options, name)
    vector = target_vectors(run, replay, space, next_step)[target_positions(next_step)[target.name]]
    per_token = pl.col("value_total_nats") / pl.col("predicted_tokens")
    measured = next_step.values.select("domain", "sample_id", "predicted_tokens", value_per_token=per_token)
    products = index.store.products(measured["sample_id"].to_numpy(), vector[None])[:, 0]
    names = {"source": name, "target": target.name}
    counts = dict(samples.group_by("domain").len().sort("domain").iter_rows())
    of_trust = names | {"predictors": "rows"}
    calibration = calibrate(measured, products[:, None], space.fitted, counts, of_trust, options.seed)
    # more than are wanted: lines differ between domains, so that the order of values is not that of products
    wide = max(_WIDER * top, _WIDEST)
    most, recall = index.search(vector, wide)
    least, least_recall = index.search(-vector, wide)
    reached = pl.concat([most, least.with_columns(-pl.col("product"))]).unique("sample_id", maintain_order=True)
    valued = _valued(reached, measured, calibration)
    found = pl.concat(_farthest(valued, end, top) for end in ("most", "least"))
    texts = sample_texts(source, tokenizer, found["sample_id"].to_list())
    rows = found.with_columns(text=pl.Series(texts), **{column: pl.lit(value) for column, value in names.items()})
    return Found(
        samples=FoundSamples.validate(rows.select(FoundSamples.column_names()), cast=True),
        domains=_domains(measured, index.domain_means(vector[None]), calibration, names),
        trust=calibration.trust,
        recall=min(recall, least_recall),
    )


def _valued(samples: pl.DataFrame, measured: pl.DataFrame, calibration: Calibration) -> pl.DataFrame:
    """Samples with `value_per_token` and where it is from: exact, by its row, or the mean of its domain."""
    products = samples["product"].to_numpy()[:, None]
    by_row = calibration.values(samples["domain"].to_numpy(), products)
    exact = measured.select("domain", "sample_id", exact="value_per_token")
    tokens = pl.col("predicted_tokens")
    means = measured.group_by("domain").agg(mean=(pl.col("value_per_token") * tokens).sum() / tokens.sum())
    both = samples.with_columns(by_row=pl.Series(by_row, dtype=pl.Float64).fill_nan(None))
    both = both.join(exact, on=["domain", "sample_id"], how="left", maintain_order="left")
    both = both.join(means, on="domain", how="left", maintain_order="left")
    is_exact, has_row = pl.col("exact").is_not_null(), pl.col("by_row").is_not_null()
    origin = pl.when(is_exact).then(pl.lit("measured")).when(has_row).then(pl.lit("row"))
    return both.with_columns(
        value_per_token=pl.coalesce("exact", "by_row", "mean"), by=origin.otherwise(pl.lit("domain mean"))
    )


def _farthest(valued: pl.DataFrame, end: str, top: int) -> pl.DataFrame:
    """The samples of most or least value, farthest first; by content where values are equal."""
    ordered = valued.sort("value_per_token", "sample_id", descending=[end == "most", False]).head(top)
    return ordered.with_columns(pl.lit(end).alias("end"), rank=pl.int_range(1, pl.len() + 1, dtype=pl.Int64))


def _command(run: Run, name: SourceName) -> str:
    more = " --candidates DIR" if name == CANDIDATES else ""
    return f"python -m curate.embed --run {run.folder}{more}"


def _domains(
    measured: pl.DataFrame,
    means: Mapping[str, npt.NDArray[np.float64]],
    calibration: Calibration,
    names: Mapping[str, str],
) -> dy.DataFrame[IndexedDomains]:
    """Value per token of each domain with its 95 % interval, see `row_values`."""
    from scipy.stats import t as student

    rows = []
    for domain, samples, count in calibration.trust.select("domain", "samples", "measured").iter_rows():
        known, line = measured.filter(domain=domain), calibration.lines.get(domain)
        if len(known) == samples:
            # every sample is known exactly: nothing is left to estimate
            line, (value, _, degrees), error = None, _measured_mean(known), 0.0
        elif line is not None:
            value, error, degrees = line.intercept + float(line.slopes[0] * means[domain][0]), line.error, count - 2
        else:
            value, error, degrees = _measured_mean(known)
        away = float(student.ppf(0.975, degrees)) * error if degrees > 0 else None
        interval = {"low": None if away is None else value - away, "high": None if away is None else value + away}
        source = "measured samples" if line is None else "rows"
        rows.append({**names, "domain": domain, "samples": samples, "value_per_token": value, **interval, "by": source})
    table = pl.DataFrame(rows, schema=IndexedDomains.create_empty().schema)
    return IndexedDomains.validate(table.sort("value_per_token", "domain", descending=[True, False]))


def _measured_mean(measured: pl.DataFrame) -> tuple[float, float, int]:
    """Mean of the values per token of measured samples, weighted by tokens, its error and degrees of freedom."""
    values, tokens = (measured[name].to_numpy() for name in ("value_per_token", "predicted_tokens"))
    mean, count = float(np.average(values, weights=tokens)), len(values)
    left = tokens * (values - mean)
    return mean, float(np.sqrt(count / max(count - 1, 1) * (left @ left)) / tokens.sum()), count - 1
