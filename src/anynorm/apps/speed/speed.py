"""`anynorm speed`: measure and print layers, then training steps; and write both as a page where one is asked for."""

import time
from pathlib import Path

import torch
from rich.console import Console

from anynorm.apps.document import check_output
from anynorm.apps.speed.layers import CASES, print_layers
from anynorm.apps.speed.training import print_steps
from anynorm.apps.terminal import open_console, say
from anynorm.apps.timing.threads import use_threads

FOR_LAYERS = 0.25  # of the time; the training steps have the rest


def print_speed(
    seconds: float = 70.0,
    threads: int | None = None,
    images: tuple[int, int] = (16, 224),
    console: Console | None = None,
    html: Path | None = None,
) -> None:
    """Measure and print layers, then training steps, then the steps once more after `anynorm.tune_allocator()`.

    Args:
        seconds: how long it takes, setting up included; longer only where two rounds of the steps do not fit in, be it
            with two images.
        threads: CPU threads; where None, as many as torch is set to.
        images: how many, at most, and their side in pixels, for the training steps.
        console: where to print; where None, standard output.
        html: where to write the same as a page; needs matplotlib.

    Raises:
        UserError: `html` cannot be written.
    """
    if html is not None:
        check_output("speed", "a page", html, (".html",))
    console = console or open_console()
    with use_threads(threads):
        end = time.perf_counter() + seconds
        say(console, f"{torch.get_num_threads()} CPU threads, torch {torch.__version__}; above 1 anynorm is faster")
        say(
            console,
            f"This takes about {seconds:.0f} seconds (--seconds), unless a step of two images takes several.",
        )
        layers = print_layers(console, CASES, FOR_LAYERS * seconds)
        steps = print_steps(console, images, end)
        if html is not None:
            from anynorm.apps.speed.page import find_facts, write_page

            html.write_text(write_page(layers, steps, find_facts()), encoding="utf-8")
            say(console, f"page: {html}")
