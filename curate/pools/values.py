"""Values of a pool that was never trained on: a part of it is probed; the rest has linear values, or predicted ones.

Two artifacts in the run, each continued where it was interrupted: `pools/<target>-*` (probes, values, how good those of
the rest are) and, for predictions, `pools/hidden-*` (hidden states of every sample, whatever the target). Both know
samples by their content, so a pool that is re-sharded needs neither again.
"""

from __future__ import annotations

import logging
import shutil
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import polars as pl
from pydantic import Field

from curate.arrays import read_table
from curate.artifacts import fingerprint, making, seal
from curate.config import Config
from curate.embeddings.adjoint_estimator import OWN_STEP_UNITS
from curate.errors import UserError
from curate.pools.draw import VALUES, draw_probes, probe_frame
from curate.pools.features import mean_hidden_states, output_layer, ratios_of
from curate.pools.ngram_slopes import PREDICTOR as NGRAM_PREDICTOR
from curate.pools.ngram_slopes import NgramSlopes, fit, ngrams_of
from curate.pools.open import Overlap, Pool
from curate.pools.probe import Outlook, look_ahead, probe_values, target_directions
from curate.pools.slopes import (
    each_target,
    linear_values,
    look_ahead_units,
    read_together,
    replay_ahead,
    slope_units,
    step_samples,
    step_tokens,
    timed,
    timings_of,
)
from curate.pools.spread import PREDICTOR, FeatureReader, block_file, blocks_of, from_slopes, settled, spread
from curate.progress import progress
from curate.trajectory.fit import check_fit
from curate.trajectory.replay import Replay
from curate.trajectory.samples import samples_fingerprint
from curate.writing import replacing

if TYPE_CHECKING:
    import numpy.typing as npt

    from curate.artifacts import Json
    from curate.embeddings.adjoint_estimator import AdjointConfig
    from curate.formats.mds import Sample
    from curate.target import Target
    from curate.trajectory.run import Run

    Floats = npt.NDArray[np.floating[Any]]

_log = logging.getLogger(__name__)
POOL = "pool"
"""Where a window's name stands in tables of values."""
_HIDDEN_UNITS = 0.25  # of a forward+backward pass: a forward pass without the output layer
_SLOPE_UNITS = 2.4  # of probes' slopes where their own step is not exact


class ProbeConfig(Config):
    """How a pool that was never trained on is valued."""

    share: float = Field(default=0.05, gt=0, le=1)
    """Share of each domain's samples that is probed."""
    rest: Literal["slopes", "features", "none"] = "slopes"
    """Values of all others. slopes: how much each sample's own loss moves along the step that the target asks for, by a
    forward pass over the pool and one for each target; ranks like probes. features: a fit to the probes, from
    n-grams, hidden states and the slopes of the probes' tokens; less than a third of the cost, and less exact. none:
    the mean of their domain, which is all that --mode reweight needs, whatever is set."""
    min_per_domain: int = Field(default=100, ge=1)
    """At least so many of each domain: the error of a rank correlation over n samples is about 1 / sqrt(n)."""
    steps: int = Field(default=1, ge=1)
    """Steps that the run is continued by; ten rank samples .97 to .99 like one, with AdamW values are six times as
    large (1 - .9^10 of a gradient is realised for 1 - .9)."""
    lr_share: float = Field(default=0.1, gt=0)
    """Their lr, as a share of the run's median. Values are extrapolated to the median lr; at a larger share they are
    more about the path that the model takes with just these batches than about the state that it is in."""
    hidden_states: bool = True
    """Whether that fit reads the model's hidden states (a forward pass over the pool) beside n-grams."""
    min_rank_correlation: float = Field(default=0.2, ge=-1, le=1)
    """Where slopes of probes, or predictions for held-out ones, of a domain rank them less well than this, or not
    certainly better than chance (95 % interval), the domain's mean stands for every sample that was not probed. What
    choosing by predictions gains is about this share of what choosing by values would gain."""
    overlap: Overlap = "remove"
    """Samples of the pool that a stage trained on (by content): remove leaves them out (--mode filter), keep keeps
    them, refuse is an error."""


@dataclass(frozen=True, kw_only=True)
class PoolValues:
    """What a pool is worth to some targets. Positive = training on the sample lowers the target's loss.

    Attributes:
        folder: the artifact.
        probed: the values frame (`scores.schema`, with documents) of the probed samples for every target; `step` is the
            group of a probe, see `draw_probes`.
        every: one row per target and sample of `Pool.samples`: `target`, `domain`, `index`, `sample_id`, `length`,
            `tokens` (predicted), `value`, `value_a`, `value_b` (per predicted token) and `source`: probe, predicted or
            domain mean.
        domains: one row per target and domain: `samples`, `probed`, `spearman` of the probes with what the rest is
            valued by (held out of a fit; null where it is not defined), with `low` and `high`, `used`: predictor,
            domain mean, or probes where all samples are probed.
        seconds: time that it took.
        cost_units: the same in forward+backward passes of a training batch.
    """

    folder: Path
    probed: pl.DataFrame
    every: pl.DataFrame
    domains: pl.DataFrame
    seconds: float
    cost_units: float

    def chosen_by(self, targets: Collection[str]) -> pl.DataFrame:
        """The values frame that samples are chosen by: those that have a value of their own for one of the targets.

        A sample that the mean of its domain stands for has none, as one outside of the window that is valued. For a
        target whose values are not predicted in a domain, the mean stands for all samples and ranks none of them.
        """
        own = (pl.col("source") != "domain mean").any().over("domain", "sample_id")
        whole = (pl.col(name) * pl.col("tokens") for name in VALUES)
        asked = self.every.filter(pl.col("target").is_in(list(targets)))
        return asked.filter(own).with_columns(*whole, window=pl.lit(POOL))


def value_pool(
    run: Run,
    pool: Pool,
    targets: Sequence[Target],
    config: ProbeConfig,
    *,
    adjoint: AdjointConfig,
    seed: int = 0,
    device: str = "cpu",
    batch_size: int = 16,
    tolerance: float = 1e-3,
) -> PoolValues:
    """Value a pool, or open its values; the cost is stated before.

    Args:
        run: a finished run, whose last state is the current one.
        pool: see `open_pool`.
        targets: what samples are valued for, in one pass.
        config: probes, and how the rest is valued.
        adjoint: how the steps ahead, and the step that a sample is added to, are differentiated.
        seed: of draws, folds and intervals.
        device: of the model.
        batch_size: sequences per pass over a target.
        tolerance: of the replay, where the run has no snapshot at its end.

    Raises:
        UserError: bad target, pool or settings.
    """
    if config.steps > run.spec.steps:
        raise UserError(f"the run has {run.spec.steps} steps; set probe.steps to that at most")
    work = _Work(run, pool, targets, config, adjoint, seed)
    settings = work.settings
    folder = run.folder / "pools" / f"{targets[0].name}-{fingerprint(settings)[:8]}"
    with making(folder, settings) as missing:
        if missing:
            replay = replay_ahead(run, targets, config.steps, config.lr_share, device, tolerance)
            work.say_cost(replay)
            with timed(folder, replay) as scratch:
                work.make(replay, folder, scratch, batch_size)
            seal(folder, "pool values", settings, targets=[target.name for target in targets])
            _log.info("valuing the pool took %.0f forward+backward passes", timings_of(folder)["cost_units"])
    shutil.rmtree(folder / "scratch", ignore_errors=True)
    found = work.open(folder)
    _say_domains(found.domains, config)
    return found


@dataclass(frozen=True)
class _Work:
    """One pool, run, targets and settings: what there is to do, and how it is done."""

    run: Run
    pool: Pool
    targets: Sequence[Target]
    config: ProbeConfig
    adjoint: AdjointConfig
    seed: int

    @property
    def settings(self) -> Json:
        unread = set() if self.config.rest == "features" else {"hidden_states"}
        return {
            "run": self.run.fingerprint,
            "samples": samples_fingerprint(self.pool.samples),
            "targets": [target.fingerprint for target in self.targets],
            "probe": self.config.model_dump(exclude={"overlap", "min_rank_correlation", *unread}),
            "predictor": None if unread else [*PREDICTOR, *NGRAM_PREDICTOR],
            "adjoint": self.adjoint.model_dump(include={"own_step", "hessian", "hessian_share"}),
            "seed": self.seed,
        }

    @property
    def probes(self) -> pl.DataFrame:
        config = self.config
        return draw_probes(self.pool.samples, config.share, config.min_per_domain, step_samples(self.run), self.seed)

    def say_cost(self, replay: Replay) -> None:
        """Say what will be done, before it is."""
        config, batch = self.config, step_samples(self.run)
        probes, samples = len(self.probes), len(self.pool.samples)
        ahead = look_ahead_units(self.run, self.targets, config.steps, self.adjoint)
        own = OWN_STEP_UNITS[self.adjoint.own_step]
        own += 0.0 if self.adjoint.own_step == "exact" else _SLOPE_UNITS
        passes = {
            "slopes": slope_units(self.run, len(self.targets), samples),
            "features": slope_units(self.run, len(self.targets), probes)
            + (_HIDDEN_UNITS * samples / batch if self._reads_hidden(replay) else 0.0),
            "none": 0.0,
        }
        rest = passes[config.rest]
        units = ahead + own * probes / batch + rest
        _log.info(
            "valuing the pool will cost about %.0f forward+backward passes: %.0f to look %d steps ahead, %.0f to probe "
            "%s of %s samples, %.0f for the rest (%s); training once on the pool is %.0f",
            units, ahead, config.steps, own * probes / batch, f"{probes:,}", f"{samples:,}", rest,
            config.rest,
            samples / batch,
        )  # fmt: skip

    def _reads_hidden(self, replay: Replay) -> bool:
        return self.config.hidden_states and output_layer(replay.model) is not None

    def make(self, replay: Replay, folder: Path, scratch: Path, batch_size: int) -> None:
        """Probe, and value the rest."""
        probes = self.probes
        losses = [half for target in self.targets for half in target.halves]
        check_fit(self.pool.stock.catalogue, self.pool.stock.spec.streams, replay.model)
        outlook = look_ahead(replay, self.run.spec.steps, losses, self.adjoint, batch_size=batch_size, scratch=scratch)
        halves = probe_values(
            replay, outlook, list(self._read(probes)), self.adjoint, step_tokens=step_tokens(self.run), scratch=scratch
        )
        values = self._per_token(halves, probes)
        if self.config.rest != "features":
            slopes = self._slopes(replay, outlook, scratch)
            found, domains = from_slopes(self.pool.samples, probes, values, slopes, self.seed)
        else:
            ratios, tokens = ratios_of(self.targets, self._read(probes)), self._tokens(replay, outlook, probes, scratch)
            reader = FeatureReader(self.pool.samples, self._read, self._hidden(replay), ratios, tokens)
            found, domains = spread(self.pool.samples, probes, values, reader, self.seed)
        for name, table in (("values", found), ("domains", domains)):
            with replacing(folder / f"{name}.parquet") as part:
                table.write_parquet(part)

    def _read(self, samples: pl.DataFrame) -> Iterable[list[Sample]]:
        """The samples in their order, as many as go through the model together."""
        return read_together(self.run, self.pool.stock, samples)

    def _per_token(self, halves: Floats, probes: pl.DataFrame) -> Floats:
        """(n, 3 T) value, value_a and value_b for each target, at the median lr, from the halves' values (n, 2 T)."""
        columns = []
        for place, target in enumerate(self.targets):
            a, b = halves[:, 2 * place], halves[:, 2 * place + 1]
            columns += [target.half_weights[0] * a + target.half_weights[1] * b, a, b]
        found: Floats = np.stack(columns, axis=1) / probes["tokens"].to_numpy()[:, None] / self.config.lr_share
        return found

    def _slopes(self, replay: Replay, outlook: Outlook, scratch: Path) -> Floats:
        """(N, T) linear values of every sample, per token, at the median lr; all the same where none are asked for."""
        if self.config.rest == "none":
            return np.zeros((len(self.pool.samples), len(self.targets)))
        return self._linear(replay, outlook, self.pool.samples, "slopes", scratch)

    def _tokens(
        self, replay: Replay, outlook: Outlook, probes: pl.DataFrame, scratch: Path
    ) -> tuple[NgramSlopes, Floats]:
        """A fit to the slopes of the probes' tokens, and (n, T) what it predicts of held-out probes."""
        found = self._linear(replay, outlook, probes, "tokens", scratch, by_token=True)
        keys = np.concatenate([ngrams_of(sample) for samples in self._read(probes) for sample in samples])
        made, held_out = fit(keys, found, probes["tokens"].to_numpy(), self.seed)
        return made, np.nan_to_num(held_out)

    def _linear(
        self, replay: Replay, outlook: Outlook, samples: pl.DataFrame, name: str, scratch: Path, by_token: bool = False
    ) -> Floats:
        """Linear values for each target at the median lr, see `linear_values`."""
        directions = target_directions(replay, outlook, each_target(self.targets).tolist())
        found = linear_values(
            replay, outlook.state.parameters, directions, samples, name, read=self._read, scratch=scratch,
            by_token=by_token,
        )  # fmt: skip
        values: Floats = found / step_tokens(self.run) / self.config.lr_share
        return values

    def _hidden(self, replay: Replay) -> Path | None:
        """Mean hidden states of every sample, where they are read; kept for other targets."""
        if not self._reads_hidden(replay):
            return None
        settings = {"run": self.run.fingerprint, "samples": samples_fingerprint(self.pool.samples)}
        folder = self.run.folder / "pools" / f"hidden-{fingerprint(settings)[:8]}"
        with making(folder, settings) as missing:
            if missing:
                replay.horizon_model(self.run.spec.steps)
                blocks = blocks_of(self.pool.samples)
                for number, block in enumerate(progress(blocks, total=len(blocks), what="hidden states", unit="block")):
                    if not block_file(folder, number).exists():
                        made = [mean_hidden_states(replay.task, samples) for samples in self._read(block)]
                        with replacing(block_file(folder, number)) as part, part.open("wb") as file:
                            np.save(file, np.concatenate(made))
                seal(folder, "hidden states", settings, samples=len(self.pool.samples))
        return folder

    def open(self, folder: Path) -> PoolValues:
        """The artifact with places and names."""
        names = pl.DataFrame({"of": range(len(self.targets)), "target": [target.name for target in self.targets]})
        places = self.pool.samples
        values, domains = settled(
            read_table(folder / "values.parquet"), read_table(folder / "domains.parquet"),
            self.config.min_rank_correlation,
        )  # fmt: skip
        every = values.join(names, on="of", maintain_order="left").join(
            places, on=["domain", "sample_id"], maintain_order="left"
        )
        domains = domains.join(names, on="of", maintain_order="left")
        return PoolValues(
            folder=folder,
            probed=self._frame(every),
            every=every.select(
                "target", "domain", "index", "sample_id", "length", "tokens", *VALUES, "source"
            ),
            domains=domains.select("target", pl.exclude("of", "target")),
            **timings_of(folder),
        )  # fmt: skip

    def _frame(self, every: pl.DataFrame) -> pl.DataFrame:
        """The probed samples as a values frame; see `scores.schema`."""
        probed = every.filter(pl.col("source") == "probe")
        whole = probed.with_columns(pl.col(name) * pl.col("tokens") for name in VALUES)
        return probe_frame(whole, POOL, self.config.steps, step_tokens(self.run), self._read)


def _say_domains(domains: pl.DataFrame, config: ProbeConfig) -> None:
    for row in domains.iter_rows(named=True):
        known = row["spearman"] is not None
        said = f"{row['spearman']:.2f} [{row['low']:.2f}, {row['high']:.2f}]" if known else "not defined"
        how = {
            "predictor": "the rest is predicted",
            "probes": "all samples are probed",
            "domain mean": (f"too low (probe.min_rank_correlation {config.min_rank_correlation:g}): " if known else "")
            + "the domain's mean stands for the rest",
        }[row["used"]]
        _log.info(
            "%s, %s: %s of %s samples probed, rank correlation %s; %s",
            row["target"], row["domain"], f"{row['probed']:,}", f"{row['samples']:,}", said, how,
        )  # fmt: skip
