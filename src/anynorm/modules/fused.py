"""Norms that also add a residual and apply an activation: `BatchNormAct2d` and its like.

    y = activation(norm(x) + residual)

State, constructor and state_dict are those of the plain norm. They are no instances of torch's norms, because torch's
tools that look for those (`fuse_conv_bn_eval`, `convert_sync_batchnorm`) would drop the activation in silence.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any, ClassVar

import torch.nn as nn
from torch import Tensor
from torch.fx import Proxy

from ..activations import IDENTITY, check_activation, finish
from ..padding.context import CONTEXTS, may_be_masked
from ..padding.masks import Lengths, find_mask
from ..statistics import blank
from . import batch, ghost, group, instance, layer, renorm, rms, sync
from .norm import Norm, check_hooks, drop_none, record_call
from .torch_state import BatchNormState, GroupNormState, InstanceNormState, LayerNormState, RMSNormState


class Fused(Norm):
    """What the fused norms share.

    Attributes:
        plain: the norm of this library with the same constructor and state.
        add: how a residual is added that has another shape or dtype than the input; None refuses it. `accelerate` sets
            it where a model's own sum, which may broadcast or promote, was fused.
    """

    plain: ClassVar[type[nn.Module]]
    __signature__: ClassVar[inspect.Signature]
    activation: str
    add: Callable[[Tensor, Any], Tensor] | None = None

    def __init_subclass__(cls, plain: type[nn.Module] | None = None, **options: Any) -> None:
        super().__init_subclass__(**options)
        if plain is None:  # A user's subclass of a fused norm.
            return
        cls.plain = plain
        if hasattr(plain, "_axes"):
            cls._axes = plain._axes  # type: ignore[attr-defined] # hasattr has just found it
        known = inspect.signature(plain)
        last = inspect.Parameter("activation", inspect.Parameter.KEYWORD_ONLY, default="relu")
        cls.__signature__ = known.replace(parameters=[*known.parameters.values(), last])  # for people and for `inspect`

    def __init__(self, *arguments: Any, activation: str | None = "relu", **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.activation = check_activation(type(self).__name__, activation) or IDENTITY

    def forward(  # type: ignore[override] # the residual comes first, as before masks
        self, input: Tensor, residual: Tensor | None = None, mask: Tensor | None = None, lengths: Lengths | None = None
    ) -> Tensor:
        """activation(norm(input) + residual); shape, dtype and memory format (channels_last is kept) of the input.

        Args:
            input: as for the plain norm.
            residual: shape and dtype of `input`.
            mask, lengths: as for the plain norm; what follows the norm is 0 at padding, too.
        """
        if isinstance(input, Proxy) or isinstance(residual, Proxy):
            given = (input,) if residual is None else (input, residual)
            return record_call(self, *given, **drop_none(mask=mask, lengths=lengths))
        if mask is None and lengths is None and CONTEXTS.was_opened and may_be_masked():
            mask = self.find_mask(input)
        if self._forward_hooks and not (mask is None and lengths is None and residual is None):
            check_hooks(self, "mask" if residual is None else "residual")
        if self.add is not None and residual is not None and not fits(residual, input):
            # A sum that broadcasts or promotes has no kernel: norm, sum, activation and mask one after the other.
            activation = check_activation(type(self).__name__, self.activation)
            y = finish(self.add(self.normalize(input, mask=mask, lengths=lengths), residual), activation, None)
            found = find_mask(type(self).__name__, input, self.find_channel_axes(input), mask, lengths)
            return y if found is None else blank(y, found > 0)
        return self.normalize(input, residual, self.activation, mask, lengths)

    def extra_repr(self) -> str:
        """The plain norm's arguments, and the activation."""
        return f"{super().extra_repr()}, activation={self.activation!r}"


def fits(residual: Any, x: Tensor) -> bool:
    """Whether a sum with the residual has shape and dtype of x."""
    if not isinstance(residual, Tensor) or residual.is_nested or x.is_nested:
        return False
    return residual.shape == x.shape and residual.dtype == x.dtype


class BatchNormAct1d(Fused, batch._Batch, BatchNormState, plain=batch.BatchNorm1d):
    """`anynorm.BatchNorm1d`, then a residual and an activation.

    Example:
        >>> norm = anynorm.BatchNormAct1d(1, activation="leaky_relu")
        >>> norm(torch.tensor([[1.0], [3.0]]), residual=torch.tensor([[0.0], [1.0]])).detach()
        tensor([[-0.0100],
                [ 2.0000]])
    """


class BatchNormAct2d(Fused, batch._Batch, BatchNormState, plain=batch.BatchNorm2d):
    """`anynorm.BatchNorm2d`, then a residual and an activation.

    Example:
        >>> anynorm.BatchNormAct2d(3).load_state_dict(torch.nn.BatchNorm2d(3).state_dict())
        <All keys matched successfully>
    """


class BatchNormAct3d(Fused, batch._Batch, BatchNormState, plain=batch.BatchNorm3d):
    """`anynorm.BatchNorm3d`, then a residual and an activation.

    Example:
        >>> bool((anynorm.BatchNormAct3d(3)(torch.randn(2, 3, 4, 4, 4)) >= 0).all())
        True
    """


class GhostBatchNormAct1d(Fused, ghost._GhostBatch, BatchNormState, plain=ghost.GhostBatchNorm1d):
    """`anynorm.GhostBatchNorm1d`, then a residual and an activation.

    Example:
        >>> norm = anynorm.GhostBatchNormAct1d(3, ghost_size=2)
        >>> bool((norm(torch.randn(5, 3)) >= 0).all())
        True
    """


class GhostBatchNormAct2d(Fused, ghost._GhostBatch, BatchNormState, plain=ghost.GhostBatchNorm2d):
    """`anynorm.GhostBatchNorm2d`, then a residual and an activation.

    Example:
        >>> norm = anynorm.GhostBatchNormAct2d(3, ghost_size=2)
        >>> bool((norm(torch.randn(5, 3, 4, 4)) >= 0).all())
        True
    """


class GhostBatchNormAct3d(Fused, ghost._GhostBatch, BatchNormState, plain=ghost.GhostBatchNorm3d):
    """`anynorm.GhostBatchNorm3d`, then a residual and an activation.

    Example:
        >>> norm = anynorm.GhostBatchNormAct3d(3, ghost_size=2)
        >>> bool((norm(torch.randn(5, 3, 4, 4, 4)) >= 0).all())
        True
    """


class BatchRenormAct1d(Fused, renorm._BatchRenorm, BatchNormState, plain=renorm.BatchRenorm1d):
    """`anynorm.BatchRenorm1d`, then a residual and an activation.

    Example:
        >>> norm = anynorm.BatchRenormAct1d(3, activation="silu")
        >>> norm.load_state_dict(torch.nn.BatchNorm1d(3).state_dict())
        <All keys matched successfully>
    """


class BatchRenormAct2d(Fused, renorm._BatchRenorm, BatchNormState, plain=renorm.BatchRenorm2d):
    """`anynorm.BatchRenorm2d`, then a residual and an activation.

    Example:
        >>> norm = anynorm.BatchRenormAct2d(3, activation="silu")
        >>> norm.load_state_dict(torch.nn.BatchNorm2d(3).state_dict())
        <All keys matched successfully>
    """


class BatchRenormAct3d(Fused, renorm._BatchRenorm, BatchNormState, plain=renorm.BatchRenorm3d):
    """`anynorm.BatchRenorm3d`, then a residual and an activation.

    Example:
        >>> norm = anynorm.BatchRenormAct3d(3, activation="silu")
        >>> norm.load_state_dict(torch.nn.BatchNorm3d(3).state_dict())
        <All keys matched successfully>
    """


class SyncBatchNormAct(Fused, sync._SyncBatch, BatchNormState, plain=sync.SyncBatchNorm):
    """`anynorm.SyncBatchNorm`, then a residual and an activation.

    Example:
        >>> anynorm.SyncBatchNormAct(3, activation="silu").load_state_dict(torch.nn.BatchNorm2d(3).state_dict())
        <All keys matched successfully>
    """


class InstanceNormAct1d(Fused, instance._InstanceNorm, InstanceNormState, plain=instance.InstanceNorm1d):
    """`anynorm.InstanceNorm1d`, then a residual and an activation.

    Example:
        >>> anynorm.InstanceNormAct1d(1)(torch.tensor([[[1.0, 3.0]]]))
        tensor([[[0.0000, 1.0000]]])
    """


class InstanceNormAct2d(Fused, instance._InstanceNorm, InstanceNormState, plain=instance.InstanceNorm2d):
    """`anynorm.InstanceNorm2d`, then a residual and an activation.

    Example:
        >>> anynorm.InstanceNormAct2d(3, affine=True, activation="silu")
        InstanceNormAct2d(3, ..., track_running_stats=False, activation='silu')
    """


class InstanceNormAct3d(Fused, instance._InstanceNorm, InstanceNormState, plain=instance.InstanceNorm3d):
    """`anynorm.InstanceNorm3d`, then a residual and an activation.

    Example:
        >>> anynorm.InstanceNormAct3d(3)(torch.randn(2, 3, 4, 4, 4)).shape
        torch.Size([2, 3, 4, 4, 4])
    """


class GroupNormAct(Fused, group._GroupNorm, GroupNormState, plain=group.GroupNorm):
    """`anynorm.GroupNorm`, then a residual and an activation.

    Example:
        >>> anynorm.GroupNormAct(2, 4)(torch.tensor([[1.0, 3.0, 5.0, 9.0]])).detach()
        tensor([[0.0000, 1.0000, 0.0000, 1.0000]])
    """


class LayerNormAct(Fused, layer._LayerNorm, LayerNormState, plain=layer.LayerNorm):
    """`anynorm.LayerNorm`, then a residual and an activation.

    Example:
        >>> norm = anynorm.LayerNormAct(2, activation="gelu")
        >>> norm(torch.tensor([1.0, 3.0])).detach()
        tensor([-0.1587,  0.8413])
    """


class RMSNormAct(Fused, rms._RMSNorm, RMSNormState, plain=rms.RMSNorm):
    """`anynorm.RMSNorm`, then a residual and an activation.

    Example:
        >>> norm = anynorm.RMSNormAct(2, activation="identity")
        >>> norm(torch.tensor([3.0, 3.0]), residual=torch.tensor([1.0, 2.0])).detach()
        tensor([2., 3.])
    """
