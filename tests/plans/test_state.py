"""A checkpoint in the forms that trainers leave, held against the recorder's snapshot."""

import pytest
import torch
from safetensors.torch import save_file

from curate.core.errors import UserError
from curate.plans.state import difference, readable
from curate.training.snapshots import save_state
from tests.tiny import TinyLM, build_optimizers


@pytest.fixture
def trained(tmp_path):
    """A model after a step, and its snapshot."""
    torch.manual_seed(0)
    model = TinyLM()
    optimizers = build_optimizers(model, "AdamW")
    model(torch.arange(8)[None]).square().sum().backward()
    optimizers[0].step()
    save_state(tmp_path / "snapshot.safetensors", model, optimizers)
    return model, optimizers[0], tmp_path / "snapshot.safetensors"


def nested(model, optimizer):
    return {"epoch": 3, "state": {"model": model.state_dict(), "optimizer": optimizer.state_dict()}}


FORMS = {
    "plain.pt": lambda model, optimizer, path: torch.save(model.state_dict(), path),
    "nested.ckpt": lambda model, optimizer, path: torch.save(nested(model, optimizer), path),
    "ddp.pth": lambda model, optimizer, path: torch.save(
        {"module." + name: value for name, value in model.state_dict().items()}, path
    ),
    "half.bin": lambda model, optimizer, path: torch.save(
        {name: value.bfloat16() for name, value in model.state_dict().items()}, path
    ),
    "own.safetensors": lambda model, optimizer, path: save_state(path, model, optimizer),
    "folder": lambda model, optimizer, path: (
        path.mkdir(),
        save_file({"embedding.weight": model.embedding.weight.detach()}, path / "model-1.safetensors"),
        save_file({"model.mix.weight": model.mix.weight.detach()}, path / "model-2.safetensors"),
    ),
}


@pytest.mark.parametrize("form", FORMS)
def test_the_same_state_is_known_in_every_form_and_another_is_not(trained, tmp_path, form):
    model, optimizer, snapshot = trained
    FORMS[form](model, optimizer, tmp_path / form)
    assert readable(snapshot, tmp_path / form)
    assert difference(snapshot, tmp_path / form) is None
    with torch.no_grad():
        model.mix.weight[0, 0] += 0.01
    FORMS[form](model, optimizer, tmp_path / ("other-" + form))
    assert difference(snapshot, tmp_path / ("other-" + form)).startswith("mix.weight differs, by ")


def test_another_shape_is_named(trained, tmp_path):
    model = TinyLM(width=6)
    torch.save(model.state_dict(), tmp_path / "small.pt")
    found = difference(trained[2], tmp_path / "small.pt")
    assert found == "down.bias has shape (6,) instead of (8,)"


def test_what_cannot_be_compared_is_said_and_what_is_damaged_refused(trained, tmp_path):
    snapshot = trained[2]
    torch.save({"step": 4, "weights": "elsewhere"}, tmp_path / "nothing.pt")
    (tmp_path / "sharded").mkdir()
    (tmp_path / "sharded" / "__0_0.distcp").write_bytes(b"x")
    for name in ("nothing.pt", "sharded"):
        assert not readable(snapshot, tmp_path / name)
        assert difference(snapshot, tmp_path / name) is None
    (tmp_path / "bad.safetensors").write_bytes(snapshot.read_bytes()[:100])
    with pytest.raises(UserError, match="is corrupted"):
        difference(snapshot, tmp_path / "bad.safetensors")


def test_nothing_pickled_is_loaded(trained, tmp_path):
    torch.save({"model": trained[0]}, tmp_path / "pickled.pt")
    assert not readable(trained[2], tmp_path / "pickled.pt")
