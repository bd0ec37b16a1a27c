"""Short branches from a run's last state, each with a little more of one domain: what domains really do.

A branch trains a few steps on samples drawn in the run's own proportions, in which a share of the positions, the same
in every branch, is filled from one domain; the base keeps all of its own. The realised change of a domain is the
target's loss after the base minus that after its branch: positive = more of the domain helped. Branches share state,
order and every other sample, so that only the domain differs. How it agrees with the domains' scores is a rank
correlation.

Steps are those of a replay: recorded optimizers and settings, lr and the rest as at the step of median lr, each step's
loss a mean over tokens.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import dataframely as dy
import numpy as np
import polars as pl
from pydantic import Field

from curate.core.artifacts import fingerprint, read_hashed, write_hashed
from curate.core.config import Config
from curate.core.errors import UserError
from curate.core.lock import locked
from curate.core.progress import progress
from curate.core.rng import generator
from curate.stats.rank_correlation import spearman, spearman_interval
from curate.tables import DomainScores
from curate.training.replay import records
from curate.training.target import target_loss
from curate.training.task import collate

if TYPE_CHECKING:
    import numpy.typing as npt

    from curate.training.replay import Replay, StepRecord
    from curate.training.run import Run
    from curate.training.target import Target

    Ids = npt.NDArray[np.int64]

_log = logging.getLogger(__name__)
BASE = "(base)"  # no domain has brackets in its name


class BranchTestConfig(Config):
    """How long branches are, and how far they differ."""

    share: float = Field(default=0.2, gt=0, le=1)
    """Share of a branch's samples that comes from the one domain instead."""
    steps: int = Field(default=20, ge=1)
    """Optimizer steps of a branch."""
    repeats: int = Field(default=2, ge=1)
    """Draws of samples; each has a base and a branch per domain."""


@dataclass(frozen=True, kw_only=True)
class Agreement:
    """Of domain scores with realised changes.

    Attributes:
        spearman: over domains; None where fewer than three have a score, or a side does not vary.
        low: lower end of its 95 % interval (bootstrap over domains).
        high: upper end.
        ceiling: what scores without any error would reach; see `ceiling`.
    """

    spearman: float | None
    low: float | None
    high: float | None
    ceiling: float | None


def lengths_of(config: BranchTestConfig) -> dict[str, Any]:
    """What of a config decides what the branches are."""
    return config.model_dump(include=set(BranchTestConfig.model_fields))


def branch_passes(run: Run, target: Target, config: BranchTestConfig, branches: int) -> float:
    """Forward+backward passes of a training batch: the branches, and a third of a pass to read each one's target."""
    batch = max(_record(run).size, 1)
    # a loss without a gradient is a forward pass, a third of forward+backward
    reads = sum(len(half) for half in target.halves) / batch / 3
    return branches * (config.steps + reads)


def realised_changes(
    replay: Replay,
    target: Target,
    prior: Mapping[str, float],
    config: BranchTestConfig,
    *,
    seed: int,
    batch_size: int,
) -> dict[str, list[float]]:
    """Train what is missing of the branches and say first what it costs; each finished one is kept in the run.

    Args:
        replay: of the run.
        target: whose loss is read.
        prior: share of each domain in what was trained on; sums to anything.
        config: length and size of the change.
        seed: of the draws.
        batch_size: sequences per pass over the target.

    Returns:
        Domain -> realised change of each repeat, nats per token of the target; positive = more of it helped.

    Raises:
        UserError: what was kept is damaged, or a branch diverged.
    """
    run = replay.run
    settings = [run.fingerprint, target.fingerprint, lengths_of(config), seed]
    path = run.folder / "branch-tests" / f"{target.name}-{fingerprint(settings)[:8]}.json"
    branches = [(repeat, name) for repeat in range(config.repeats) for name in (BASE, *sorted(prior))]
    # branches do not depend on scores: tests of several selections share what is kept
    # two tests that run at once: the second waits and uses what the first one trained
    with locked(path.parent, f".{path.name}.lock", wait=True):
        losses: dict[str, float] = read_hashed(path) if path.exists() else {}
        missing = [(repeat, name) for repeat, name in branches if _key(repeat, name) not in losses]
        if missing:
            _say_cost(run, branch_passes(run, target, config, len(missing)), len(missing), len(branches))
            for key, loss in _train(replay, target, prior, config, missing, seed=seed, batch_size=batch_size):
                losses[key] = loss  # written after each branch: an interrupted test continues with the next one
                write_hashed(path, losses)
    return {
        name: [losses[_key(repeat, BASE)] - losses[_key(repeat, name)] for repeat in range(config.repeats)]
        for name in sorted(prior)
    }


def _key(repeat: int, name: str) -> str:
    return f"{repeat}/{name}"


def _say_cost(run: Run, units: float, missing: int, branches: int) -> None:
    _log.info(
        "%d of %d branches are to be trained, at about %.0f forward+backward passes, %.0f %% of the stage's %d",
        missing,
        branches,
        units,
        100 * units / run.spec.steps,
        run.spec.steps,
    )


def _train(
    replay: Replay,
    target: Target,
    prior: Mapping[str, float],
    config: BranchTestConfig,
    branches: Sequence[tuple[int, str]],
    *,
    seed: int,
    batch_size: int,
) -> Iterator[tuple[str, float]]:
    """Train branches one after the other; yields the key of each and the target's loss after it."""
    run = replay.run
    optimizers = replay.optimizers_at(run.spec.steps)
    state, record = replay.checkpoint(optimizers), _record(run)
    # every branch of a repeat from one draw: they differ in the replaced positions only
    drawn = {repeat: _draw(run, prior, config, record.size, seed + repeat) for repeat, _ in branches}
    for repeat, name in progress(branches, total=len(branches), what="branches", unit="branch"):
        # in memory, parameters and optimizer states alike: no file is read between branches
        replay.rewind(state, optimizers)
        for ids in drawn[repeat][name].reshape(config.steps, record.size).tolist():
            samples = replay.reader.samples(ids)
            # weights of a mean over the step's predicted tokens, as one micro-batch
            predicted = np.array([sample.predicted_tokens for sample in samples], np.float32)
            batch = collate(samples, predicted / max(float(predicted.sum()), 1.0)).to(replay.device)
            replay.backward([batch], optimizers)
            replay.update(record, optimizers)
        loss = target_loss(replay.task, target, batch_size)
        if not math.isfinite(loss):
            raise UserError(
                f"the branch of {name} diverged (target loss {loss}) with the settings that the run "
                f"trained with: set --steps lower than {config.steps}"
            )
        yield _key(repeat, name), loss


def _record(run: Run) -> StepRecord:
    """The step of median lr (of the first group)."""
    step = run.usual_step
    return next(records(run, step, step + 1))


def _draw(run: Run, prior: Mapping[str, float], config: BranchTestConfig, batch_size: int, seed: int) -> dict[str, Ids]:
    """Sample ids of the base and of every domain's branch, one per position; they differ at the same positions."""
    domains, positions = sorted(prior), config.steps * batch_size
    pools = {domain: _order(run, domain, seed) for domain in domains}
    shares = np.array([prior[domain] for domain in domains])
    random = generator(seed, "branch test")
    chosen = random.choice(len(domains), positions, p=shares / shares.sum())
    at = np.arange(positions)
    base = np.zeros(positions, np.int64)
    for number, domain in enumerate(domains):
        base = np.where(chosen == number, pools[domain][at % len(pools[domain])], base)
    replaced = np.zeros(positions, bool)
    replaced[random.permutation(positions)[: max(1, round(config.share * positions))]] = True
    drawn = {BASE: base}
    for domain, pool in pools.items():
        # from the far end, so that a branch adds other samples of the domain instead of repeating the base's
        drawn[domain] = np.where(replaced, pool[-1 - at % len(pool)], base)
    return drawn


def _order(run: Run, domain: str, seed: int) -> Ids:
    """Ids of a domain's samples with predicted tokens in random order, whatever their order in shards."""
    of_domain = run.unique_samples.filter(domain=domain)
    usable = of_domain.filter(pl.col("predicted_tokens") > 0).sort("sample_id")
    return np.asarray(generator(seed, "branch test", domain).permutation(usable["sample_id"].to_numpy()))


def agreement(scores: Mapping[str, float], changes: Mapping[str, Sequence[float]], seed: int) -> Agreement:
    """Rank correlation over domains of a score with the mean realised change.

    Args:
        scores: of the domains that have one.
        changes: see `realised_changes`.
        seed: of the bootstrap.
    """
    domains = sorted(scores)
    a = np.array([scores[domain] for domain in domains])
    b = np.array([np.mean(changes[domain]) for domain in domains])
    r = spearman(a, b)
    # every domain is a step of its own: domains are resampled
    low, high = (None, None) if r is None else spearman_interval(a, b, np.arange(len(a)), seed)
    return Agreement(spearman=r, low=low, high=high, ceiling=ceiling([changes[domain] for domain in domains]))


def ceiling(changes: Sequence[Sequence[float]]) -> float | None:
    """The correlation that the true effects would have with the mean of R repeats, as far as the repeats tell.

        sqrt(R r / (1 + (R - 1) r)),    r the mean rank correlation of two repeats, at least 0

    The reliability of a mean (Spearman, Brown: British Journal of Psychology 3, 1910) and the attenuation that it
    leaves (Spearman: American Journal of Psychology 15, 1904), of ranks as if they were measured.

    Args:
        changes: of each domain, R realised changes.

    Returns:
        0 to 1; None for fewer than three domains, a single repeat, or where a repeat does not vary.
    """
    draws = np.array(changes, np.float64).T
    pairs = [spearman(draws[a], draws[b]) for a in range(len(draws)) for b in range(a)]
    known = [pair for pair in pairs if pair is not None]
    if not known or len(known) < len(pairs):
        return None
    r = max(0.0, float(np.mean(known)))  # below 0 by noise only: repeats share their true effects
    return float(np.sqrt(len(draws) * r / (1 + (len(draws) - 1) * r)))


def tested_scores(domains: dy.DataFrame[DomainScores]) -> dict[str, float]:
    """The scores that branches can be held against.

    Args:
        domains: of one source and target.

    Returns:
        Score of each domain of which samples were measured.

    Raises:
        UserError: no samples were measured, or all scores are equal.
    """
    scores = dict(domains.filter(pl.col("samples") > 0).select("domain", "score").iter_rows())
    if not scores:
        raise UserError(
            "no domain has valued samples, so that there is no score to test: select with a method that values samples "
            "(--method curate)"
        )
    if len(set(scores.values())) == 1:
        raise UserError(
            f"all {len(scores)} domains with a score have the same, {next(iter(scores.values())):g}: there is nothing "
            "to test; go on without a branch test"
        )
    return scores
