"""A run rebuilt from a description is the run that a recorder wrote beside the training: records, states, selection."""

import json
import re
import shutil
from pathlib import Path

import polars as pl
import pytest
import torch
from safetensors.torch import save_file
from torch.distributed.checkpoint.state_dict_saver import save as save_distributed

from curate.core.errors import UserError
from curate.reconstruct.build import FACTS, reconstruct
from curate.reconstruct.check import Compared, Digits, judge
from curate.reconstruct.checkpoints import CheckpointKeys, snapshot_tensors
from curate.reconstruct.description import ReconstructConfig
from curate.select import SelectConfig, select
from curate.training.replay import Replay, records
from curate.training.run import Run
from tests.reconstruct.training import Loop, in_processes
from tests.tiny import write_tiny_streams, write_tiny_target

SHUFFLED = {"shuffle": True, "shuffle_seed": 7, "num_canonical_nodes": 1, "shuffle_block_size": 1000}


@pytest.fixture(scope="module")
def streams(tmp_path_factory) -> dict[str, dict[str, str]]:
    folders = write_tiny_streams(tmp_path_factory.mktemp("data"))
    return {domain: {"local": str(folder)} for domain, folder in folders.items()}


@pytest.fixture(scope="module")
def loop(streams, tmp_path_factory) -> Loop:
    loop = Loop(folder=str(tmp_path_factory.mktemp("loop")), streams=streams, dataset=SHUFFLED)
    loop.run()
    return loop


def rebuild(loop: Loop, **changes) -> Run:
    return Run(reconstruct(ReconstructConfig(**loop.description(**changes))))


def same_run(loop: Loop, rebuilt: Run) -> None:
    """Everything but the records' fingerprint of the catalogue is held against the recorder's, byte by byte."""
    recorded = Run(Path(loop.folder) / "recorded")
    assert rebuilt.steps.equals(recorded.steps)
    assert (rebuilt.folder / "run.json").read_bytes() == (recorded.folder / "run.json").read_bytes()
    assert rebuilt.snapshots == sorted(loop.saved)
    for step in rebuilt.snapshots:
        assert rebuilt.snapshot(step).read_bytes() == recorded.snapshot(step).read_bytes()


def test_a_run_is_rebuilt_to_the_same_bytes(loop):
    rebuilt = rebuild(loop)
    same_run(loop, rebuilt)
    steps = (rebuilt.folder / "steps.parquet").read_bytes()
    assert steps == (Path(loop.folder) / "recorded" / "steps.parquet").read_bytes()
    facts = json.loads((rebuilt.folder / FACTS).read_text())
    assert len(facts["compared"]) == 2 * 3 * 4  # loss and norm of three steps from four checkpoints
    assert all(one["agrees"] for one in facts["compared"])
    assert sum(one["tells"] for one in facts["compared"]) > 12
    assert reconstruct(ReconstructConfig(**loop.description())) == rebuilt.folder  # complete already


@pytest.mark.slow
def test_a_selection_from_it_is_that_of_the_recorded_run(loop, tmp_path):
    target = write_tiny_target(tmp_path / "target.jsonl")
    made = {}
    for name in ("recorded", "rebuilt"):
        rebuild(loop)
        config = SelectConfig(
            target=target, out=tmp_path / name, mode="both", output={"wandb": "none"},
            values={"min_target_tokens": 10, "sources": ("early", "late")},
        )  # fmt: skip
        folder = select(config, Run(Path(loop.folder) / name))
        made[name] = {
            file: (folder / file).read_bytes() for file in ("mixture.yaml", "scores.parquet", "domains.parquet")
        }
    assert made["recorded"] == made["rebuilt"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("changes", "dataset", "weights"),
    [
        ({"workers": 2, "kills": [11]}, {}, [{}, {}]),  # workers, a restart in mid-epoch
        ({"batch_size": 7, "kills": [9, 17]}, {"shuffle": False}, [{"repeat": 0.5}, {"repeat": 1.3}]),  # epochs
        (
            {"accumulation": 2, "batch_size": 3}, {"shuffle_algo": "py1s", "num_canonical_nodes": 2},
            [{"choose": 30}, {"choose": 101}],
        ),
        (
            {"batch_size": 5, "drop_last": False}, {"sampling_method": "fixed", "epoch_size": 63},
            [{"proportion": 0.3}, {"proportion": 0.7}],
        ),
    ],
)  # fmt: skip
def test_other_trainings_are_rebuilt_too(streams, tmp_path, changes, dataset, weights):
    places = {domain: {**stream, **part} for (domain, stream), part in zip(streams.items(), weights, strict=True)}
    loop = Loop(folder=str(tmp_path), streams=places, dataset={**SHUFFLED, **dataset}, **changes)
    loop.run()
    same_run(loop, rebuild(loop))


@pytest.fixture(scope="module")
def frozen_loop(streams, tmp_path_factory) -> Loop:
    loop = Loop(folder=str(tmp_path_factory.mktemp("frozen")), streams=streams, dataset=SHUFFLED, frozen="embedding")
    loop.run()
    return loop


def test_a_training_with_frozen_parameters_is_rebuilt(frozen_loop):
    same_run(frozen_loop, rebuild(frozen_loop, frozen=["embedding.*"]))


@pytest.mark.parametrize(
    ("frozen", "message"),
    [([], r"optimizer\.state"), (["mix.*"], r"optimizer\.state"), (["nothing"], "frozen has 'nothing'")],
)
def test_frozen_parameters_that_are_not_said_are_refused(frozen_loop, tmp_path, frozen, message):
    with pytest.raises(UserError, match=message):
        rebuild(frozen_loop, out=str(tmp_path / "other"), frozen=frozen)


@pytest.mark.slow
def test_two_real_processes_are_rebuilt_in_one(streams, tmp_path):
    loop = Loop(folder=str(tmp_path), streams=streams, dataset=SHUFFLED, batch_size=3, workers=1, kills=[13])
    in_processes(loop, 2)
    said = loop.description()
    rebuilt = rebuild(loop, loader={**said["loader"], "world_size": 2})
    assert rebuilt.steps["rank"].unique().sort().to_list() == [0, 1]
    same_run(loop, rebuilt)


def state(loop: Loop, step: int) -> dict:
    return torch.load(Path(loop.folder) / f"{step}.pt", weights_only=True)


@pytest.mark.parametrize(
    ("place", "change", "message"),
    [
        ("dataset", {"shuffle_seed": 8}, r"first step after a checkpoint.*agree with .*dataset.shuffle_seed 7"),
        ("dataset", {"shuffle": False}, r"agree with dataset.shuffle True"),
        ("dataset", {"shuffle_seed": 3001}, r"Likely causes.*num_canonical_nodes.*not predownload"),
        ("loader", {"resumed": [{"step": 10, "epoch": 0, "sample_in_epoch": 0}]}, r"agree with .*loader.resumed"),
        ("loader", {"first_epoch": 5}, r"Likely causes.*first_epoch"),
        ("loss", {"mean": "sample"}, r"agree with .*loss.mean token and loss.over"),
        ("log", {"first_step": 1}, r"agree with log.first_step 0"),
    ],
)
def test_a_wrong_description_is_refused_and_the_right_setting_found(loop, tmp_path, place, change, message):
    said = loop.description(out=tmp_path / "run")
    said |= {"check_steps": 1, "lr": {"peak": 1e-2, "warmup_steps": 3, "decay": "constant"}}
    with pytest.raises(UserError, match=message):
        reconstruct(ReconstructConfig(**{**said, place: {**said.get(place, {}), **change}}))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"lr": {"peak": 2e-2, "decay": "constant"}}, "samples and model are right, updates are not.*lr"),
        ({"clip_norm": 0.1}, "updates are not.*clip_norm"),
        ({"optimizers": [{"arguments": {"weight_decay": 0.1}}]}, "has 2 parameter groups, the description 1"),
        ({"optimizers": [{"name": "Lion"}]}, "known are AdamW"),
        ({"optimizers": [{"groups": [{"min_dim": 2}]}]}, "in no group"),
        (
            {
                "optimizers": [
                    {"arguments": {"betas": [0.9, 0.999], "weight_decay": 0.1}, "groups": [{"min_dim": 2}, {}]}
                ]
            },
            "betas .*0.95",
        ),
        ({"dataset": {"shuffle": True, "shuffel_seed": 1}}, "shuffel_seed"),
        ({"streaming_version": "0.7.0", "dataset": {"shuffle": True}}, "another version of mosaicml-streaming"),
        ({"windows": {"early": (2, 4), "late": (8, 12)}, "checkpoints": {6: "6.pt"}}, "early window begins at step 2"),
        ({"checkpoints": {0: "12.pt"}}, "first step after a checkpoint"),
        ({"checkpoints": {0: "gone.pt"}}, "gone.pt is not there"),
        ({"checkpoints": {24: "24.pt"}, "windows": {"early": (24, 24)}}, "covers steps 24 to 24"),
        ({"log": {"file": "log.csv", "loss": "train/loss"}}, "has no column 'train/loss'"),
        ({"log": {"file": "log.csv", "lr": "rate"}}, "no lr of step 0"),
        ({"log": {"file": "gone.csv"}}, "gone.csv cannot be read"),
    ],
)
def test_bad_input_says_what_is_wrong(loop, tmp_path, change, message):
    said = {**loop.description(out=tmp_path / "run"), **change}
    said["checkpoints"] = {step: Path(loop.folder) / path for step, path in said["checkpoints"].items()}
    said["log"] = {**said["log"], "file": Path(loop.folder) / said["log"]["file"]}
    with pytest.raises(UserError, match=message):
        reconstruct(ReconstructConfig(**said))


def test_an_object_in_a_checkpoint_is_not_unpickled(loop, tmp_path):
    torch.save({**state(loop, 6), "trainer": Loop}, tmp_path / "6.pt")
    with pytest.raises(UserError, match="holds more than tensors"):
        rebuild(loop, out=tmp_path / "run", checkpoints={6: tmp_path / "6.pt"}, windows={"late": (18, 24)})


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_every_kind_of_checkpoint_gives_the_same_state(loop, tmp_path):
    saved = state(loop, 6)
    numbered = saved["optimizer"]["state"]
    names = [*MATRICES, *VECTORS]
    named = {"state": {name: numbered[index] for index, name in enumerate(names)}}
    save_distributed({"model": saved["model"], "optimizer": named}, checkpoint_id=tmp_path / "by-name", no_dist=True)
    save_distributed(
        {"model": saved["model"], "optimizer": saved["optimizer"]}, checkpoint_id=tmp_path / "by-number", no_dist=True
    )
    compiled = {f"module._orig_mod.{name}": tensor for name, tensor in saved["model"].items()}
    torch.save({"net": compiled, "opt": {"0": saved["optimizer"]}}, tmp_path / "other.pt")
    snapshot = Path(loop.folder) / "recorded" / "snapshots" / "step-00000006.safetensors"
    shutil.copyfile(snapshot, tmp_path / "snapshot.safetensors")
    for name in ("by-name", "by-number", "other.pt", "snapshot.safetensors"):
        keys = {"model": "net", "optimizers": ["opt.0"]} if name == "other.pt" else {}
        rebuilt = rebuild(
            loop, out=tmp_path / f"run-{name}", checkpoints={6: tmp_path / name}, checkpoint_keys=keys,
            windows={"early": (6, 12), "late": (18, 24)},
        )  # fmt: skip
        assert rebuilt.snapshot(6).read_bytes() == snapshot.read_bytes()


MATRICES = ("embedding.weight", "mix.weight", "up.weight", "down.weight")
VECTORS = ("up.bias", "down.bias", "norm.weight", "norm.bias")


def weights_only(loop: Loop, folder: Path, steps: list[int]) -> dict[int, Path]:
    """Hugging Face's form: a folder with model.safetensors, tied tensors once, no optimizer state."""
    for step in steps:
        (folder / str(step)).mkdir(parents=True)
        weights = {
            name: tensor.clone() for name, tensor in state(loop, step)["model"].items() if name != "lm_head.weight"
        }
        save_file(weights, folder / str(step) / "model.safetensors")
    return {step: folder / str(step) for step in steps}


def test_without_optimizer_state_it_says_what_is_lost(loop, tmp_path, caplog):
    checkpoints = weights_only(loop, tmp_path, [6, 12])
    with pytest.raises(UserError, match="no checkpoint at or before it has optimizer state: set estimate_moments"):
        rebuild(loop, out=tmp_path / "run", checkpoints=checkpoints, windows={"late": (18, 24)})
    assert "[6, 12] have no optimizer state: they confirm the order" in caplog.text
    checkpoints[0] = Path(loop.folder) / "0.pt"  # before the first step there is none to lose
    rebuilt = rebuild(loop, out=tmp_path / "run", checkpoints=checkpoints)
    assert rebuilt.snapshots == [0]
    assert len(list(Replay(rebuilt).steps(0, 24))) == 24


def test_estimated_moments_are_close_to_those_that_were(loop, tmp_path):
    rebuilt = rebuild(
        loop, out=tmp_path / "run", checkpoints=weights_only(loop, tmp_path, [12, 18]), estimate_moments=12,
        windows={"early": (12, 18), "late": (18, 24)}, tolerance=0.02,
    )  # fmt: skip
    errors = {}
    for step in (12, 18):
        replay, truth = Replay(rebuilt), Replay(Run(Path(loop.folder) / "recorded"))
        moments = {}
        for name, each in (("estimated", replay), ("true", truth)):
            first, second, updates = each.moments(each.restore(step))
            assert updates == [step, step]
            moments[name] = (first, second.sqrt())
        errors[step] = [
            float((one - other).norm() / other.norm())
            for one, other in zip(moments["estimated"], moments["true"], strict=True)
        ]
    assert all(first < 0.4 and second < 0.35 for first, second in errors.values()), errors
    facts = json.loads((rebuilt.folder / FACTS).read_text())
    assert facts["estimated_optimizer_state"] == [12, 18]
    assert len(list(Replay(rebuilt, tolerance=0.02).steps(12, 24))) == 12


def rounded_log(loop: Loop, path: Path, **decimals: int) -> Path:
    log = pl.read_csv(Path(loop.folder) / "log.csv")
    log.with_columns(pl.col(name).round(places) for name, places in decimals.items()).write_csv(path)
    return path


@pytest.mark.parametrize(
    ("decimals", "tolerance", "remedy"),
    [
        ({"loss": 2}, 2e-4, "tolerance"),
        ({"grad_norm": 2}, 1e-3, "log.grad_norm"),
        ({"loss": 2, "grad_norm": 2}, 1e-4, "tolerance"),
    ],
)
def test_a_log_that_was_rounded_says_so_and_what_it_says_helps(loop, tmp_path, decimals, tolerance, remedy):
    said = {
        "log": {"file": rounded_log(loop, tmp_path / "log.csv", **decimals)}, "tolerance": tolerance,
        "checkpoints": {step: Path(loop.folder) / f"{step}.pt" for step in (0, 6, 18)}, "out": tmp_path / "run",
    }  # fmt: skip
    with pytest.raises(UserError, match=r"by its rounding only.*significant digits") as refused:
        rebuild(loop, **said)
    assert "first_step" not in str(refused.value)
    if "log.grad_norm" in str(refused.value):
        said["log"]["grad_norm"] = ""
    named = re.search(r"set tolerance to ([\d.e-]+) here", str(refused.value))
    if named:
        said["tolerance"] = float(named[1])
    assert remedy in str(refused.value)
    run = rebuild(loop, **said)
    assert len(list(Replay(run, tolerance=said["tolerance"]).steps(18, 24))) == 6  # as curate.select replays it


def test_a_log_with_the_digits_that_are_asked_for_is_enough(loop, tmp_path):
    log = pl.read_csv(Path(loop.folder) / "log.csv")
    log = log.with_columns(pl.col("loss", "grad_norm").map_elements(lambda value: float(f"{value:.4g}"), pl.Float64))
    log.write_csv(tmp_path / "log.csv")
    assert rebuild(loop, out=tmp_path / "run", log={"file": tmp_path / "log.csv"}).snapshots == sorted(loop.saved)


def test_in_a_rounded_log_the_wrong_setting_is_still_found(loop, tmp_path):
    log = {"file": rounded_log(loop, tmp_path / "log.csv", loss=2, grad_norm=2)}
    said = loop.description(out=tmp_path / "run", log=log, dataset={**SHUFFLED, "shuffle_seed": 8})
    with pytest.raises(UserError, match=r"They would agree with dataset.shuffle_seed 7: correct") as refused:
        reconstruct(ReconstructConfig(**said))
    assert "first_step" not in str(refused.value)


def test_digits_are_those_of_the_whole_column():
    written = Digits.of(pl.Series([5.23, 4.0, 10.5, None, float("nan"), 0.87]))
    assert (written.decimals, written.significant) == (2, 3)
    assert written.rounding(4.0) == pytest.approx(0.005)
    assert written.rounding(104.0) == pytest.approx(0.5)
    assert written.coarsest == pytest.approx(0.005 / 0.87)
    assert Digits.of(pl.Series([0.1 + 0.2, 1 / 3])).rounding(0.3) < 1e-16
    assert Digits.of(pl.Series([None], dtype=pl.Float64)).coarsest == 0


def test_norms_that_were_not_logged_are_replayed_in_the_windows(loop, tmp_path):
    rebuilt = rebuild(loop, out=tmp_path / "run", log={"file": Path(loop.folder) / "log.csv", "grad_norm": "unlogged"})
    recorded = Run(Path(loop.folder) / "recorded").steps.select("step", "clip_factor")
    joined = rebuilt.steps.join(recorded.unique("step"), on="step", suffix="_recorded")
    inside = joined.filter((pl.col("step") < 6) | (pl.col("step") >= 18))
    assert inside["clip_factor"].to_list() == pytest.approx(inside["clip_factor_recorded"].to_list(), rel=1e-5)
    assert joined.filter(pl.col("step").is_between(6, 17))["clip_factor"].is_null().all()
    with pytest.raises(UserError, match="gradient norm of step 6 was not recorded"):
        _ = next(records(rebuilt, 6, 7)).clipped


def test_a_comparison_that_cannot_fail_is_no_proof():
    same = Compared(checkpoint=0, step=0, what="loss", logged=5.0, replayed=5.0, agrees=True, tells=False)
    with pytest.raises(UserError, match="says nothing about the order"):
        judge([same], 1e-3, list)
    with pytest.raises(UserError, match="nothing can be checked"):
        judge([], 1e-3, list)
    judge([same, Compared(**{**vars(same), "tells": True})], 1e-3, list)


class Named(torch.nn.Module):
    """Its parameters are called like a key of a checkpoint, as those of Hugging Face models are."""

    def __init__(self) -> None:
        super().__init__()
        self.model = torch.nn.Linear(2, 3)


@pytest.mark.parametrize("prefix", ["", "model."])
def test_a_model_whose_names_begin_like_the_key_of_its_state(prefix):
    model = Named()
    found = {f"{prefix}{name}": tensor for name, tensor in model.state_dict().items()}
    tensors, whole = snapshot_tensors(found, CheckpointKeys(), model, [[["model.weight", "model.bias"]]])
    assert sorted(tensors) == ["model.model.bias", "model.model.weight"]
    assert not whole
