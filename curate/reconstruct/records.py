"""The step records of a described run: `curate.training.run.STEPS`, rebuilt from order, log and schedule."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import polars as pl

from curate.core.errors import UserError
from curate.data.order import SampleOrder
from curate.training.recorder import clip_factor
from curate.training.run import STEPS

if TYPE_CHECKING:
    import numpy.typing as npt

    from curate.optimizers.settings import GroupSettings
    from curate.reconstruct.description import LogConfig, LossConfig, ReconstructConfig

_READERS = {".csv": pl.read_csv, ".jsonl": pl.read_ndjson, ".ndjson": pl.read_ndjson, ".parquet": pl.read_parquet}


def read_log(config: LogConfig, steps: int) -> pl.DataFrame:
    """What was logged.

    Returns:
        step (from 0), loss, lr, grad_norm (null where not logged), one row per logged step.

    Raises:
        UserError: the table is missing or unreadable, has no such columns, or says two things of one step.
    """
    reader: Any = _READERS.get(config.file.suffix)
    if reader is None:
        raise UserError(f"log.file {config.file} is none of {', '.join(_READERS)}; export the log as one of them")
    try:
        table: pl.DataFrame = reader(config.file.read_bytes())  # in a path, polars reads [1] and * as a pattern
    except (OSError, pl.exceptions.PolarsError, pl.exceptions.PanicException) as error:  # polars panics on some damage
        raise UserError(f"log.file {config.file} cannot be read ({' '.join(str(error).split())[:200]})") from None
    for name in (config.step, config.loss):
        if name not in table.columns:
            raise UserError(f"{config.file} has no column {name!r} (it has {table.columns}); set log.step and log.loss")
    for name in {config.step, config.loss, config.lr, config.grad_norm} & set(table.columns):
        if not (table.schema[name].is_numeric() or table.schema[name] in (pl.String, pl.Null, pl.Boolean)):
            raise UserError(f"{config.file} has {table.schema[name]} in column {name!r}; expected numbers")
    # strict=False: trackers export empty cells as text; what is no number becomes null, which means "not logged".
    columns = [
        (pl.col(column) if column in table.columns else pl.lit(None)).cast(pl.Float64, strict=False).alias(name)
        for name, column in (("loss", config.loss), ("lr", config.lr), ("grad_norm", config.grad_norm))
    ]
    step = (pl.col(config.step).cast(pl.Int64, strict=False) - config.first_step).alias("step")
    logged = table.select(step, *columns).filter(pl.col("step").is_between(0, steps - 1))
    # Trackers write one row per metric, so a step may have several rows; a restart repeats steps with other numbers.
    merged = logged.group_by("step").agg(pl.col(name).drop_nulls().unique() for name in ("loss", "lr", "grad_norm"))
    for name in ("loss", "lr", "grad_norm"):
        ambiguous = merged.filter(pl.col(name).list.len() > 1).sort("step")
        if len(ambiguous):
            raise UserError(
                f"{config.file} has several {name} of step {ambiguous['step'][0] + config.first_step}: "
                f"{ambiguous[name][0].to_list()[:3]}; keep what was logged by the process that went on"
            )
    if logged["loss"].is_null().all():
        raise UserError(f"{config.file} has no loss of steps 0 to {steps - 1}; check log.step and log.first_step")
    return merged.with_columns(pl.col(name).list.first() for name in ("loss", "lr", "grad_norm")).sort("step")


def learning_rates(config: ReconstructConfig, log: pl.DataFrame) -> list[float]:
    """Lr of every step, by formula or as logged.

    Raises:
        UserError: there is no formula and the log lacks a step's.
    """
    if config.lr is not None:
        return [config.lr.lr(step, config.steps) for step in range(config.steps)]
    # No interpolation between logged steps: a warm-up or a restart between them would be lost in silence.
    logged = dict(log.filter(pl.col("lr").is_not_null()).select("step", "lr").iter_rows())
    missing = [step for step in range(config.steps) if step not in logged]
    if missing:
        raise UserError(
            f"the log has no lr of step {missing[0] + config.log.first_step} and of {len(missing) - 1} more of "
            f"{config.steps}; set `lr` to the schedule, or log.lr to its column"
        )
    return [logged[step] for step in range(config.steps)]


def content(catalogue: pl.DataFrame, domains: list[str]) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int32]]:
    """Content id and predicted tokens of every sample, by its index in the dataset (one stream after another)."""
    frames = [catalogue.filter(domain=domain).sort("index") for domain in domains]
    joined = pl.concat([frame.select("sample_id", "predicted_tokens") for frame in frames])
    return joined["sample_id"].to_numpy(), joined["predicted_tokens"].to_numpy().astype(np.int32)


def micro_batches(config: ReconstructConfig, order: SampleOrder) -> Iterator[list[list[npt.NDArray[np.int64]]]]:
    """Per step, per rank, dataset-wide indexes of each micro-batch."""
    for ranks in order.steps(config.steps):
        yield [
            [
                batch[at : at + (config.micro_batch_size or len(batch))]
                for batch in batches
                for at in range(0, len(batch), config.micro_batch_size or len(batch))
            ]
            for batches in ranks
        ]


def sample_weights(
    tokens: list[list[npt.NDArray[np.int32]]], config: LossConfig
) -> list[list[npt.NDArray[np.float32]]]:
    """`c_z` of a step's samples.

    Args:
        tokens: per rank, per micro-batch, predicted tokens of its samples.
        config: the mean.

    Returns:
        Weights in the same form; they sum to 1, unless there is nothing to predict.
    """
    # What a sample counts before normalisation: its tokens, or 1 if it predicts any. float32, as the loss was.
    counts = [
        [(batch if config.mean == "token" else batch > 0).astype(np.float32) for batch in rank] for rank in tokens
    ]
    # max(., 1): a step, rank or micro-batch of padding alone has loss 0, not NaN.
    if config.over == "step":
        total = np.float32(sum(float(batch.sum()) for rank in counts for batch in rank))
        return [[batch / max(total, np.float32(1)) for batch in rank] for rank in counts]
    if config.over == "rank":
        # DistributedDataParallel takes the mean over ranks, hence len(counts).
        totals = [np.float32(max(sum(float(batch.sum()) for batch in rank), 1) * len(counts)) for rank in counts]
        return [[batch / total for batch in rank] for rank, total in zip(counts, totals, strict=True)]
    return [
        [batch / np.float32(max(float(batch.sum()), 1) * len(rank) * len(counts)) for batch in rank] for rank in counts
    ]


def step_records(
    config: ReconstructConfig,
    order: SampleOrder,
    catalogue: pl.DataFrame,
    log: pl.DataFrame,
    groups: list[tuple[GroupSettings, float]],
) -> pl.DataFrame:
    """The rows that the recorder would have written; loss and gradient norm are null where they were not logged.

    Raises:
        UserError: see `learning_rates` and `SampleOrder.steps`.
    """
    ids, tokens = content(catalogue, list(config.streams))
    logged = {row["step"]: row for row in log.iter_rows(named=True)}
    rates = learning_rates(config, log)
    rows: list[dict[str, Any]] = []
    for step, ranks in enumerate(micro_batches(config, order)):
        counts = [[tokens[indexes] for indexes in rank] for rank in ranks]
        weights = sample_weights(counts, config.loss)
        norm = logged.get(step, {}).get("grad_norm")
        of_step = {
            "loss": logged.get(step, {}).get("loss"),
            "grad_norm": norm,
            "clip_factor": clip_factor(norm, config.clip_norm),
            "groups": [vars(replace(settings, lr=rates[step] * scale)) for settings, scale in groups],
        }
        for rank, batches in enumerate(ranks):
            for number, indexes in enumerate(batches):
                rows.append(
                    {
                        "step": step,
                        "rank": rank,
                        "micro_batch": number,
                        "sample_ids": ids[indexes].tolist(),
                        "weights": weights[rank][number].tolist(),
                        "tokens": counts[rank][number].tolist(),
                        **of_step,
                    }
                )
    return pl.DataFrame(rows, schema=STEPS).sort("step", "rank", "micro_batch")
