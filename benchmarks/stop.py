"""When a run ends early: at Ctrl-C, behind what is being timed or, the second time, at once; or as its time is over."""

from __future__ import annotations

import contextlib
import signal
import threading
import time
from collections.abc import Iterator
from types import FrameType


class Stop:
    """Whether the run is to end.

    Ctrl-C as an exception would be lost in the middle of a `__del__`, such as compiled graphs have: Python ignores
    what is raised there. So the signal is only remembered.

    Args:
        end: by time.perf_counter().
    """

    def __init__(self, end: float) -> None:
        self.asked, self.end = False, end

    def is_late(self) -> bool:
        """Whether the time is over."""
        return time.perf_counter() > self.end

    def ask(self, number: int, frame: FrameType | None) -> None:
        """Remember it, and let the next Ctrl-C end the program."""
        self.asked = True
        signal.signal(number, signal.default_int_handler)

    def check(self) -> None:
        """Raise KeyboardInterrupt if it was asked for."""
        if self.asked:
            raise KeyboardInterrupt


@contextlib.contextmanager
def catch_stop(end: float) -> Iterator[Stop]:
    """Remember Ctrl-C within a block; in another thread than the main one there is none."""
    stop = Stop(end)
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return
    before = signal.signal(signal.SIGINT, stop.ask)
    try:
        yield stop
    finally:
        signal.signal(signal.SIGINT, before)
