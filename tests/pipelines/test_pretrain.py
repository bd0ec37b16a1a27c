"""The shipped trainer: resumes to the same bytes, records without changing a number, replays."""

import json

import numpy as np
import pytest

from curate.core.errors import UserError
from curate.data.mds import Columns, write_stream
from curate.data.streams import domain_folders
from curate.mixture.record import Phase
from curate.output.write import write_schedule
from curate.training.replay import Replay
from curate.training.run import Run
from curate.training.token_accounting import domains_seen, uses
from pipelines import pretrain
from pipelines.optimizers import OptimizerConfig, learning_rate
from pipelines.pretrain import PretrainConfig, train
from tests.tiny import write_tiny_streams

MODEL = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": 128, "hidden_size": 16,
    "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 2,
    "max_position_embeddings": 32, "tie_word_embeddings": True,
}  # fmt: skip


@pytest.fixture
def config(tmp_path):
    write_tiny_streams(tmp_path / "data")
    (tmp_path / "model.json").write_text(json.dumps(MODEL))
    return PretrainConfig(
        out=tmp_path / "run", data=tmp_path / "data", model=tmp_path / "model.json", steps=12, batch_size=8,
        micro_batch_size=4, checkpoint_steps=5, recorder={"windows": {"early": [0, 3], "late": [9, 12]}},
        optimizer=OptimizerConfig(warmup_steps=3, clip_norm=0.5),
    )  # fmt: skip


def train_until(crash, config, monkeypatch):
    """Train until step `crash` asks for its lr, and stop there as Ctrl-C does."""
    original = pretrain.learning_rate

    def crashing(optimizer, step, steps):
        if step == crash:
            raise KeyboardInterrupt
        return original(optimizer, step, steps)

    with monkeypatch.context() as patch:
        patch.setattr(pretrain, "learning_rate", crashing)
        with pytest.raises(KeyboardInterrupt):
            train(config)


def test_the_recorder_changes_no_loss_and_the_record_replays(config, tmp_path):
    recorded = train(config)
    assert train(config.model_copy(update={"recorder": None, "out": tmp_path / "plain"})) == recorded
    run = Run(config.out)
    assert run.spec.task.model.hf_config == (config.out / "model" / "config.json").resolve()
    (tmp_path / "model.json").write_text("{}")  # the run keeps its own copy
    assert len(list(Replay(run, tolerance=1e-5).steps(0, 12))) == 12
    assert (run.folder / "checkpoint.safetensors").exists()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("crash", "optimizer"), [(3, "AdamW"), (7, "AdamW"), (10, "AdamW"), (7, "Adam"), (7, "SGD"), (7, "Muon")]
)
def test_a_crashed_run_resumes_to_the_same_bytes(config, tmp_path, monkeypatch, crash, optimizer):
    settings = config.optimizer.model_copy(update={"name": optimizer})
    config = config.model_copy(update={"optimizer": settings})
    whole = train(config)
    assert len(list(Replay(Run(config.out), tolerance=1e-5).steps(0, 12))) == 12
    other = config.model_copy(update={"out": tmp_path / "crashed"})
    train_until(crash, other, monkeypatch)
    resumed = train(other)
    assert resumed == whole[-len(resumed) :]
    assert Run(other.out).steps.equals(Run(config.out).steps)
    for name in ("checkpoint.safetensors", "snapshots/step-00000012.safetensors"):
        assert (other.out / name).read_bytes() == (config.out / name).read_bytes()


def test_a_run_that_stopped_at_an_epochs_end_goes_on_with_the_next(config, tmp_path, monkeypatch):
    """20 batches are an epoch; the checkpoint after step 20 lies at its end."""
    config = config.model_copy(update={"steps": 24, "checkpoint_steps": 20, "recorder": None})
    whole = train(config)
    other = config.model_copy(update={"out": tmp_path / "crashed"})
    train_until(21, other, monkeypatch)
    assert train(other) == whole[20:]


def test_a_schedule_of_phases_is_recorded_resumed_and_counted(config, tmp_path, monkeypatch):
    """Phases change inside a step and the crash lies inside a phase, between two checkpoints."""
    phases = ({"json": 30, "dataclasses": 6}, {"json": 2, "dataclasses": 42}, {"json": 16, "dataclasses": 1})
    starts = (0, 36, 80)
    laid = [
        Phase(start_sample=start, blend=1.0, samples=sum(domains.values()), domains=domains)
        for start, domains in zip(starts, phases, strict=True)
    ]
    schedule = tmp_path / "schedule.yaml"
    write_schedule(schedule, {name: f"data/{name}" for name in ("json", "dataclasses")}, laid)
    config = config.model_copy(update={"data": schedule})
    whole = train(config)
    run = Run(config.out)
    ids = run.steps["sample_ids"].explode().to_list()
    owner = dict(run.catalogue.select("sample_id", "domain").iter_rows())
    assert len(ids) == 96
    for start, stop, domains in zip(starts, (36, 80, 96), phases, strict=True):
        found = [owner[each] for each in ids[start:stop]]
        if stop < 96:  # the last sample of the schedule fills no step
            assert {name: found.count(name) for name in domains} == domains
    ledger = domains_seen(run, uses([run.folder]))
    assert dict(ledger.select("domain", "seen_tokens").iter_rows()) == {
        name: 12 * sum(owner[each] == name for each in ids) for name in ("json", "dataclasses")
    }
    other = config.model_copy(update={"out": tmp_path / "crashed"})
    for crash in (3, 7, 11):
        train_until(crash, other, monkeypatch)
    resumed = train(other)
    assert resumed == whole[-len(resumed) :]
    assert Run(other.out).steps.equals(run.steps)
    assert (other.out / "checkpoint.safetensors").read_bytes() == (config.out / "checkpoint.safetensors").read_bytes()
    with pytest.raises(
        UserError, match=r"is a schedule of 97 samples, 13 steps of 8 need 104; set steps to at most 12"
    ):
        train(config.model_copy(update={"steps": 13, "out": tmp_path / "long"}))


@pytest.mark.parametrize("tied", [True, False])
def test_muon_takes_the_hidden_matrices_and_adamw_the_rest(config, tmp_path, tied):
    (tmp_path / "model.json").write_text(json.dumps({**MODEL, "tie_word_embeddings": tied}))
    train(config.model_copy(update={"optimizer": config.optimizer.model_copy(update={"name": "Muon"})}))
    spec = Run(config.out).spec
    assert spec.optimizers == ["Muon", "AdamW", "AdamW"]
    hidden, outer, vectors = spec.groups
    assert len(hidden) == 2 * 7
    assert all("layers" in name and "proj" in name for name in hidden)
    assert outer == ["model.embed_tokens.weight", *([] if tied else ["lm_head.weight"])]
    assert all("norm" in name for name in vectors)


def test_settings_changed_on_resume_are_named(config):
    train(config)
    assert train(config) == []
    with pytest.raises(UserError, match="was trained with other steps, batch_size"):
        train(config.model_copy(update={"steps": 13, "batch_size": 4}))


def test_a_second_stage_starts_from_the_state_of_the_first(config, tmp_path):
    train(config)
    second = config.model_copy(
        update={"out": tmp_path / "second", "init_from": config.out / "checkpoint.safetensors", "recorder": None}
    )
    fresh = config.model_copy(update={"out": tmp_path / "fresh", "recorder": None})
    assert train(second)[0] < train(fresh)[0]
    other = second.model_copy(update={"optimizer": OptimizerConfig(name="SGD"), "out": tmp_path / "other"})
    with pytest.raises(UserError, match=r"SGD needs momentum_buffer: it was written with another optimizer"):
        train(other)


def test_bad_settings(config, tmp_path):
    with pytest.raises(UserError, match="batch_size 8 is not a multiple of micro_batch_size 3"):
        train(config.model_copy(update={"micro_batch_size": 3}))
    with pytest.raises(UserError, match=r"has 160 samples .*, fewer than one batch of 200"):
        train(config.model_copy(update={"batch_size": 200, "micro_batch_size": None}))
    with pytest.raises(UserError, match=r"missing\.json"):
        train(config.model_copy(update={"model": tmp_path / "missing.json"}))
    with pytest.raises(UserError, match=r"missing\.yaml"):
        train(config.model_copy(update={"data": tmp_path / "missing.yaml"}))
    (tmp_path / "model.json").write_text(json.dumps({**MODEL, "vocab_size": 64}))
    with pytest.raises(UserError, match=r"sample 0 has token id \d+, the model has a vocabulary of 64: set vocab_size"):
        train(config)
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"holds no MDS streams.*pipelines.prepare"):
        train(config.model_copy(update={"data": tmp_path / "empty"}))


def test_schedule():
    optimizer = OptimizerConfig(lr=1.0, warmup_steps=10, min_lr_ratio=0.1)
    assert learning_rate(optimizer, 0, 110) == pytest.approx(0.1)
    assert learning_rate(optimizer, 9, 110) == pytest.approx(1.0)
    assert learning_rate(optimizer, 60, 110) == pytest.approx(0.55)
    assert learning_rate(optimizer, 110, 110) == pytest.approx(0.1)


def test_streams_of_another_writer_need_only_tokens(config, tmp_path):
    """llm-foundry writes raw int64 bytes and nothing else; sequences may differ in length."""
    text = (b"the quick brown fox jumps over the lazy dog " * 40)[:1500]
    rows = [{"ids": np.frombuffer(text[i : i + 20 + i % 7], np.uint8).astype(np.int64).tobytes()} for i in range(300)]
    write_stream(tmp_path / "foreign" / "web", {"ids": "bytes"}, rows)
    columns = Columns(tokens="ids")
    trained = config.model_copy(update={"data": tmp_path / "foreign", "columns": columns, "loss_mean": "sample"})
    train(trained)
    run = Run(trained.out)
    assert run.streams["web"][3].tokens.tolist() == list(text[3:26])
    assert len(list(Replay(run, tolerance=1e-5).steps(0, 12))) == 12


def test_a_wrong_token_type_is_named(config, tmp_path):
    rows = [{"tokens": np.arange(i, i + 8, dtype=np.int32).tobytes()} for i in range(20)]
    write_stream(tmp_path / "foreign" / "web", {"tokens": "bytes"}, rows)
    with pytest.raises(UserError, match=r"web, sample 0, read as int64.*set columns\.tokens_dtype"):
        train(config.model_copy(update={"data": tmp_path / "foreign"}))


def test_streams_in_folders_of_one_name_keep_their_parents_names(tmp_path):
    folders = [{"local": str(tmp_path / name / "train")} for name in ("web", "code")]
    assert list(domain_folders(folders)) == ["web.train", "code.train"]
    with pytest.raises(UserError, match=r"two streams are called web\.train"):
        domain_folders([folders[0], folders[0]])


def test_a_missing_tokens_column_is_named(config):
    with pytest.raises(UserError, match=r"has no column 'ids' \(it has .*'tokens'.*set columns.tokens"):
        train(config.model_copy(update={"columns": Columns(tokens="ids")}))
