"""Formula, sentences, letters and colours that the terminal and the picture share."""

from torch import Tensor

from anynorm.apps.explain.numbers import GROUPS, SMALL

# Paul Tol's "light" scheme: told apart with every kind of colour vision, and black text is legible on all of it.
COLOURS = ("#77AADD", "#EE8866", "#EEDD88", "#44BB99", "#FFAABB", "#BBCC33", "#99DDFF", "#AAAA00")
LETTERS = "abcdefgh"
FORMULA = "y = (x - mean) / sqrt(var + eps) * gamma + beta"
SHOWN = ("batch", "layer", "instance", "group")
SENTENCES = {
    "batch": "one mean per channel, over all samples",
    "layer": "one mean per sample, over all channels",
    "instance": "one mean per channel of each sample",
    "group": f"one mean per group ({SMALL.shape[1] // GROUPS} channels) of each sample",
}


def write_vector(values: Tensor) -> str:
    """Return values as (2, 0.5)."""
    return "(" + ", ".join(f"{value:g}" for value in values.tolist()) + ")"
