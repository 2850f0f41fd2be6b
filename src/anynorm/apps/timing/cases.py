"""A norm on a shape, and the three ways in which it is timed: what `anynorm speed` and `make bench` measure."""

import dataclasses
import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

MODES = ("evaluation", "training", "forward+backward")


@dataclasses.dataclass(frozen=True)
class Case:
    """A layer and its input.

    Attributes:
        place: where the layer comes from, as ResNet-50.
        kind: the name of the class, in torch.nn and in anynorm.
        arguments: its positional arguments.
        shape: of the input.
        channels_last: the input's memory format, for inputs of four and five axes.
        quick: whether the short run takes it.
    """

    place: str
    kind: str
    arguments: tuple[int, ...]
    shape: tuple[int, ...]
    channels_last: bool = False
    dtype: torch.dtype = torch.float32
    quick: bool = False

    @property
    def norm(self) -> str:
        """Return the family's name of the norm, as "batch"."""
        return self.kind.split("Norm")[0].lower()

    @property
    def layout(self) -> str:
        """Return the memory format in words."""
        return "channels_last" if self.channels_last else "contiguous"

    @property
    def name(self) -> str:
        """Return norm and shape, as "batch 8x64x56x56"."""
        return f"{self.norm} {'x'.join(map(str, self.shape))}"

    @property
    def dtype_name(self) -> str:
        """Return the dtype without its package."""
        return str(self.dtype).removeprefix("torch.")

    @property
    def size(self) -> int:
        """Return the bytes of the input."""
        return math.prod(self.shape) * self.dtype.itemsize

    def draw(self) -> tuple[Tensor, Tensor]:
        """Return an input and a gradient, the same at every call."""
        generator = torch.Generator().manual_seed(0)
        x, g = (torch.randn(self.shape, generator=generator).to(self.dtype) for _ in range(2))
        if not self.channels_last:
            return x, g
        layout = torch.channels_last if len(self.shape) == 4 else torch.channels_last_3d
        return x.to(memory_format=layout), g.to(memory_format=layout)

    def make(self, library: Any) -> nn.Module:
        """Return the layer from torch.nn or anynorm, with the same parameters and running averages in both."""
        # torch's instance norm has no parameters unless they are asked for; networks ask for them.
        options = {"affine": True} if self.norm == "instance" else {}
        module: nn.Module = getattr(library, self.kind)(*self.arguments, **options)
        generator = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for name, tensor in module.state_dict().items():
                if tensor.is_floating_point():
                    tensor.copy_(torch.rand(tensor.shape, generator=generator) + (0.0 if "mean" in name else 0.5))
        return module.to(self.dtype)


def make_call(module: Callable[..., Any], parameters: Iterable[nn.Parameter], mode: str, x: Tensor, g: Tensor) -> Any:
    """Return the call that is timed: a forward pass, or forward and backward to input and parameters.

    Args:
        module: the layer or the layer compiled; the layer is in training, but for the mode "evaluation".

    Note:
        To be called under `torch.set_grad_enabled(needs_grad(mode))`, which is not part of what is timed.
    """
    if not needs_grad(mode):
        return lambda: module(x)
    leaf = x.detach().requires_grad_()
    inputs = [leaf, *parameters]
    return lambda: torch.autograd.grad(module(leaf), inputs, g)


def needs_grad(mode: str) -> bool:
    """Return whether a mode has a backward pass."""
    return mode == "forward+backward"
