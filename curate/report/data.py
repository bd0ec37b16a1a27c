"""`ReportData`: the one record that crosses from a selection into its report, and its files."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

import polars as pl

from curate.core.arrays import read_table
from curate.core.artifacts import read_json
from curate.core.errors import UserError
from curate.core.writing import atomic_write
from curate.output.layout import SelectionFolder

# Columns that each frame must have; more are allowed and shown nowhere. Files of another version of curate are refused
# by them.
COLUMNS: Mapping[str, tuple[str, ...]] = {
    "reliability": ("source", "ranking", "samples", "spearman", "reliability", "reliability_low", "reliability_high"),
    "curve": ("source", "step", "domain", "value", "value_per_lr"),
    "training": ("step", "loss", "lr", "grad_norm"),
    "domains": (
        *("source", "target", "domain", "samples", "predicted_tokens", "value_per_token", "se", "low", "high"),
        *("score", "score_low", "score_high", "shrunk", "value_score", "ngram_ratio", "novel_share"),
    ),
    "mixture": (
        *("domain", "prior", "weight", "stored_tokens", "samples", "epochs"),
        *("epochs_so_far", "binding", "unconstrained"),
    ),
    "sweep": ("prior_strength", "expected_score", "kl_to_prior", "effective_domains", "retained_score"),
    "targets": ("target", "weight", "domain", "score", "score_low", "score_high", "shrunk"),
    "examples": ("kind", "rank", "source", "step", "domain", "sample_id", "value", "text"),
    "shards": ("source", "domain", "shards", "samples", "share_between", "p_value", "verdict"),
    "costs": ("phase", "passes", "seconds", "bytes", "note"),
}


@dataclass(frozen=True, kw_only=True)
class ReportData:
    """Everything that a report shows. Values are in nats per token of the target, positive = the sample helped.

    Raises:
        ValueError: a frame lacks one of its `COLUMNS`.
    """

    run: str
    """Name of the run whose samples were valued."""
    target: str
    """Name of the target."""
    target_documents: int
    """Documents of the target that selection used."""
    target_tokens: int
    """Predicted tokens of those documents."""
    retain: str | None
    """Name of the retained text; None: nothing was retained."""
    estimator: str
    """What estimated the values, e.g. "adjoint"."""
    horizons: Mapping[str, str]
    """Source -> the state that the target's loss is read at ("window_end", "stage_end", "step_N" or "1_steps_on"),
    windows in time's order."""
    mixture_source: str
    """The source whose scores set the mixture."""
    sign: str
    """What a positive value means (`curate.core.artifacts.SIGN`)."""
    budget_tokens: int
    """Tokens asked for in the next stage."""
    loader: str
    """Python lines that load the next stage's data."""
    settings: Mapping[str, Any]
    """The resolved settings of the selection (JSON values)."""
    reliability: pl.DataFrame
    """Output of `curate.domains.reliability.halves_reliability`."""
    curve: pl.DataFrame
    """One row per (source, step, domain): `value`, the mean value per predicted token, and `value_per_lr`, it divided
    by the step's learning rate."""
    training: pl.DataFrame
    """One row per step of the stage: `loss` (nats per token), `lr`, `grad_norm` (null where unknown)."""
    domains: pl.DataFrame
    """Output of `curate.domains.domain.domain_scores` for the target."""
    mixture: pl.DataFrame
    """One row per domain: shares `prior` and `weight`, `stored_tokens`, `samples`, `epochs` of the next stage,
    `epochs_so_far` of all stages before it, `binding` (null, "floor", "ceiling", "max_epochs" or "max_change"),
    `unconstrained` (the share that no bound would give) and `by_SOURCE` (the share that each source's scores ask
    for)."""
    sweep: pl.DataFrame
    """One row per prior strength: what the mixture would be, see `mixture.record.SweepPoint`, and the share of each
    domain in a column of its name after `share_`."""
    targets: pl.DataFrame
    """Domain scores of every target, the retention target with `weight` null, of the source that set the mixture."""
    examples: pl.DataFrame
    """Samples to read: `kind` "most" or "least" valuable, `rank` from 1, and where each comes from."""
    shards: pl.DataFrame
    """Output of `curate.domains.shards.between_shards` for the target."""
    costs: pl.DataFrame
    """One row per phase: `passes` (forward+backward passes of a training batch), `seconds`, `bytes` written, `note`;
    each but the phase may be null."""
    phases: Sequence[Mapping[str, Any]] = ()
    """The next stage in order, as in `mixture.yaml`: `start_sample` and `samples`, `blend` (0 base
    mixture to 1) and samples by domain; one phase is not shown."""
    residuals: Mapping[str, float] = field(default_factory=dict)
    """Source -> share of the target's gradient that the anchors leave unexplained, 0 to 1; only where the target was
    solved into anchors."""
    length_bias: Mapping[str, float] = field(default_factory=dict)
    """Source -> rank correlation of value and length inside domains (`curate.domains.reliability.length_bias`)."""
    predicted: Sequence[Mapping[str, Any]] = ()
    trust: Sequence[Mapping[str, Any]] = ()
    """Rows of `tables.Predicted`; empty where data is not chosen by predictions."""
    contamination: Sequence[Mapping[str, Any]] = ()
    """Samples of the data that share text with held-out documents, by `domain` and `file`: `samples`, `documents`,
    `of_sample` (largest share of a sample's n-grams), `removed`."""
    group_limits: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    """Constraints on several domains together -> `least`, `reached` and `price`."""

    def __post_init__(self) -> None:
        for name, columns in COLUMNS.items():
            missing = sorted(set(columns) - set(getattr(self, name).columns))
            if missing:
                raise ValueError(f"the frame {name!r} of a report lacks the columns {', '.join(missing)}")


def save_data(selection: SelectionFolder, data: ReportData) -> None:
    """Write `data` into a selection, so that `python -m curate.report` can render it again."""
    # what is no frame goes into one JSON file
    facts = {field_.name: getattr(data, field_.name) for field_ in fields(data) if field_.name not in COLUMNS}
    # the whole folder appears at once: a cut leaves no mixture of old and new frames
    with atomic_write(selection.report_data) as part:
        part.mkdir()
        for name in COLUMNS:
            getattr(data, name).write_parquet(part / f"{name}.parquet")
        (part / selection.report_facts.name).write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")


def load_data(selection: SelectionFolder) -> ReportData:
    """Read what `save_data` wrote.

    Raises:
        UserError: a file is missing or damaged.
    """
    try:
        frames: dict[str, Any] = {name: read_table(selection.report_data / f"{name}.parquet") for name in COLUMNS}
        return ReportData(**read_json(selection.report_facts), **frames)
    # a damaged file has said which one it is
    except UserError:
        raise
    except (OSError, pl.exceptions.PolarsError, TypeError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(
            f"{selection.root} holds no complete report data ({reason}); select again to write it"
        ) from None
