"""Two processes that meet by gloo, for the scripts beside this."""

import os
import sys
import tempfile
from collections.abc import Callable

import torch
import torch.distributed as dist
import torch.multiprocessing as mp


def serve(rank: int, task: Callable[[int], None], place: str) -> None:
    torch.set_num_threads(1)
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    dist.init_process_group("gloo", init_method=place, rank=rank, world_size=2)
    task(rank)
    dist.barrier()
    sys.stdout.flush()
    dist.destroy_process_group()


def run(task: Callable[[int], None]) -> None:
    """task(rank) on both; raises what one of them does."""
    with tempfile.TemporaryDirectory() as folder:
        mp.start_processes(serve, (task, f"file://{folder}/store"), nprocs=2, start_method="fork")
