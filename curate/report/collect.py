"""Collect what a report shows from a selection's tables."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import polars as pl

from curate.artifacts import folder_bytes
from curate.formats.documents import load_tokenizer
from curate.sums import row_sum
from curate.trajectory.samples import SampleReader

if TYPE_CHECKING:
    from pathlib import Path

    from curate.embeddings.store import Embedding
    from curate.mixture.record import Mixture
    from curate.pools.slopes import NextStep, Slopes
    from curate.pools.values import PoolValues
    from curate.trajectory.run import Run

    Costed = Embedding | PoolValues | NextStep | Slopes

EXAMPLES = 12  # most and least valuable samples of each window


def training_curve(run: Run) -> pl.DataFrame:
    """One row per step: loss, lr of the first parameter group, gradient norm."""
    first = run.steps.unique("step", keep="first", maintain_order=True)
    return first.select("step", "loss", lr=pl.col("groups").list.first().struct.field("lr"), grad_norm="grad_norm")


def value_curve(values: pl.DataFrame, training: pl.DataFrame) -> pl.DataFrame:
    """Mean value per predicted token of each (window, step, domain), raw and divided by the step's lr."""
    sums = values.group_by("window", "step", "domain").agg(value=row_sum(pl.col("value")) / pl.col("tokens").sum())
    joined = sums.join(training.select("step", "lr"), on="step", how="left").sort("window", "step", "domain")
    return joined.select("window", "step", "domain", "value", value_per_lr=pl.col("value") / pl.col("lr"))


def mixture_table(mixture: Mixture, ledger: pl.DataFrame) -> pl.DataFrame:
    """The mixture, one row per domain; `weight` is what is delivered, `epochs_so_far` what all stages consumed."""
    so_far = dict(ledger.select("domain", "epochs").iter_rows())
    rows = [
        {
            "domain": name, "prior": domain.prior, "weight": domain.delivered_weight, "tokens": domain.tokens,
            "samples": domain.samples, "epochs": domain.epochs, "epochs_so_far": so_far.get(name, 0.0),
            "binding": domain.binding, "unconstrained": domain.unconstrained_weight,
            **{
                f"asked_{window}": None if phase.weights is None else phase.weights[name]
                for window, phase in mixture.asked.items()
            },
        }
        for name, domain in mixture.domains.items()
    ]  # fmt: skip
    return pl.DataFrame(rows, schema_overrides={"binding": pl.String})


def sweep_table(mixture: Mixture) -> pl.DataFrame:
    """One row per temperature of the sweep."""
    rows = [
        point.model_dump(exclude={"weights"}) | {f"share_{name}": share for name, share in point.weights.items()}
        for point in mixture.sweep
    ]
    return pl.DataFrame(rows, schema_overrides={"guard_score": pl.Float64})


def target_table(domains: pl.DataFrame, mixture: Mixture) -> pl.DataFrame:
    """Domain scores of every target, and of the guard (weight null), in the window that set the mixture."""
    weights: dict[str, float | None] = {**mixture.targets}
    if mixture.guard is not None:
        weights[mixture.guard] = None
    order = pl.DataFrame(
        {"target": list(weights), "weight": list(weights.values())}, schema_overrides={"weight": pl.Float64}
    )
    rows = order.join(domains.filter(window=mixture.window), on="target", maintain_order="left_right")
    return rows.select("target", "weight", "domain", "score", "score_low", "score_high", "shrunk")


def leak_table(leaks: pl.DataFrame) -> pl.DataFrame:
    """What the screen found, by domain and held-out file, most samples first; see `ReportData.leaks`."""
    found = leaks.group_by("domain", "file").agg(
        samples=pl.col("sample_id").n_unique(), documents=pl.col("id").n_unique(), of_sample=pl.col("of_sample").max(),
        removed=pl.col("removed").all(),
    )  # fmt: skip
    return found.sort("samples", "domain", "file", descending=[True, False, False])


def example_table(run: Run, values: pl.DataFrame, found: Mapping[tuple[str, str], Sequence[int]]) -> pl.DataFrame:
    """Samples to read.

    Args:
        run: supplies tokens and tokenizer; without a tokenizer the token ids are shown.
        values: the values frame.
        found: (window, "most" or "least") -> row numbers within that window, best match first.
    """
    tokenizer = load_tokenizer(run.spec.tokenizer) if run.spec.tokenizer else None
    reader, rows = SampleReader(run), []  # by content: streams may have been sharded anew since
    for (window, kind), places in found.items():
        frame = values.filter(window=window)
        for rank, place in enumerate(places, start=1):
            row = frame.row(int(place), named=True)
            tokens = reader.samples([row["sample_id"]])[0].tokens.tolist()
            text = tokenizer.decode(tokens, skip_special_tokens=False) if tokenizer else " ".join(map(str, tokens))
            chosen = {name: row[name] for name in ("window", "step", "domain", "sample_id", "value")}
            rows.append({"kind": kind, "rank": rank, **chosen, "text": text})
    return pl.DataFrame(rows)


def cost_table(run: Run, made: Mapping[str, Costed | None], out: Path, seconds: float) -> pl.DataFrame:
    """What each phase cost, the stage's training for comparison.

    Args:
        run: of the stage.
        made: phase -> what it made; None: there was none.
        out: folder of the selection.
        seconds: that selecting took.
    """
    rows: list[dict[str, object]] = [{"phase": "training", "units": float(run.spec.steps), "note": "one per step"}]
    for phase, part in made.items():
        if part is None:
            continue
        note = f"{100 * part.cost_units / run.spec.steps:.1f} % of the stage"
        size = sum(path.stat().st_size for path in part.folder.glob("*.*"))
        rows.append(
            {
                "phase": phase,
                "units": part.cost_units,
                "seconds": part.seconds,
                "bytes": size,
                "note": note,
            }
        )
    written = folder_bytes(out)
    rows.append({"phase": "select", "units": 0.0, "seconds": seconds, "bytes": written, "note": "no passes"})
    columns = {"phase": pl.String, "units": pl.Float64, "seconds": pl.Float64, "bytes": pl.Int64, "note": pl.String}
    return pl.DataFrame(rows, schema=columns)
