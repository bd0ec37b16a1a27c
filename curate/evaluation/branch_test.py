"""Do a selection's domain scores predict the next stage? Tested by short trainings (called microanneals elsewhere).

From the run's last state short branches are trained, each with a little more of one domain; what they do to the
target's loss is compared with the scores. `curate.select` can be given the result.
"""

from __future__ import annotations

import logging
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from pydantic import Field

from curate.core.artifacts import MANIFEST, begin, finalize, fingerprint, making, read_json, write_hashed
from curate.core.errors import UserError
from curate.evaluation.branch_record import FILE, BranchTest, strength_factor, verdict_of
from curate.evaluation.branches import (
    BranchTestConfig,
    agreement,
    branch_passes,
    lengths_of,
    realised_changes,
    tested_scores,
)
from curate.tables import DomainScores
from curate.training.run import Run

if TYPE_CHECKING:
    from collections.abc import Mapping

    from curate.core.artifacts import Json
    from curate.training.target import Target

_log = logging.getLogger(__name__)


class BranchTestCommand(BranchTestConfig):
    """What to test, and how thoroughly."""

    selection: Path
    """Folder that `curate.select` wrote: the scores to test, those of its mixture's source."""
    target: Path
    """Target documents (JSONL) of that selection, the same bytes; a selection keeps their fingerprint only."""
    run: Path | None = None
    """Recorded run that was selected from; none: the one that the selection lies in."""
    streams: dict[str, Path] = {}
    """Where the run's streams lie now, by domain, if they were moved since."""
    tokenizer: Path | None = None
    """`tokenizers` JSON file that made the run's tokens, where the run was recorded without one."""
    out: Path | None = None
    """Folder to write to; none: a folder inside the run."""
    seed: int = 0
    """Seed of draws and bootstrap."""
    device: str = "cpu"
    """Device of the branches, for example cuda."""
    tolerance: float = Field(default=1e-3, gt=0)
    """Largest relative difference between recorded and replayed losses, where the last state has to be replayed."""
    target_batch_size: int = Field(default=16, ge=1)
    """Sequences per pass over the target."""


@dataclass(frozen=True, kw_only=True)
class _Scores:
    """The scores of a selection that are tested.

    Attributes:
        selection: its fingerprint.
        source: where they come from.
        scores: of the domains with measured samples.
    """

    selection: str
    source: str
    scores: Mapping[str, float]


def branch_test(config: BranchTestCommand) -> Path:
    """Test the scores of a selection.

    Returns:
        `branch_test.json` (`BranchTest`); a complete one of the same scores and settings is returned as it is, an
        interrupted one is continued.

    Raises:
        UserError: bad selection, run or target, or scores that cannot be tested.
    """
    from curate.training.samples import trained_tokens
    from curate.training.target import load_target

    run = Run(config.run or _run_around(config.selection), config.streams, config.tokenizer)
    target = load_target(config.target, run.spec, min_tokens=1)  # the selection found it large enough
    tested, prior = _read_scores(config, run, target), trained_tokens(run)
    foreign = sorted(set(tested.scores) - set(prior))
    if foreign:
        raise UserError(
            f"{config.selection} has scores of {', '.join(foreign)}, the run trained on {', '.join(prior)}: branches "
            "differ in a run's domains, so test a selection of whole domains (and set --streams as it did)"
        )
    settings = {
        "run": run.fingerprint,
        "target": target.fingerprint,
        **asdict(tested),
        "seed": config.seed,
        **lengths_of(config),
    }
    # by what was tested, not by where it lies: a selection that is made again has its test already
    out = config.out or run.folder / "branch-tests" / f"{target.name}-{fingerprint(settings)[:8]}"
    with making(out, settings) as missing:
        if missing:
            begin(out, settings)
            _make(config, run, target, tested, prior, out)
            finalize(out, "branch test", settings)
        else:
            _log.info("this branch test is complete already")
    return out / FILE


def _run_around(selection: Path) -> Path:
    """The run that a selection lies in."""
    for folder in selection.resolve().parents:
        if (folder / "run.json").is_file():
            return folder
    raise UserError(f"{selection} lies in no run: name the run that it was selected from with --run")


def _read_scores(config: BranchTestCommand, run: Run, target: Target) -> _Scores:
    """The scores for the target in the mixture's source; refuses a selection that they cannot be tested of."""
    from curate.core.arrays import read_table
    from curate.mixture.record import read_mixture

    folder = config.selection
    manifest = read_json(folder / MANIFEST) if (folder / MANIFEST).is_file() else {}
    if manifest.get("kind") != "selection":
        raise UserError(f"{folder} is no complete selection; name a folder that `python -m curate.select` finished")
    _check_parents(config, manifest["settings"], run, target)
    if manifest["settings"].get("candidates") is not None:
        raise UserError(
            f"{folder} selects among candidates that the run never trained on, which branches do not draw from: test a "
            "selection without candidates"
        )
    mixture = read_mixture(folder / "mixture.yaml")
    domains = read_table(folder / "domains.parquet")
    # the selection's main target comes first; its file may have been renamed since, so that its name is not asked
    rows = DomainScores.validate(domains.filter(source=mixture.source, target=next(iter(mixture.targets))))
    return _Scores(selection=manifest["fingerprint"], source=mixture.source, scores=tested_scores(rows))


def _check_parents(config: BranchTestCommand, settings: Json, run: Run, target: Target) -> None:
    """Refuse a run or a target that the selection was not made from."""
    main = next((fingerprint for fingerprint, _ in settings.get("targets", [])), None)
    parents = {
        "run": (run.folder, run.fingerprint, settings.get("run")),
        "target": (config.target, target.fingerprint, main),
    }
    for name, (path, here, wanted) in parents.items():
        if wanted != here:
            raise UserError(
                f"{config.selection} was not made from the {name} {path} (fingerprint {wanted} there, {here} here): "
                f"set --{name} to what it was selected with"
            )


def _make(
    config: BranchTestCommand, run: Run, target: Target, tested: _Scores, prior: Mapping[str, float], out: Path
) -> None:
    """Train what is missing of the branches and write what they say."""
    from curate.training.replay import Replay

    if len(tested.scores) < 3:
        _log.warning("%d domains have a score: there will be no correlation, which takes three", len(tested.scores))
    replay = Replay(run, config.device, config.tolerance)
    changes = realised_changes(replay, target, prior, config, seed=config.seed, batch_size=config.target_batch_size)
    agreed = agreement(tested.scores, changes, config.seed)
    branches = config.repeats * (len(prior) + 1)
    test = BranchTest(
        run=run.fingerprint,
        target=target.fingerprint,
        target_name=target.name,
        **asdict(tested),
        changes=changes,
        **asdict(agreed),
        verdict=verdict_of(agreed.spearman, agreed.ceiling),
        strength_factor=strength_factor(agreed.spearman),
        seed=config.seed,
        **lengths_of(config),
        forward_backward_passes=branch_passes(run, target, config, branches),
    )
    write_hashed(out / FILE, test.model_dump(mode="json"))
