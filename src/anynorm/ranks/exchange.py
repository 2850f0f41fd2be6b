"""How do ranks exchange statistics, so that no fault ends in a hang, an abort or a wrong number?

Every message between ranks is one frame: a header that says whose it is, then the payload, in one `all_gather`. All
frames at the same place of the sequence have the same size on all ranks, whatever each of them is doing, because a
frame grows only after a header that all ranks agreed on. So ranks that do different things always read each other's
header and say so, where messages of different sizes would abort the process (gloo) and messages of the same size
would silently mix two layers.

Frames travel by gloo through the memory of the host, on a group of their own with the ranks and the timeout of the
user's, so that nothing else, as gradients of DistributedDataParallel, can come between.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import Any, ClassVar
from weakref import WeakKeyDictionary

import torch
import torch.distributed as dist
from torch import Tensor

from ..errors import SyncError
from .failures import find_missing, make_broken_error, make_mismatch_error, make_missing_error
from .frames import FRAME, HEADER, Call, make_frame, read_payloads
from .group import exchange_waits, find_timeout, open_channel


class Ranks:
    """The ranks of one process group, and the exchange of frames between them.

    Attributes:
        members: global ranks, in the order of the group.
        rank, world: this rank in the group, and how many there are.
        channel: the group that frames travel on; None before the first frame and after a failure.
        frame_size: words of the next frame, the same on all ranks.
        sent: messages so far.
        broken: why the group cannot be used any more.
        order: of the layers, as they were synchronized for the first time.
    """

    instances: ClassVar[WeakKeyDictionary[Any, Ranks]] = WeakKeyDictionary()  # by process group
    rank: int
    world: int

    def __init__(self, group: Any) -> None:
        self.members: list[int] = dist.get_process_group_ranks(group)
        self.rank, self.world = dist.get_rank(group), len(self.members)
        self.timeout: timedelta = find_timeout(group)
        self.store_prefix: str = f"anynorm/{group.group_name}"  # in the default store, the same on all ranks
        self.channel: Any = None
        self.frame_size: int = FRAME
        self.sent: int = 0
        self.broken: SyncError | None = None
        self.order: WeakKeyDictionary[Any, int] = WeakKeyDictionary()
        self.layers: int = 0  # not len(order), which sinks where a layer is collected

    @classmethod
    def find(cls, group: Any) -> Ranks | None:
        """The ranks of a group, None standing for all processes; None where there is nobody else."""
        if not dist.is_available() or not dist.is_initialized():
            return None
        group = dist.group.WORLD if group is None else group
        if dist.get_world_size(group) < 2:
            return None
        if group not in cls.instances:
            cls.instances[group] = cls(group)
        return cls.instances[group]

    def register_layer(self, layer: Any) -> int:
        """How many layers were synchronized before this one for the first time, which may be now."""
        if layer not in self.order:
            self.order[layer] = self.layers
            self.layers += 1
        return self.order[layer]

    def exchange(self, call: Call, payload: Tensor) -> Tensor:
        """Every rank's payload, in the order of ranks.

        Args:
            call: whose payload it is.
            payload: (K,), float64, on the CPU; K is the same where calls agree.

        Returns:
            (ranks, K).

        Raises:
            SyncError: ranks differ, are missing or dead, or the group has failed before.
        """
        if self.broken is not None:
            raise make_broken_error(call, self.broken)
        with self.translate_errors(call):
            if self.channel is None:
                # Opening is collective too, so a rank that does not come must be named here as well.
                self.channel = open_channel(self.members, self.timeout)
            length = payload.numel()
            frames = self.gather(make_frame(self.frame_size, call.pack(length), payload))
        # All ranks see the same headers, so they refuse together.
        mismatch = make_mismatch_error(call, self.members, self.rank, frames[:, :HEADER].tolist())
        if mismatch is not None:
            self.fail(mismatch)
        if HEADER + length <= self.frame_size:
            return read_payloads(frames, length)
        with self.translate_errors(call):
            payloads = self.gather(payload.view(torch.int64))
        self.frame_size = HEADER + length  # Only now, that all ranks have agreed on it.
        return payloads.view(torch.float64)

    def gather(self, message: Tensor) -> Tensor:
        """Every rank's message, in the order of ranks, by one `all_gather`."""
        received = torch.empty(self.world, message.numel(), dtype=message.dtype, device="cpu")
        # Asynchronous, because only a work that is waited for takes a timeout of its own.
        work = dist.all_gather(list(received), message, group=self.channel, async_op=True)
        work.wait(self.timeout)
        self.sent += 1
        return received

    @contextmanager
    def translate_errors(self, call: Call) -> Iterator[None]:
        """Turn what the channel raises into an error that names the layer and the ranks that are missing."""
        start = time.monotonic()
        try:
            yield
        except (RuntimeError, ValueError) as error:
            waited = time.monotonic() - start
            timeout = self.timeout.total_seconds()
            # Closed before the store is asked, which takes time: ranks that still wait in the channel fail at once.
            self.close()
            waits = exchange_waits(self.store_prefix, self.rank, self.world, waited)
            missing = [] if waits is None else find_missing(waits, self.world, timeout)
            ranks = tuple(self.members[rank] for rank in missing)
            self.fail(make_missing_error(call, self.members[self.rank], ranks, waited, timeout, error), error)
        except BaseException as interruption:  # The others wait for what this rank has not sent.
            self.broken = SyncError(f"{call.label}: interrupted by {type(interruption).__name__}", call.label)
            self.close()
            raise

    def fail(self, error: SyncError, cause: BaseException | None = None) -> None:
        """Declare the group unusable, and raise.

        For good: after a failure nobody knows at which frame each rank is.
        """
        self.broken = error
        self.close()
        raise error from cause

    def close(self) -> None:
        """Give up the channel, so that ranks that still wait in it fail at once."""
        channel, self.channel = self.channel, None
        if channel is not None:
            with suppress(Exception):
                dist.destroy_process_group(channel)
