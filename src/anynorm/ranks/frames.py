"""What travels between ranks: frames, each a header that says which call it belongs to, then a payload.

A frame is a row of words of 8 bytes, int64 in the header and float64 in the payload.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

HEADER = 8  # words of 8 bytes
FRAME = HEADER + 1 + 2 * 512  # words at the start: count, mean and m2 of up to 512 channels
FORWARD, BACKWARD = 1, 2
PHASES = {FORWARD: "forward", BACKWARD: "backward"}
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
MODES = {1: "a gradient for its input", 2: "moves its running averages"}
LABELS: dict[int, str] = {}  # the label of every layer that this process has registered, by its id in headers


def register_label(label: str) -> int:
    """Remember a layer's label under its id in headers, and return the id.

    A header has one word for a layer, too little for a name. So the id is a hash of the label, the same on all ranks,
    and each rank looks up labels among those that it has registered itself.
    """
    # Not hash(): Python salts it anew in every process.
    layer_id = int.from_bytes(hashlib.blake2b(label.encode(), digest_size=8).digest(), "little", signed=True)
    LABELS[layer_id] = label
    return layer_id


@dataclass(frozen=True)
class Call:
    """One call of a layer, as all ranks must agree on it.

    Attributes:
        label: the layer's name.
        number: how many calls of this layer came before.
        order: how many layers of these ranks were synchronized before it for the first time; tells apart layers of
            the same name in two models.
        phase: FORWARD or BACKWARD.
        channels: of the input.
        dtype: of the input, an index of DTYPES.
        mode: sum of the keys of MODES that hold.
    """

    label: str
    number: int
    order: int
    phase: int
    channels: int
    dtype: int
    mode: int

    def pack(self, length: int) -> list[int]:
        """The header; `length` is that of the payload in words."""
        layer_id = register_label(self.label)
        return [self.phase, layer_id, self.number, self.channels, self.dtype, self.mode, length, self.order]


def make_frame(size: int, header: Sequence[int], payload: Tensor) -> Tensor:
    """A frame of `size` words; without the payload where that does not fit."""
    frame = torch.zeros(size, dtype=torch.int64, device="cpu")
    frame[:HEADER] = torch.tensor(header, dtype=torch.int64, device="cpu")
    end = HEADER + payload.numel()
    if end <= size:
        frame[HEADER:end] = payload.view(torch.int64)  # the bits of the float64, not their values
    return frame


def read_payloads(frames: Tensor, length: int) -> Tensor:
    """The payloads of all ranks' frames, (ranks, length), float64."""
    return frames[:, HEADER : HEADER + length].contiguous().view(torch.float64)


def describe_header(header: Sequence[int]) -> str:
    """What a header says, for messages."""
    phase, layer_id, number, channels, dtype, mode, _, order = header
    modes = [text if mode & bit else f"not {text}" for bit, text in MODES.items()]
    label = LABELS.get(layer_id, "a layer that this rank has not called")
    return (
        f"{PHASES.get(phase, phase)} of {label}, call {number}: {channels} channels, "
        f"{str(DTYPES[dtype]).removeprefix('torch.')}, {', '.join(modes)}, layer {order} of those synchronized"
    )
