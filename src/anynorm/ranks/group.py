"""A process group of torch's: its timeout, a channel for frames, and the store through which survivors meet."""

from __future__ import annotations

import time
import warnings
from contextlib import suppress
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from ..torch_private import find_default_store

PATIENCE = 2.0  # seconds that a rank waits, after a failure, for the others to report that they live


def find_timeout(group: Any) -> timedelta:
    """The user's timeout of a process group."""
    # Private: torch has no public way to read it. Where it cannot be read, torch's default stands in.
    for device in ("cpu", "cuda"):
        with suppress(Exception):
            timeout: timedelta = group._get_backend(torch.device(device)).options._timeout
            return timeout
    return dist.distributed_c10d.default_pg_timeout


def open_channel(members: list[int], timeout: timedelta) -> Any:
    """A gloo group for frames alone; collective over its members."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        # Local synchronization: the other ranks of the job need not come, which new_group asks of all by default.
        return dist.new_group(members, timeout=timeout, backend="gloo", use_local_synchronization=True)


def exchange_waits(prefix: str, rank: int, world: int, waited: float) -> dict[int, float] | None:
    """Report in the default store how long this rank waited in a failed call, and read what the others report.

    Ranks cannot talk through their own group any more, but the store still serves those that live.

    Args:
        prefix: of the store's keys, the same on all ranks of the group.

    Returns:
        Seconds by rank, of those that reported within PATIENCE; None where the store is gone too.
    """
    waits = {rank: waited}
    with suppress(Exception):  # The store may be gone with the rank that held it.
        store: Any = find_default_store()
        store.set(f"{prefix}/{rank}", f"{waited}")
        limit = time.monotonic() + PATIENCE
        while len(waits) < world and time.monotonic() < limit:
            time.sleep(0.02)
            for other in range(world):
                # check first: get blocks until the key is there, for a dead rank until the store's own timeout
                if other not in waits and store.check([f"{prefix}/{other}"]):
                    waits[other] = float(store.get(f"{prefix}/{other}"))
        return waits
    return None
