"""What is raised where ranks differ, are missing, or have failed before: errors that name the layer and the ranks."""

from __future__ import annotations

from collections.abc import Sequence

from ..errors import SyncError
from .frames import PHASES, Call, describe_header


def make_broken_error(call: Call, earlier: SyncError) -> SyncError:
    """The error of a call in a group that has failed before."""
    return SyncError(
        f"{call.label}: its process group cannot be used any more; it failed before: {earlier}; start the "
        "job again from its last checkpoint",
        call.label,
        earlier.ranks,
    )


def make_mismatch_error(
    call: Call, members: Sequence[int], rank: int, headers: Sequence[Sequence[int]]
) -> SyncError | None:
    """The error where ranks do different things; None where all headers equal this rank's.

    Args:
        members: global ranks of the group's ranks.
        rank: this one, in the group.
        headers: of all ranks, in their order.
    """
    own = headers[rank]
    others = {other: header for other, header in enumerate(headers) if header != own}
    if not others:
        return None
    theirs = "; ".join(f"rank {members[other]} is at {describe_header(header)}" for other, header in others.items())
    return SyncError(
        f"{call.label}: all ranks must call the same layers in the same order with the same channels, dtype "
        f"and mode; rank {members[rank]} is at {describe_header(own)}; {theirs}; "
        "look for a branch that depends on the data of a rank; layers without a name are numbered as they are "
        "built, so build the same on all ranks or name them by anynorm.sync(model)",
        call.label,
        tuple(members[other] for other in others),
    )


def make_missing_error(
    call: Call, rank: int, missing: tuple[int, ...], waited: float, timeout: float, cause: Exception
) -> SyncError:
    """The error where ranks did not come to a call.

    Args:
        rank: this one, in the job.
        missing: ranks in the job; none where it is not known which.
        waited, timeout: in seconds.
        cause: what the channel raised.
    """
    names = ", ".join(map(str, missing)) or "unknown"
    first = str(cause).strip().splitlines()[0] if str(cause).strip() else type(cause).__name__
    return SyncError(
        f"{call.label}: every rank must come to {PHASES[call.phase]}, call {call.number}, within the "
        f"timeout of {timeout:g} s; missing ranks: {names}, seen by rank "
        f"{rank} after {waited:.1f} s; they skipped the layer, died or are too slow: "
        f"look at their own errors first ({first})",
        call.label,
        missing,
    )


def find_missing(waits: dict[int, float], world: int, timeout: float) -> list[int]:
    """Ranks that skipped the layer, or are dead or late.

    Ranks that did not report how long they waited are missing; of those that did, the ones that waited much less than
    the others came too late.

    Args:
        waits: seconds by rank, of those that reported.
        timeout: in seconds.
    """
    silent = [rank for rank in range(world) if rank not in waits]
    if silent:
        return silent
    longest = max(waits.values())
    # Where nobody waited as long as the timeout the channel broke for another reason, and short waits say nothing.
    timed_out = longest > 0.9 * timeout
    return [rank for rank in sorted(waits) if waits[rank] < longest / 2] if timed_out else []
