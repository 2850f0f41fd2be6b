"""Real processes that meet by gloo: each runs the same function as one rank and returns what it found."""

from __future__ import annotations

import multiprocessing
import os
import socket
import tempfile
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from typing import Any

import torch
import torch.distributed as dist

TIMEOUT = 30.0  # seconds: of the process group, and what a call may take beyond it


def serve(rank: int, world: int, place: str, seconds: float, pipe: Connection) -> None:
    """What a process does: meet the others, then run what it is sent."""
    torch.set_num_threads(1)
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    dist.init_process_group("gloo", init_method=place, rank=rank, world_size=world, timeout=timedelta(seconds=seconds))
    while True:
        try:
            function, arguments = pipe.recv()
        except EOFError:
            os._exit(0)
        torch.manual_seed(0)
        try:
            pipe.send((True, function(rank, world, *arguments)))
        except BaseException:
            pipe.send((False, traceback.format_exc()))


def find_port() -> int:
    """A free one."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


class Processes:
    """`world` processes that have met; they live until `close`.

    Args:
        seconds: the timeout of their process group.
        tcp: meet at a store in rank 0, which dies with it, instead of in a file.
    """

    def __init__(self, world: int, seconds: float = TIMEOUT, tcp: bool = False) -> None:
        self.world, self.seconds = world, seconds
        self.folder = tempfile.TemporaryDirectory()
        place = f"tcp://127.0.0.1:{find_port()}" if tcp else f"file://{self.folder.name}/store"
        context = multiprocessing.get_context("forkserver")  # A process that has torch, and no threads, is forked.
        context.set_forkserver_preload(["anynorm", "torch.distributed", "torch._dynamo"])
        self.pipes, self.processes = [], []
        for rank in range(world):
            here, there = context.Pipe()
            process = context.Process(target=serve, args=(rank, world, place, seconds, there), daemon=True)
            process.start()
            there.close()
            self.pipes.append(here)
            self.processes.append(process)

    def run(self, function: Callable[..., Any], *arguments: Any) -> list[Any]:
        """function(rank, world, *arguments) on every rank; what each returned, or None where it died."""
        for pipe in self.pipes:
            pipe.send((function, arguments))
        found: dict[int, Any] = {}
        while len(found) < self.world:
            ready = wait([p for r, p in enumerate(self.pipes) if r not in found], self.seconds + TIMEOUT)
            assert ready, f"ranks {set(range(self.world)) - set(found)} hang"
            for pipe in ready:
                rank = self.pipes.index(pipe)
                try:
                    fine, found[rank] = pipe.recv()
                except (EOFError, ConnectionResetError):
                    fine, found[rank] = True, None
                assert fine, f"rank {rank}: {found[rank]}"
        return [found[rank] for rank in range(self.world)]

    def close(self) -> None:
        for process in self.processes:
            process.kill()
            process.join()
        self.folder.cleanup()
