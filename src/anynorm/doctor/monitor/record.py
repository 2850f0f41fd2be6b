"""`Record`: what is measured of one norm at one step; its fields are the columns of the file."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields

VERSION = 1  # of the format: a column more, less or of another meaning is another version
NAN = math.nan


@dataclass
class Record:
    """One norm at one measured step. What does not apply is NaN.

    Attributes:
        step: how many training forwards of the model came before.
        layer: the norm's name in the model; "" for the model itself.
        kind: its class.
        calls: how often it was called in this step.
        mean, std: of all values that reached it.
        gap: how far the batch's mean lies from the running mean, in standard deviations of the batch's channel; the
            median over channels.
        gap_worst: the same of the channel where it is largest.
        channel: which channel that is; -1 where there is none.
        ratio: batch variance over running variance; the median over channels.
        noise: standard error of the batch's mean, in standard deviations; root mean square over channels.
        constant: how many channels hardly vary.
        gamma_min, gamma_max: of gamma.
        gamma_zero, gamma_negative: the share of gammas that are smaller than 0.01 in size, and below 0.
        gradient: Euclidean norm of the gradient of gamma.
        nonfinite: what was NaN or infinite, of input, running_mean, running_var, gamma and gradient; with spaces.
        warned: what was warned of, of the names in `alarms.PROBLEMS`; with spaces.
    """

    step: int
    layer: str
    kind: str
    calls: int = 1
    mean: float = NAN
    std: float = NAN
    gap: float = NAN
    gap_worst: float = NAN
    channel: int = -1
    ratio: float = NAN
    noise: float = NAN
    constant: int = 0
    gamma_min: float = NAN
    gamma_max: float = NAN
    gamma_zero: float = NAN
    gamma_negative: float = NAN
    gradient: float = NAN
    nonfinite: str = ""
    warned: str = ""

    def note(self, column: str, word: str) -> None:
        """Add a word to `nonfinite` or `warned`."""
        words = getattr(self, column).split()
        setattr(self, column, " ".join([*words, word] if word not in words else words))


# Each column and its type, in order.
COLUMNS: dict[str, type] = {
    field.name: {"int": int, "float": float, "str": str}[str(field.type)] for field in fields(Record)
}
# What is drawn, and goes to TensorBoard.
QUANTITIES = ("gap", "gap_worst", "ratio", "noise", "gamma_min", "gamma_max", "gradient", "mean", "std")
