"""Fix the statistics of a model's norms at the values of a first run, to see what still changes without them."""

from typing import Any

import torch
from torch import Tensor, nn

from .. import reference
from .norms import find_kind, find_norm_pooling, find_plain_class

Statistics = tuple[Tensor, Tensor]  # mean and population variance, in the shape of the opened input, pooled axes of 1
ROUNDING = 1e-4  # of a norm's output: above, the statistics that were fixed are not the ones it uses


class FixedStatistics:
    """Record mean and variance of batch, instance and group norms; after `replay()` use them again.

    A batch norm runs its own `forward` in evaluation with the recorded statistics as running averages, so that a
    subclass keeps its code; the others are computed by the reference. A norm whose output this does not reproduce has
    code of its own.

    Layer and RMS norms over the last axes are left alone: each position has statistics of its own, so that
    neither another sample nor padding can reach it through them.

    Args:
        model: hooks are put on its norms and taken off at the end of the `with` block.
        batch_only: fix only what joins samples (batch norm); else also instance and group norm.
    """

    def __init__(self, model: nn.Module, batch_only: bool) -> None:
        kinds = ("batch",) if batch_only else ("batch", "instance", "group")
        self.norms: list[nn.Module] = [
            module for module in model.modules() if find_kind(find_plain_class(module)) in kinds
        ]
        self.recorded: dict[nn.Module, list[Statistics]] = {}
        self.calls: dict[nn.Module, int] = {}
        self.unknown: list[nn.Module] = []
        # `calling`: a norm's own forward runs inside of its hook, which must not answer it a second time.
        self.replaying: bool = False
        self.calling: bool = False
        self._handles: list[Any] = []

    def __enter__(self) -> "FixedStatistics":
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
    def custom(self) -> tuple[str, ...]:
        """Return the class names of those whose statistics cannot be fixed, for their code is not known."""
        return tuple(dict.fromkeys(type(norm).__name__ for norm in self.unknown))

    def _hook(self, norm: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        """Record the statistics of a call, or answer with those recorded for the same call before."""
        running = getattr(norm, "running_mean", None) is not None
        if self.calling or not args or not isinstance(output, Tensor) or (running and not norm.training):
            return output
        if not self.replaying:
            self._record(norm, args, output)
            return output
        call = self.calls.get(norm, 0)
        self.calls[norm] = call + 1
        recorded = self.recorded.get(norm, [])
        return self._apply(norm, args, recorded[call]) if call < len(recorded) and norm not in self.unknown else output

    def _record(self, norm: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
        """Keep the statistics of a call; a norm whose output they do not give has code that is not known."""
        calls = self.recorded.setdefault(norm, [])
        if norm in self.unknown:
            return
        try:
            calls.append(_find_statistics(norm, args[0]))
            known = self._is_reproduced(norm, args, calls[-1], output)
        except Exception:  # the norm's own code may want what it is not given here
            known = False
        if not known:
            self.unknown.append(norm)

    def _is_reproduced(self, norm: nn.Module, args: tuple[Any, ...], statistics: Statistics, output: Tensor) -> bool:
        """Return whether the statistics give the output that the norm gave, and others give another one."""
        again = self._apply(norm, args, statistics)
        if again.shape != output.shape:
            return False
        mean, var = statistics
        other = self._apply(norm, args, (mean + (var + 1).sqrt(), 2 * var + 1))
        apart, close = (float((found - output).abs().max()) for found in (other, again))
        return close <= ROUNDING * float(output.abs().max()) < apart

    def _apply(self, norm: nn.Module, args: tuple[Any, ...], statistics: Statistics) -> Tensor:
        """Return the norm's output with these statistics."""
        if find_kind(find_plain_class(norm)) != "batch":
            return _normalize(norm, args[0], statistics)
        self.calling = True
        try:
            return _evaluate(norm, args, statistics)
        finally:
            self.calling = False


def _evaluate(norm: Any, args: tuple[Any, ...], statistics: Statistics) -> Tensor:
    """Return what a batch norm gives in evaluation with the statistics as running averages, and leave it as it was."""
    before = norm.running_mean, norm.running_var, norm.training, norm.track_running_stats
    norm.running_mean, norm.running_var = (values.flatten() for values in statistics)
    norm.training, norm.track_running_stats = False, True
    try:
        y: Tensor = norm.forward(*args)
        return y
    finally:
        norm.running_mean, norm.running_var, norm.training, norm.track_running_stats = before


def _find_statistics(norm: nn.Module, x: Tensor) -> Statistics:
    """Return mean and population variance of the norm's input, shaped to broadcast against a longer one as well."""
    pooling = find_norm_pooling(norm, find_kind(find_plain_class(norm)) or "", x)
    mean, var = reference.moments(pooling.open(x.detach()).double().numpy(), pooling.pooled)
    return torch.from_numpy(mean).to(x.dtype), torch.from_numpy(var).to(x.dtype)


def _normalize(norm: Any, x: Tensor, statistics: Statistics) -> Tensor:
    """Return the formula's y with the given statistics, for an instance or group norm without its own code."""
    pooling = find_norm_pooling(norm, find_kind(find_plain_class(norm)) or "", x)
    shape = (1, -1) + (1,) * (x.dim() - 2)

    def open_parameter(parameter: Tensor | None, absent: float) -> Any:
        return absent if parameter is None else pooling.open(parameter.detach().reshape(shape)).double().numpy()

    view = pooling.open(x.detach())
    gamma, beta = open_parameter(norm.weight, 1.0), open_parameter(norm.bias, 0.0)
    given = tuple(values.double().numpy() for values in statistics)
    y = reference.forward(view.double().numpy(), pooling.pooled, gamma, beta, norm.eps, given=(given[0], given[1]))
    return torch.from_numpy(y).reshape(x.shape).to(x.dtype)
