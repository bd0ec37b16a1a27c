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
_ELSEWHERE = {"out", "device"}  # settings that no number of the run depends on


def reconstruct(config: ReconstructConfig) -> Path:
    """Write the run folder of a described run, once it has been checked.

    Returns:
        The folder; a complete one made from the same description is returned as it is.

    Raises:
        UserError: the description does not fit data, checkpoints or log, or the folder holds something else.
    """
    settings = {
        **config.model_dump(mode="json", exclude=_ELSEWHERE),
        # By content: a log that was exported again under the same name is another description.
        "log_file": file_fingerprint(config.log.file) if config.log.file.is_file() else None,
    }
    # Beside the folder, not in it: `out` is replaced as a whole, and its lock would go with it.
    lock = f".{config.out.name}.lock"
    if not _is_complete(config.out, settings):
        with locked(config.out.parent, lock, wait=True):
            # Another process may have made it while this one waited.
            if not _is_complete(config.out, settings):
                _make(config, settings)
    else:
        sweep(config.out.parent, lock)
        _log.info("this run is reconstructed already")
    return config.out


def _make(config: ReconstructConfig, settings: dict[str, Any]) -> None:
    _warn_version(config)
    with atomic_write(config.out) as folder:
        folder.mkdir(parents=True)
        model = build_model(config.task.model)
        optimizers = build_optimizers(model, config)
        order = _write_records(folder, config, model, optimizers)
        complete = _write_states(folder, config, model, optimizers)
        # From here on it is a run like any other: the check uses the same replay as every estimator.
        replay = Replay(Run(folder), config.device, config.tolerance)
        compared = _check(folder, config, replay, complete)
        # Only after the check: also a state without moments confirms the order of the samples.
        _keep_complete(folder, config, complete)
        filled = _fill_norms(folder, replay)
        facts = {
            "settings": settings,
            "order": order.settings,
            "steps_with_logged_loss": replay.run.steps.filter(pl.col("loss").is_not_null())["step"].n_unique(),
            "steps_with_replayed_norm": filled,
            "estimated_optimizer_state": [step for step, whole in complete.items() if not whole],
            "compared": [asdict(comparison) for comparison in compared],
            "versions": versions(),
        }
        write_json(folder / FACTS, facts)


def _is_complete(out: Path, settings: dict[str, Any]) -> bool:
    if not out.exists():
        return False
    earlier = read_json(out / FACTS).get("settings", {}) if (out / FACTS).exists() else None
    if earlier is None:
        raise UserError(f"{out} exists and is no reconstructed run; choose another out")
    differing = sorted(key for key in {*earlier, *settings} if earlier.get(key) != settings.get(key))
    if differing:
        raise UserError(
            f"{out} was reconstructed from another description ({', '.join(differing)} differ); choose another out"
        )
    return True


def _warn_version(config: ReconstructConfig) -> None:
    installed = streaming_version()
    if config.streaming_version not in (None, installed):
        _log.warning(
            "the run used mosaicml-streaming %s, installed is %s: orders may differ between versions; the check "
            "against the log decides",
            config.streaming_version,
            installed,
        )


def _write_records(
    folder: Path, config: ReconstructConfig, model: nn.Module, optimizers: list[Optimizer]
) -> SampleOrder:
    """Write `run.json` and `steps.parquet`; returns the order."""
    folders = {domain: stream_folder(stream) for domain, stream in config.streams.items()}
    streams = {domain: MdsStream(folder, config.columns) for domain, folder in folders.items()}
    log = read_log(config.log, config.steps)
    order = SampleOrder(list(config.streams.values()), config.dataset, config.loader)
    catalogue = read_catalogue(folder, streams)
    # Before any replay: a token id beyond the vocabulary would be an index error deep inside the model.
    check_fit(catalogue, folders, model)
    tokenizer = None if config.tokenizer is None else tokenizer_file(config.tokenizer).resolve()
    if tokenizer is None:
        _log.warning("no tokenizer is described: targets must be token ids, unless curate.select is given --tokenizer")
    else:
        check_tokens(catalogue, folders, tokenizer)
    frame = step_records(config, order, catalogue, log, group_settings(config, optimizers))
    names = {id(parameter): name for name, parameter in named_parameters(model).items()}
    spec = RunSpec(
        task=keep_model_config(folder, config.task),
        # Absolute paths: the run outlives the folder that this command was started in.
        streams={name: path.resolve() for name, path in folders.items()},
        columns=config.columns,
        tokenizer=tokenizer,
        seq_len=int(catalogue["stored_tokens"].max()),  # type: ignore[arg-type]
        steps=config.steps,
        windows=_windows(config),
        # A run counts parameter groups, not optimizers: one name for each group.
        optimizers=[type(optimizer).__name__ for optimizer in optimizers for _ in optimizer.param_groups],
        groups=[
            [names[id(parameter)] for parameter in group["params"]]
            for optimizer in optimizers
            for group in optimizer.param_groups
        ],
        clip_norm=config.clip_norm,
        previous=config.previous and config.previous.resolve(),
    )
    write_json(folder / "run.json", spec.model_dump(mode="json"))
    with atomic_write(folder / "steps.parquet") as path:
        frame.write_parquet(path)
    list_files(folder, [folder / "run.json", folder / "steps.parquet"])
    return order


def _windows(config: ReconstructConfig) -> dict[str, tuple[int, int]]:
    """The declared windows, or the recorder's default ones with the early one from the first checkpoint on.

    Raises:
        UserError: a window begins before the first checkpoint.
    """
    first, steps = min(config.checkpoints), config.steps
    if config.windows is None:
        early, late = default_windows(steps)["early"], default_windows(steps)["late"]
        windows = {"early": (first, min(first + early[1], steps)), "late": late}
    else:
        windows = window_steps(config.windows, steps)
    for name, (start, _) in windows.items():
        if start < first:
            raise UserError(
                f"the {name} window begins at step {start}, the first checkpoint is of step {first}: states before it "
                "are lost; set windows to steps from there on"
            )
    return windows


def _write_states(
    folder: Path, config: ReconstructConfig, model: nn.Module, optimizers: list[Optimizer]
) -> dict[int, bool]:
    """Write the checkpoints as snapshots; returns, per step, whether its optimizer state is complete."""
    names = {id(parameter): name for name, parameter in named_parameters(model).items()}
    groups = [
        [[names[id(parameter)] for parameter in group["params"]] for group in optimizer.param_groups]
        for optimizer in optimizers
    ]
    settings = [settings for settings, _ in group_settings(config, optimizers)]
    # Plain SGD keeps nothing: a checkpoint of the weights alone is complete.
    stateless = all(group.optimizer == "SGD" and group.momentum == 0 for group in settings)
    complete = {}
    for step, path in sorted(config.checkpoints.items()):
        checkpoint = read_checkpoint(path)
        unchecked = list(settings)
        # strict=False: `snapshot_tensors` refuses a wrong number of keys, and says where the state lies.
        for prefix, optimizer_groups in zip(config.checkpoint_keys.optimizers, groups, strict=False):
            check_settings(checkpoint, prefix, unchecked[: len(optimizer_groups)])
            unchecked = unchecked[len(optimizer_groups) :]
        tensors, has_moments = snapshot_tensors(checkpoint, config.checkpoint_keys, model, groups)
        put_state(tensors, model, optimizers, f"checkpoint {path}")
        save_snapshot(folder, step, model, optimizers)
        # Before step 0 no optimizer has any state.
        complete[step] = has_moments or stateless or step == 0
    return complete


def _check(folder: Path, config: ReconstructConfig, replay: Replay, complete: dict[int, bool]) -> list[Compared]:
    """Compare with the log, and estimate optimizer state where it is missing and the config asks for it."""
    compared: list[Compared] = []
    lacking = [step for step, whole in complete.items() if not whole]
    _log.info("checking up to %d steps from each of %d checkpoints against the log", config.check_steps, len(complete))
    for step, whole in complete.items():
        if step == config.steps:  # the final checkpoint: no step follows it
            continue
        # Without moments only the first loss can agree: its update goes wrong, and all later ones with it.
        compared += compare(replay, step, snapshot_path(folder, step), config.check_steps if whole else 1)
    # Diagnosing replays dozens of variants: a callable, so that it costs nothing where numbers agree.
    judge(compared, config.tolerance, lambda: diagnose(config, replay, replay.run.catalogue, _losses(replay.run)))
    for comparison in compared:
        _log.info("%s", comparison.line)
    if lacking and config.estimate_moments is None:
        kept = sorted(step for step, whole in complete.items() if whole)
        _log.warning(_lost_states_warning(lacking, kept))
    # After `judge`: moments of wrong samples would hide that the samples are wrong.
    for step in lacking if config.estimate_moments else []:
        estimate_moments(replay, step, snapshot_path(folder, step), int(config.estimate_moments or 0))
        if step == config.steps:
            continue
        drift = compare(replay, step, snapshot_path(folder, step), config.check_steps)
        for comparison in drift[1:]:
            _log.info("with estimated moments, %s", comparison.line)
        # The step itself was compared above: its loss does not depend on the moments.
        compared += [comparison for comparison in drift if comparison.step != step]
    return compared


def _losses(run: Run) -> dict[int, float]:
    return dict(run.steps.filter(pl.col("loss").is_not_null()).unique("step").select("step", "loss").iter_rows())


def _lost_states_warning(lacking: list[int], kept: list[int]) -> str:
    return (
        f"the checkpoints of steps {lacking} have no optimizer state: they confirm the order, but what follows them "
        f"cannot be replayed, and they become no snapshots; snapshots are those of steps {kept}. With estimate_moments "
        "(100, say) they serve every estimator, on states that drift as the check then shows; plain SGD needs none"
    )


def _keep_complete(folder: Path, config: ReconstructConfig, complete: dict[int, bool]) -> None:
    """Remove states that no replay can start from.

    Raises:
        UserError: no window can be replayed then.
    """
    if config.estimate_moments is not None:
        return
    for step, whole in complete.items():
        if not whole:
            snapshot_path(folder, step).unlink()
    kept = [step for step, whole in complete.items() if whole]
    for name, (start, _) in _windows(config).items():
        if not kept or min(kept) > start:
            raise UserError(
                f"the {name} window begins at step {start}, and no checkpoint at or before it has optimizer state: "
                "set estimate_moments (100, say) to make it from the gradients of as many steps before each "
                "checkpoint, or windows to steps after a checkpoint that has it"
            )


def _fill_norms(folder: Path, replay: Replay) -> int:
    """Replay the windows where the log does not tell what clipping did, and record it; returns the number of steps.

    Only the windows: to replay all steps would cost as much as the training.
    """
    run = replay.run
    unknown = set(run.steps.filter(pl.col("clip_factor").is_null())["step"])
    norms = {}
    for start, stop in run.spec.windows.values():
        if unknown & set(range(start, stop)):
            _log.info("replaying steps %d to %d for their gradient norms, which were not logged", start, stop)
            for replayed in replay.steps(start, stop):
                norms[replayed.record.step] = replay.gradient_norm()
    # What was logged stands, also where this replay measured it again.
    norms = {step: norm for step, norm in norms.items() if step in unknown}
    if norms:
        measured = pl.DataFrame(
            [
                {"step": step, "norm": norm, "factor": clip_factor(norm, run.spec.clip_norm)}
                for step, norm in norms.items()
            ]
        )
        filled = run.steps.join(measured, on="step", how="left", maintain_order="left").with_columns(
            pl.coalesce("grad_norm", "norm").alias("grad_norm"),
            pl.coalesce("clip_factor", "factor").alias("clip_factor"),
        )
        with atomic_write(folder / "steps.parquet") as path:
            filled.drop("norm", "factor").write_parquet(path)
        list_files(folder, [folder / "steps.parquet"])
    return len(norms)
