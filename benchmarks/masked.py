"""What does a mask cost? Each norm on one padded tensor: without a mask, with a full one, with lengths, with holes.

`python -m benchmarks.masked` prints the table and writes it into docs/padding.md.
"""

from __future__ import annotations

import re
import statistics
import sys
from pathlib import Path

import torch
import torch.nn as nn
from torch import Tensor

import anynorm
from anynorm.apps.timing.cases import Case, make_call, needs_grad
from anynorm.apps.timing.interleaved import InterleavedTimings, time_interleaved

from .machine import Watch, describe_load, find_facts

PAGE = Path(__file__).parents[1] / "docs" / "padding.md"
SECONDS = 1.0  # for a case in a mode, over all masks

# Speech features and a padded text batch, volumes of unlike size, and the small batch of a series.
CASES = (
    Case("speech", "BatchNorm1d", (256,), (32, 256, 400)),
    Case("speech", "BatchNorm2d", (256,), (32, 256, 1, 400), channels_last=True),
    Case("speech", "InstanceNorm1d", (256,), (32, 256, 400)),
    Case("speech", "GroupNorm", (8, 256), (32, 256, 400)),
    Case("text", "LayerNorm", (768,), (16, 256, 768)),
    Case("text", "RMSNorm", (768,), (16, 256, 768)),
    Case("volumes", "InstanceNorm3d", (32,), (4, 32, 32, 64, 64)),
    Case("series", "BatchNorm1d", (12,), (16, 12, 30)),
)


def draw_masks(case: Case) -> dict[str, Tensor | None]:
    """The masks by name; lengths are even from a quarter of the positions to all."""
    features = case.norm in ("layer", "rms")
    positions = case.shape[:-1] if features else (case.shape[0], *case.shape[2:])
    lengths = torch.linspace(positions[-1] / 4, positions[-1], positions[0]).long()
    prefix = torch.arange(positions[-1]) < lengths.view(-1, *[1] * (len(positions) - 1))
    holes = torch.rand(positions, generator=torch.Generator().manual_seed(0)) < 0.7
    full = torch.ones(positions, dtype=torch.bool)
    return {"none": None, "full": full, "lengths": prefix.expand(positions).contiguous(), "holes": holes}


class Masked(nn.Module):
    """A norm that is always called with the same mask."""

    def __init__(self, norm: nn.Module, mask: Tensor | None) -> None:
        super().__init__()
        self.norm, self.mask = norm, mask

    def forward(self, x: Tensor) -> Tensor:
        """As the norm's."""
        return self.norm(x, mask=self.mask)


def measure(case: Case, mode: str, seconds: float) -> InterleavedTimings:
    """Time all masks in turn."""
    x, g = case.draw()
    calls = {}
    for name, mask in draw_masks(case).items():
        module = Masked(case.make(anynorm), mask).train(mode != "evaluation")
        calls[name] = make_call(module, module.parameters(), mode, x, g)
    with torch.set_grad_enabled(needs_grad(mode)):
        return time_interleaved(calls, seconds)


def write_row(case: Case, mode: str, rounds: InterleavedTimings) -> str:
    """Milliseconds without a mask, and how many times as long each mask takes."""
    ratios = {name: rounds.ratio(name, "none") for name in ("full", "lengths", "holes")}
    layout = " cl" if case.channels_last else ""
    cells = [f"{case.name}{layout}", mode, f"{1e3 * rounds.median('none'):.3g}", *(f"{r:.2f}" for r in ratios.values())]
    return f"| {' | '.join(cells)} |"


def main() -> None:
    """Measure, print, and write the page unless a case is named."""
    only = " ".join(sys.argv[1:])
    watch = Watch()
    lines = ["| case | mode | no mask, ms | full | lengths | holes |", "|---|---|---|---|---|---|"]
    lengths: list[float] = []
    for case in CASES:
        if only not in f"{case.place} {case.name}":
            continue
        for mode in ("training", "forward+backward"):
            rounds = measure(case, mode, SECONDS)
            lengths.append(rounds.ratio("lengths", "none"))
            lines.append(write_row(case, mode, rounds))
            print(lines[-1], flush=True)
    facts = find_facts()
    mean = statistics.geometric_mean(lengths)
    lines += [
        "",
        f"Geometric mean with lengths {mean:.2f}. {facts['date']}, {facts['cpu']}, {facts['threads']} threads; "
        f"other work meanwhile: {describe_load(watch.find_share())}.",
    ]
    print(lines[-1])
    if not only:
        text = re.sub(
            r"(<!-- masked -->\n).*?(<!-- /masked -->)",
            lambda match: f"{match[1]}" + "\n".join(lines) + f"\n{match[2]}",
            PAGE.read_text(),
            flags=re.DOTALL,
        )
        PAGE.write_text(text)


if __name__ == "__main__":
    main()
