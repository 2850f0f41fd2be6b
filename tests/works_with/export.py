"""Every layer through every way out of Python, held against eager at another batch size and length: docs/export.md.

Each cell exports one layer with its batch and its length free, and compares outputs to 1e-5. Where that fails it tries
again with the length fixed, then with nothing free. `make works-with` runs it; with words, as in `PYTHONPATH=tests
python -m works_with.export group lstm`, only rows whose names contain one of them; the rows of the others stay.
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
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from works_with.export_layers import LAYERS, Layer, find_axes

PAGE = Path(__file__).parents[2] / "docs" / "export.md"
MARKED = re.compile(r"(?<=<!-- table -->\n).*?(?=<!-- /table -->)", re.DOTALL)
TOLERANCE = 1e-5
SIZES = ((3, 8), (5, 8), (2, 13))  # of batch and length: the example, another batch, and both others
FREE = {"": "nl", "works, with the length fixed": "n", "works, with batch and length fixed": ""}


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
    return torch._inductor.aoti_load_package(torch._inductor.aoti_compile_and_package(program, package_path=str(path)))


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
    import onnxruntime  # Here, as the suite reads LAYERS where there is none.

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = 1, 4
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


def read_rows(page: str) -> dict[str, list[str]]:
    """The cells of the table, by row."""
    lines = [line.removeprefix("| ").removesuffix(" |").split(" | ") for line in page.splitlines() if line[:2] == "| "]
    return {name: [cell.strip() for cell in cells] for name, *cells in lines if name in LAYERS}


def write(found: dict[str, list[str]]) -> None:
    """The table of docs/export.md, with the rows that were tried now and those that are there."""
    page = PAGE.read_text()
    known = read_rows(page) | found
    rows = {name: known[name] for name in LAYERS if name in known}
    head = f"\n| layer | {' | '.join(WAYS)} |\n|---|{'---|' * len(WAYS)}\n"
    table = "".join(f"| {name} | {' | '.join(cells)} |\n" for name, cells in rows.items())
    versions = f"torch {torch.__version__.partition('+')[0]} and onnxruntime {version('onnxruntime')}"
    before, after = MARKED.split(page)
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
    if rows:
        write(rows)


if __name__ == "__main__":
    main()
