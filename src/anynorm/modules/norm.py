"""`Norm`, the base of every norm here as a module: which checkpoints it loads, and how FX records it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch.nn as nn
from torch import Tensor
from torch.fx import Proxy

from ..engine.protocol import look_at
from ..errors import check_state
from ..padding.context import CONTEXTS, find_current, may_be_masked
from ..padding.masks import Lengths
from ..padding.ragged import is_ragged
from .checkpoints import repair_state
from .frozen import Frozen

if TYPE_CHECKING:
    from typing_extensions import Self


class Norm(nn.Module):
    """Refuses checkpoints that torch loads in silence, and is a leaf to FX.

    Attributes:
        label: the name that `accelerate` or `sync` found in the model, for messages.
        frozen: what `freeze` has stopped; None for nothing.
    """

    label = ""
    frozen: Frozen | None = None
    training: bool
    weight: Any
    bias: Any

    def forward(self, input: Tensor, mask: Tensor | None = None, lengths: Lengths | None = None) -> Tensor:
        """Normalize; same shape, dtype and memory format (channels_last is kept).

        Args:
            input: as for torch's norm, or a jagged nested tensor or a PackedSequence.
            mask: which positions count, True or 1 where they do (torch's key_padding_mask is the opposite);
                broadcastable to the input without its channels or features. Padding enters no statistic, and its
                outputs are 0.
            lengths: (N,), how many positions of each sample count, instead of a mask.
        """
        if isinstance(input, Proxy):
            return record_call(self, input, **drop_none(mask=mask, lengths=lengths))
        if mask is None and lengths is None and CONTEXTS.was_opened and may_be_masked():
            mask = self.find_mask(input)
        if self._forward_hooks and not (mask is None and lengths is None):
            check_hooks(self, "mask")
        return self.normalize(input, None, None, mask, lengths)

    def normalize(
        self,
        input: Tensor,
        residual: Tensor | None = None,
        activation: str | None = None,
        mask: Tensor | None = None,
        lengths: Lengths | None = None,
    ) -> Tensor:
        """What `forward` does outside FX; see the function of the same name in `anynorm.functional`."""
        raise NotImplementedError

    def train(self, mode: bool = True) -> Self:
        """Set the mode; a norm whose statistics are frozen stays in evaluation."""
        super().train(mode)
        if self.frozen is not None:
            self.frozen.training = mode
            self.training = mode and not self.frozen.statistics
        return self

    def extra_repr(self) -> str:
        """The constructor's arguments, and what is frozen."""
        arguments = super().extra_repr()
        return arguments if self.frozen is None else f"{arguments}, frozen={self.frozen.describe()!r}"

    def read_affine(self) -> tuple[Tensor | None, Tensor | None]:
        """gamma and beta. torch's own look-up of an attribute that is a parameter costs most of a microsecond."""
        known = self._parameters
        if "weight" in known and "bias" in known:
            return known["weight"], known["bias"]
        return self.weight, self.bias  # what is parametrized

    def find_mask(self, input: Tensor) -> Tensor | None:
        """What `anynorm.masked` has for this input; nested tensors of either layout and packed ones have no padding."""
        seen = look_at(input)
        if is_ragged(seen) or seen.is_nested:
            return None
        channels = self.find_channel_axes(seen)
        positions = [size for axis, size in enumerate(seen.shape) if axis not in channels]
        return find_current(self, positions, input)

    def find_channel_axes(self, input: Tensor) -> tuple[int, ...]:
        """Axes of the input that a mask has not."""
        return (1,)

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        state_dict = repair_state(state_dict, prefix)
        wrong = list(check_state(state_dict, prefix))
        error_msgs += wrong  # load_state_dict raises them together.
        if not wrong:
            super()._load_from_state_dict(
                state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
            )


def read_entry(module: nn.Module, entries: dict[str, Any], name: str) -> Any:
    """A parameter or buffer of a module, from where torch keeps it; what is parametrized is an attribute instead."""
    return entries[name] if name in entries else getattr(module, name)


def drop_none(**options: Any) -> dict[str, Any]:
    """The options that are not None, so that a recorded call has no others."""
    return {name: value for name, value in options.items() if value is not None}


def record_call(module: nn.Module, *inputs: Any, **options: Any) -> Any:
    """Let FX record a call of the module itself, as it does for torch.nn's.

    FX traces through classes outside torch.nn, which would freeze the training mode and move the counter meanwhile.
    """
    tracer: Any = next(input.tracer for input in (*inputs, *options.values()) if isinstance(input, Proxy))
    path = tracer.path_of_module(module)
    if not path:
        raise TypeError(
            f"symbolic_trace: a norm cannot be the root of a trace; got {type(module).__name__}; "
            "trace torch.nn.Sequential(norm)"
        )
    return tracer.create_proxy("call_module", path, inputs, options)


def check_hooks(layer: nn.Module, what: str) -> None:
    """Opacus keeps the tensor that is normalized alone: per-sample gradients would be those of a call without `what`.

    Raises:
        NotImplementedError: a hook of Opacus is on the layer.
    """
    if any((getattr(hook, "__module__", None) or "").startswith("opacus.") for hook in layer._forward_hooks.values()):
        raise NotImplementedError(
            f"{type(layer).__name__}: Opacus' per-sample gradients know no {what}, and would be silently wrong; leave "
            f"the {what} out"
        )
