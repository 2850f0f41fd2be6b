"""Hold the statistics of a model's norms at the values of a first run, to see what moves without them."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.instancenorm import _InstanceNorm

from anynorm.modules.fused import Fused

Statistics = tuple[Tensor, Tensor]
ROUNDING = 1e-4  # of a norm's output: above, the statistics that were held are not the ones it uses


class HeldStatistics:
    """Record mean and variance of batch, instance and group norms; after `replay()` use them again.

    A batch norm runs its own `forward` in evaluation with the held statistics as running averages, so that a subclass
    keeps its code; the others are computed here. A norm whose output this does not reproduce has code of its own.

    Layer and RMS norms over the last axes are left alone: each position has statistics of its own, so that
    neither another sample nor padding can reach it through them.

    Args:
        model: hooks are put on its norms and taken off at the end of the `with` block.
        across: hold only what joins samples (batch norm); else also instance and group norm.
    """

    def __init__(self, model: nn.Module, across: bool) -> None:
        kinds = (_BatchNorm,) if across else (_BatchNorm, _InstanceNorm, nn.GroupNorm)
        self.norms = [module for module in model.modules() if issubclass(_plain(module), kinds)]
        self.recorded: dict[nn.Module, list[Statistics]] = {}
        self.calls: dict[nn.Module, int] = {}
        self.unknown: list[nn.Module] = []
        self.replaying = self.busy = False
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

    @property
    def own(self) -> tuple[str, ...]:
        """Return the class names of those whose statistics cannot be held."""
        return tuple(dict.fromkeys(type(norm).__name__ for norm in self.unknown))

    def _hook(self, norm: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        """Record the statistics of a call, or answer with those recorded for the same call before."""
        running = getattr(norm, "running_mean", None) is not None
        if self.busy or not args or not isinstance(output, Tensor) or (running and not norm.training):
            return output
        if not self.replaying:
            statistics = _statistics(norm, args[0])
            self.recorded.setdefault(norm, []).append(statistics)
            if norm not in self.unknown and not self._is_known(norm, args, statistics, output):
                self.unknown.append(norm)
            return output
        call = self.calls.get(norm, 0)
        self.calls[norm] = call + 1
        known = self.recorded.get(norm, [])
        return self._apply(norm, args, known[call]) if call < len(known) and norm not in self.unknown else output

    def _is_known(self, norm: nn.Module, args: tuple[Any, ...], statistics: Statistics, output: Tensor) -> bool:
        """Return whether the statistics give the output that the norm gave, and others give another one."""
        try:
            again = self._apply(norm, args, statistics)
            if again.shape != output.shape:
                return False
            mean, var = statistics
            other = self._apply(norm, args, (mean + (var + 1).sqrt(), 2 * var + 1))
            apart, close = (float((found - output).abs().max()) for found in (other, again))
            return close <= ROUNDING * float(output.abs().max()) < apart
        except Exception:  # the norm's own code may want what it is not given here
            return False

    def _apply(self, norm: nn.Module, args: tuple[Any, ...], statistics: Statistics) -> Tensor:
        """Return the norm's output with these statistics."""
        if not issubclass(_plain(norm), _BatchNorm):
            return _apply(norm, args[0], statistics)
        self.busy = True
        try:
            return _evaluate(norm, args, statistics)
        finally:
            self.busy = False


def _plain(norm: nn.Module) -> type:
    """Return the class whose statistics a norm has: ours that are fused are no torch norms."""
    return norm.plain if isinstance(norm, Fused) else type(norm)


def _evaluate(norm: Any, args: tuple[Any, ...], statistics: Statistics) -> Tensor:
    """Return what a batch norm gives in evaluation with the statistics as running averages, and leave it as it was."""
    before = norm.running_mean, norm.running_var, norm.training, norm.track_running_stats
    norm.running_mean, norm.running_var = (values.flatten() for values in statistics)
    norm.training, norm.track_running_stats = False, True
    try:
        return norm.forward(*args)
    finally:
        norm.running_mean, norm.running_var, norm.training, norm.track_running_stats = before


def _statistics(norm: Any, x: Tensor) -> Statistics:
    """Return mean and population variance, shaped to broadcast against x and against a longer x."""
    if issubclass(_plain(norm), nn.GroupNorm):
        var, mean = torch.var_mean(x.reshape(x.shape[0], norm.num_groups, -1), dim=2, correction=0)
        shape = (x.shape[0], x.shape[1]) + (1,) * (x.dim() - 2)
        size = x.shape[1] // norm.num_groups
        return mean.repeat_interleave(size, 1).reshape(shape), var.repeat_interleave(size, 1).reshape(shape)
    axes = [0, *range(2, x.dim())] if issubclass(_plain(norm), _BatchNorm) else list(range(2, x.dim()))
    var, mean = torch.var_mean(x, dim=axes, correction=0, keepdim=True)
    return mean, var


def _apply(norm: Any, x: Tensor, statistics: Statistics) -> Tensor:
    """Return (x - mean) / sqrt(var + eps) * gamma + beta with the given statistics."""
    mean, var = statistics
    shape = (1, -1) + (1,) * (x.dim() - 2)
    y = (x - mean) / torch.sqrt(var + norm.eps)
    y = y if norm.weight is None else y * norm.weight.reshape(shape)
    return y if norm.bias is None else y + norm.bias.reshape(shape)
