"""Every layer through every way out of Python, held against eager at another batch size and length: docs/export.md.

Each cell exports one layer with its batch and its length free, and compares outputs to 1e-5. Where that fails it tries
again with the length fixed, then with nothing free. `python tests/works_with/export.py group lstm` runs the rows whose
names contain one of the words, and writes none of them.
"""

from __future__ import annotations

import contextlib
import io
import logging
import re
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnxruntime
import torch
from torch import Tensor, nn

import anynorm

PAGE = Path(__file__).parents[2] / "docs" / "export.md"
MARKED = re.compile(r"(?<=<!-- table -->\n).*?(?=<!-- /table -->)", re.DOTALL)
TOLERANCE = 1e-5
SIZES = ((3, 8), (5, 8), (2, 13))  # of batch and length: the example, another batch, and both others
AXES = {"n": "batch", "l": "length"}
FREE = {"": "nl", "works, with the length fixed": "n", "works, with batch and length fixed": ""}
Inputs = tuple[Tensor, ...]


@dataclass(frozen=True)
class Layer:
    """A row: how its model is made, and the axes of its inputs.

    Attributes:
        make: the model, with gamma, beta and averages that are not those of the start.
        inputs: axes of each: n is the batch, l the length, numbers are sizes; `lengths` and `mask` name what is not
            drawn from a normal distribution.
        aot: whether AOTInductor is tried too, which takes half a minute.
    """

    make: Callable[[], nn.Module]
    inputs: tuple[str, ...] = ("n 6 l",)
    aot: bool = False

    def draw(self, samples: int, length: int) -> Inputs:
        """Inputs of these sizes, the same at each call."""
        generator = torch.Generator().manual_seed(7)
        counted = torch.arange(samples) % length + 1  # ragged, and never nothing
        found = []
        for axes in self.inputs:
            sizes = [{"n": samples, "l": length}.get(axis) or int(axis) for axis in find_axes(axes)]
            if axes.startswith("mask"):
                found.append(anynorm.mask_of(counted, length))
            elif axes.startswith("lengths"):
                found.append(counted)
            else:
                found.append(torch.randn(sizes, generator=generator) * 2 + 1)
        return tuple(found)

    def find_free(self, free: str) -> list[dict[int, str]]:
        """For each input its axes that are free, and their names."""
        return [{i: AXES[a] for i, a in enumerate(find_axes(axes)) if a in free} for axes in self.inputs]


def find_axes(axes: str) -> list[str]:
    """The axes of an input, without what names it."""
    return [axis for axis in axes.split() if axis not in ("mask", "lengths")]


class Call(nn.Module):
    """A layer with a keyword argument as its second input, or a domain that is chosen."""

    def __init__(self, layer: nn.Module, keyword: str = "", domain: str = "") -> None:
        super().__init__()
        self.layer, self.keyword, self.domain = layer, keyword, domain

    def forward(self, x: Tensor, other: Tensor | None = None) -> Any:
        """What a graph of one layer computes."""
        with anynorm.domain(self.domain) if self.domain else contextlib.nullcontext():
            y = self.layer(x, **{self.keyword: other}) if self.keyword else self.layer(x)
        if not isinstance(y, tuple):
            return y
        return (y[0], *y[1]) if isinstance(y[1], tuple) else y  # of an LSTM


class Masked(nn.Module):
    """A model of several layers under `anynorm.masked`."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Conv1d(6, 6, 3, padding=1), anynorm.BatchNorm1d(6), anynorm.GroupNorm(2, 6))

    def forward(self, x: Tensor, lengths: Tensor) -> Tensor:
        """The mask reaches both norms."""
        with anynorm.masked(anynorm.mask_of(lengths, x.shape[-1])):
            y: Tensor = self.layers(x)
        return y


def settle(model: nn.Module) -> nn.Module:
    """In evaluation, with parameters and averages drawn at random, some gammas negative."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            if not name.rpartition(".")[2].startswith("num_"):
                tensor.copy_(torch.randn(tensor.shape, generator=generator))
            if "running_var" in name or "running_std" in name:
                tensor.abs_().add_(0.5)
    return model.eval()


def norm(name: str, *arguments: Any, **options: Any) -> Callable[[], nn.Module]:
    """One of our classes."""
    return lambda: settle(getattr(anynorm, name)(*arguments, **options))


def call(name: str, *arguments: Any, keyword: str = "", domain: str = "", **options: Any) -> Callable[[], nn.Module]:
    """One of our classes, called with more than x."""
    return lambda: settle(Call(getattr(anynorm, name)(*arguments, **options), keyword, domain))


def make_frozen() -> nn.Module:
    """In training mode."""
    model = settle(nn.Sequential(nn.Conv1d(6, 6, 3, padding=1), anynorm.BatchNorm1d(6), nn.ReLU()))
    anynorm.freeze(model)
    return model.train()


def make_accelerated() -> nn.Module:
    """Norms fused with their ReLU."""
    layers = (nn.Conv1d(6, 6, 3, padding=1), nn.BatchNorm1d(6), nn.ReLU(), nn.GroupNorm(2, 6), nn.SiLU())
    model = nn.Sequential(*layers)
    settle(model)
    anynorm.accelerate(model, fuse=True)
    return model


SEQUENCE = "n l 6"
LAYERS: dict[str, Layer] = {
    "BatchNorm1d": Layer(norm("BatchNorm1d", 6), aot=False),
    "BatchNorm1d of (N, C)": Layer(norm("BatchNorm1d", 6), ("n 6",)),
    "BatchNorm2d": Layer(norm("BatchNorm2d", 6), ("n 6 l 4",)),
    "BatchNorm3d": Layer(norm("BatchNorm3d", 6), ("n 6 l 4 2",)),
    "BatchNorm1d without running averages": Layer(norm("BatchNorm1d", 6, track_running_stats=False)),
    "InstanceNorm1d": Layer(norm("InstanceNorm1d", 6, affine=True)),
    "InstanceNorm2d": Layer(norm("InstanceNorm2d", 6, affine=True), ("n 6 l 4",)),
    "InstanceNorm3d": Layer(norm("InstanceNorm3d", 6), ("n 6 l 4 2",)),
    "InstanceNorm1d with running averages": Layer(norm("InstanceNorm1d", 6, affine=True, track_running_stats=True)),
    "GroupNorm": Layer(norm("GroupNorm", 2, 6), aot=False),
    "LayerNorm": Layer(norm("LayerNorm", 6), (SEQUENCE,), aot=False),
    "LayerNorm of two axes": Layer(norm("LayerNorm", (5, 6)), ("n l 5 6",)),
    "RMSNorm": Layer(norm("RMSNorm", 6), (SEQUENCE,)),
    "GhostBatchNorm1d": Layer(norm("GhostBatchNorm1d", 6, ghost_size=2)),
    "BatchRenorm1d": Layer(norm("BatchRenorm1d", 6)),
    "SyncBatchNorm": Layer(norm("SyncBatchNorm", 6)),
    'AnyNorm("n c s -> c")': Layer(norm("AnyNorm", "n c s -> c", affine="c", c=6, track_running_stats=True)),
    'AnyNorm("n c s -> n")': Layer(norm("AnyNorm", "n c s -> n", affine="c", c=6)),
    'AnyNorm("n (g k) s -> n g")': Layer(norm("AnyNorm", "n (g k) s -> n g", affine="g k", g=2, k=3)),
    'AnyNorm("n s d -> n s")': Layer(norm("AnyNorm", "n s d -> n s", affine="d", d=6, centred=False), (SEQUENCE,)),
    "BatchNormAct1d": Layer(norm("BatchNormAct1d", 6), aot=False),
    "BatchNormAct1d with a residual": Layer(norm("BatchNormAct1d", 6), ("n 6 l", "n 6 l")),
    "InstanceNormAct1d, leaky ReLU": Layer(norm("InstanceNormAct1d", 6, affine=True, activation="leaky_relu")),
    "GroupNormAct, SiLU": Layer(norm("GroupNormAct", 2, 6, activation="silu")),
    "LayerNormAct, GELU": Layer(norm("LayerNormAct", 6, activation="gelu"), (SEQUENCE,)),
    "RMSNormAct, mish": Layer(norm("RMSNormAct", 6, activation="mish"), (SEQUENCE,)),
    "GhostBatchNormAct1d": Layer(norm("GhostBatchNormAct1d", 6, ghost_size=2)),
    "BatchRenormAct1d": Layer(norm("BatchRenormAct1d", 6)),
    "SyncBatchNormAct": Layer(norm("SyncBatchNormAct", 6)),
    "a model, `accelerate(fuse=True)`": Layer(make_accelerated),
    "a frozen model in `train()`": Layer(make_frozen, aot=False),
    "DomainBatchNorm1d": Layer(call("DomainBatchNorm1d", 6, domains=("day", "night"), domain="night")),
    "BatchNorm1d, `mask=`": Layer(call("BatchNorm1d", 6, keyword="mask"), ("n 6 l", "mask n l")),
    "BatchNorm1d, `lengths=`": Layer(call("BatchNorm1d", 6, keyword="lengths"), ("n 6 l", "lengths n")),
    "InstanceNorm1d, `mask=`": Layer(call("InstanceNorm1d", 6, keyword="mask"), ("n 6 l", "mask n l")),
    "GroupNorm, `lengths=`": Layer(call("GroupNorm", 2, 6, keyword="lengths"), ("n 6 l", "lengths n")),
    "LayerNorm, `mask=`": Layer(call("LayerNorm", 6, keyword="mask"), (SEQUENCE, "mask n l")),
    "RMSNorm, `lengths=`": Layer(call("RMSNorm", 6, keyword="lengths"), (SEQUENCE, "lengths n")),
    "BatchNormAct1d, `mask=`": Layer(call("BatchNormAct1d", 6, keyword="mask"), ("n 6 l", "mask n l")),
    "a model within `anynorm.masked`": Layer(lambda: settle(Masked()), ("n 6 l", "lengths n")),
    "LSTM, layer norm": Layer(call("LSTM", 6, 4, norm="layer", batch_first=True), (SEQUENCE,)),
    "LSTM, batch norm of the sequence": Layer(
        call("LSTM", 6, 4, norm="batch-sequence", bidirectional=True, batch_first=True), (SEQUENCE,)
    ),
    "LSTM, batch norm per step": Layer(call("LSTM", 6, 4, norm="batch-per-step", max_steps=8, batch_first=True), (SEQUENCE,)),
    "GRU, layer norm": Layer(call("GRU", 6, 4, norm="layer", batch_first=True), (SEQUENCE,)),
    "GRU, batch norm of the sequence": Layer(
        call("GRU", 6, 4, norm="batch-sequence", num_layers=2, batch_first=True), (SEQUENCE,)
    ),
}

Graph = Callable[..., Any]


def export(layer: Layer, model: nn.Module, free: str) -> Graph:
    """torch.export."""
    example = layer.draw(*SIZES[0])
    return torch.export.export(model, example, dynamic_shapes=find_shapes(layer, free)).module()


def export_onnx(layer: Layer, model: nn.Module, free: str) -> Graph:
    """torch.onnx, by torch.export."""
    path = Path(tempfile.mkdtemp()) / "model.onnx"
    torch.onnx.export(
        model, layer.draw(*SIZES[0]), path, dynamo=True, dynamic_shapes=find_shapes(layer, free), verbose=False
    )
    return open_session(str(path))


def export_onnx_traced(layer: Layer, model: nn.Module, free: str) -> Graph:
    """torch.onnx, by torch.jit.trace."""
    file, names = io.BytesIO(), [f"x{i}" for i in range(len(layer.inputs))]
    axes = {name: axes for name, axes in zip(names, layer.find_free(free), strict=True) if axes}
    mode = torch.onnx.TrainingMode.PRESERVE
    torch.onnx.export(
        model, layer.draw(*SIZES[0]), file, dynamo=False, input_names=names, dynamic_axes=axes, training=mode
    )
    return open_session(file.getvalue())


def trace(layer: Layer, model: nn.Module, free: str) -> Graph:
    """torch.jit.trace, to which no axis can be declared free."""
    return torch.jit.trace(model, layer.draw(*SIZES[0]), check_trace=False)


def compile_ahead(layer: Layer, model: nn.Module, free: str) -> Graph:
    """AOTInductor."""
    program = torch.export.export(model, layer.draw(*SIZES[0]), dynamic_shapes=find_shapes(layer, free))
    path = Path(tempfile.mkdtemp()) / "model.pt2"
    return torch._inductor.aoti_load_package(
        torch._inductor.aoti_compile_and_package(program, package_path=str(path))
    )


WAYS = {
    "torch.export": export,
    "ONNX, `dynamo=True`": export_onnx,
    "ONNX, `dynamo=False`": export_onnx_traced,
    "torch.jit.trace": trace,
    "AOTInductor": compile_ahead,
}


def find_shapes(layer: Layer, free: str) -> tuple[Any, ...]:
    """What torch.export takes."""
    dims = {"batch": torch.export.Dim("batch", min=2, max=64), "length": torch.export.Dim("length", min=2, max=512)}
    return tuple({axis: dims[name] for axis, name in axes.items()} for axes in layer.find_free(free))


def open_session(model: str | bytes) -> Graph:
    """A graph that onnxruntime computes."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = 1, 3
    session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])

    def compute(*inputs: Tensor) -> tuple[Tensor, ...]:
        names = [each.name for each in session.get_inputs()]
        given = {name: each.numpy() for name, each in zip(names, inputs, strict=True)}
        return tuple(torch.from_numpy(each) for each in session.run(None, given))

    return compute


def check(graph: Graph, layer: Layer, model: nn.Module, free: str) -> None:
    """Raise where a graph and the model differ, at every size that the graph should take."""
    samples = {SIZES[0], *(SIZES if free == "nl" else SIZES[:2] if free == "n" else ())}
    for size in sorted(samples):
        inputs = layer.draw(*size)
        with torch.no_grad():
            want, found = model(*inputs), graph(*inputs)
        pair = [each if isinstance(each, tuple | list) else (each,) for each in (found, want)]
        torch.testing.assert_close(tuple(pair[0]), tuple(pair[1]), rtol=TOLERANCE, atol=TOLERANCE)


def attempt(layer: Layer, way: Callable[[Layer, nn.Module, str], Graph]) -> str:
    """What the cell says."""
    why = ""
    lengths = any("l" in find_axes(axes) for axes in layer.inputs)
    for said, free in FREE.items():
        if free == "n" and not lengths:
            continue
        model = layer.make()
        try:
            with torch.no_grad():
                graph = way(layer, model, free)
            check(graph, layer, model, free)
        except Exception as problem:
            why = why or describe(problem)
        else:
            return said or "works"
        finally:
            torch._dynamo.reset()
    return why


def describe(problem: BaseException) -> str:
    """The first line of an error that says something, short enough for a cell."""
    while problem.__cause__ is not None:
        problem = problem.__cause__
    lines = [line.strip() for line in str(problem).splitlines() if line.strip()]
    return f"{type(problem).__name__}: {(lines or [''])[0]}".replace("|", "/")[:160]


def write(rows: dict[str, list[str]]) -> None:
    """The table of docs/export.md."""
    head = f"\n| layer | {' | '.join(WAYS)} |\n|---|{'---|' * len(WAYS)}\n"
    table = "".join(f"| {name} | {' | '.join(cells)} |\n" for name, cells in rows.items())
    versions = f"torch {torch.__version__.partition('+')[0]}, onnxruntime {onnxruntime.__version__}"
    before, after = MARKED.split(PAGE.read_text())
    PAGE.write_text(f"{before}{head}{table}\nRun on {time.strftime('%Y-%m-%d')} with {versions}.\n\n{after}")


def main() -> None:
    words = [word.lower().replace("_", " ") for word in sys.argv[1:]]
    torch.set_num_threads(1)
    logging.disable(logging.CRITICAL)
    warnings.simplefilter("ignore")
    rows = {}
    for name, layer in LAYERS.items():
        if words and not any(word in name.lower() for word in words):
            continue
        rows[name] = []
        for title, way in WAYS.items():
            began = time.perf_counter()
            with contextlib.redirect_stdout(io.StringIO()):
                said = attempt(layer, way) if layer.aot or way is not compile_ahead else ""
            rows[name].append(said)
            if said:
                print(f"{name:40} {title:22} {time.perf_counter() - began:5.1f} s  {said}", flush=True)
    if not words:
        write(rows)


if __name__ == "__main__":
    main()
