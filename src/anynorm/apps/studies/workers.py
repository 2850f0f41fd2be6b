"""Worker processes: one torch thread each, because small networks gain nothing from a second."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable
from multiprocessing.connection import Connection, wait
from multiprocessing.context import SpawnProcess
from typing import Any

Record = dict[str, Any]
Run = Any  # a frozen dataclass that says what is to be done; its fields go into the record


def work(connection: Connection) -> None:
    """A worker's life: receive a task, what performs a run and on what, then its runs, until the parent goes away."""
    # Ctrl-C reaches the whole process group; only the parent answers it.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    if parent is not None:
        threading.Thread(target=follow, args=(parent,), daemon=True).start()
    import torch

    from .user_code import describe

    torch.set_num_threads(1)
    with contextlib.suppress(EOFError, BrokenPipeError, ConnectionResetError):
        while (run := connection.recv()) is not None:
            if isinstance(run, tuple):  # a new task
                perform, setting = run
                continue
            try:
                record = perform(run, setting)
            # What users give may raise anything; the study goes on without this run.
            except Exception as problem:
                record = {**vars(run), "status": "failed", "reason": describe(problem)}
            connection.send(record)


def follow(parent: Any) -> None:
    """End this process as soon as its parent ends, however that happens."""
    parent.join()
    os._exit(1)


class Worker:
    """One process with its pipe and the run that it is busy with."""

    connection: Connection
    began: float
    dead: bool

    def __init__(self, number: int) -> None:
        context = multiprocessing.get_context("spawn")
        self.connection, other = context.Pipe()
        self.process: SpawnProcess = context.Process(target=work, args=(other,), name=f"anynorm-{number}", daemon=True)
        self.process.start()
        other.close()
        self.run: Run | None = None
        self.began, self.dead = 0.0, False

    def start(self, run: Run) -> None:
        """Hand over a run."""
        self.run, self.began = run, time.monotonic()
        with contextlib.suppress(OSError):  # A dead process shows when its answer is read.
            self.connection.send(run)

    def finish(self) -> tuple[Run, Record, float]:
        """The run, its record and its wall time in seconds; a process that died leaves a failed record."""
        run, wall = self.run, time.monotonic() - self.began
        assert run is not None
        self.run = None
        try:
            record = self.connection.recv()
        except (EOFError, OSError):
            record = {**vars(run), "status": "failed", "reason": "its process died; memory may have run out"}
            self.dead = True
        return run, record, wall

    def stop(self) -> None:
        """End the process at once: what it was doing is given up."""
        self.process.kill()
        self.process.join()
        self.connection.close()


class Workers:
    """As many processes as there are cores, at most `most`."""

    def __init__(self, most: int = 2) -> None:
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        with interrupts_ignored():
            self.all: list[Worker] = [Worker(number) for number in range(max(1, min(most, cores)))]
        self.task: Any = None

    def send_task(self, perform: Callable[[Run, Any], Record], setting: Any) -> None:
        """Give every worker the function that performs a run, found by its name, and what it performs it on."""
        self.task = perform, setting
        for worker in self.all:
            with contextlib.suppress(OSError):
                worker.connection.send(self.task)

    @property
    def idle(self) -> list[Worker]:
        """Workers without a run."""
        return [worker for worker in self.all if worker.run is None]

    @property
    def busy(self) -> set[Run]:
        """Runs under way."""
        return {worker.run for worker in self.all if worker.run is not None}

    def wait(self, timeout: float) -> list[tuple[Run, Record, float]]:
        """Runs that ended within `timeout` seconds."""
        busy = {worker.connection: worker for worker in self.all if worker.run is not None}
        ended = []
        for connection in wait(list(busy), timeout):
            worker = busy[connection]  # type: ignore[index] # wait returns what it was given
            ended.append(worker.finish())
            if worker.dead:
                self.replace(worker)
        return ended

    def replace(self, dead: Worker) -> None:
        """Put a new process in the place of one that died."""
        dead.stop()
        with interrupts_ignored():
            fresh = Worker(self.all.index(dead))
        with contextlib.suppress(OSError):
            fresh.connection.send(self.task)
        self.all[self.all.index(dead)] = fresh

    def stop(self) -> None:
        """End all processes."""
        for worker in self.all:
            worker.stop()


@contextlib.contextmanager
def interrupts_ignored() -> Any:
    """Processes started inside ignore Ctrl-C from their first instruction; in other threads nothing changes."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
