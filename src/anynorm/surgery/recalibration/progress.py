"""The progress bar of `recalibrate`. It imports rich where a bar is drawn: the library itself needs torch and NumPy."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress


class ProgressBar:
    """Counts the batches of each pass in the terminal while its `with` block lasts.

    Args:
        shows: whether there is a bar at all.
    """

    def __init__(self, shows: bool) -> None:
        self.bar: Progress | None = make_bar() if shows else None

    def __enter__(self) -> ProgressBar:
        if self.bar is not None:
            self.bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self.bar is not None:
            self.bar.stop()

    @contextmanager
    def count(self, title: str, total: int | None) -> Iterator[Callable[[], None]]:
        """Give a function to call after every batch of a pass; `total` is None where their number is not known."""
        if self.bar is None:
            yield lambda: None
            return
        task = self.bar.add_task(title, total=total)
        try:
            yield partial(self.bar.advance, task)
        finally:
            self.bar.remove_task(task)


def make_bar() -> Progress:
    """Return rich's bar, which disappears when it is stopped."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    return Progress(
        TextColumn("recalibrate, {task.description}"),
        BarColumn(bar_width=30),
        MofNCompleteColumn(),
        TextColumn("batches"),
        TimeRemainingColumn(),
        console=make_console(),
        transient=True,
    )


def make_console() -> Console:
    """Return a console on the present standard output."""
    from rich.console import Console

    return Console(highlight=False, markup=False, emoji=False)
