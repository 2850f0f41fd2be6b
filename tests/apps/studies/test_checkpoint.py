"""A start from the user's weights: what is loaded, what is said, and what is refused."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from anynorm.apps.studies.checkpoint import Loaded, load_checkpoint, read_checkpoint, say_checkpoint
from anynorm.apps.studies.compare.options import Options
from anynorm.apps.studies.compare.prepare import load_task, prepare
from anynorm.apps.studies.compare.train import Run, make_network
from anynorm.errors import UserError


@pytest.fixture(autouse=True)
def fresh(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    read_checkpoint.cache_clear()


def make_small():
    return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))


@pytest.mark.parametrize("wrap", [lambda s: s, lambda s: {"state_dict": s, "epoch": 3}])
@pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod."])
def test_names_and_shapes_that_agree_are_loaded(wrap, prefix):
    torch.manual_seed(0)
    source = make_small()
    torch.save(wrap({prefix + name: value for name, value in source.state_dict().items()}), "w.pt")
    target = nn.Sequential(nn.Linear(3, 4), nn.Identity(), nn.Linear(4, 5))
    before = target[2].weight.clone()
    found = load_checkpoint(target, "w.pt")
    assert torch.equal(target[0].weight, source[0].weight)
    assert torch.equal(target[2].weight, before)
    assert found.loaded == ("0.weight", "0.bias")
    assert found.not_given == ("2.weight", "2.bias")
    assert len(found.not_taken) == len(source.state_dict()) - 2


def test_safetensors_are_read(tmp_path):
    safe = pytest.importorskip("safetensors.torch", reason="safetensors is an extra: pip install 'anynorm[files]'")
    safe.save_file(make_small().state_dict(), tmp_path / "w.safetensors")
    assert set(read_checkpoint("w.safetensors")) == set(make_small().state_dict())


class Strange:
    """Anything: no plain container of tensors."""


@pytest.mark.parametrize(
    ("content", "said"),
    [(None, "no file"), (b"nonsense", "cannot be read as weights"), ([1, 2], "holds a list"), (Strange(), "weights")],
)
def test_files_that_hold_no_weights(content, said):
    if isinstance(content, bytes):
        Path("w.pt").write_bytes(content)
    elif content is not None:
        torch.save(content, "w.pt")
    with pytest.raises(UserError, match=said) as caught:
        read_checkpoint("w.pt")
    assert "\n" not in str(caught.value)


def test_what_was_not_loaded_is_said_for_each_arm():
    said = say_checkpoint(
        "w.pt",
        {"batch": Loaded(("a",), (), ()), "none": Loaded(("a",), ("1.weight",), ()), "rms": Loaded(("a",), (), ())},
    )
    assert "batch, rms: everything was loaded" in said
    assert "none: 1 of the file found no place (1.weight)" in said


def test_every_arm_starts_from_the_file_and_another_network_is_refused():
    np.savez("d.npz", x=np.random.default_rng(0).normal(size=(60, 3)), y=np.arange(60) % 2)
    Path("start_net.py").write_text(
        "from torch import nn\n"
        "def make(): return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))\n"
        "def other(): return nn.Sequential(nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4)), nn.Linear(4, 2))\n"
    )
    torch.manual_seed(5)
    source = make_small()
    torch.save(source.state_dict(), "w.pt")
    options = Options(
        "d.npz", ("start_net.py:make",), ("none", "batch", "group"), ("8",), (0.1,), 2, 64, checkpoint="w.pt"
    )
    task = load_task(options)
    _, context = prepare(options, task)
    assert len(context["start"]) == 1
    assert "batch: everything was loaded" in context["start"][0]
    for norm in options.norms:
        for seed in (0, 1):
            network = make_network(Run("start_net.py:make", norm, "8", 0.1, seed, 64, True), task)
            assert torch.equal(network[2].weight, source[2].weight)
    plain = replace(options, checkpoint="")
    _, without = prepare(plain, load_task(plain))
    assert without["configuration"] != context["configuration"]
    assert without["start"] == []
    other = Options("d.npz", ("start_net.py:other",), ("none", "batch"), ("8",), (0.1,), 2, 64, checkpoint="w.pt")
    with pytest.raises(UserError, match=r"nothing in 'w\.pt' has a name and shape"):
        prepare(other, load_task(other))
