"""Weights from strangers: nothing in a file is executed, nothing is loaded in part, and what is wrong is named."""

import copy
import io
import os
import pickle
import random
import struct
import zipfile

import pytest
import torch
import torch.nn as nn

from anynorm.apps.weights import load_weights, read_weights, write_weights
from anynorm.errors import UserError


def make_model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(4, 2))


class Call:
    """Pickles as a call of `function` with `arguments`."""

    def __init__(self, function, *arguments):
        self.function, self.arguments = function, arguments

    def __reduce__(self):
        return self.function, self.arguments


def find_callables():
    """Ways in which a pickle could touch the file `marker`, by the name that the refusal has to say."""
    import os
    import pathlib
    import shutil
    import subprocess

    return {
        "system": lambda m: Call(os.system, f"touch {m}"),
        "Popen": lambda m: Call(subprocess.Popen, ("touch", str(m))),
        "check_output": lambda m: Call(subprocess.check_output, ["touch", str(m)]),
        "eval": lambda m: Call(eval, f"open({str(m)!r}, 'w')"),
        "exec": lambda m: Call(exec, f"open({str(m)!r}, 'w')"),
        "open": lambda m: Call(open, str(m), "w"),
        "makedirs": lambda m: Call(os.makedirs, str(m)),
        "mkdir": lambda m: Call(os.mkdir, str(m)),
        "rmtree": lambda m: Call(shutil.rmtree, str(m.parent)),
        "Path": lambda m: Call(pathlib.Path, str(m)),
    }


POISONS = sorted(find_callables())


def plant(kind, model, poison):
    """A state_dict with a call at one of several places."""
    state = dict(model.state_dict())
    places = {
        "instead": lambda: poison,
        "beside": lambda: {**state, "extra": poison},
        "first": lambda: {"a": poison, **state},
        "inside": lambda: {"state_dict": {**state, "1.running_var": poison}},
        "list": lambda: [state, [poison]],
        "key": lambda: {"state_dict": state, "optimizer": {"hook": poison}},
    }
    return places[kind]()


@pytest.mark.parametrize("place", ["instead", "beside", "first", "inside", "list", "key"])
@pytest.mark.parametrize("name", POISONS)
@pytest.mark.parametrize("form", ["zip", "legacy"])
def test_poisoned_pickles_are_refused_by_the_name_of_what_they_call(tmp_path, name, place, form):
    model, marker = make_model(), tmp_path / "victim" / "marker"
    marker.parent.mkdir()
    before = copy.deepcopy(model.state_dict())
    path = tmp_path / "w.pt"
    torch.save(plant(place, model, find_callables()[name](marker)), path, _use_new_zipfile_serialization=form == "zip")
    with pytest.raises(UserError, match=r"fold --weights: .* was not read: it asks to call [\w.]+, and") as caught:
        load_weights("fold --weights", model, str(path))
    assert f"{name}, and weights" in str(caught.value)
    assert marker.parent.is_dir()
    assert not marker.exists()
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_a_bare_pickle(tmp_path):
    path, marker = tmp_path / "w.pth", tmp_path / "marker"
    path.write_bytes(pickle.dumps(find_callables()["system"](marker)))
    with pytest.raises(UserError, match="cannot be read as weights"):
        read_weights("x", str(path))
    assert not marker.exists()


DAMAGES = 80


@pytest.mark.parametrize("seed", range(DAMAGES))
def test_damaged_files_load_whole_or_not_at_all(tmp_path, seed):
    """Cut short, bytes turned over, entries of the archive missing: an error of ours, or the very weights."""
    model, rng = make_model(), random.Random(seed)
    other = make_model()
    for value in other.state_dict().values():
        value.copy_(torch.randint(1, 9, value.shape))
    file = io.BytesIO()
    torch.save(other.state_dict(), file)
    data = bytearray(file.getvalue())
    path = tmp_path / "w.pt"
    if seed % 4 == 0:
        data = data[: rng.randrange(1, len(data) - 1)]
    elif seed % 4 == 1:
        for _ in range(rng.randrange(1, 30)):
            data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    elif seed % 4 == 2:
        source = zipfile.ZipFile(file)
        names = source.namelist()
        lost = rng.choice([name for name in names if "/data/" in name or name.endswith("data.pkl")])
        out = io.BytesIO()
        with zipfile.ZipFile(out, "w") as target:
            for name in names:
                if name != lost:
                    target.writestr(name, source.read(name))
        data = out.getvalue()
    else:
        data = rng.randbytes(rng.randrange(1, 4000))
    path.write_bytes(bytes(data))
    before = copy.deepcopy(model.state_dict())
    try:
        load_weights("fold --weights", model, str(path))
    except UserError:
        assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    else:
        assert seed % 4 == 1  # a bit in a value, in a checksum that is not read, or in padding


def set_entry(state, key, value):
    return {**state, key: value}


STATES = {
    "negative": (lambda s: set_entry(s, "1.running_var", torch.tensor([1.0, -0.5, 1, 1])), "1.running_var must not be"),
    "complex": (lambda s: set_entry(s, "1.weight", torch.ones(4, dtype=torch.complex64)), "1.weight must be"),
    "complex conv": (lambda s: set_entry(s, "0.bias", torch.ones(4, dtype=torch.complex64)), "0.bias must be"),
    "shape": (lambda s: set_entry(s, "1.bias", torch.ones(5)), r"1.bias must have shape \(4,\); got \(5,\)"),
    "broadcast": (lambda s: set_entry(s, "1.running_mean", torch.ones(1)), r"1.running_mean must have shape"),
    "scalar": (lambda s: set_entry(s, "1.weight", torch.tensor(1.0)), r"1.weight must have shape \(4,\); got \(\)"),
    "missing": (lambda s: {k: v for k, v in s.items() if k != "3.weight"}, "3.weight is missing"),
    "extra": (lambda s: set_entry(s, "4.weight", torch.ones(1)), "4.weight has no place in the model"),
    "whole": (lambda s: set_entry(s, "0.weight", torch.ones(4, 3, 3, 3, dtype=torch.int64)), "0.weight must be"),
    "bool": (lambda s: set_entry(s, "1.bias", torch.ones(4, dtype=torch.bool)), "1.bias must be torch.float32"),
    "sparse": (lambda s: set_entry(s, "3.bias", torch.ones(2).to_sparse()), "3.bias must be a plain tensor"),
    "counters": (lambda s: set_entry(s, "1.num_batches_tracked", torch.ones(3)), "1.num_batches_tracked must"),
    "no tensor": (lambda s: set_entry(s, "1.weight", 3.0), "1.weight is missing"),
    "empty": (lambda s: {}, "must hold a state_dict"),
    "tensor": (lambda s: torch.ones(3), "must hold a state_dict"),
}


@pytest.mark.parametrize("fault", STATES)
@pytest.mark.parametrize("form", ["pt", "safetensors"])
def test_malformed_states_are_refused_whole_by_their_key(tmp_path, fault, form):
    change, message = STATES[fault]
    model = make_model()
    other = {key: torch.full_like(value, 2) for key, value in model.state_dict().items()}
    before = copy.deepcopy(model.state_dict())
    state = change(other)
    path = tmp_path / f"w.{form}"
    if form == "pt":
        torch.save(state, path)
    else:
        safe = pytest.importorskip("safetensors.torch", reason="safetensors is an extra: pip install 'anynorm[files]'")
        if fault in ("sparse", "no tensor", "tensor"):
            pytest.skip("safetensors holds no such thing")
        safe.save_file(state, path)
    with pytest.raises(UserError, match=message) as caught:
        load_weights("fold --weights", model, str(path))
    assert "fold --weights" in str(caught.value)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


@pytest.mark.parametrize("header", [b"\xff" * 8, struct.pack("<Q", 2**40), struct.pack("<Q", 2) + b"[]", b""])
def test_malformed_safetensors(tmp_path, header):
    pytest.importorskip("safetensors.torch", reason="safetensors is an extra: pip install 'anynorm[files]'")
    path = tmp_path / "w.safetensors"
    path.write_bytes(header + b"\0" * 20)
    with pytest.raises(UserError, match="cannot be read as safetensors"):
        read_weights("x", str(path))


def test_what_is_written_is_read(tmp_path):
    model = make_model()
    write_weights("x", model, tmp_path / "w.pt")
    other = make_model()
    other[3].weight.data.zero_()
    load_weights("x", other, str(tmp_path / "w.pt"))
    assert torch.equal(other[3].weight, model[3].weight)
    with pytest.raises(UserError, match="is there already; choose another name, or pass --force"):
        write_weights("x", model, tmp_path / "w.pt")
    write_weights("x", model, tmp_path / "w.pt", force=True)
    with pytest.raises(UserError, match="there is no folder"):
        write_weights("x", model, tmp_path / "no" / "w.pt")
    assert [path.name for path in tmp_path.iterdir()] == ["w.pt"]


def test_prefixes_of_wrappers_and_half_types(tmp_path):
    model, path = make_model(), tmp_path / "w.pt"
    state = {f"module.{key}": v.half() if v.is_floating_point() else v for key, v in model.state_dict().items()}
    torch.save({"model": state}, path)
    load_weights("x", model, str(path))
    assert model[0].weight.dtype is torch.float32


@pytest.mark.parametrize("name", ["w.pt", "w.safetensors"])
def test_what_is_written_over_keeps_links_and_permissions(tmp_path, name):
    if name.endswith(".safetensors"):
        pytest.importorskip("safetensors", reason="it is in the extra 'files'")
    model, real, link = make_model(), tmp_path / f"real_{name}", tmp_path / name
    link.symlink_to(real)
    with pytest.raises(UserError, match="is there already"):  # though it leads nowhere
        write_weights("--out", model, link)
    write_weights("--out", model, link, force=True)
    assert link.is_symlink()
    (tmp_path / "new").touch()
    assert real.stat().st_mode == (tmp_path / "new").stat().st_mode
    real.chmod(0o640)
    write_weights("--out", model, link, force=True)
    assert real.stat().st_mode & 0o777 == 0o640
    load_weights("--weights", make_model(), str(link))


def test_only_files_are_written_over(tmp_path):
    os.mkfifo(tmp_path / "pipe")  # as a device is, which would be replaced by a file
    for path in (tmp_path, tmp_path / "pipe"):
        with pytest.raises(UserError, match="is a folder or device, no file; choose another name"):
            write_weights("--out", make_model(), path, force=True)
    with pytest.raises(UserError, match="there is no folder"):
        write_weights("--out", make_model(), tmp_path / "none" / "w.pt")
    with pytest.raises(UserError, match=r"cannot be written \(OSError: .*File name too long"):
        write_weights("--out", make_model(), tmp_path / f"{'x' * 300}.pt")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["pipe"]
