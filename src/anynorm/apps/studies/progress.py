"""Live progress of a study in the terminal, with the time that is left."""

from __future__ import annotations

import time
from collections.abc import Sequence

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text


class LiveProgress:
    """Live progress in a terminal; where there is none, only the lines worth keeping in a log.

    Args:
        console: where to write.
        deadline: when the command ends, by time.monotonic(); None where it ends when all is done.
    """

    console: Console
    deadline: float | None

    def __init__(self, console: Console, deadline: float | None) -> None:
        self.console, self.deadline = console, deadline
        self.leaders: list[str] = []  # who is ahead so far, a line for each network
        self.live: Live = Live(console=console, refresh_per_second=4, transient=True)

    def __enter__(self) -> LiveProgress:
        if self.console.is_terminal:
            self.live.start()
        return self

    def __exit__(self, *exception: object) -> None:
        if self.console.is_terminal:
            self.live.stop()

    def say(self, text: str) -> None:
        """A line that stays; names in it are never read as markup."""
        self.console.print(Text(text), soft_wrap=True)

    def show(self, done: int, total: int, state: str, running: Sequence[str], needed: float = 0.0) -> None:
        """Redraw the progress; `needed` are the seconds that what is left is expected to take."""
        if not self.console.is_terminal:
            return
        left = needed if self.deadline is None else max(0.0, self.deadline - time.monotonic())
        about = "about " if self.deadline is None else ""
        bar = Table.grid(padding=(0, 1))
        bar.add_row(
            Text(f"{about}{int(left) // 60}:{int(left) % 60:02d} left", style="bold"),
            ProgressBar(total=max(total, 1), completed=done, width=30),
            Text(f"{done} of {total} runs · {state}" if total else state),
        )
        parts: list[RenderableType] = [bar, *(Text(f"  {name}", style="dim") for name in running)]
        if self.leaders:
            parts += [Text("so far:", style="bold"), *(Text(f"  {line}") for line in self.leaders)]
        self.live.update(Group(*parts))
