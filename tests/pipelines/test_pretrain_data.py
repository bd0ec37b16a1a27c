"""What the shipped trainer is given: streams of other writers, tokenizers, settings; understood, or refused at once."""

import json
import subprocess
import sys

import numpy as np
import pytest
from tokenizers import Tokenizer
from tokenizers.models import WordLevel

from curate.core.config import parse_command
from curate.core.errors import UserError
from curate.data.mds import Columns, write_stream
from curate.training.replay import Replay
from curate.training.run import Run
from pipelines import pretrain
from pipelines.pretrain import PretrainConfig, train
from tests.pipelines.test_pretrain import MODEL
from tests.tiny import write_tiny_streams


@pytest.fixture
def config(tmp_path):
    write_tiny_streams(tmp_path / "data")
    (tmp_path / "model.json").write_text(json.dumps(MODEL))
    windows = {"early": [0, 2], "late": [2, 4]}
    return PretrainConfig(
        out=tmp_path / "run", data=tmp_path / "data", model=tmp_path / "model.json", steps=4, batch_size=8,
        recorder={"windows": windows, "cadence_snapshots": 0},
    )  # fmt: skip


def write_rows(folder, rows, **columns):
    write_stream(
        folder, {"tokens": "ndarray:int32"} | columns, [{name: np.asarray(v) for name, v in r.items()} for r in rows]
    )


def tokens(*lengths):
    return [{"tokens": np.arange(length, dtype=np.int32) + index % 50} for index, length in enumerate(lengths)]


def test_a_sequence_is_as_long_as_the_longest_sample(config, tmp_path):
    write_rows(tmp_path / "short" / "web", tokens(3, *[20] * 40, 24, 7))
    train(config.model_copy(update={"data": tmp_path / "short"}))
    assert Run(config.out).spec.seq_len == 24


def test_labels_are_a_mask_and_bytes_of_both_are_read(config, tmp_path):
    """Half of each sample is ignored; the same content has the same id, however it is stored."""
    sequences = [np.arange(index, index + 12) for index in range(40)]
    half = np.arange(12) >= 6
    write_rows(
        tmp_path / "labels" / "web",
        [{"tokens": s.astype(np.int32), "loss_mask": np.where(half, s, -100)} for s in sequences],
        loss_mask="ndarray:int64",
    )
    raw = [{"tokens": s.astype("int64").tobytes(), "loss_mask": half.tobytes()} for s in sequences]
    write_stream(tmp_path / "raw" / "web", {"tokens": "bytes", "loss_mask": "bytes"}, raw)
    runs = []
    for name in ("labels", "raw"):
        train(config.model_copy(update={"data": tmp_path / name, "out": tmp_path / f"run-{name}"}))
        runs.append(Run(tmp_path / f"run-{name}"))
    assert set(runs[0].steps["tokens"].explode()) == {6}
    assert runs[0].steps.equals(runs[1].steps)
    assert len(list(Replay(runs[0], tolerance=1e-5).steps(0, 4))) == 4


def test_a_mask_column_that_no_stream_has_is_refused(config, tmp_path):
    with pytest.raises(UserError, match=r"has a column 'labels'"):
        train(config.model_copy(update={"columns": Columns(loss_mask="labels")}))
    rows = [{**row, "loss_mask": np.zeros(8, np.uint8)} for row in tokens(*[8] * 20)]
    write_rows(tmp_path / "masked" / "web", rows, loss_mask="ndarray:uint8")
    with pytest.raises(UserError, match=r"masked/web has no token to predict"):
        train(config.model_copy(update={"data": tmp_path / "masked"}))


@pytest.mark.parametrize("sample", [{"tokens": [1, 128, 2]}, {"tokens": np.arange(33)}], ids=["token id", "length"])
def test_what_the_model_cannot_read_is_refused_by_stream_and_sample(config, tmp_path, sample):
    late = {"tokens": np.asarray(sample["tokens"], np.int32)}
    write_rows(tmp_path / "late" / "web", [*tokens(*[8] * 30), late])
    write_rows(tmp_path / "late" / "code", tokens(*[8] * 30))
    with pytest.raises(UserError, match=r"late/web, sample 30 has .* the model has"):
        train(config.model_copy(update={"data": tmp_path / "late"}))


def test_the_catalogue_that_is_read_before_training_is_the_runs(config):
    train(config)
    kept = list(config.out.glob("catalogue-*"))
    assert len(kept) == 1
    assert Run(config.out).catalogue["largest_token_id"].max() < 128
    assert list(config.out.glob("catalogue-*")) == kept


@pytest.mark.parametrize("amount", [{"repeat": 0.05}, {"choose": 4}, {"proportion": 1.0}])
def test_less_than_a_batch_is_refused_before_training(config, tmp_path, amount):
    write_rows(tmp_path / "few", tokens(*[8] * 4))
    large = "few" if "proportion" in amount else "data/json"
    (tmp_path / "s.yaml").write_text(json.dumps([{"local": str(tmp_path / large), **amount}]))
    with pytest.raises(UserError, match=r"has 4 samples .* fewer than one batch of 8"):
        train(config.model_copy(update={"data": tmp_path / "s.yaml"}))


@pytest.mark.parametrize("epochs", [0, 3])
def test_epochs_without_a_batch_end_the_training(epochs):
    class Loader:
        batch_size = 8
        passes = 0

        def __iter__(self):
            self.passes += 1
            return iter([{"samples": [self.passes]}] if self.passes <= epochs else [])

    served = []
    with pytest.raises(UserError, match="no batch of 8 samples"):
        served.extend(pretrain._forever(Loader()))
    assert len(served) <= epochs


def words(path, *names):
    Tokenizer(WordLevel({name: place for place, name in enumerate(names)}, unk_token=names[0])).save(str(path))
    return path


def test_a_tokenizer_can_be_given_and_must_be_the_datas(config, tmp_path, caplog):
    small, large = words(tmp_path / "small.json", "a"), words(tmp_path / "large.json", *map(str, range(128)))
    with caplog.at_level("WARNING"):
        train(config.model_copy(update={"out": tmp_path / "without"}))
    assert "--tokenizer" in caplog.text
    assert Run(tmp_path / "without").spec.tokenizer is None
    with pytest.raises(UserError, match=r"sample 0 has token id \d+, the tokenizer .*small.json has 1 tokens"):
        train(config.model_copy(update={"tokenizer": small}))
    train(config.model_copy(update={"tokenizer": large}))
    assert Run(config.out).spec.tokenizer == large
    words(config.data / "tokenizer.json", *map(str, range(129)))
    with pytest.raises(UserError, match=r"large.json is not the tokenizer of the data, .*data/tokenizer.json"):
        train(config.model_copy(update={"tokenizer": large, "out": tmp_path / "other"}))


def test_a_run_without_a_tokenizer_takes_one_later(config, tmp_path):
    small, large = words(tmp_path / "small.json", "a"), words(tmp_path / "large.json", *map(str, range(128)))
    other = words(tmp_path / "other.json", *map(str, range(129)))
    train(config)
    train(config.model_copy(update={"out": tmp_path / "with", "tokenizer": large}))
    bare, given = Run(config.out), Run(config.out, tokenizer=large)
    assert given.spec.tokenizer == large
    assert len({bare.fingerprint, given.fingerprint, Run(config.out, tokenizer=other).fingerprint}) == 3
    with pytest.raises(UserError, match=r"has token id \d+, the tokenizer .*small.json has 1 tokens"):
        Run(config.out, tokenizer=small)
    recorded = Run(tmp_path / "with")
    assert Run(tmp_path / "with", tokenizer=large).fingerprint == recorded.fingerprint == bare.fingerprint
    with pytest.raises(UserError, match=r"other.json is not the tokenizer of the run"):
        Run(tmp_path / "with", tokenizer=other)


def test_streams_of_two_tokenizers_are_refused(config, tmp_path):
    write_tiny_streams(tmp_path / "more")
    words(tmp_path / "data" / "tokenizer.json", *map(str, range(128)))
    words(tmp_path / "more" / "tokenizer.json", *map(str, range(1, 129)))
    entries = [{"local": str(tmp_path / "data" / "json")}, {"local": str(tmp_path / "more" / "dataclasses")}]
    (tmp_path / "s.yaml").write_text(json.dumps(entries))
    with pytest.raises(UserError, match=r"data/tokenizer.json is not the tokenizer of the data, .*more/tokenizer.json"):
        train(config.model_copy(update={"data": tmp_path / "s.yaml"}))


@pytest.mark.parametrize(
    ("setting", "value"), [("init_from", "data"), ("tokenizer", "data"), ("device", "abacus"), ("data", "model.json")]
)
def test_what_is_no_state_tokenizer_device_or_data_is_refused(config, tmp_path, setting, value):
    given = value if setting == "device" else tmp_path / value
    with pytest.raises(UserError, match=value):
        train(config.model_copy(update={setting: given}))


@pytest.mark.parametrize(
    "setting",
    [
        "--steps=0", "--batch_size=0", "--batch_size=-8", "--micro_batch_size=0", "--checkpoint_steps=0", "--seed=-1",
        "--optimizer.lr=nan", "--optimizer.lr=-1", "--optimizer.clip_norm=0", "--optimizer.clip_norm=inf",
        "--optimizer.betas=[0.9, 1.0]", "--optimizer.eps=-1", "--optimizer.momentum=1.5", "--optimizer.warmup_steps=-1",
        "--optimizer.weight_decay=inf", "--optimizer.min_lr_ratio=-0.1",
    ],
)  # fmt: skip
def test_numbers_that_no_training_can_have_are_refused(setting):
    given = ["--out=o", "--data=d", "--model=m", "--steps=4", setting]
    with pytest.raises(UserError):
        parse_command(PretrainConfig, "pretrain", "", given)


@pytest.mark.slow
def test_the_command_refuses_data_of_which_it_would_leave_out_a_part(config, tmp_path):
    (tmp_path / "data" / "json" / "index.json").unlink()
    command = ["--out", config.out, "--data", config.data, "--model", config.model, "--steps", "2", "--batch_size", "8"]
    done = subprocess.run(
        [sys.executable, "-m", "pipelines.pretrain", *map(str, command)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 2
    assert "data/json holds shard.00000.mds" in done.stderr
    assert "Traceback" not in done.stderr
    assert not config.out.exists()
