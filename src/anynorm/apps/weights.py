"""Weights in files: read without executing anything, checked whole before a tensor is loaded, and written at once."""

from __future__ import annotations

import os
import re
import tempfile
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from anynorm.doctor.call import in_one_line
from anynorm.errors import UserError, check_state

INSIDE = ("state_dict", "model_state_dict", "model")  # where training loops put the weights among other things
GLOBAL = re.compile(r"GLOBAL ([\w.]+)")  # what torch's reader of pickles says it met
MOST_NAMED = 5


def read_weights(asked: str, path: str) -> dict[str, Tensor]:
    """Tensors by name out of a file that torch.save or safetensors wrote.

    Args:
        asked: the option that names the file, for messages.
        path: of the file; what ends in .safetensors is read as such, anything else as torch.save's.

    Raises:
        UserError: no such file; not readable as plain tensors; no tensors in it.
    """
    if not Path(path).is_file():
        raise UserError(f"{asked}: there is no file {path!r}; check the path.")
    found = read_safetensors(asked, path) if path.endswith(".safetensors") else read_torch(asked, path)
    for name in INSIDE:
        if isinstance(found, Mapping) and isinstance(found.get(name), Mapping):
            found = found[name]
    tensors = (
        {str(name): value for name, value in found.items() if isinstance(value, Tensor)}
        if isinstance(found, Mapping)
        else {}
    )
    if not tensors:
        raise UserError(
            f"{asked}: {path!r} must hold a state_dict, tensors by name; it holds a "
            f"{type(found).__name__} without; write it with torch.save(network.state_dict(), path)."
        )
    # DistributedDataParallel puts this before every name, and torch.compile that.
    for prefix in ("module.", "_orig_mod."):
        if all(name.startswith(prefix) for name in tensors):
            tensors = {name.removeprefix(prefix): value for name, value in tensors.items()}
    return tensors


def read_torch(asked: str, path: str) -> Any:
    """What torch.save wrote, of plain tensors and containers only."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # it warns of files that it then refuses
            return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as problem:
        wanted = GLOBAL.search(str(problem))
        if wanted:
            raise UserError(
                f"{asked}: {path!r} was not read: it asks to call {wanted[1]}, and weights are tensors that call "
                "nothing; if you trust its author, read it yourself and save its state_dict."
            ) from problem
        raise UserError(
            f"{asked}: {path!r} cannot be read as weights ({in_one_line(problem)}); write it with "
            f"torch.save(network.state_dict(), path)."
        ) from problem


def read_safetensors(asked: str, path: str) -> Any:
    """What safetensors wrote."""
    try:
        from safetensors.torch import load_file
    except ImportError:
        raise UserError(
            f"{asked}: {path!r} is read with safetensors, which is not installed; run pip install 'anynorm[files]'."
        ) from None
    try:
        return load_file(path)
    except Exception as problem:
        raise UserError(
            f"{asked}: {path!r} cannot be read as safetensors ({in_one_line(problem)}); write it again."
        ) from problem


def load_weights(asked: str, model: nn.Module, path: str, check_values: bool = True) -> None:
    """Load a file into a model, all of it or nothing.

    Args:
        asked: the option that names the file, for messages.
        model: takes the weights.
        path: of the file.
        check_values: refuse what no norm can have, such as a negative running_var.

    Raises:
        UserError: as `read_weights`, or names, shapes or values that do not fit; each is named.
    """
    weights, own = read_weights(asked, path), model.state_dict()
    wrong = [*find_wrong(own, weights)]
    if check_values:
        wrong += find_wrong_values(model, weights)
    if wrong:
        more = f"; and {len(wrong) - MOST_NAMED} more" if len(wrong) > MOST_NAMED else ""
        raise UserError(
            f"{asked}: {path!r} does not fit the model, and nothing of it was loaded: "
            f"{'; '.join(map(shorten, wrong[:MOST_NAMED]))}{more}."
        )
    model.load_state_dict(weights)


def shorten(text: str) -> str:
    """Text without its middle, where it is long: a key may be of any length."""
    return text if len(text) <= 300 else f"{text[:150]}...{text[-147:]}"


def find_wrong(own: Mapping[str, Any], weights: dict[str, Tensor]) -> Iterator[str]:
    """What of weights does not fit a model's own, each as a sentence that begins with the key."""
    for key, value in own.items():
        given = weights.get(key)
        if not isinstance(value, Tensor):
            yield f"{key} is extra state of the model, which is no tensor"
        elif given is None:
            yield f"{key} is missing"
        elif given.layout != torch.strided or given.is_quantized or given.is_meta:
            yield f"{key} must be a plain tensor; got layout {given.layout}, dtype {given.dtype}, on {given.device}"
        elif given.shape != value.shape:
            yield f"{key} must have shape {tuple(value.shape)}; got {tuple(given.shape)}"
        elif find_sort(given) != find_sort(value) and not key.endswith("num_batches_tracked"):
            yield f"{key} must be {value.dtype} or its like; got {given.dtype}"
    yield from (f"{key} has no place in the model" for key in weights if key not in own)


def find_wrong_values(model: nn.Module, weights: dict[str, Tensor]) -> Iterator[str]:
    """What no norm can have, the same."""
    for name, module in model.named_modules(remove_duplicate=False):
        if "running_var" in module._buffers:
            yield from check_state(weights, f"{name}." if name else "")


def find_sort(t: Tensor) -> str:
    """Which numbers a tensor holds."""
    if t.is_complex():
        return "complex"
    return "real" if t.is_floating_point() else "whole"


def write_weights(asked: str, model: nn.Module, path: Path, force: bool = False) -> None:
    """Write a model's state_dict: safetensors where the name ends so, else as torch.save does.

    Raises:
        UserError: see `check_target`; it cannot be written.
    """
    check_target(asked, path, force)
    path = path.resolve()  # what a link leads to is written, and the link stays
    tensors = {name: value.detach().clone().contiguous() for name, value in model.state_dict().items()}
    # Beside it and then in its place: what is interrupted leaves no half file under the name.
    try:
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=".weights.")
    except OSError as problem:
        raise UserError(f"{asked}: {str(path)!r} cannot be written ({in_one_line(problem)}).") from problem
    os.close(handle)
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import save_file

            save_file(tensors, name)
        else:
            torch.save(tensors, name)
        os.chmod(name, find_permissions(path))  # a temporary file is its owner's alone
        os.replace(name, path)
    except BaseException as problem:
        Path(name).unlink(missing_ok=True)
        if isinstance(problem, OSError):
            raise UserError(f"{asked}: {str(path)!r} cannot be written ({in_one_line(problem)}).") from problem
        raise


def check_target(asked: str, path: Path, force: bool = False) -> None:
    """Raise where a file is not to be written, before anything is computed for it.

    Raises:
        UserError: it is there and `force` is False; it is no file; there is no folder for it.
    """
    if os.path.lexists(path) and not force:
        raise UserError(f"{asked}: {str(path)!r} is there already; choose another name, or pass --force.")
    if os.path.exists(path) and not os.path.isfile(path):
        raise UserError(f"{asked}: {str(path)!r} is a folder or device, no file; choose another name.")
    folder = path.resolve().parent
    if not folder.is_dir():
        raise UserError(f"{asked}: there is no folder {str(folder)!r}; create it first.")


def find_permissions(path: Path) -> int:
    """Those of a file, or of one that is new."""
    if os.path.exists(path):
        return path.stat().st_mode & 0o777
    mask = os.umask(0)
    os.umask(mask)
    return 0o666 & ~mask
