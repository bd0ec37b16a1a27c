"""Optimizer state is read where it lies, or the message says where that is."""

import pytest
import torch
from safetensors.torch import save_file

from curate.core.errors import UserError
from curate.optimizers.settings import GroupSettings
from curate.reconstruct.checkpoints import CheckpointKeys, check_settings, read_checkpoint, snapshot_tensors

NAMES = ["0.weight", "1.weight", "0.bias", "1.bias"]


@pytest.fixture
def trained():
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Linear(4, 2))
    parameters = dict(model.named_parameters())
    groups = [
        {"params": [parameters[name] for name in NAMES[:2]]},
        {"params": [parameters[name] for name in NAMES[2:]]},
    ]
    optimizer = torch.optim.AdamW(groups, weight_decay=0.1)
    model(torch.ones(2, 3)).sum().backward()
    optimizer.step()
    return model, optimizer


def read(path, model, keys, optimizers=(tuple(NAMES),)):
    return snapshot_tensors(read_checkpoint(path), CheckpointKeys(**keys), model, [[names] for names in optimizers])


def same_state(found, model, optimizer):
    tensors, whole = found
    assert whole
    for name, parameter in model.named_parameters():
        assert torch.equal(tensors[f"model.{name}"], parameter)
        for buffer, value in optimizer.state[parameter].items():
            assert torch.equal(tensors[f"optimizer.{name}.{buffer}"], value)


def lightning(model, optimizer):
    weights = {f"net.{name}": tensor for name, tensor in model.state_dict().items()}
    return {
        "epoch": 1,
        "state_dict": weights,
        "optimizer_states": [optimizer.state_dict()],
        "lr_schedulers": [{"x": 1}],
    }


def test_lists_are_opened(trained, tmp_path):
    torch.save(lightning(*trained), tmp_path / "last.ckpt")
    keys = {"model": "state_dict.net", "optimizers": ["optimizer_states.0"]}
    same_state(read(tmp_path / "last.ckpt", trained[0], keys), *trained)
    settings = [GroupSettings.read("AdamW", group) for group in trained[1].param_groups]
    check_settings(read_checkpoint(tmp_path / "last.ckpt"), "optimizer_states.0", settings)


def test_state_that_lies_elsewhere_is_named(trained, tmp_path):
    torch.save(lightning(*trained), tmp_path / "last.ckpt")
    with pytest.raises(UserError, match=r"'optimizer_states\.0'"):
        read(tmp_path / "last.ckpt", trained[0], {"model": "state_dict.net"})
    torch.save({"model": trained[0].state_dict(), "training": {"opt": trained[1].state_dict()}}, tmp_path / "own.pt")
    with pytest.raises(UserError, match=r"'training\.opt'"):
        read(tmp_path / "own.pt", trained[0], {})
    same_state(read(tmp_path / "own.pt", trained[0], {"optimizers": ["training.opt"]}), *trained)


def test_a_folder_of_hugging_face_has_its_optimizer_state(trained, tmp_path):
    save_file(dict(trained[0].state_dict()), tmp_path / "model.safetensors")
    assert not read(tmp_path, trained[0], {})[1]
    torch.save(trained[1].state_dict(), tmp_path / "optimizer.pt")
    same_state(read(tmp_path, trained[0], {}), *trained)


def test_state_at_the_top_is_the_empty_key(trained, tmp_path):
    torch.save({**trained[0].state_dict(), **trained[1].state_dict()}, tmp_path / "flat.pt")
    same_state(read(tmp_path / "flat.pt", trained[0], {"model": "", "optimizers": [""]}), *trained)
    with pytest.raises(UserError, match="''"):
        read(tmp_path / "flat.pt", trained[0], {"model": ""})


def test_every_optimizer_has_a_key(trained, tmp_path):
    model, parameters = trained[0], dict(trained[0].named_parameters())
    two = [torch.optim.Adam([parameters[name] for name in names]) for names in (NAMES[:2], NAMES[2:])]
    for optimizer in two:
        optimizer.step()
    torch.save({"model": model.state_dict(), "a": two[0].state_dict(), "b": two[1].state_dict()}, tmp_path / "two.pt")
    split = (NAMES[:2], NAMES[2:])
    assert len(read(tmp_path / "two.pt", model, {"optimizers": ["a", "b"]}, split)[0]) == 4 + 4 * 3
    for keys in (["a"], ["a", "c"], ["c"]):
        with pytest.raises(UserError, match="'b'"):
            read(tmp_path / "two.pt", model, {"optimizers": keys}, split)
    with pytest.raises(UserError, match="has 1 optimizer"):
        read(tmp_path / "two.pt", model, {"optimizers": ["a", "b"]}, (NAMES[:2],))


def test_state_of_other_shapes_is_refused(trained, tmp_path):
    torch.save({"model": trained[0].state_dict(), "optimizer": trained[1].state_dict()}, tmp_path / "own.pt")
    with pytest.raises(UserError, match=r"another order.*optimizers\.groups"):
        read(tmp_path / "own.pt", trained[0], {}, (NAMES[::-1],))


def test_a_checkpoint_without_state_stays_one(trained, tmp_path):
    torch.save({"model": trained[0].state_dict()}, tmp_path / "own.pt")
    assert not read(tmp_path / "own.pt", trained[0], {})[1]
    assert not read(tmp_path / "own.pt", trained[0], {}, (NAMES[:2], NAMES[2:]))[1]
