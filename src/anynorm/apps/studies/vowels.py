"""JapaneseVowels as it lies in the aeon package: utterances of unlike lengths, each with its speaker.

Kudo, Toyama and Shimbo 1999, Pattern Recognition Letters 20 (11-13). aeon itself is not imported.
"""

from __future__ import annotations

import hashlib
import importlib.util
from pathlib import Path

import numpy as np

from anynorm.errors import UserError

Part = tuple[np.ndarray, np.ndarray]

CHANNELS, LONGEST, CLASSES = 12, 29, 9
VALIDATION = 60  # of the 270 utterances to train on; the 370 of the test stay what their authors made them


def find_vowels() -> Path:
    """The folder of the files; where it is missing, one sentence that says what to install."""
    spec = importlib.util.find_spec("aeon")
    if spec is None or not spec.submodule_search_locations:
        raise UserError(
            "compare --data: vowels is read from the aeon package, which is not installed; "
            "run pip install --no-deps aeon."
        )
    folder = Path(spec.submodule_search_locations[0]) / "datasets" / "data" / "JapaneseVowels"
    if not (folder / "JapaneseVowels_TRAIN.ts").is_file():
        raise UserError("compare --data: this aeon has no JapaneseVowels_TRAIN.ts; install aeon 1.6.0.")
    return folder


def read_utterances(path: Path) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(x, lengths, labels) of a .ts file: after @data a line for each, channels between colons, the speaker last."""
    rows = [line.split(":") for line in path.read_text().partition("@data")[2].split()]
    x = np.zeros((len(rows), CHANNELS, LONGEST), np.float32)
    lengths = np.array([row[0].count(",") + 1 for row in rows])
    for utterance, row, length in zip(x, rows, lengths, strict=True):
        utterance[:, :length] = [[float(value) for value in channel.split(",")] for channel in row[:-1]]
    return x, lengths, np.array([int(row[-1]) - 1 for row in rows])


def load_vowels() -> tuple[Part, Part, Part, str]:
    """(x and labels of the training utterances, of validation, of the test, digest of the files).

    Each x is (N, 12, 29), every channel standardized with the real steps of the training part, and 0 at padding, which
    is behind; see `find_lengths`.
    """
    folder, digest = find_vowels(), hashlib.sha256()
    generator = np.random.default_rng(0)  # the files are sorted by speaker
    parts = []
    for name in ("TRAIN", "TEST"):
        path = folder / f"JapaneseVowels_{name}.ts"
        digest.update(path.read_bytes())
        arrays = read_utterances(path)
        order = generator.permutation(len(arrays[0]))
        parts.append([array[order] for array in arrays])
    cut = len(parts[0][0]) - VALIDATION
    train, validation = [a[:cut] for a in parts[0]], [a[cut:] for a in parts[0]]
    steps = train[0].swapaxes(1, 2)[np.arange(LONGEST) < train[1][:, None]]
    mean, std = steps.mean(0, dtype=np.float64)[:, None], steps.std(0, dtype=np.float64)[:, None]

    def standardize(x: np.ndarray, lengths: np.ndarray, labels: np.ndarray) -> Part:
        real = np.arange(LONGEST) < lengths[:, None, None]
        return np.where(real, (x - mean) / std, 0).astype(np.float32), labels.astype(np.int64)

    return standardize(*train), standardize(*validation), standardize(*parts[1]), digest.hexdigest()


def find_lengths(x: np.ndarray) -> np.ndarray:
    """Steps of each sequence of (N, C, L) that are there: up to the last at which a channel is not 0."""
    there = (x != 0).any(1)
    found: np.ndarray = x.shape[2] - there[:, ::-1].argmax(1)
    return found
