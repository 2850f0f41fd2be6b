"""What anynorm uses of torch that torch does not promise to keep, all in one place.

Each line says what it answers and since when torch has it, and what serves in its place where it is missing: always
what is right, though slower or said less well. The compiled calls look up the same names by themselves
(`kernels/tensors.cpp`) and leave all to Python where one is missing. A test calls each one, so that a new torch that
changes one fails there first, by its name.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable
from importlib import import_module
from typing import Any, TypeVar

import torch
from torch.autograd import forward_ad

T = TypeVar("T")
TORCH = tuple(int(part) for part in torch.__version__.split(".")[:2])


def find(path: str, instead: Any) -> Any:
    """What lies at a dotted path below torch; `instead` where there is nothing."""
    found: Any = torch
    *modules, name = path.split(".")
    for place, module in enumerate(modules, 1):
        if not hasattr(found, module):
            try:
                import_module(".".join(["torch", *modules[:place]]))
            except ImportError:
                return instead
        found = getattr(found, module)
    return getattr(found, name, instead)


class NoKeys:
    """Stands for the dispatch keys of a tensor: equal to no others, so that no tensor counts as plain memory."""

    def __init__(self, tensor: torch.Tensor) -> None:
        pass

    def raw_repr(self) -> object:
        """A key that equals none."""
        return object()


def ask_once(function: Callable[[], T]) -> Callable[[], T]:
    """The function, for a torch.compile that does not know it: asked as a graph is traced, and a constant in it."""

    def answer() -> T:
        return function()

    answer._dynamo_marked_constant = True  # type: ignore[attr-defined] # as torch.compiler.assume_constant_result marks
    return answer


def with_replace(kind: type[T]) -> type[T]:
    """A class of named tuples with a `_replace` that torch.compile looks into. torch's follows any since 2.10."""
    if TORCH < (2, 10):

        def replace(self: Any, **changed: Any) -> Any:
            return kind(*[changed.get(name, value) for name, value in zip(names, self)])

        names = kind._fields  # type: ignore[attr-defined] # a class of named tuples
        kind._replace = replace  # type: ignore[attr-defined]
    return kind


# --- Does anything watch the operations? Without an answer something does, and torch's own operations are used. -----

# The dispatch keys of a tensor, whose `raw_repr()` is a number: plain memory or anything else. Since 2.0.
dispatch_keys: Callable[[torch.Tensor], Any] = find("_C._dispatch_keys", NoKeys)
# How many transforms of torch.func are in force. Since 2.0.
count_transforms: Callable[[], int] = find("_C._functorch.get_dynamic_layer_stack_depth", lambda: 1)
if TORCH < (2, 13):  # A torch.compile that does not know the function, as that of 2.10, would end its graph there.
    count_transforms = ask_once(count_transforms)
# How many dispatch modes, and function modes, are in force, and which. Since 2.0.
count_dispatch_modes: Callable[[], int] = find("_C._len_torch_dispatch_stack", lambda: 1)
count_function_modes: Callable[[], int] = find("_C._len_torch_function_stack", lambda: 1)
find_dispatch_modes: Callable[[], list[Any]] = find("utils._python_dispatch._get_current_dispatch_mode_stack", list)
find_function_modes: Callable[[], list[Any]] = find("overrides._get_current_function_mode_stack", lambda: [None])
# Whether torch.jit.trace is at work. Since 1.0; torch.jit.is_tracing is public, and slower.
is_tracing: Callable[[], bool] = find("_C._is_tracing", torch.jit.is_tracing)  # type: ignore[attr-defined]
# Whether a tensor is batched by the older vmap, as torch.autograd.grad(is_grads_batched=True) does. Since 2.0.
is_legacy_batched: Callable[[torch.Tensor], bool] = find("_C._functorch.is_legacy_batchedtensor", lambda tensor: True)


def find_forward_level() -> int:
    """The level of forward-mode derivatives in force, -1 without any. Since 1.11; without it there always is one."""
    return getattr(forward_ad, "_current_level", 0)


# --- What is under a transform of torch.func? Without these its operations are taken one by one. --------------------

# The transforms in force, outermost first, each with a `key()` out of TransformType. Since 2.0.
find_transforms: Callable[[], list[Any] | None] = find("_C._functorch.get_interpreter_stack", lambda: None)
TransformType: Any = find("_C._functorch.TransformType", None)
is_wrapped: Callable[[torch.Tensor], bool] = find("_C._functorch.is_functorch_wrapped_tensor", lambda tensor: False)
unwrap: Callable[[torch.Tensor], torch.Tensor] = find("_C._functorch.get_unwrapped", lambda tensor: tensor)

# --- What does autograd do just now? --------------------------------------------------------------------------------

# A number while backward runs, -1 outside. Since 1.13; without it activation checkpointing is not noticed, and a batch
# that is computed again is counted again.
find_backward: Callable[[], int] = find("_C._current_graph_task_id", lambda: -1)
# Tells autograd that tensors were written. Since 2.1 for one tensor, 2.5 for several; the public one has checks.
increment_version: Callable[[Any], None] = find("_C._increment_version", torch.autograd.graph.increment_version)
# The hooks that checkpointing and offloading set around what backward keeps, None without. Since 2.5.
find_saved_tensor_hooks: Callable[[bool], Any] = find(
    "_C._autograd._top_saved_tensors_default_hooks", lambda ignore_is_tracing: None
)

# --- Subclasses and compilers. --------------------------------------------------------------------------------------

# Within it a subclass is treated as the tensor that it is. Since 1.7.
as_plain_tensors: Any = find("_C.DisableTorchFunctionSubclass", contextlib.nullcontext)
# The mode that torch.set_default_device sets. Since 2.0; without it such a mode is one like others.
DeviceContext: type = find("utils._device.DeviceContext", type("DeviceContext", (), {}))
# A function that compilers do not look into. Since 2.0; torch.compiler.disable does it too, but loads the compiler,
# which takes seconds, at import.
not_compiled: Callable[[T], T] = find("_disable_dynamo", lambda function: function)
# Public, and yet torch.compile answers True in every graph, whether exported or not, in 2.8 and 2.10 at least.
is_exporting: Callable[[], bool] = torch.compiler.is_exporting
if TORCH < (2, 13):
    is_exporting = ask_once(is_exporting)


def is_recording() -> bool:
    """Whether a graph is made that other tools read: by torch.export or torch.jit.trace, and the exporters to ONNX."""
    return is_exporting() or torch.jit.is_tracing()  # type: ignore[attr-defined] # public, but not said so


def is_tracing_for_onnx() -> bool:
    """Whether torch.onnx exports by torch.jit.trace, which knows fewer of torch's operations than torch.jit.trace."""
    onnx = sys.modules.get("torch.onnx") if torch.jit.is_tracing() else None  # type: ignore[attr-defined] # as above
    return onnx is not None and onnx.is_in_onnx_export()


# Where some functions of torch.nn.functional are under a name of their own.
functions_of_nn: Any = find("_C._nn", torch.nn.functional)
# What torch.nn's batch and instance norms have in common.
NormBase: Any = find("nn.modules.batchnorm._NormBase", torch.nn.modules.batchnorm._BatchNorm)


def tree_leaves(tree: Any) -> list[Any]:
    """Everything in nested containers, in their order. torch's own knows those that users register. Since 2.2."""
    own = find("utils._pytree.tree_leaves", None)
    if own is not None:
        leaves: list[Any] = own(tree)
        return leaves
    if isinstance(tree, dict):
        return [leaf for part in tree.values() for leaf in tree_leaves(part)]
    return [leaf for part in tree for leaf in tree_leaves(part)] if isinstance(tree, (list, tuple)) else [tree]


def map_tensors(function: Callable[[torch.Tensor], Any], tree: Any) -> Any:
    """Nested containers with the function applied to every tensor. Since 2.0."""
    own = find("utils._pytree.tree_map_only", None)
    if own is not None:
        return own(torch.Tensor, function, tree)
    if isinstance(tree, dict):
        return {key: map_tensors(function, part) for key, part in tree.items()}
    if isinstance(tree, (list, tuple)):
        return type(tree)(map_tensors(function, part) for part in tree)
    return function(tree) if isinstance(tree, torch.Tensor) else tree


def find_default_store() -> Any:
    """The store by which the ranks found each other, None where there is none. Since 1.13."""
    from torch import distributed

    found = getattr(distributed.distributed_c10d, "_get_default_store", None)
    return None if found is None else found()
