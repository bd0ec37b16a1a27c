"""`python -m pipelines.pretrain`: a plain PyTorch pretraining loop over MDS streams.

Curate is in the loop as the recorder only: `begin_step`, `micro_batch`, `end_step`, `flush` at checkpoints,
`finish`. Float32 on one device; the loss of a step is the token mean or the sample mean over all its micro-batches.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import dataframely as dy
import numpy as np
import polars as pl
from pydantic import Field

from curate.core.config import Config, parse_command, run_command
from curate.core.errors import UserError
from curate.core.lock import locked
from curate.core.machine import usable_device
from curate.core.progress import progress, start_logging
from curate.data.mds import Columns, MdsStream, as_sample
from curate.data.memory import release
from curate.data.phases import load_schedule
from curate.data.streams import domain_folders, find_tokenizer, load_streams
from curate.embeddings.run_capture import CaptureConfig, RunCapture
from curate.tables import Catalogue
from curate.training.fit import check_fit, check_tokens
from curate.training.recorder import NoRecorder, RecorderConfig, TrajectoryRecorder
from curate.training.snapshots import load_state
from curate.training.source import read_catalogue
from curate.training.task import ModelSpec, TaskSpec, build_model
from pipelines.checkpoints import FINAL, finish, finished, resume, save
from pipelines.optimizers import OptimizerConfig, build_optimizers, learning_rate

if TYPE_CHECKING:
    from streaming import StreamingDataLoader
    from torch import Tensor, nn
    from torch.optim import Optimizer

_log = logging.getLogger(__name__)


class PretrainConfig(Config):
    """One training stage."""

    out: Path
    """Folder of the run: records, snapshots, checkpoint, final weights."""
    data: Path
    """Folder of MDS folders (of `pipelines.prepare`, say) or an MDS folder, or a streams.yaml or schedule.yaml of
    `curate.select`."""
    model: Path
    """JSON file or folder with the config of a Hugging Face causal LM."""
    steps: int = Field(ge=1)
    """Optimizer steps; more than one pass over the data starts a new epoch (a schedule has but one)."""
    batch_size: int = Field(default=16, ge=1)
    """Sequences per optimizer step."""
    micro_batch_size: int | None = Field(default=None, ge=1)
    """Sequences per forward and backward pass; none: the whole batch."""
    columns: Columns = Columns()
    """Columns of the streams, where another program wrote them."""
    tokenizer: Path | None = None
    """`tokenizers` JSON file that made the tokens, for targets given as text; none: the tokenizer.json beside the
    streams, if there is one."""
    loss_mean: Literal["token", "sample"] = "token"
    """Mean over the step's predicted tokens, or over its samples."""
    init_from: Path | None = None
    """State of an earlier stage to start from (model and optimizer), e.g. RUN/checkpoint.safetensors; none: random
    weights.
    """
    seed: int = Field(default=0, ge=0, lt=1 << 32)
    """Seed of the initial weights and of the sample order."""
    checkpoint_steps: int = Field(default=100, ge=1)
    """Steps between checkpoints; an interrupted run continues from the last one."""
    device: str = "cpu"
    """Device to train on."""
    optimizer: OptimizerConfig = OptimizerConfig()
    """Optimizer."""
    recorder: RecorderConfig | None = RecorderConfig()
    """What is recorded; null: train without a recorder."""
    capture: CaptureConfig | None = None
    """What is captured of the gradients in the recorder's windows; null: nothing, values are replayed for."""


def train(config: PretrainConfig) -> list[float]:
    """Train the stage to its end, from its checkpoint where it has one.

    Returns:
        Losses of the steps that this call trained, nats per token; none where the stage is complete.

    Raises:
        UserError: the data or settings do not fit, or the folder holds a stage made with other settings.
    """
    settings = config.model_dump(mode="json", exclude={"out", "capture"})  # a capture changes no number
    if finished(config.out, settings):
        _log.info("%s is complete already", config.out)
        return []
    # a stack, because the data loader, which is opened deep inside, must be closed after an error too
    with ExitStack() as stack:
        stack.enter_context(locked(config.out))
        return _train(config, settings, stack)


def _train(config: PretrainConfig, settings: dict[str, Any], stack: ExitStack) -> list[float]:
    import torch

    if config.init_from is not None and config.init_from.is_dir():
        raise UserError(f"init_from {config.init_from} is a folder; name a state in it, {config.init_from / FINAL}")
    # for the initial weights; the order of samples has a generator of its own
    torch.manual_seed(config.seed)
    model = build_model(ModelSpec(hf_config=config.model.resolve()))
    model = model.to(usable_device(config.device))
    optimizers = build_optimizers(model, config.optimizer)
    streams = load_streams(config.data)
    catalogue = _read_streams(streams, model, config)
    tokenizer = _tokenizer(config, streams, catalogue)
    # after the checks of the data: the dataset takes shared memory when it is made
    loader = _loader(config, stack)
    first_step = resume(config.out, model, optimizers, loader)
    # a checkpoint of this stage holds what the initial state became
    if first_step == 0 and config.init_from is not None:
        load_state(config.init_from, model, optimizers)
    seq_len = int(catalogue["stored_tokens"].max())  # type: ignore[arg-type]
    recorder = _recorder(config, model, optimizers, streams, seq_len, first_step, tokenizer)
    batches = _forever(loader)
    losses = []
    for step in progress(range(first_step, config.steps), total=config.steps, what="train", done=first_step):
        # before lr and gradients are touched: a snapshot holds the state that the step starts from
        recorder.begin_step(step)
        for group in (group for optimizer in optimizers for group in optimizer.param_groups):
            group["lr"] = learning_rate(config.optimizer, step, config.steps)
        model.zero_grad(set_to_none=True)
        # on the device: .item() for every micro-batch would wait for it
        loss = torch.zeros((), device=config.device)
        for micro_batch in _micro_batches(next(batches), config):
            micro_loss = _loss(model, micro_batch, config.device)
            micro_loss.backward()
            loss += micro_loss.detach()
            recorder.micro_batch(micro_batch["sample_ids"], micro_batch["weights"], micro_batch["predicted"])
        # after the last micro-batch, as the replay clips: the whole gradient, not its parts
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), config.optimizer.clip_norm)
        for optimizer in optimizers:
            optimizer.step()
        recorder.end_step(loss, norm)
        losses.append(loss.item())
        if (step + 1) % config.checkpoint_steps == 0 or step + 1 == config.steps:
            # records first: a checkpoint must not be ahead of what is recorded, or a resumed run would miss steps
            recorder.flush()
            save(config.out, step + 1, settings, model, optimizers, loader)
    # the recorder finishes last: a run that is finished has its final checkpoint
    finish(config.out, config.steps)
    recorder.finish()
    _log.info(
        "trained %d steps, last loss %.4f nats per token -> %s",
        len(losses),
        losses[-1] if losses else math.nan,
        config.out,
    )
    return losses


def _loss(model: nn.Module, micro_batch: dict[str, Any], device: str) -> Tensor:
    """This micro-batch's part of the step's loss, nats per token."""
    from torch.nn.functional import cross_entropy

    tokens = micro_batch["tokens"].to(device)
    # no attention mask: attention is causal and padding stands at the end, so that no real token sees it
    logits = model(input_ids=tokens, use_cache=False).logits[:, :-1].float()
    nll = cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten(), reduction="none").view(tokens[:, 1:].shape)
    loss: Tensor = (nll * micro_batch["token_weights"].to(device)).sum()
    return loss


def _recorder(
    config: PretrainConfig,
    model: nn.Module,
    optimizers: list[Optimizer],
    streams: list[dict[str, Any]],
    seq_len: int,
    first_step: int,
    tokenizer: Path | None,
) -> TrajectoryRecorder | NoRecorder:
    if config.recorder is None:
        if config.capture is not None:
            raise UserError("capture needs the recorder, which is off (recorder: null); set recorder, or capture: null")
        return NoRecorder()
    recorder = TrajectoryRecorder(
        config.out,
        config.recorder,
        model,
        optimizers,
        steps=config.steps,
        first_step=first_step,
        task=TaskSpec(model=ModelSpec(hf_config=config.model.resolve())),
        streams=domain_folders(streams),
        tokenizer=tokenizer,
        columns=config.columns,
        seq_len=seq_len,
        clip_norm=config.optimizer.clip_norm,
        previous=_previous(config),
    )
    if config.capture is not None:
        recorder.attach(RunCapture(recorder, config.capture))
    return recorder


def _previous(config: PretrainConfig) -> Path | None:
    """The recorded run that the initial state is the end of."""
    # what was seen before this stage is read from there
    folder = config.init_from and config.init_from.parent
    return folder if folder and (folder / "run.json").exists() else None


def _read_streams(streams: list[dict[str, Any]], model: nn.Module, config: PretrainConfig) -> dy.DataFrame[Catalogue]:
    """Read every sample once, hold it against the model, and keep the catalogue, which `curate.select` needs later.

    Raises:
        UserError: a stream is missing or damaged, has nothing to predict, or does not fit the model.
    """
    opened = {domain: MdsStream(folder, config.columns) for domain, folder in domain_folders(streams).items()}
    mask = config.columns.loss_mask
    unmasked = [domain for domain, stream in opened.items() if not any(mask in kind for kind in stream.encodings)]
    if len(unmasked) == len(opened) and mask != Columns().loss_mask:
        columns = sorted(next(iter(opened.values())).encodings[0])
        # a wrong name would make every token predicted without a word; the default name may be absent
        raise UserError(f"no stream of {config.data} has a column {mask!r} (one has {columns}); set columns.loss_mask")
    if unmasked:
        _log.info("no column %r in %s: all tokens but the first are predicted", mask, ", ".join(unmasked))
    catalogue = read_catalogue(config.out, opened)
    check_fit(catalogue, domain_folders(streams), model)
    predicted = dict(catalogue.group_by("domain").agg(pl.col("predicted_tokens").sum()).iter_rows())
    silent = [domain for domain in opened if not predicted[domain]]
    if silent:
        raise UserError(
            f"{opened[silent[0]].folder} has no token to predict: its loss mask is 0 everywhere, or its sequences have "
            "one token; correct columns.loss_mask, or leave the stream out"
        )
    return catalogue


def _tokenizer(
    config: PretrainConfig, streams: list[dict[str, Any]], catalogue: dy.DataFrame[Catalogue]
) -> Path | None:
    """What the run is recorded with.

    Raises:
        UserError: it is not the data's, or lacks some of its token ids.
    """
    tokenizer = find_tokenizer(config.data, streams, config.tokenizer)
    if tokenizer is not None:
        check_tokens(catalogue, domain_folders(streams), tokenizer)
    elif config.recorder is not None:
        _log.warning(
            "there is no tokenizer.json beside the streams: targets must be token ids, unless the tokenizer that made "
            "the data is given (--tokenizer, here or to curate.select)"
        )
    return tokenizer


def _loader(config: PretrainConfig, stack: ExitStack) -> StreamingDataLoader:
    """The batches of the stage; the stack gives back what they take.

    Raises:
        UserError: batch sizes do not go together, or the streams have less than a batch or less than the stage needs.
    """
    from streaming import StreamingDataLoader

    from curate.data.dataset import open_dataset

    size = config.batch_size
    if config.micro_batch_size and size % config.micro_batch_size:
        raise UserError(f"batch_size {size} is not a multiple of micro_batch_size {config.micro_batch_size}")
    _check_length(config)
    dataset = open_dataset(config.data, batch_size=size, seed=config.seed, predownload=8 * size)
    stack.callback(release, dataset)
    amounts = ", ".join(f"{stream.choose:,} of {stream.local}" for stream in dataset.streams)
    if dataset.epoch_size < size:
        raise UserError(
            f"an epoch of {config.data} has {dataset.epoch_size} samples ({amounts}), fewer than one batch of {size}; "
            "lower batch_size, or raise choose, repeat or proportion"
        )
    _log.info("%s samples in an epoch: %s", f"{dataset.epoch_size:,}", amounts)
    # drop_last: every step has batch_size samples, as the recorder and the schedule count
    return StreamingDataLoader(dataset, batch_size=size, collate_fn=_keep, drop_last=True)


def _check_length(config: PretrainConfig) -> None:
    """A schedule is served once; streams begin a new epoch."""
    schedule = load_schedule(config.data)
    if schedule is not None and schedule.stop < config.steps * config.batch_size:
        raise UserError(
            f"{config.data} is a schedule of {schedule.stop:,} samples, {config.steps} steps of {config.batch_size} "
            f"need {config.steps * config.batch_size:,}; set steps to at most {schedule.stop // config.batch_size}"
        )


def _keep(samples: list[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    """Samples as they are; a dict, because that is what StreamingDataLoader counts samples of (for resuming)."""
    return {"samples": samples}


def _forever(loader: StreamingDataLoader) -> Iterator[list[dict[str, Any]]]:
    """Batches of one epoch after the other.

    Raises:
        UserError: epochs have none.
    """
    empty = 0  # epochs without a batch in a row; a run that resumes at the end of an epoch has one
    while empty < 2:
        empty += 1
        for batch in loader:
            empty = 0
            yield batch["samples"]
    raise UserError(f"an epoch of the data has no batch of {loader.batch_size} samples; lower batch_size")


def _micro_batches(rows: list[dict[str, Any]], config: PretrainConfig) -> Iterator[dict[str, Any]]:
    """The micro-batches of one step.

    Yields:
        sample_ids, tokens (b, T) int64 (padded at the end), predicted (b,) token counts, weights (b,) `c_z` that sum
        to 1 over the step, and token_weights (b, T-1), `c_z / predicted` where a token is predicted and 0 elsewhere.
    """
    import torch
    from torch.nn.utils.rnn import pad_sequence

    samples = [as_sample(row, config.columns, str(config.data)) for row in rows]
    tokens = pad_sequence([torch.from_numpy(sample.tokens.astype(np.int64)) for sample in samples], batch_first=True)
    mask = pad_sequence([torch.from_numpy(sample.loss_mask[1:].astype(np.float32)) for sample in samples], True)
    predicted = mask.sum(1)
    # a sample without predicted tokens has no loss: it does not count in the mean over samples either
    mass = predicted if config.loss_mean == "token" else (predicted > 0).float()
    # over the whole step, not the micro-batch: the cut into micro-batches changes no gradient
    weights = mass / mass.sum().clamp(min=1)
    token_weights = mask * (weights / predicted.clamp(min=1))[:, None]
    size = config.micro_batch_size or config.batch_size
    for start in range(0, len(samples), size):
        micro = slice(start, start + size)
        yield {
            "sample_ids": [sample.sample_id for sample in samples[micro]],
            "tokens": tokens[micro],
            "predicted": predicted[micro].int(),
            "weights": weights[micro],
            "token_weights": token_weights[micro],
        }


def main() -> None:
    """Entry point."""
    config = parse_command(PretrainConfig, "python -m pipelines.pretrain", "Train one stage on MDS streams, recorded.")
    start_logging()
    train(config)


if __name__ == "__main__":
    run_command(main)
