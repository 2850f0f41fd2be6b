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

import hashlib
import time
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, ClassVar
from weakref import WeakKeyDictionary

import torch
import torch.distributed as dist
from torch import Tensor

from ..errors import SyncError

HEADER = 8  # words of 8 bytes
FRAME = HEADER + 1 + 2 * 512  # words at the start: count, mean and m2 of up to 512 channels
FORWARD, BACKWARD = 1, 2
PHASES = {FORWARD: "forward", BACKWARD: "backward"}
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
MODES = {1: "a gradient for its input", 2: "moves its running averages"}
PATIENCE = 2.0  # seconds that a survivor waits for the others to say that they live
LABELS: dict[int, str] = {}  # of every layer that this process has named, by what headers call it


def find_id(label: str) -> int:
    """What headers call a layer."""
    found = int.from_bytes(hashlib.blake2b(label.encode(), digest_size=8).digest(), "little", signed=True)
    LABELS[found] = label
    return found


@dataclass(frozen=True)
class Call:
    """One call of a layer, as all ranks must agree on it.

    Attributes:
        label: the layer's name.
        number: how many calls of this layer came before.
        place: how many layers of these ranks were synchronized before it for the first time; tells apart layers of
            the same name in two models.
        phase: FORWARD or BACKWARD.
        channels: of the input.
        dtype: of the input, an index of DTYPES.
        mode: sum of the keys of MODES that hold.
    """

    label: str
    number: int
    place: int
    phase: int
    channels: int
    dtype: int
    mode: int

    def pack(self, length: int) -> list[int]:
        """The header; `length` is that of the payload in words."""
        return [self.phase, find_id(self.label), self.number, self.channels, self.dtype, self.mode, length, self.place]


def tell(header: Sequence[int]) -> str:
    """A header in words."""
    phase, layer, number, channels, dtype, mode, _, place = header
    modes = [words if mode & bit else f"not {words}" for bit, words in MODES.items()]
    name = LABELS.get(layer, "a layer that this rank has not called")
    return (
        f"{PHASES.get(phase, phase)} of {name}, call {number}: {channels} channels, "
        f"{str(DTYPES[dtype]).removeprefix('torch.')}, {', '.join(modes)}, layer {place} of those synchronized"
    )


class Ranks:
    """The ranks of one process group, and the frames between them."""

    known: ClassVar[WeakKeyDictionary[Any, Ranks]] = WeakKeyDictionary()

    def __init__(self, group: Any) -> None:
        self.members = dist.get_process_group_ranks(group)
        self.rank, self.world = dist.get_rank(group), len(self.members)
        self.timeout = find_timeout(group)
        self.place = f"anynorm/{group.group_name}"  # in the default store, the same on all ranks
        self.channel: Any = None
        self.frame = FRAME
        self.sent = 0
        self.broken: SyncError | None = None
        self.places: WeakKeyDictionary[Any, int] = WeakKeyDictionary()
        self.layers = 0

    @classmethod
    def find(cls, group: Any) -> Ranks | None:
        """Those of a group, None standing for all processes; None where there is nobody else."""
        if not dist.is_available() or not dist.is_initialized():
            return None
        group = dist.group.WORLD if group is None else group
        if dist.get_world_size(group) < 2:
            return None
        if group not in cls.known:
            cls.known[group] = cls(group)
        return cls.known[group]

    def find_place(self, layer: Any) -> int:
        """How many layers were synchronized before this one for the first time."""
        if layer not in self.places:
            self.places[layer] = self.layers
            self.layers += 1
        return self.places[layer]

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
            raise SyncError(
                f"{call.label}: its process group cannot be used any more; it failed before: {self.broken}; start the "
                "job again from its last checkpoint",
                call.label,
                self.broken.ranks,
            )
        with self.failing(call):
            if self.channel is None:
                self.channel = open_channel(self.members, self.timeout)
            words, fits = payload.numel(), HEADER + payload.numel() <= self.frame
            frame = torch.zeros(self.frame, dtype=torch.int64, device="cpu")
            frame[:HEADER] = torch.tensor(call.pack(words), dtype=torch.int64, device="cpu")
            if fits:
                frame[HEADER : HEADER + words] = payload.view(torch.int64)
            frames = self.gather(frame)
        self.check(call, words, frames)
        if fits:
            return frames[:, HEADER : HEADER + words].contiguous().view(torch.float64)
        with self.failing(call):
            payloads = self.gather(payload.view(torch.int64))
        self.frame = HEADER + words  # Only now, that all ranks have agreed on it.
        return payloads.view(torch.float64)

    def gather(self, message: Tensor) -> Tensor:
        """One `all_gather`."""
        received = torch.empty(self.world, message.numel(), dtype=message.dtype, device="cpu")
        work = dist.all_gather(list(received), message, group=self.channel, async_op=True)
        work.wait(self.timeout)
        self.sent += 1
        return received

    def check(self, call: Call, words: int, frames: Tensor) -> None:
        """Refuse headers that differ from this rank's; all ranks see the same and refuse together."""
        mine = call.pack(words)
        headers = frames[:, :HEADER].tolist()
        others = {rank: header for rank, header in enumerate(headers) if header != mine}
        if not others:
            return
        ranks = tuple(self.members[rank] for rank in others)
        theirs = "; ".join(f"rank {self.members[rank]} is at {tell(header)}" for rank, header in others.items())
        self.fail(
            SyncError(
                f"{call.label}: all ranks must call the same layers in the same order with the same channels, dtype "
                f"and mode; rank {self.members[self.rank]} is at {tell(mine)}; {theirs}; "
                "look for a branch that depends on the data of a rank; layers without a name are numbered as they are "
                "built, so build the same on all ranks or name them by anynorm.sync(model)",
                call.label,
                ranks,
            )
        )

    @contextmanager
    def failing(self, call: Call) -> Iterator[None]:
        """Turn what the channel raises into an error that names the layer and the ranks that are missing."""
        start = time.monotonic()
        try:
            yield
        except (RuntimeError, ValueError) as error:
            waited = time.monotonic() - start
            missing = self.find_missing(waited)
            names = ", ".join(map(str, missing)) or "unknown"
            first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
            self.fail(
                SyncError(
                    f"{call.label}: every rank must come to {PHASES[call.phase]}, call {call.number}, within the "
                    f"timeout of {self.timeout.total_seconds():g} s; missing ranks: {names}, seen by rank "
                    f"{self.members[self.rank]} after {waited:.1f} s; they skipped the layer, died or are too slow: "
                    f"look at their own errors first ({first})",
                    call.label,
                    missing,
                ),
                error,
            )
        except BaseException as interruption:  # The others wait for what this rank has not sent.
            self.broken = SyncError(f"{call.label}: interrupted by {type(interruption).__name__}", call.label)
            self.close()
            raise

    def fail(self, error: SyncError, cause: BaseException | None = None) -> None:
        """Declare the group unusable."""
        self.broken = error
        self.close()
        raise error from cause

    def close(self) -> None:
        """Let go of the channel, so that ranks that still wait in it hear of the failure at once."""
        channel, self.channel = self.channel, None
        if channel is not None:
            with suppress(Exception):
                dist.destroy_process_group(channel)

    def find_missing(self, waited: float) -> tuple[int, ...]:
        """Ranks that skipped the layer, or are dead or late.

        Every rank that sees a failure says in the default store how long it waited. Those that do not say so are
        missing; of those that do, the ones that waited much less than the others came too late.
        """
        self.close()
        waits = {self.rank: waited}
        with suppress(Exception):  # The store may be gone with the rank that held it.
            store: Any = dist.distributed_c10d._get_default_store()
            store.set(f"{self.place}/{self.rank}", f"{waited}")
            limit = time.monotonic() + PATIENCE
            while len(waits) < self.world and time.monotonic() < limit:
                time.sleep(0.02)
                for rank in range(self.world):
                    if rank not in waits and store.check([f"{self.place}/{rank}"]):
                        waits[rank] = float(store.get(f"{self.place}/{rank}"))
            longest = max(waits.values())
            late = [rank for rank, seconds in waits.items() if seconds < longest / 2]
            silent = [rank for rank in range(self.world) if rank not in waits]
            timed_out = longest > 0.9 * self.timeout.total_seconds()
            found = silent or (late if timed_out else [])
            return tuple(self.members[rank] for rank in sorted(found))
        return ()


def find_timeout(group: Any) -> timedelta:
    """The user's timeout of a process group."""
    for device in ("cpu", "cuda"):
        with suppress(Exception):
            found: Any = group._get_backend(torch.device(device)).options._timeout
            return found
    return dist.distributed_c10d.default_pg_timeout


def open_channel(members: list[int], timeout: timedelta) -> Any:
    """A group for frames alone; collective over its members."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return dist.new_group(members, timeout=timeout, backend="gloo", use_local_synchronization=True)
