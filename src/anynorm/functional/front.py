"""What every norm's function does before the numbers: mask, known calls, torch's protocol, ragged input, checks.

`Front` is that way, written once. Each norm's file has a subclass with what is its own, and one object of it, which
function and module call.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..activations import check_activation, check_finish, finish
from ..engine import kernels, paths, protocol, watch
from ..engine.gradients import apply
from ..engine.request import Request
from ..errors import check_floating
from ..family import FAMILY, Scheme
from ..padding import ragged
from ..padding.masks import find_mask, open_mask
from ..pooling import Pooling
from ..sources import Batch, Given, Source


class Front:
    """How a norm is asked for.

    Args:
        function: its name in `functional`, for messages.
        scheme: its line of the family.

    Attributes:
        copies: whether gamma and beta may be changed in place between forward and backward.
    """

    copies = False

    def __init__(self, function: str, scheme: str) -> None:
        self.function = function
        self.scheme: Scheme = FAMILY[scheme]

    def normalize(self, x: Any, weight: Tensor | None, bias: Tensor | None, residual: Any, request: Request) -> Any:
        """activation(norm(x) + residual): shape, dtype and memory format of x.

        Args:
            x: a tensor, or a jagged or packed one.
            weight, bias: gamma and beta.
            residual: as x, or None.
            request: as the user asked.
        """
        _, _, activation, mask, lengths, _ = request
        if mask is not None or lengths is not None:
            opened = None
            if watch.is_plain(x, weight, bias, residual, request.source[0], request.source[1]):
                opened = self.open_mask(x, request)
            if opened is None:
                found = self.hand_over(x, weight, bias, residual, request)
                if found is not None:
                    return found
                opened = self.read_mask(x, request)
            request = opened
        if kernels.READS_TENSORS and not self.copies and not torch.compiler.is_compiling():
            try:
                y = kernels.compiled.normalize_known(
                    paths.PLANS, self.function, apply, x, weight, bias, residual, request
                )
            except ValueError:  # The kernels refuse memory that overlaps, before they touch it; say what overlaps.
                self.check_memory(x, weight, bias, request)
                raise
            if y is not None:
                return y
        if activation is not None:
            request = request._replace(activation=check_activation(self.function, activation))
        key = watch.find_key(self.function, x, weight, bias, residual, request)
        plan = paths.PLANS.get(key) if key is not None else None
        if plan is None:
            return self.normalize_checked(x, weight, bias, residual, request, key=key)
        if self.copies:
            weight, bias = copy_parameters(weight, bias, request)
        try:  # As `paths.run`, without a frame of its own.
            if torch.is_grad_enabled() and (
                x.requires_grad
                or (weight is not None and weight.requires_grad)
                or (bias is not None and bias.requires_grad)
                or (residual is not None and residual.requires_grad)
            ):
                return apply(x, weight, bias, residual, request, plan)
            return kernels.forward(x, weight, bias, residual, request, plan)[0]
        except ValueError:  # The kernels refuse memory that overlaps, before they touch it; say what overlaps.
            self.check_memory(x, weight, bias, request)
            raise

    def normalize_checked(
        self,
        x: Any,
        weight: Tensor | None,
        bias: Tensor | None,
        residual: Any,
        request: Request,
        *,
        key: tuple[Any, ...] | None = None,
    ) -> Any:
        """The same where nothing is known of such a call; `key` to remember that its checks passed."""
        if key is None:
            if ragged.is_ragged(x):
                return self.normalize_ragged(x, weight, bias, residual, request)
            found = self.hand_over(x, weight, bias, residual, request)
            if found is not None:
                return found
        check_floating(self.function, x)
        activation = check_finish(self.function, x, request.activation, residual)
        if x.dim() == 1 and not x.numel() and self.takes_nothing(request):
            return normalize_nothing(x, weight, bias, residual, activation)
        if x.is_nested:
            return finish(self.call_torch(x, weight, bias, request), activation, residual)
        self.check(x, weight, bias, request)
        if request.mask is None and paths.prefers_torch(x) and self.is_torchs(request):
            return finish(self.call_torch(x, weight, bias, request), activation, residual)
        if not x.numel() and self.takes_nothing(request):
            return normalize_nothing(x, weight, bias, residual, activation)
        self.check_memory(x, weight, bias, request)
        if self.copies:
            weight, bias = copy_parameters(weight, bias, request)
        pooling = self.find_pooling(x, request)
        if self.warns(x, pooling):
            key = None
        return paths.normalize(x, weight, bias, residual, request, pooling, key=key)

    def hand_over(self, x: Any, weight: Tensor | None, bias: Tensor | None, residual: Any, request: Request) -> Any:
        """What torch's protocol for subclasses and modes makes of the call; None where it has no say."""
        if ragged.is_ragged(x):
            return None
        source, _, activation, mask, lengths, _ = request
        if not isinstance(source, (Batch, Given)):
            return protocol.hand_over(self.normalize, (x, weight, bias, residual, request), {})
        function, arguments = self.write_call(x, weight, bias, request)
        options = {"activation": activation, "residual": residual, "mask": mask, "lengths": lengths}
        return protocol.hand_over(function, arguments, options)

    def open_mask(self, x: Any, request: Request) -> Request | None:
        """What `read_mask` does, at once, for plain memory; None where something may not be as it should."""
        source, eps, activation, mask, lengths, sizes = request
        channels = self.find_channels(request)
        found = None if channels is None else open_mask(x, channels, mask, lengths)
        if found is None or not self.is_enough(found[1], request):
            return None
        return Request(source, eps, activation, found[0], None, sizes)

    def find_channels(self, request: Request) -> tuple[int, int] | None:
        """The first axis that a mask has not, and how many such axes there are; None to have `read_mask` look."""
        return 1, 1

    def is_enough(self, count: int, request: Request) -> bool:
        """Whether so many real positions make statistics."""
        return True

    def read_mask(self, x: Any, request: Request) -> Request:
        """The request with its mask as the engine takes it."""
        mask = find_mask(self.function, x, (1,), request.mask, request.lengths)
        return request._replace(mask=mask, lengths=None)

    def normalize_ragged(
        self, x: Any, weight: Tensor | None, bias: Tensor | None, residual: Any, request: Request
    ) -> Any:
        """A norm of the rows, of each or of all together; norms that must know whose row each is have another."""
        rows, added = ragged.open_rows(self.function, x), ragged.open_residual(self.function, x, residual)
        return ragged.close_rows(self.normalize(rows, weight, bias, added, request), x)

    def find_pooling(self, x: Tensor, request: Request) -> Pooling:
        """The norm's pattern, worked out for x."""
        return self.scheme.pool(x)

    def write_call(
        self, x: Tensor, weight: Tensor | None, bias: Tensor | None, request: Request
    ) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        """The call of the public function that asks for the same, and its positional arguments."""
        raise NotImplementedError

    def check(self, x: Tensor, weight: Tensor | None, bias: Tensor | None, request: Request) -> None:
        """Refuse sizes and options that do not fit."""
        raise NotImplementedError

    def check_memory(self, x: Tensor, weight: Tensor | None, bias: Tensor | None, request: Request) -> None:
        """Refuse dtypes that do not fit, and memory that overlaps; torch's own operation has its own rules."""

    def warns(self, x: Tensor, pooling: Pooling) -> bool:
        """Whether there was something to warn of, at every such call."""
        return False

    def takes_nothing(self, request: Request) -> bool:
        """Whether an input without elements is returned as it is, whatever its other sizes are."""
        return False

    def is_torchs(self, request: Request) -> bool:
        """Whether torch has an operation that means the same."""
        return True

    def call_torch(self, x: Tensor, weight: Tensor | None, bias: Tensor | None, request: Request) -> Tensor:
        """torch's own operation, without what follows the norm."""
        raise NotImplementedError


def normalize_nothing(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, residual: Tensor | None, activation: str | None
) -> Tensor:
    """torch's batch norm of an input without elements: of any dtype, with averages or without; none of them moves."""
    y = x.clone()
    for parameter in (weight, bias):  # They get a gradient, of zeros.
        y = y if parameter is None else y + parameter.sum().to(y.dtype)
    return finish(y, activation, residual)


def copy_parameters(
    weight: Tensor | None, bias: Tensor | None, request: Request
) -> tuple[Tensor | None, Tensor | None]:
    """What is kept for backward, so that both may change in place until then."""
    if torch.is_grad_enabled():
        if weight is not None and weight.requires_grad:
            weight = weight.clone()
        if request.activation is not None and bias is not None and bias.requires_grad:
            bias = bias.clone()
    return weight, bias


def find_source(
    running_mean: Tensor | None, running_var: Tensor | None, from_batch: bool, momentum: float | Tensor
) -> Source:
    """What torch's arguments say of where statistics come from; what does not fit is refused by the checks."""
    if from_batch:
        return Batch(running_mean, running_var, momentum)
    return Given(running_mean, running_var)  # type: ignore[arg-type] # None is refused by the checks
