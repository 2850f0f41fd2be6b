"""Sequences of unequal lengths as rows: only the positions that are there, step after step.

Row (t, i) is step t of sequence i. Sequences are sorted by length, the longest first, so those that still run at step t
are the first ``sizes[t]``, and ``sizes`` never rises. This is what torch's PackedSequence holds.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence

from ...padding.masks import Lengths


def pack(name: str, input: Tensor, lengths: Lengths, batch_first: bool) -> PackedSequence:
    """The rows of a padded batch; what stands in the padding is never read and gets gradient 0.

    Args:
        name: whose error it is.
        input: (steps, batch, features), or (batch, steps, features) where `batch_first`.
        lengths: how many steps of each sequence are there, in any order.

    Raises:
        ValueError: `input` is already packed, or has no batch.
        RuntimeError: lengths that do not fit, as from torch's pack_padded_sequence.
    """
    if not isinstance(input, Tensor) or input.dim() != 3:
        got = f"{input.dim()}D input" if isinstance(input, Tensor) else type(input).__name__
        raise ValueError(f"{name}: lengths belong to a padded batch, a 3D input; got {got}; leave lengths out")
    steps, batch = (input.shape[1], input.shape[0]) if batch_first else (input.shape[0], input.shape[1])
    lengths = find_lengths(name, lengths, steps, batch)
    return pack_padded_sequence(input, lengths, batch_first, enforce_sorted=False)


def find_lengths(name: str, lengths: Lengths, steps: int, batch: int) -> Tensor:
    """Checked lengths as int64 on the CPU. torch takes one that is too large in silence."""
    found = lengths.detach().cpu() if isinstance(lengths, Tensor) else torch.as_tensor(lengths, device="cpu")
    if found.is_floating_point() or found.is_complex() or found.dtype == torch.bool:
        raise RuntimeError(
            f"{name}: lengths must be whole numbers; got {found.dtype}; count the steps of each sequence"
        )
    if tuple(found.shape) != (batch,):
        raise RuntimeError(
            f"{name}: lengths must have one number per sequence; got shape {tuple(found.shape)}, batch={batch}; "
            f"pass {batch} numbers"
        )
    wrong = found[(found < 1) | (found > steps)]
    if wrong.numel():
        raise RuntimeError(
            f"{name}: lengths must be from 1 to the number of steps; got {int(wrong[0])} where the input has "
            f"{steps} steps; leave empty sequences out of the batch"
        )
    return found.long()


def unpack(packed: PackedSequence, batch_first: bool, steps: int) -> Tensor:
    """The padded batch again, as long as it was, with 0 in the padding."""
    # Put back in order here: pad_packed_sequence would order the lengths too, which the meta device cannot.
    in_order = packed._replace(sorted_indices=None, unsorted_indices=None)
    padded = pad_packed_sequence(in_order, batch_first, total_length=steps)[0]
    back = packed.unsorted_indices
    return padded if back is None else padded.index_select(0 if batch_first else 1, back)


def split_steps(rows: Tensor, sizes: list[int]) -> tuple[Tensor, ...]:
    """The rows of each step. Steps of one size are cut without it, so that a traced graph takes other batches."""
    if sizes[0] is sizes[-1] or sizes[0] == sizes[-1]:
        found: tuple[Tensor, ...] = rows.unflatten(0, (len(sizes), -1)).unbind(0)
    else:
        found = rows.split(sizes)
    return found


def find_flip_of_all(rows: Tensor, steps: int) -> Tensor:
    """`find_flip` where every sequence has all steps, for any number of rows in a graph."""
    found: Tensor = torch.arange(rows.shape[0], device=rows.device).unflatten(0, (steps, -1)).flip(0).flatten()
    return found


def find_flip(batch_sizes: Tensor) -> Tensor:
    """Where each row goes when every sequence is read from its own end: row (t, i) becomes row (length_i - 1 - t, i).

    Going there twice leads back.

    Example:
        >>> find_flip(torch.tensor([2, 1, 1]))  # sequences of 3 steps (rows 0, 2, 3) and 1 step (row 1)
        tensor([3, 1, 2, 0])
    """
    starts = batch_sizes.cumsum(0) - batch_sizes
    step = torch.repeat_interleave(torch.arange(batch_sizes.numel(), device="cpu"), batch_sizes)
    sequence = torch.arange(step.numel(), device="cpu") - starts[step]
    order = torch.arange(int(batch_sizes.max()), device="cpu")
    lengths = (batch_sizes[:, None] > order).sum(0)
    return starts[lengths[sequence] - 1 - step] + sequence
