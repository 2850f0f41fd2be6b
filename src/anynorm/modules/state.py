"""What every norm of ours shares as a module: which checkpoints it loads, and how FX records it."""

from __future__ import annotations

from typing import Any

import torch.nn as nn
from torch import Tensor
from torch.fx import Proxy

from ..errors import check_state


class Norm(nn.Module):
    """Refuses checkpoints that torch loads in silence, and is a leaf to FX."""

    def forward(self, input: Tensor) -> Tensor:
        """Normalize; same shape, dtype and memory format (channels_last is kept)."""
        if isinstance(input, Proxy):
            return record_call(self, input)
        return self.normalize(input)

    def normalize(self, input: Tensor) -> Tensor:
        """What `forward` does outside FX."""
        raise NotImplementedError

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
        wrong = list(check_state(state_dict, prefix))
        error_msgs += wrong  # load_state_dict raises them together.
        if not wrong:
            super()._load_from_state_dict(
                state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
            )


def record_call(module: nn.Module, *inputs: Any) -> Any:
    """Let FX record a call of the module itself, as it does for torch.nn's.

    FX traces through classes outside torch.nn, which would freeze the training mode and move the counter meanwhile.
    """
    tracer: Any = next(input.tracer for input in inputs if isinstance(input, Proxy))
    path = tracer.path_of_module(module)
    if not path:
        raise TypeError(
            f"symbolic_trace: a norm cannot be the root of a trace; got {type(module).__name__}; "
            "trace torch.nn.Sequential(norm)"
        )
    return tracer.create_proxy("call_module", path, inputs, {})
