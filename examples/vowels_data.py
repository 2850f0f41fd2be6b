"""JapaneseVowels as it lies in the aeon package: utterances of unlike lengths, each with its speaker.

Kudo, Toyama and Shimbo 1999, Pattern Recognition Letters 20 (11-13). aeon itself is not imported.
"""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from anynorm.errors import UserError

CLASSES, CHANNELS, LONGEST = 9, 12, 29


@dataclass(frozen=True)
class Utterances:
    """x: (N, C, 29), float32, 0 at padding; lengths, labels: (N,), int64."""

    x: Tensor
    lengths: Tensor
    labels: Tensor

    def take(self, chosen: Tensor) -> Utterances:
        """Some of them, padded to the longest among them."""
        lengths = self.lengths[chosen]
        return Utterances(self.x[chosen, :, : int(lengths.max())].contiguous(), lengths, self.labels[chosen])


def check_packages() -> Path:
    """The folder of the data; where something is missing, one sentence that says what to install."""
    if importlib.util.find_spec("scipy") is None:
        raise UserError(
            "japanese_vowels: intervals need scipy, which is not installed; run pip install 'anynorm[compare]'."
        )
    spec = importlib.util.find_spec("aeon")
    if spec is None or not spec.submodule_search_locations:
        raise UserError(
            "japanese_vowels: the data are read from the aeon package, which is not installed; "
            "run pip install --no-deps aeon."
        )
    folder = Path(spec.submodule_search_locations[0]) / "datasets" / "data" / "JapaneseVowels"
    if not (folder / "JapaneseVowels_TRAIN.ts").is_file():
        raise UserError("japanese_vowels: this aeon has no JapaneseVowels_TRAIN.ts; install aeon 1.6.0.")
    return folder


def read_file(path: Path) -> Utterances:
    """A .ts file: after @data one utterance a line, channels between colons, the speaker 1 .. 9 last."""
    lines = path.read_text().partition("@data")[2].split()
    rows = [line.split(":") for line in lines]
    series = [torch.tensor([[float(v) for v in channel.split(",")] for channel in row[:-1]]) for row in rows]
    x = torch.zeros(len(rows), CHANNELS, LONGEST)
    for row, utterance in zip(x, series, strict=True):
        row[:, : utterance.shape[1]] = utterance
    lengths = torch.tensor([utterance.shape[1] for utterance in series])
    return Utterances(x, lengths, torch.tensor([int(row[-1]) - 1 for row in rows]))


@cache
def load_vowels() -> tuple[Utterances, Utterances]:
    """Training and test utterances, shuffled, every channel standardized with the real training steps."""
    folder = check_packages()
    parts = [read_file(folder / f"JapaneseVowels_{part}.ts") for part in ("TRAIN", "TEST")]
    real = [torch.arange(LONGEST) < part.lengths[:, None] for part in parts]
    steps = parts[0].x.mT[real[0]]
    mean, std = steps.mean(0)[:, None], steps.std(0)[:, None]
    generator = torch.Generator().manual_seed(0)  # the files are sorted by speaker
    shuffled = []
    for part, mask in zip(parts, real, strict=True):
        x = ((part.x - mean) / std).where(mask[:, None], 0)
        order = torch.randperm(len(x), generator=generator)
        shuffled.append(Utterances(x[order], part.lengths[order], part.labels[order]))
    return shuffled[0], shuffled[1]
