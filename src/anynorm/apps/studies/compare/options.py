"""Options of `anynorm compare`, read and checked before anything slow is imported."""

from __future__ import annotations

import difflib
import math
from dataclasses import dataclass, field
from pathlib import Path

from anynorm.errors import UserError

from ..data import Reading
from ..targets import KINDS

NORM_NAMES = ("none", "batch", "layer", "instance", "group", "rms")


@dataclass(frozen=True)
class Options:
    """What the command was asked for; the defaults are those of the command line."""

    data: str = "mnist"
    models: tuple[str, ...] = ("cnn", "mlp")
    norms: tuple[str, ...] = NORM_NAMES
    batches: tuple[str, ...] = ("64", "8", "2")
    rates: tuple[float, ...] = (0.0003, 0.001, 0.003, 0.01, 0.03, 0.1, 0.3)
    seeds: int = 8
    images: int = 2048
    minutes: float = 3.0
    out: Path = Path("anynorm-compare")
    reading: Reading = field(default_factory=Reading)
    loss: str = ""
    metric: str = ""
    optimizer: str = ""
    checkpoint: str = ""


def read_options(
    *,
    data: str,
    model: str,
    norms: str,
    batch_sizes: str,
    rates: str,
    seeds: str,
    images: str,
    minutes: str,
    out: str,
    task: str = "auto",
    target: str = "",
    tokens: bool = False,
    standardize: bool = True,
    **own: str,
) -> Options:
    """Options from their text on the command line; the first one that breaks its rule raises a UserError.

    `own` are loss, metric, optimizer and checkpoint, which are looked up later.
    """
    return Options(
        data=data,
        models=tuple(read_items("--model", model, "network names", "cnn,mlp")),
        norms=tuple(read_norm(item) for item in read_items("--norms", norms, "norms", ",".join(NORM_NAMES))),
        batches=tuple(read_batch(item) for item in read_items("--batch-sizes", batch_sizes, "sizes", "64,8,2 or 64:8")),
        rates=tuple(sorted(read_rate(item) for item in read_items("--rates", rates, "rates", "0.01,0.1,1"))),
        seeds=read_whole("--seeds", seeds, 1000, "how many seeds to run", "8"),
        images=read_whole("--images", images, 10**9, "how many images a run sees", "2048"),
        minutes=read_minutes(minutes),
        out=Path(out),
        reading=Reading(read_task(task), target, tokens, standardize),
        **own,
    )


def read_task(text: str) -> str:
    """A kind of target, or auto."""
    if text not in ("auto", *KINDS):
        raise UserError(
            f"compare --task: takes auto, {', '.join(KINDS)}; got {text!r}; auto goes by what y looks like."
        )
    return text


def read_items(option: str, text: str, what: str, example: str) -> list[str]:
    """Items of a comma-separated list, each once, in the order given."""
    items = [item.strip() for item in text.split(",")]
    if not all(items):
        raise UserError(f"compare {option}: takes {what} with a comma between; got {text!r}; try {example}.")
    return list(dict.fromkeys(items))


def read_norm(item: str) -> str:
    """A known norm."""
    if item not in NORM_NAMES:
        near = difflib.get_close_matches(item.lower(), NORM_NAMES, 1)
        raise UserError(
            f"compare --norms: takes names out of {', '.join(NORM_NAMES)}; got {item!r}; "
            f"{f'did you mean {near[0]}?' if near else 'leave out what is not listed.'}"
        )
    return item


def read_batch(item: str) -> str:
    """A batch size, or two with a colon between: the first half of the images, then the second."""
    sizes = item.split(":")
    if len(sizes) > 2 or not all(size.isascii() and size.isdigit() and 0 < int(size) < 10**9 for size in sizes):
        raise UserError(
            f"compare --batch-sizes: takes whole numbers above 0, or first:second for a size that changes halfway; "
            f"got {item!r}; try 64,8,2 or 64:8."
        )
    return ":".join(str(int(size)) for size in sizes)


def read_rate(item: str) -> float:
    """A finite learning rate above 0."""
    try:
        rate = float(item)
    except ValueError:
        rate = math.nan
    if not 0 < rate < math.inf:
        raise UserError(f"compare --rates: takes finite numbers above 0; got {item!r}; try 0.01,0.03,0.1,0.3.")
    return rate


def read_whole(option: str, text: str, most: int, what: str, example: str) -> int:
    """A whole number from 1 to `most`."""
    if not (text.isascii() and text.isdigit() and 1 <= int(text) <= most):
        raise UserError(
            f"compare {option}: takes {what}, a whole number from 1 to {most:,}; got {text!r}; try {example}."
        )
    return int(text)


def read_minutes(text: str) -> float:
    """A time budget in minutes, at most a week."""
    try:
        minutes = float(text)
    except ValueError:
        minutes = math.nan
    if not 0 < minutes <= 7 * 24 * 60:
        raise UserError(f"compare --minutes: takes a number above 0, at most {7 * 24 * 60:,}; got {text!r}; try 3.")
    return minutes
