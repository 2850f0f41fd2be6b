"""anynorm and torch eager once more, where the C allocator keeps memory: then page faults flatter neither of them.

`anynorm.tune_allocator` cannot be undone, so this is a second process, which measures while the first one waits.
"""

from __future__ import annotations

import signal
import warnings
from concurrent.futures import Executor, ProcessPoolExecutor
from multiprocessing import get_context

import torch

import anynorm
from anynorm.engine import allocator


def open_process(threads: int) -> Executor:
    """The second process; it ends with the block."""
    return ProcessPoolExecutor(1, mp_context=get_context("spawn"), initializer=set_up, initargs=(threads,))


def set_up(threads: int) -> None:
    """Tune before the first tensor is made. Ctrl-C is the first process's."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        anynorm.tune_allocator(keep_large=True)
    torch.set_num_threads(threads)


def find_problem(process: Executor) -> str:
    """Why nothing is kept there; an empty string where memory is."""
    return process.submit(describe_allocator).result()


def describe_allocator() -> str:
    """What was wrong when this process was set up."""
    return "" if allocator.done else f"no memory is kept: {allocator.done}"
