"""Find out by trying whether a sample's output depends on the rest of its batch or on its padding."""

import dataclasses
from collections.abc import Callable

import torch
from torch import Tensor, nn

from ..randomness import keep_randomness
from .call import Call
from .fixed_statistics import FixedStatistics
from .outputs import find_outputs, largest_difference, without_dropout


@dataclasses.dataclass(frozen=True)
class Finding:
    """What happened to the output of sample 0 in one mode.

    Args:
        training: whether the mode was training, else evaluation.
        change: largest change as a share of the largest output; None where it could not be tried.
        remaining: the same with the statistics of the norms fixed at their first values; None where not tried.
        kinds: classes of the norms whose statistics depend on what was changed.
        custom: those among them whose statistics cannot be fixed, for their code is not known.
        note: why it could not be tried, or how the outputs were compared.
        tolerance: changes up to here are rounding.
    """

    training: bool
    change: float | None
    remaining: float | None = None
    kinds: tuple[str, ...] = ()
    custom: tuple[str, ...] = ()
    note: str = ""
    tolerance: float = 0.0

    @property
    def depends(self) -> bool:
        """Return whether the output changed by more than rounding."""
        return self.change is not None and self.change > self.tolerance

    @property
    def only_norms(self) -> bool:
        """Return whether the norms alone carry the change: nothing is left once their statistics are fixed."""
        return self.depends and self.remaining is not None and self.remaining <= self.tolerance


Change = Callable[[Call], Call]
Select = Callable[[list[Tensor], list[Tensor]], tuple[list[Tensor], list[Tensor], str]]


class ModelProbe:
    """A copy of the model in float64 where it can be (so that rounding is told from change), without dropout."""

    model: nn.Module
    call: Call
    tolerance: float

    def __init__(self, model: nn.Module, call: Call) -> None:
        few = _first_samples(call)
        # A model may be made for one batch size, or make its own float32 tensors and refuse float64.
        for chosen, wide in ((few, True), (call, True), (few, False), (call, False)):
            self.model, self.call, self.tolerance = without_dropout(model), chosen, 1e-4
            if wide:
                self.model, self.tolerance = self.model.double(), 1e-9
                self.call = chosen.change(lambda t: t.double() if t.is_floating_point() else t)
            try:
                find_outputs(self.model, self.call, training=False)
                return
            except Exception:
                continue

    def outputs(self, call: Call, training: bool, seed: int = 0) -> list[Tensor]:
        """Return the floating-point outputs."""
        return find_outputs(self.model, call, training, seed)

    def examine(self, call: Call, change: Change, select: Select, training: bool, batch_only: bool) -> Finding:
        """Run the call as it is and changed; if the output moved, run both again with fixed statistics."""
        first = self.outputs(call, training)
        # A longer input draws other random numbers, an equally large one the same: only padding needs a model
        # without chance (a functional dropout cannot be switched off from here).
        again = self.outputs(call, training, seed=0 if batch_only else 1)
        if largest_difference(first, again).relative > self.tolerance:
            return Finding(training, None, note="the model gives another output each time it is called")
        changed = change(call)
        one, other, note = select(first, self.outputs(changed, training))
        if not one:
            return Finding(training, None, note=note)
        moved = largest_difference(one, other).relative
        if moved <= self.tolerance:
            return Finding(training, moved, note=note, tolerance=self.tolerance)
        with FixedStatistics(self.model, batch_only) as fixed:
            first = self.outputs(call, training)
            if not fixed.kinds:
                return Finding(training, moved, moved, note=note, tolerance=self.tolerance)
            fixed.replay()
            one, other, _ = select(first, self.outputs(changed, training))
        remaining = largest_difference(one, other).relative
        return Finding(training, moved, remaining, fixed.kinds, fixed.custom, note, self.tolerance)


def find_batch_dependence(model: nn.Module, call: Call) -> list[Finding]:
    """Replace the other samples of the batch and compare sample 0's output, in evaluation and in training mode."""
    probe = ModelProbe(model, call)
    size = _batch_size(probe.call)
    if size is None:
        return [Finding(mode, None, note="the arguments share no first axis") for mode in (False, True)]
    if size == 1:
        # One sample has no company: give it three copies, which the test then replaces.
        probe.call = probe.call.change(lambda t: torch.cat([t] * 4) if t.dim() and len(t) == 1 else t)
        size = 4
    count = size

    def replace(given: Call) -> Call:
        return given.change(lambda tensor: _replace_others(tensor, count))

    def sample_0(first: list[Tensor], second: list[Tensor]) -> tuple[list[Tensor], list[Tensor], str]:
        pairs = [(a, b) for a, b in zip(first, second) if a.dim() and len(a) == count and a.shape == b.shape]
        note = "" if pairs else "no output has the batch as its first axis"
        return [a[:1] for a, _ in pairs], [b[:1] for _, b in pairs], note

    return [probe.examine(probe.call, replace, sample_0, mode, batch_only=True) for mode in (False, True)]


def _first_samples(call: Call, most: int = 4) -> Call:
    """Return the call with a few samples only: they answer the question as well as many, and sooner."""
    size = _batch_size(call)
    return call if size is None else call.change(lambda tensor: tensor[:most] if tensor.dim() else tensor)


def _batch_size(call: Call) -> int | None:
    """Return the size of the first axis that the tensor arguments share."""
    sizes = {len(tensor) for tensor in call.tensors() if tensor.dim()}
    return sizes.pop() if len(sizes) == 1 else None


def _replace_others(tensor: Tensor, count: int) -> Tensor:
    """Return the tensor with new values in every sample but the first: wider and shifted, or other tokens."""
    if tensor.dim() == 0 or len(tensor) != count or tensor.dtype == torch.bool:
        return tensor
    with keep_randomness(seed=1):
        if tensor.is_floating_point():
            return torch.cat([tensor[:1], 3.0 * torch.randn_like(tensor[1:]) + 1.0])
        low, high = int(tensor.min()), int(tensor.max()) + 1
        new = torch.randint(low, high, tensor[1:].shape, dtype=tensor.dtype, device=tensor.device)
    return torch.cat([tensor[:1], new])


def find_padding_dependence(model: nn.Module, call: Call) -> list[Finding]:
    """Append padding (zeros, half as many steps again) and compare the real positions, in both modes.

    Returns an empty list where the input is not a sequence: no floating (N, L, D) or (N, C, L), no integer (N, L).
    """
    probe = ModelProbe(model, call)
    axes = _position_axes(model, probe.call)
    problem = ""
    for axis in axes:
        length = probe.call.tensors()[0].shape[axis]

        def pad(given: Call, axis: int = axis, length: int = length) -> Call:
            return given.change(lambda tensor: _append_zeros(tensor, axis, length))

        try:
            return [probe.examine(probe.call, pad, _real_positions, mode, batch_only=False) for mode in (False, True)]
        except Exception as error:  # this axis is not one of positions: the model wants its exact size
            problem = problem or type(error).__name__
    note = f"the model accepts no longer input ({problem})"
    return [Finding(mode, None, note=note) for mode in (False, True)] if axes else []


def _position_axes(model: nn.Module, call: Call) -> list[int]:
    """Return the axes of the first argument that may count positions, the likeliest first."""
    if not call.tensors():
        return []
    first = call.tensors()[0]
    if first.dim() == 2 and not first.is_floating_point():
        return [1]
    if first.dim() != 3 or not first.is_floating_point():
        return []
    return [2, 1] if any(isinstance(module, nn.Conv1d) for module in model.modules()) else [1, 2]


def _append_zeros(tensor: Tensor, axis: int, length: int) -> Tensor:
    """Return the tensor with half as many zeros again along an axis of that length; others unchanged."""
    if tensor.dim() <= axis or tensor.shape[axis] != length:
        return tensor
    shape = list(tensor.shape)
    shape[axis] = max(1, length // 2)
    return torch.cat([tensor, tensor.new_zeros(shape)], dim=axis)


def _real_positions(first: list[Tensor], second: list[Tensor]) -> tuple[list[Tensor], list[Tensor], str]:
    """Cut the outputs of the longer input to the shape of the shorter's; equal shapes mean no position axis."""
    cut = []
    for short, long in zip(first, second):
        for axis, size in enumerate(short.shape):
            long = long.narrow(axis, 0, min(size, long.shape[axis]))
        cut.append(long)
    whole = all(a.shape == b.shape for a, b in zip(first, second))
    return first, cut, "the output has no axis of positions: compared whole" if whole else ""
