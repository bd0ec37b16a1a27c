"""What a selection is known by: with the same identity it would have the same bytes."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from curate.core.artifacts import MANIFEST, file_fingerprint, fingerprint, read_json
from curate.core.errors import UserError
from curate.filter.choose import CHOICE
from curate.influence.extrapolate import PREDICTOR
from curate.influence.row_values import ROWS
from curate.ngrams.regression import PREDICTOR as NGRAM_PREDICTOR
from curate.selection.candidates import candidate_streams, streams_fingerprint
from curate.training.token_accounting import stages_identity

if TYPE_CHECKING:
    from curate.core.artifacts import Json
    from curate.selection.resolve import Resolved
    from curate.training.target import Targets

# Settings that say where something lies or how fast it is done; what lies there counts by its content.
_ELSEWHERE: dict[str, Any] = {
    **dict.fromkeys(("run", "source", "target", "more_targets", "retain", "candidates", "out", "device"), True),
    "values": {"embed_config", "sources"},
    "mixture": {"branch_test"},
    "filter": {"held_out", "unseen_only"},
    "output": {"wandb", "wandb_texts"},
}
# The same of the settings that windows are valued with.
_EMBEDDING: dict[str, Any] = {
    **dict.fromkeys(("run", "streams", "tokenizer", "target", "more_targets", "retain", "device"), True),
    **dict.fromkeys(("tolerance", "target_batch_size", "min_target_tokens", "index", "value_curve"), True),
    "adjoint": {"memory_bytes", "disk_bytes", "save_seconds", "anchor_files"},
    "dvemb": {"rows_per_block"},
    "dvemb_adam": {"rows_per_block"},
}


def identity_of(plan: Resolved, targets: Targets) -> Json:
    """What decides what is selected."""
    config = plan.config
    weights: list[float | str] = [1.0, *config.more_targets.values(), *([] if targets.retain is None else ["retain"])]
    held_out = [file_fingerprint(Path(path)) for path in config.filter.held_out]
    identity: dict[str, Any] = {
        "run": plan.run.fingerprint,
        "targets": [[target.fingerprint, weight] for target, weight in zip(targets.every, weights, strict=True)],
        "earlier": stages_identity(plan.stages[:-1]),
        "sources": list(plan.sources),
        "budget_tokens": plan.budget_tokens,
        "unseen_only": plan.unseen_only,
        "branch_test": None if plan.branch_test is None else fingerprint(plan.branch_test.model_dump(mode="json")),
        "held_out": held_out,
        # the version of a rule is part of what decides the bytes: a change of rule makes a new selection
        "choice": list(CHOICE) if config.takes_samples or config.method == "curate" else None,
        "candidates": None if config.candidates is None else streams_fingerprint(candidate_streams(config.candidates)),
        "row_rules": list(ROWS) if config.values.rows else None,
        "predictor": list(NGRAM_PREDICTOR if plan.measures_samples else PREDICTOR if plan.predicts_samples else ()),
    }
    if plan.windows:
        files = plan.embedding.adjoint.anchor_files
        curve = plan.embedding.value_curve
        identity["value_curve"] = None if curve is None else file_fingerprint(curve)
        identity["embedding"] = plan.embedding.model_dump(mode="json", exclude=_EMBEDDING)
        identity["anchor_files"] = [file_fingerprint(path) if path.is_file() else str(path) for path in files]
    # the budget is in it as resolved, so that "as many as the last stage" and the same number are one selection
    return identity | config.model_dump(mode="json", exclude={**_ELSEWHERE, "budget_tokens": True})


def check_samples(selection: Path, samples: str) -> None:
    """Refuse a complete selection from streams that have other samples now.

    Args:
        selection: its folder.
        samples: fingerprint of those samples now.

    Raises:
        UserError: the samples differ.
    """
    if read_json(selection / MANIFEST).get("data", samples) != samples:
        raise UserError(
            f"{selection} was selected from other samples than the streams hold now; choose another --out, or delete "
            "it to select again"
        )
