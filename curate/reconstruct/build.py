"""From a description to a run folder: order, records, snapshots, and the check that makes it trustworthy."""

from __future__ import annotations

import logging
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import polars as pl

from curate.core.artifacts import file_fingerprint, list_files, read_json, versions, write_json
from curate.core.errors import UserError
from curate.core.lock import locked, sweep
from curate.core.writing import atomic_write
from curate.data.documents import tokenizer_file
from curate.data.mds import MdsStream
from curate.data.order import SampleOrder, stream_folder, streaming_version
from curate.reconstruct.check import compare, judge
from curate.reconstruct.checkpoints import check_settings, read_checkpoint, snapshot_tensors
from curate.reconstruct.description import build_optimizers, group_settings
from curate.reconstruct.diagnose import diagnose
from curate.reconstruct.moments import estimate_moments
from curate.reconstruct.records import read_log, step_records
from curate.training.declared import default_windows, window_steps
from curate.training.fit import check_fit, check_tokens
from curate.training.model import named_parameters
from curate.training.recorder import clip_factor
from curate.training.replay import Replay
from curate.training.run import Run, RunSpec, keep_model_config
from curate.training.snapshots import put_state, save_snapshot, snapshot_path
from curate.training.source import read_catalogue
from curate.training.task import build_model

if TYPE_CHECKING:
    from torch import nn
    from torch.optim import Optimizer

    from curate.reconstruct.check import Compared
    from curate.reconstruct.description import ReconstructConfig

_log = logging.getLogger(__name__)
FACTS = "reconstruction.json"
_ELSEWHERE = {"out", "device"}


def reconstruct(config: ReconstructConfig) -> Path:
    """Write the run folder of a described run, once it has been checked.

    Returns:
        The folder; a complete one made from the same description is returned as it is.

    Raises:
        UserError: the description does not fit data, checkpoints or log, or the folder holds something else.
    """
    settings = {
        **config.model_dump(mode="json", exclude=_ELSEWHERE),
        "log_file": file_fingerprint(config.log.file) if config.log.file.is_file() else None,
    }
    lock = f".{config.out.name}.lock"
    if not _is_complete(config.out, settings):
        with locked(config.out.parent, lock, wait=True):
            if not _is_complete(config.out, settings):
                _make(config, settings)
    else:
        sweep(config.out.parent, lock)
        _log.info("this run is reconstructed already")
    return config.out


def _make(config: ReconstructConfig, settings: dict[str, Any]) -> None:
    _say_version(config)
    with atomic_write(config.out) as part:
        part.mkdir(parents=True)
        model = build_model(config.task.model)
        optimizers = build_optimizers(model, config)
        order = _write_records(part, config, model, optimizers)
        complete = _write_states(part, config, model, optimizers)
        replay = Replay(Run(part), config.device, config.tolerance)
        compared = _checked(part, config, replay, complete)
        _keep_complete(part, config, complete)
        filled = _fill_norms(part, replay)
        facts = {
            "settings": settings,
            "order": order.settings,
            "steps_with_logged_loss": replay.run.steps.filter(pl.col("loss").is_not_null())["step"].n_unique(),
            "steps_with_replayed_norm": filled,
            "estimated_optimizer_state": [step for step, whole in complete.items() if not whole],
            "compared": [asdict(one) for one in compared],
            "versions": versions(),
        }
        write_json(part / FACTS, facts)


def _is_complete(out: Path, settings: dict[str, Any]) -> bool:
    if not out.exists():
        return False
    found = read_json(out / FACTS).get("settings", {}) if (out / FACTS).exists() else None
    if found is None:
        raise UserError(f"{out} exists and is no reconstructed run; choose another out")
    differing = sorted(key for key in {*found, *settings} if found.get(key) != settings.get(key))
    if differing:
        raise UserError(
            f"{out} was reconstructed from another description ({', '.join(differing)} differ); choose another out"
        )
    return True


def _say_version(config: ReconstructConfig) -> None:
    here = streaming_version()
    if config.streaming_version not in (None, here):
        _log.warning(
            "the run used mosaicml-streaming %s, installed is %s: orders may differ between versions; the check "
            "against the log decides", config.streaming_version, here,
        )  # fmt: skip


def _write_records(part: Path, config: ReconstructConfig, model: nn.Module, optimizers: list[Optimizer]) -> SampleOrder:
    """Write `run.json` and `steps.parquet`; returns the order."""
    folders = {domain: stream_folder(stream) for domain, stream in config.streams.items()}
    streams = {domain: MdsStream(folder, config.columns) for domain, folder in folders.items()}
    log = read_log(config.log, config.steps)
    order = SampleOrder(list(config.streams.values()), config.dataset, config.loader)
    catalogue = read_catalogue(part, streams)
    check_fit(catalogue, folders, model)
    tokenizer = None if config.tokenizer is None else tokenizer_file(config.tokenizer).resolve()
    if tokenizer is None:
        _log.warning("no tokenizer is described: targets must be token ids, unless curate.select is given --tokenizer")
    else:
        check_tokens(catalogue, folders, tokenizer)
    frame = step_records(config, order, catalogue, log, group_settings(config, optimizers))
    names = {id(parameter): name for name, parameter in named_parameters(model).items()}
    spec = RunSpec(
        task=keep_model_config(part, config.task), streams={name: path.resolve() for name, path in folders.items()},
        columns=config.columns, tokenizer=tokenizer,
        seq_len=int(catalogue["stored_tokens"].max()), steps=config.steps, windows=_windows(config),  # type: ignore[arg-type]
        optimizers=[type(optimizer).__name__ for optimizer in optimizers for _ in optimizer.param_groups],
        groups=[[names[id(p)] for p in group["params"]] for each in optimizers for group in each.param_groups],
        clip_norm=config.clip_norm, previous=config.previous and config.previous.resolve(),
    )  # fmt: skip
    write_json(part / "run.json", spec.model_dump(mode="json"))
    with atomic_write(part / "steps.parquet") as path:
        frame.write_parquet(path)
    list_files(part, [part / "run.json", part / "steps.parquet"])
    return order


def _windows(config: ReconstructConfig) -> dict[str, tuple[int, int]]:
    """The declared windows, or the recorder's with the early one from the first checkpoint on.

    Raises:
        UserError: a window begins before the first checkpoint.
    """
    first, steps = min(config.checkpoints), config.steps
    if config.windows is None:
        early, late = default_windows(steps)["early"], default_windows(steps)["late"]
        found = {"early": (first, min(first + early[1], steps)), "late": late}
    else:
        found = window_steps(config.windows, steps)
    for name, (start, _) in found.items():
        if start < first:
            raise UserError(
                f"the {name} window begins at step {start}, the first checkpoint is of step {first}: states before it "
                "are lost; set windows to steps from there on"
            )
    return found


def _write_states(
    part: Path, config: ReconstructConfig, model: nn.Module, optimizers: list[Optimizer]
) -> dict[int, bool]:
    """Write the checkpoints as snapshots; returns, per step, whether its optimizer state is complete."""
    parameters = {id(parameter): name for name, parameter in named_parameters(model).items()}
    groups = [[[parameters[id(p)] for p in group["params"]] for group in each.param_groups] for each in optimizers]
    settings = [settings for settings, _ in group_settings(config, optimizers)]
    stateless = all(each.optimizer == "SGD" and each.momentum == 0 for each in settings)
    complete = {}
    for step, path in sorted(config.checkpoints.items()):
        found = read_checkpoint(path)
        left = list(settings)
        for prefix, own in zip(config.checkpoint_keys.optimizers, groups, strict=False):
            check_settings(found, prefix, left[: len(own)])
            left = left[len(own) :]
        tensors, whole = snapshot_tensors(found, config.checkpoint_keys, model, groups)
        put_state(tensors, model, optimizers, f"checkpoint {path}")
        save_snapshot(part, step, model, optimizers)
        complete[step] = whole or stateless or step == 0
    return complete


def _checked(part: Path, config: ReconstructConfig, replay: Replay, complete: dict[int, bool]) -> list[Compared]:
    """Compare with the log; estimates optimizer state where it is lacking and asked for."""
    compared: list[Compared] = []
    lacking = [step for step, whole in complete.items() if not whole]
    _log.info("checking up to %d steps from each of %d checkpoints against the log", config.check_steps, len(complete))
    for step, whole in complete.items():
        if step == config.steps:
            continue
        compared += compare(replay, step, snapshot_path(part, step), config.check_steps if whole else 1)
    judge(compared, config.tolerance, lambda: diagnose(config, replay, replay.run.catalogue, _losses(replay.run)))
    for one in compared:
        _log.info("%s", one.line)
    if lacking and config.estimate_moments is None:
        kept = sorted(step for step, whole in complete.items() if whole)
        _log.warning(_what_is_lost(lacking, kept))
    for step in lacking if config.estimate_moments else []:
        estimate_moments(replay, step, snapshot_path(part, step), int(config.estimate_moments or 0))
        if step == config.steps:
            continue
        drift = compare(replay, step, snapshot_path(part, step), config.check_steps)
        for one in drift[1:]:
            _log.info("with estimated moments, %s", one.line)
        compared += [one for one in drift if one.step != step]
    return compared


def _losses(run: Run) -> dict[int, float]:
    return dict(run.steps.filter(pl.col("loss").is_not_null()).unique("step").select("step", "loss").iter_rows())


def _what_is_lost(lacking: list[int], kept: list[int]) -> str:
    return (
        f"the checkpoints of steps {lacking} have no optimizer state: they confirm the order, but what follows them "
        f"cannot be replayed, and they become no snapshots; snapshots are those of steps {kept}. With estimate_moments "
        "(100, say) they serve every estimator, on states that drift as the check then shows; plain SGD needs none"
    )


def _keep_complete(part: Path, config: ReconstructConfig, complete: dict[int, bool]) -> None:
    """Remove states that a replay would go wrong from.

    Raises:
        UserError: no window can be replayed then.
    """
    if config.estimate_moments is not None:
        return
    for step, whole in complete.items():
        if not whole:
            snapshot_path(part, step).unlink()
    kept = [step for step, whole in complete.items() if whole]
    for name, (start, _) in _windows(config).items():
        if not kept or min(kept) > start:
            raise UserError(
                f"the {name} window begins at step {start}, and no checkpoint at or before it has optimizer state: "
                "set estimate_moments (100, say) to make it from the gradients of as many steps before each "
                "checkpoint, or windows to steps after a checkpoint that has it"
            )


def _fill_norms(part: Path, replay: Replay) -> int:
    """Replay the windows where clipping is not known from the log, and record it; returns the number of steps."""
    run = replay.run
    unknown = set(run.steps.filter(pl.col("clip_factor").is_null())["step"])
    norms = {}
    for start, stop in run.spec.windows.values():
        if unknown & set(range(start, stop)):
            _log.info("replaying steps %d to %d for their gradient norms, which were not logged", start, stop)
            for replayed in replay.steps(start, stop):
                norms[replayed.record.step] = replay.gradient_norm()
    norms = {step: norm for step, norm in norms.items() if step in unknown}
    if norms:
        known = pl.DataFrame(
            [
                {"step": step, "norm": norm, "factor": clip_factor(norm, run.spec.clip_norm)}
                for step, norm in norms.items()
            ]
        )
        filled = run.steps.join(known, on="step", how="left", maintain_order="left").with_columns(
            pl.coalesce("grad_norm", "norm").alias("grad_norm"),
            pl.coalesce("clip_factor", "factor").alias("clip_factor"),
        )
        with atomic_write(part / "steps.parquet") as path:
            filled.drop("norm", "factor").write_parquet(path)
        list_files(part, [part / "steps.parquet"])
    return len(norms)
