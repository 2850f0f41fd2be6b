"""A call of a model: its arguments, and what can be done with them without knowing the model."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor, nn


@dataclasses.dataclass(frozen=True)
class Call:
    """The arguments of one call of a model, by position and by name."""

    args: tuple[Any, ...] = ()
    kwargs: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    def of(self, model: nn.Module) -> Any:
        """Call the model with these arguments."""
        return model(*self.args, **self.kwargs)

    def change(self, function: Callable[[Tensor], Tensor]) -> "Call":
        """Return the same call with every tensor argument replaced by function(tensor)."""

        def one(value: Any) -> Any:
            return function(value) if isinstance(value, Tensor) else value

        return Call(tuple(map(one, self.args)), {key: one(value) for key, value in self.kwargs.items()})

    def tensors(self) -> list[Tensor]:
        """Return the tensor arguments."""
        return find_tensors([*self.args, *self.kwargs.values()])

    def describe(self) -> str:
        """Return the shapes in words, as 8x3x96x96 float32."""
        kinds = ("x".join(map(str, t.shape)) + " " + str(t.dtype).removeprefix("torch.") for t in self.tensors())
        return ", ".join(kinds)


def find_tensors(value: Any) -> list[Tensor]:
    """Return the tensors inside a tensor, tuple, list, dict or dataclass, in order."""
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, Mapping):
        value = list(value.values())
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        value = [getattr(value, field.name) for field in dataclasses.fields(value)]
    if isinstance(value, list | tuple):
        return [tensor for item in value for tensor in find_tensors(item)]
    return []


def in_one_line(problem: BaseException) -> str:
    """Return an exception as type and first line, shortened: made to stand inside a sentence."""
    text = " ".join(str(problem).split())
    text = text if len(text) <= 200 else text[:197] + "..."
    return f"{type(problem).__name__}: {text}" if text else type(problem).__name__
