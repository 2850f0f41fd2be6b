"""Ctrl-C during a run: the first ends it behind what is being timed, the second at once."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator
from types import FrameType


class Stop:
    """Whether the run is to end.

    An exception would be lost where it comes in the middle of `__del__`, as those of compiled graphs, which Python
    ignores; so the signal is only remembered.
    """

    def __init__(self) -> None:
        self.asked = False

    def ask(self, number: int, frame: FrameType | None) -> None:
        """Remember it, and let the next Ctrl-C end the program."""
        self.asked = True
        signal.signal(number, signal.default_int_handler)

    def check(self) -> None:
        """Raise KeyboardInterrupt if it was asked for."""
        if self.asked:
            raise KeyboardInterrupt


@contextlib.contextmanager
def catch_stop() -> Iterator[Stop]:
    """Remember Ctrl-C within a block; in another thread than the main one there is none."""
    stop = Stop()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return
    before = signal.signal(signal.SIGINT, stop.ask)
    try:
        yield stop
    finally:
        signal.signal(signal.SIGINT, before)
