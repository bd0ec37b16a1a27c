"""Distributed checkpoints: real ones are read whole, and what is pickled into one is never run."""

import collections
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.distributed.checkpoint import metadata as torch_metadata
from torch.distributed.checkpoint.state_dict_saver import save

from curate.core.errors import UserError
from curate.reconstruct.checkpoints import read_checkpoint

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")


def name(module: str, attribute: str) -> bytes:
    return f"c{module}\n{attribute}\n".encode()


def text(value: str) -> bytes:
    return f"V{value}\n".encode()


def called(function: bytes, *arguments: bytes) -> bytes:
    return function + b"(" + b"".join(arguments) + b"tR"


TORCH, FILES = "torch.distributed.checkpoint.metadata", "torch.distributed.checkpoint.filesystem"
COMMAND = text("touch marker")
ATTACKS = {
    "a shell": called(name("os", "system"), COMMAND),
    "its C name": called(name("posix", "system"), COMMAND),
    "a helper of torch that is getattr": called(name(FILES, "_get_device_module"), text("os")),
    "an import of torch": called(name(FILES, "os.system"), COMMAND),
    "an attribute of a record": called(name(TORCH, "Metadata.__init__.__globals__"), COMMAND),
    "getattr": called(called(name("builtins", "getattr"), name("os", "path"), text("os")), COMMAND),
    "eval": called(name("builtins", "eval"), text("open('marker', 'w')")),
    "open": called(name("io", "open"), text("marker"), text("w")),
    "torch.load": called(name("torch", "load"), text("marker")),
    "an attribute of a dtype": called(name("torch", "float32.__class__"), text("x")),
    "copyreg": called(name("copyreg", "_reconstructor"), name("os", "system"), COMMAND),
    "torch's own unpickler": called(name("torch._utils", "_rebuild_tensor"), text("x")),
}


@pytest.mark.parametrize("attack", ATTACKS)
def test_what_is_pickled_into_an_index_is_not_run(attack, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / ".metadata").write_bytes(b"\x80\x02" + ATTACKS[attack] + b".")
    with pytest.raises(UserError, match="its index names"):
        read_checkpoint(tmp_path)
    assert not (tmp_path / "marker").exists()


def test_an_index_cannot_change_a_class_of_this_process(tmp_path):
    before = dict(vars(torch_metadata.Metadata))
    state = b"N}(" + text("__init__") + name(TORCH, "StorageMeta") + b"u\x86b."  # BUILD with attributes, on the class
    (tmp_path / ".metadata").write_bytes(b"\x80\x02" + name(TORCH, "Metadata") + state)
    with pytest.raises(UserError):
        read_checkpoint(tmp_path)
    assert dict(vars(torch_metadata.Metadata)) == before


DTYPES = (
    torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.int64, torch.int32, torch.uint8, torch.bool,
    torch.complex64, torch.float8_e4m3fn,
)  # fmt: skip


def test_a_real_index_of_every_kind_of_entry_is_read(tmp_path):
    tensors = {str(dtype).removeprefix("torch."): torch.arange(12).reshape(3, 4).to(dtype) for dtype in DTYPES}
    state = {
        "model": tensors,
        "optimizer": {"state": {0: {"step": torch.tensor(3.0)}}, "param_groups": [{"lr": 0.1, "betas": (0.9, 0.95)}]},
        "step": 3, "name": "run", "ordered": collections.OrderedDict(a=torch.ones(2, requires_grad=True)),
        "images": torch.ones(1, 2, 3, 3).to(memory_format=torch.channels_last), "list": [torch.ones(1), {"x": 1}],
    }  # fmt: skip
    save(state, checkpoint_id=tmp_path / "checkpoint", no_dist=True)
    found = read_checkpoint(tmp_path / "checkpoint")
    assert {key: found[f"model.{key}"].dtype for key in tensors} == {key: each.dtype for key, each in tensors.items()}
    assert all(torch.equal(found[f"model.{key}"].double(), tensors[key].double()) for key in tensors if key[0] != "c")
    assert found["optimizer.state.0.step"] == 3
    assert found["ordered.a"].tolist() == [1, 1]
    assert "step" not in found  # pickled values are left out


PROCESS = """
import sys, warnings
warnings.simplefilter("ignore")
import torch
from torch import distributed
from torch.distributed.checkpoint.state_dict_saver import save
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor
folder, rank = sys.argv[1], int(sys.argv[2])
distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
mesh = init_device_mesh("cpu", (2,))
whole = torch.arange(35.0).reshape(5, 7)
placed = {"rows": [Shard(0)], "columns": [Shard(1)], "copies": [Replicate()]}
state = {name: distribute_tensor(whole, mesh, placement) for name, placement in placed.items()}
save({"model": state, "step": 3}, checkpoint_id=f"{folder}/sharded")
distributed.barrier()
distributed.destroy_process_group()
"""


@pytest.mark.slow
def test_a_checkpoint_of_sharded_tensors_is_read_whole(tmp_path):
    (tmp_path / "process.py").write_text(PROCESS)
    command = [sys.executable, str(tmp_path / "process.py"), str(tmp_path)]
    running = [subprocess.Popen([*command, str(rank)]) for rank in (0, 1)]
    assert [process.wait(timeout=200) for process in running] == [0, 0]
    found = read_checkpoint(tmp_path / "sharded")
    assert sorted(found) == ["model.columns", "model.copies", "model.rows"]
    assert all(tensor.equal(torch.arange(35.0).reshape(5, 7)) for tensor in found.values())


def written_index(folder: Path) -> torch_metadata.Metadata:
    """A real checkpoint's own index."""
    save({"model": {"weight": torch.ones(4, 4)}}, checkpoint_id=folder, no_dist=True)
    return pickle.loads((folder / ".metadata").read_bytes())


@pytest.mark.parametrize("file", ["../outside.distcp", "absolute"])
def test_an_index_reads_no_file_outside_its_folder(file, tmp_path):
    folder = tmp_path / "checkpoint"
    index = written_index(folder)
    outside = tmp_path / "outside.distcp"
    next(folder.glob("*.distcp")).rename(outside)
    (place,) = index.storage_data.values()
    place.relative_path = str(outside) if file == "absolute" else file
    (folder / ".metadata").write_bytes(pickle.dumps(index))
    with pytest.raises(UserError, match=r"outside\.distcp"):
        read_checkpoint(folder)


def test_a_part_that_is_missing_is_no_zero(tmp_path):
    index = written_index(tmp_path / "checkpoint")
    index.state_dict_metadata["model.weight"].chunks[0].sizes = torch.Size([2, 4])
    (tmp_path / "checkpoint" / ".metadata").write_bytes(pickle.dumps(index))
    with pytest.raises(UserError, match="lacks a part"):
        read_checkpoint(tmp_path / "checkpoint")


@pytest.mark.parametrize("damage", ["index cut", "index empty", "data cut", "data gone", "another object"])
def test_a_damaged_one_is_named(damage, tmp_path):
    folder = tmp_path / "checkpoint"
    written_index(folder)
    index, data = folder / ".metadata", next(folder.glob("*.distcp"))
    if damage == "data gone":
        data.unlink()
    elif damage == "another object":
        index.write_bytes(pickle.dumps([1, 2]))
    else:
        file = index if damage.startswith("index") else data
        file.write_bytes(b"" if damage.endswith("empty") else file.read_bytes()[: file.stat().st_size // 2])
    with pytest.raises(UserError, match=str(folder)):
        read_checkpoint(folder)
