"""The norms of a user's model: their names, their kind in the family, and which elements share a mean."""

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.instancenorm import _InstanceNorm

from ..family import FAMILY
from ..modules.fused import Fused
from ..pooling import Pooling, Sizes, find_pooling
from ..torch_private import NormBase

# torch's classes, and with them ours and every other subclass, with their names in FAMILY.
KINDS: tuple[tuple[type[nn.Module], str], ...] = (
    (_BatchNorm, "batch"),
    (_InstanceNorm, "instance"),
    (nn.GroupNorm, "group"),
    (nn.LayerNorm, "layer"),
    (nn.RMSNorm, "rms"),
)


def find_norms(model: nn.Module) -> dict[str, nn.Module]:
    """Return the model's normalization layers by name: torch's classes and leaves that call themselves Norm."""

    def is_norm(module: nn.Module) -> bool:
        known = isinstance(module, NormBase | nn.LayerNorm | nn.GroupNorm | nn.RMSNorm)
        return known or ("Norm" in type(module).__name__ and not any(True for _ in module.children()))

    return {name: module for name, module in model.named_modules() if is_norm(module)}


def find_kind(cls: type) -> str | None:
    """Return the name in FAMILY of a class of norms; None for a class outside of the family."""
    return next((kind for base, kind in KINDS if issubclass(cls, base)), None)


def find_plain_class(norm: nn.Module) -> type:
    """Return the class whose statistics a norm has: this library's fused norms are no subclasses of torch's norms."""
    return norm.plain if isinstance(norm, Fused) else type(norm)


def find_norm_pooling(norm: nn.Module, kind: str, x: Tensor) -> Pooling:
    """Return which elements of its input share a mean, from the family's table."""
    scheme = FAMILY[kind]
    sizes: Sizes = ()
    if kind == "group":
        sizes = (("g", int(norm.num_groups)),)  # type: ignore[arg-type] # torch annotates every attribute as Tensor | Module
    elif kind in ("layer", "rms"):
        sizes = (("d", tuple(norm.normalized_shape)),)  # type: ignore[arg-type] # torch annotates every attribute as Tensor | Module
    return find_pooling(scheme.pattern, scheme.affine, scheme.centred, x.dim(), sizes)
