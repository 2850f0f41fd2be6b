"""Hold the statistics of a model's norms at the values of a first run, to see what moves without them."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.instancenorm import _InstanceNorm

Statistics = tuple[Tensor, Tensor]


class HeldStatistics:
    """Record mean and variance of batch, instance and group norms; after `replay()` use them again.

    Layer and RMS norms over the last axes are left alone: each position has statistics of its own, so that
    neither another sample nor padding can reach it through them.

    Args:
        model: hooks are put on its norms and taken off at the end of the `with` block.
        across: hold only what joins samples (batch norm); else also instance and group norm.
    """

    def __init__(self, model: nn.Module, across: bool) -> None:
        kinds = (_BatchNorm,) if across else (_BatchNorm, _InstanceNorm, nn.GroupNorm)
        self.norms = [module for module in model.modules() if isinstance(module, kinds)]
        self.recorded: dict[nn.Module, list[Statistics]] = {}
        self.calls: dict[nn.Module, int] = {}
        self.replaying = False
        self._handles: list[Any] = []

    def __enter__(self) -> "HeldStatistics":
        self._handles = [norm.register_forward_hook(self._hook) for norm in self.norms]
        return self

    def __exit__(self, *_: object) -> None:
        for handle in self._handles:
            handle.remove()

    def replay(self) -> None:
        """From now on normalize with the recorded statistics, call by call."""
        self.replaying = True
        self.calls.clear()

    @property
    def kinds(self) -> tuple[str, ...]:
        """Return the class names of the norms that computed statistics of their own, without repetition."""
        return tuple(dict.fromkeys(type(norm).__name__ for norm in self.recorded))

    def _hook(self, norm: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        """Record the statistics of a call, or answer with those recorded for the same call before."""
        running = getattr(norm, "running_mean", None) is not None
        if not args or not isinstance(output, Tensor) or (running and not norm.training):
            return output
        if not self.replaying:
            self.recorded.setdefault(norm, []).append(_statistics(norm, args[0]))
            return output
        call = self.calls.get(norm, 0)
        self.calls[norm] = call + 1
        known = self.recorded.get(norm, [])
        return _apply(norm, args[0], known[call]) if call < len(known) else output


def _statistics(norm: nn.Module, x: Tensor) -> Statistics:
    """Return mean and population variance, shaped to broadcast against x and against a longer x."""
    if isinstance(norm, nn.GroupNorm):
        var, mean = torch.var_mean(x.reshape(x.shape[0], norm.num_groups, -1), dim=2, correction=0)
        shape = (x.shape[0], x.shape[1]) + (1,) * (x.dim() - 2)
        size = x.shape[1] // norm.num_groups
        return mean.repeat_interleave(size, 1).reshape(shape), var.repeat_interleave(size, 1).reshape(shape)
    axes = [0, *range(2, x.dim())] if isinstance(norm, _BatchNorm) else list(range(2, x.dim()))
    var, mean = torch.var_mean(x, dim=axes, correction=0, keepdim=True)
    return mean, var


def _apply(norm: Any, x: Tensor, statistics: Statistics) -> Tensor:
    """Return (x - mean) / sqrt(var + eps) * gamma + beta with the given statistics."""
    mean, var = statistics
    shape = (1, -1) + (1,) * (x.dim() - 2)
    y = (x - mean) / torch.sqrt(var + norm.eps)
    y = y if norm.weight is None else y * norm.weight.reshape(shape)
    return y if norm.bias is None else y + norm.bias.reshape(shape)
