"""The result of a branch test as a file: what was found, of what, and how far the scores may be trusted."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Literal

from pydantic import ValidationError

from curate.core.artifacts import read_hashed
from curate.core.config import Config
from curate.core.errors import UserError
from curate.core.validation import first_problem

FILE = "branch_test.json"
TRUSTED = 0.7  # Spearman from which scores are taken at their word
_LEAST = 0.05  # of the correlation that a prior strength is divided by
_SAME = 1e-6  # of the largest score: what two machines may differ by
_ADVICE = {
    "trusted": f"the scores predict the next stage (at least {TRUSTED}): the mixture may use them as they are",
    "weak": f"the scores do not predict the next stage well (less than {TRUSTED}): the mixture should stay near the "
    "prior",
    "too_noisy": "the draws of samples differ too much to tell, so that the mixture should stay near the prior: set "
    "--steps or --repeats higher for a test that tells",
    "undefined": "no rank correlation is defined (of fewer than three domains, or where no change differs): the "
    "mixture should stay near the prior",
}

Verdict = Literal["trusted", "weak", "too_noisy", "undefined"]


class BranchTest(Config):
    """What short branches said of the domain scores of one selection."""

    run: str
    """Fingerprint of the run that the branches start from."""
    target: str
    """Fingerprint of the target's file."""
    target_name: str
    selection: str
    """Fingerprint of the selection that the scores are from."""
    source: str
    """Where the scores come from."""
    sign: str = "positive = more of the domain lowered the target's loss = it helped"
    scores: dict[str, float]
    """Score of each domain, as in domains.parquet."""
    changes: dict[str, list[float]]
    """Realised change of each domain and repeat, nats per token of the target; domains without a score too."""
    spearman: float | None
    """Rank correlation over domains of scores with mean changes; null where it is not defined."""
    low: float | None
    """Lower end of its 95 % interval (bootstrap over domains)."""
    high: float | None
    """Upper end."""
    ceiling: float | None
    """The correlation that scores without any error would reach, as far as the repeats tell; null for one repeat."""
    verdict: Verdict
    """trusted: the correlation is at least 0.7. weak: it is less. too_noisy: scores without error would not reach it
    either. undefined: there is no correlation."""
    strength_factor: float
    """What the mixture's prior strength is to be multiplied by: 1 where the scores are trusted, up to 20."""
    steps: int
    """Optimizer steps of a branch."""
    share: float
    """Share of a branch's samples that came from its domain instead."""
    repeats: int
    """Draws of samples."""
    seed: int
    """Of the draws and the bootstrap."""
    forward_backward_passes: float
    """Passes of a training batch that the branches cost."""


def read_branch_test(
    path: Path, run_fingerprint: str | None = None, target_fingerprint: str | None = None
) -> BranchTest:
    """Read the result of a branch test.

    Args:
        path: `branch_test.json`.
        run_fingerprint: that it must be of; none: whichever.
        target_fingerprint: the same.

    Raises:
        UserError: the file is missing, damaged, not a branch test, or of another run or target.
    """
    if not path.exists():
        raise UserError(f"{path} does not exist; `python -m curate.branch_test` writes it")
    try:
        test = BranchTest.model_validate(read_hashed(path))
    except ValidationError as error:
        raise UserError(
            f"{path} is not the result of a branch test ({first_problem(error)}); name the {FILE} that "
            "`python -m curate.branch_test` wrote"
        ) from None
    # the target after the run: of another run nothing else can be right
    for what, tested, wanted in (("run", test.run, run_fingerprint), ("target", test.target, target_fingerprint)):
        if wanted not in (None, tested):
            raise UserError(
                f"{path} is a branch test of another {what} (fingerprint {tested}, it is {wanted} here): test a "
                f"selection of this {what} with `python -m curate.branch_test`, or leave the file out"
            )
    return test


def check_tested(path: Path, test: BranchTest, source: str, scores: Mapping[str, float]) -> None:
    """Refuse a branch test of other scores than these: what it allows says nothing of them.

    Args:
        path: of the test, for the message.
        test: what was read there.
        source: where the scores come from.
        scores: of the domains that have one.

    Raises:
        UserError: it tested scores of another source, of other domains, or others.
    """
    # relative to the largest: scores near 0 differ by more than that of themselves between two machines
    close = _SAME * max(map(abs, test.scores.values()), default=0.0)
    differing = sorted(
        domain
        for domain in {*scores, *test.scores}
        if domain not in scores or domain not in test.scores or abs(scores[domain] - test.scores[domain]) > close
    )
    if source != test.source or differing:
        what = f"of {test.source}, not {source}" if source != test.source else f"differ for {', '.join(differing)}"
        raise UserError(
            f"{path} tested other domain scores ({what}): select without it and run `python -m curate.branch_test` on "
            "that selection"
        )


def strength_factor(spearman: float | None) -> float:
    """What a prior strength is to be multiplied by: 1 for a correlation of at least `TRUSTED`, else 1 / max(it, 0.05).

    Dividing by the correlation is what regression to the mean says: of a score that ranks realised changes with
    correlation r, a change of r times as many deviations is to be expected. An unknown correlation counts as 0.
    """
    r = 0.0 if spearman is None else spearman
    return 1.0 if r >= TRUSTED else 1 / max(r, _LEAST)


def verdict_of(spearman: float | None, ceiling: float | None) -> Verdict:
    """What a correlation says, given the one that scores without error would reach."""
    if spearman is None:
        return "undefined"
    if spearman >= TRUSTED:
        return "trusted"
    return "too_noisy" if ceiling is not None and ceiling < TRUSTED else "weak"


def summary(test: BranchTest) -> list[str]:
    """What a reader needs to know of a branch test, by line: the domains by score, the agreement, what follows."""
    lines = [f"{'domain':<20} {'score':>8}  {'change':>10}  by repeat (nats per token of {test.target_name})"]
    order = sorted(test.changes, key=lambda domain: (-test.scores.get(domain, -float("inf")), domain))
    for domain in order:
        changes = test.changes[domain]
        score = f"{test.scores[domain]:+8.3f}" if domain in test.scores else f"{'-':>8}"
        repeats = " ".join(f"{change:+.5f}" for change in changes)
        lines.append(f"{domain:<20} {score}  {sum(changes) / len(changes):+10.5f}  {repeats}")
    numbers = ("-" if number is None else f"{number:.2f}" for number in (test.spearman, test.low, test.high))
    agreement = "Spearman of scores and changes {} [95 % interval {}, {}]".format(*numbers)
    reach = "" if test.ceiling is None else f"; scores without error would reach about {test.ceiling:.2f}"
    return [
        *lines,
        f"{agreement}{reach}",
        f"{test.verdict}: {_ADVICE[test.verdict]}; mixture.prior_strength times {test.strength_factor:.3g}",
    ]
