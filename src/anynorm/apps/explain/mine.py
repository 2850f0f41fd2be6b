"""`anynorm explain --mine`: one norm of the user's own model, with the input it really receives."""

import copy
import dataclasses
from math import prod
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm, _NormBase
from torch.nn.modules.instancenorm import _InstanceNorm

from anynorm.apps.explain.numbers import find_statistics
from anynorm.apps.explain.words import FORMULA
from anynorm.apps.terminal import heading, plain_table, say
from anynorm.apps.trial.call import in_one_line
from anynorm.apps.trial.target import Target, find_norms, resolve
from anynorm.errors import UserError
from anynorm.family import FAMILY
from anynorm.pooling import Pooling, Sizes, find_pooling
from anynorm.randomness import keep_randomness

MOST_ROWS = 6
KINDS: tuple[tuple[type[nn.Module], str], ...] = (
    (_BatchNorm, "batch"),
    (_InstanceNorm, "instance"),
    (nn.GroupNorm, "group"),
    (nn.LayerNorm, "layer"),
    (nn.RMSNorm, "rms"),
)


@dataclasses.dataclass(frozen=True)
class Seen:
    """One norm during one call in training mode.

    Args:
        name, norm: the layer, after the call; its class decides `kind`, a name in FAMILY.
        x, y: its input and output, in float64.
        start: (running_mean, running_var) before the call, or None.
        pooling: which elements share a mean.
    """

    name: str
    norm: nn.Module
    kind: str
    x: Tensor
    y: Tensor
    start: tuple[Tensor, Tensor] | None
    pooling: Pooling

    def statistics(self, values: Tensor) -> tuple[Tensor, Tensor]:
        """Return mean and population variance of each pool, flat."""
        return find_statistics(values, dataclasses.replace(self.pooling, centred=True))


def explain_mine(console: Console, spec: str, layer: str | None, out: Path | None) -> None:
    """Print, and where asked draw, what one norm of a model does to its real input."""
    target = resolve(spec)
    seen = watch(target, layer)
    scheme = FAMILY[seen.kind]
    console.print(FORMULA, style="bold")
    shape = "x".join(map(str, seen.x.shape))
    heading(console, f"{target.name}: {seen.name or 'the model itself'}")
    eps = getattr(seen.norm, "eps", None) or "of the dtype"
    origin = "made up by anynorm" if target.guessed else "the model's own example"
    say(
        console,
        f"{type(seen.norm).__name__}: {scheme.pattern}, eps {eps}, training mode.",
        f"The model's input: {target.call.describe()} ({origin}).",
        f"This layer's input: {shape}. {_count(seen)}\n",
    )
    _print_table(console, seen)
    _print_notes(console, seen)
    if out is not None:
        from anynorm.apps.explain.picture import draw_layer

        draw_layer(out, seen, f"{target.name}: {seen.name or type(seen.norm).__name__}", pool_names(seen)[:4])
        console.print(f"\nThe same as a picture: {out}")


def watch(target: Target, layer: str | None) -> Seen:
    """Call the model once in training mode and return what its norm received and gave.

    Raises:
        UserError: no norms, no norm of that name, one outside the family, or one that the call does not reach.
    """
    name, norm = _choose(target, layer)
    kind = next((kind for base, kind in KINDS if isinstance(norm, base)), None)
    if kind is None:
        raise UserError(f"explain: {name} is a {type(norm).__name__}, which is not in the family; try another --layer.")
    caught: list[tuple[Tensor, Tensor]] = []
    start = _running(norm)

    def catch(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        x = args[0] if args else next(iter(kwargs.values()), None)
        if isinstance(x, Tensor) and isinstance(output, Tensor) and not caught:
            caught.append((x.detach().double(), output.detach().double()))

    handle = norm.register_forward_hook(catch, with_kwargs=True)
    try:
        with keep_randomness(), torch.no_grad():
            target.call.of(target.model.train())
    except Exception as problem:
        raise UserError(f"explain: calling {target.name} raised {in_one_line(problem)}") from problem
    finally:
        handle.remove()
    if not caught:
        raise UserError(f"explain: the call of {target.name} does not reach {name}; choose another --layer.")
    x, y = caught[0]
    return Seen(name, norm, kind, x, y, start, _pooling(norm, kind, x))


def _choose(target: Target, layer: str | None) -> tuple[str, nn.Module]:
    """Return the named norm, or the first."""
    norms = find_norms(target.model)
    if not norms:
        raise UserError(f"explain: {target.name} holds no normalization layer.")
    if layer is None:
        return next(iter(norms.items()))
    if layer not in norms:
        names = list(norms)
        more = f" and {len(names) - 6} more" if len(names) > 6 else ""
        raise UserError(f"explain: {target.name} has no norm {layer!r}; it has {', '.join(names[:6])}{more}.")
    return layer, norms[layer]


def _running(norm: nn.Module) -> tuple[Tensor, Tensor] | None:
    """Return copies of the running averages, where the norm keeps any."""
    if not isinstance(norm, _NormBase) or norm.running_mean is None or norm.running_var is None:
        return None
    return norm.running_mean.clone(), norm.running_var.clone()


def _pooling(norm: nn.Module, kind: str, x: Tensor) -> Pooling:
    """Return which elements share a mean, from the family's table."""
    scheme = FAMILY[kind]
    sizes: Sizes = ()
    if isinstance(norm, nn.GroupNorm):
        sizes = (("g", norm.num_groups),)
    elif isinstance(norm, nn.LayerNorm | nn.RMSNorm):
        sizes = (("d", tuple(norm.normalized_shape)),)
    return find_pooling(scheme.pattern, scheme.affine, scheme.centred, x.dim(), sizes)


def _count(seen: Seen) -> str:
    """Return in words how many means there are and how many values share one."""
    size = seen.pooling.count(seen.pooling.open(seen.x))
    means = seen.x.numel() // size
    what = "mean" if seen.pooling.centred else "mean square"
    return f"{means:,} {what}{'s' if means > 1 else ''}, each of {size:,} values."


def pool_names(seen: Seen) -> list[str]:
    """Return what to call the first pools, in the order of the statistics."""
    view = seen.pooling.open(seen.x)
    kept = [axis for axis in range(view.dim()) if axis not in seen.pooling.pooled]
    words = {"batch": ["channel"], "instance": ["sample", "channel"], "group": ["sample", "group"]}
    labels = words.get(seen.kind, ["sample", "position", "row", "column"])
    shape = [view.shape[axis] for axis in kept]
    names = []
    for index in range(min(MOST_ROWS, prod(shape))):
        places = torch.unravel_index(torch.tensor(index, dtype=torch.long, device="cpu"), tuple(shape)) if shape else ()
        # Counted from 0, as the reader's own code counts.
        names.append(", ".join(f"{label} {int(place)}" for label, place in zip(labels, places)) or "all")
    return names


def _print_table(console: Console, seen: Seen) -> None:
    """Print the first pools: statistics before, running averages and parameters where each has one, and after."""
    before, after = seen.statistics(seen.x), seen.statistics(seen.y)
    columns: dict[str, Tensor] = {"x\nmean": before[0], "x\nvar": before[1]}
    if not seen.pooling.centred:
        columns["x mean\nsquare"] = find_statistics(seen.x, seen.pooling)[1]
    if seen.kind == "batch":
        running = _running(seen.norm)
        if running is not None:
            columns |= {"running\nmean": running[0], "running\nvar": running[1]}
        for title, parameter in (("gamma\n", seen.norm.weight), ("beta\n", seen.norm.bias)):
            if isinstance(parameter, Tensor):
                columns[title] = parameter.detach()
    columns |= {"y\nmean": after[0], "y\nvar": after[1]}
    table = plain_table("\nshared by", *columns)
    names = pool_names(seen)
    for row, name in enumerate(names):
        table.add_row(name, *(_short(values[row].item()) for values in columns.values()))
    console.print(table)
    if before[0].numel() > len(names):
        console.print(f"and {before[0].numel() - len(names):,} more")


def _print_notes(console: Console, seen: Seen) -> None:
    """Print what the table cannot show: parameters that vary inside a pool, running averages, evaluation."""
    console.print()
    if seen.kind != "batch" and isinstance(getattr(seen.norm, "weight", None), Tensor):
        weight = seen.norm.weight
        assert isinstance(weight, Tensor)
        place = "channel" if seen.kind in ("instance", "group") else "feature"
        say(console, f"gamma: one per {place}, from {_short(weight.min().item())} to {_short(weight.max().item())}.")
    if seen.start is None:
        say(console, "This layer keeps no running averages: training and evaluation are alike.")
        return
    momentum = getattr(seen.norm, "momentum", None)
    moved = f"{momentum:g} of the way towards" if momentum is not None else "by a plain average over batches towards"
    say(
        console,
        f"The running averages above are those after this call. It moved them {moved} "
        "the batch's (the variance with n-1). Evaluation uses them in place of the batch's.",
    )
    gap = (evaluate(seen) - seen.y).abs().max().item()
    say(
        console,
        f"On this very input evaluation would differ from training by up to {_short(gap)}; "
        f"the largest output in training is {_short(seen.y.abs().max().item())}.",
    )


def evaluate(seen: Seen) -> Tensor:
    """Return the layer's output in evaluation, on the input it received in training."""
    with torch.no_grad():
        return copy.deepcopy(seen.norm).double().eval()(seen.x)


def _short(value: float) -> str:
    """Return a number in at most eight characters; what is rounding beside numbers of order 1 becomes 0."""
    if abs(value) < 1e-6:
        return "0"
    if not 1e-3 <= abs(value) < 1e4:
        return f"{value:.1e}"
    return f"{value:.4f}" if abs(value) < 0.1 else f"{value:.3f}" if abs(value) < 100 else f"{value:.1f}"
