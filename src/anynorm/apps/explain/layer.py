"""`anynorm explain --mine`: one norm of the user's own model, with the input it really receives."""

import copy
import dataclasses
from math import prod
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor, nn

from anynorm.apps.explain.notation import FORMULA
from anynorm.apps.explain.numbers import find_statistics
from anynorm.apps.models.load import LoadedModel, load_model
from anynorm.apps.terminal import heading, plain_table, say
from anynorm.doctor.call import in_one_line
from anynorm.doctor.norms import find_kind, find_norm_pooling, find_norms
from anynorm.errors import UserError
from anynorm.family import FAMILY
from anynorm.pooling import Pooling
from anynorm.randomness import keep_randomness

from ...torch_private import NormBase

MOST_ROWS = 6


@dataclasses.dataclass(frozen=True)
class ObservedLayer:
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


def explain_layer(console: Console, spec: str, layer: str | None, out: Path | None) -> None:
    """Print, and where asked draw, what one norm of a model does to its real input."""
    loaded = load_model(spec)
    observed = observe(loaded, layer)
    scheme = FAMILY[observed.kind]
    console.print(FORMULA, style="bold")
    shape = "x".join(map(str, observed.x.shape))
    heading(console, f"{loaded.name}: {observed.name or 'the model itself'}")
    eps = getattr(observed.norm, "eps", None) or "of the dtype"
    origin = "made up by anynorm" if loaded.guessed else "the model's own example"
    say(
        console,
        f"{type(observed.norm).__name__}: {scheme.pattern}, eps {eps}, training mode.",
        f"The model's input: {loaded.call.describe()} ({origin}).",
        f"This layer's input: {shape}. {_count(observed)}\n",
    )
    _print_table(console, observed)
    _print_notes(console, observed)
    if out is not None:
        from anynorm.apps.explain.picture import draw_layer

        title = f"{loaded.name}: {observed.name or type(observed.norm).__name__}"
        draw_layer(out, observed, title, pool_names(observed)[:4])
        console.print(f"\nThe same as a picture: {out}")


def observe(loaded: LoadedModel, layer: str | None) -> ObservedLayer:
    """Call the model once in training mode and return what its norm received and gave.

    Raises:
        UserError: no norms, no norm of that name, one outside the family, or one that the call does not reach.
    """
    name, norm = _choose(loaded, layer)
    kind = find_kind(type(norm))
    if kind is None:
        raise UserError(f"explain: {name} is a {type(norm).__name__}, which is not in the family; try another --layer.")
    start = _copy_running(norm)
    calls = _record_calls(loaded, norm)
    if not calls:
        raise UserError(f"explain: the call of {loaded.name} does not reach {name}; choose another --layer.")
    x, y = calls[0]
    return ObservedLayer(name, norm, kind, x, y, start, find_norm_pooling(norm, kind, x))


def _record_calls(loaded: LoadedModel, norm: nn.Module) -> list[tuple[Tensor, Tensor]]:
    """Call the model in training mode and return input and output of its norm, in float64, for the first call of it."""
    calls: list[tuple[Tensor, Tensor]] = []

    def record(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        x = args[0] if args else next(iter(kwargs.values()), None)
        if isinstance(x, Tensor) and isinstance(output, Tensor) and not calls:
            calls.append((x.detach().double(), output.detach().double()))

    handle = norm.register_forward_hook(record, with_kwargs=True)
    try:
        with keep_randomness(), torch.no_grad():
            loaded.call.of(loaded.model.train())
    except Exception as problem:
        raise UserError(f"explain: calling {loaded.name} raised {in_one_line(problem)}") from problem
    finally:
        handle.remove()
    return calls


def _choose(loaded: LoadedModel, layer: str | None) -> tuple[str, nn.Module]:
    """Return the named norm, or the first."""
    norms = find_norms(loaded.model)
    if not norms:
        raise UserError(f"explain: {loaded.name} holds no normalization layer.")
    if layer is None:
        return next(iter(norms.items()))
    if layer not in norms:
        names = list(norms)
        more = f" and {len(names) - 6} more" if len(names) > 6 else ""
        raise UserError(f"explain: {loaded.name} has no norm {layer!r}; it has {', '.join(names[:6])}{more}.")
    return layer, norms[layer]


def _copy_running(norm: nn.Module) -> tuple[Tensor, Tensor] | None:
    """Return copies of the running averages, where the norm keeps any."""
    if not isinstance(norm, NormBase) or norm.running_mean is None or norm.running_var is None:
        return None
    return norm.running_mean.clone(), norm.running_var.clone()


def _count(observed: ObservedLayer) -> str:
    """Return in words how many means there are and how many values share one."""
    size = observed.pooling.count(observed.pooling.open(observed.x))
    means = observed.x.numel() // size
    what = "mean" if observed.pooling.centred else "mean square"
    return f"{means:,} {what}{'s' if means > 1 else ''}, each of {size:,} values."


def pool_names(observed: ObservedLayer) -> list[str]:
    """Return what to call the first pools, in the order of the statistics."""
    view = observed.pooling.open(observed.x)
    kept = [axis for axis in range(view.dim()) if axis not in observed.pooling.pooled]
    axes = {"batch": ["channel"], "instance": ["sample", "channel"], "group": ["sample", "group"]}
    labels = axes.get(observed.kind, ["sample", "position", "row", "column"])
    shape = [view.shape[axis] for axis in kept]
    names = []
    for index in range(min(MOST_ROWS, prod(shape))):
        places = torch.unravel_index(torch.tensor(index, dtype=torch.long, device="cpu"), tuple(shape)) if shape else ()
        # Counted from 0, as the reader's own code counts.
        names.append(", ".join(f"{label} {int(place)}" for label, place in zip(labels, places)) or "all")
    return names


def _print_table(console: Console, observed: ObservedLayer) -> None:
    """Print the first pools: statistics before, running averages and parameters where each has one, and after."""
    before, after = observed.statistics(observed.x), observed.statistics(observed.y)
    columns: dict[str, Tensor] = {"x\nmean": before[0], "x\nvar": before[1]}
    if not observed.pooling.centred:
        columns["x mean\nsquare"] = find_statistics(observed.x, observed.pooling)[1]
    if observed.kind == "batch":
        running = _copy_running(observed.norm)
        if running is not None:
            columns |= {"running\nmean": running[0], "running\nvar": running[1]}
        for title, parameter in (("gamma\n", observed.norm.weight), ("beta\n", observed.norm.bias)):
            if isinstance(parameter, Tensor):
                columns[title] = parameter.detach()
    columns |= {"y\nmean": after[0], "y\nvar": after[1]}
    table = plain_table("\nshared by", *columns)
    names = pool_names(observed)
    for row, name in enumerate(names):
        table.add_row(name, *(_short(values[row].item()) for values in columns.values()))
    console.print(table)
    if before[0].numel() > len(names):
        console.print(f"and {before[0].numel() - len(names):,} more")


def _print_notes(console: Console, observed: ObservedLayer) -> None:
    """Print what the table cannot show: parameters that vary inside a pool, running averages, evaluation."""
    console.print()
    if observed.kind != "batch" and isinstance(getattr(observed.norm, "weight", None), Tensor):
        weight = observed.norm.weight
        assert isinstance(weight, Tensor)
        place = "channel" if observed.kind in ("instance", "group") else "feature"
        say(console, f"gamma: one per {place}, from {_short(weight.min().item())} to {_short(weight.max().item())}.")
    if observed.start is None:
        say(console, "This layer keeps no running averages: training and evaluation are alike.")
        return
    momentum = getattr(observed.norm, "momentum", None)
    moved = f"{momentum:g} of the way towards" if momentum is not None else "by a plain average over batches towards"
    say(
        console,
        f"The running averages above are those after this call. It moved them {moved} "
        "the batch's (the variance with n-1). Evaluation uses them in place of the batch's.",
    )
    gap = (evaluate(observed) - observed.y).abs().max().item()
    say(
        console,
        f"On this very input evaluation would differ from training by up to {_short(gap)}; "
        f"the largest output in training is {_short(observed.y.abs().max().item())}.",
    )


def evaluate(observed: ObservedLayer) -> Tensor:
    """Return the layer's output in evaluation, on the input it received in training."""
    with torch.no_grad():
        y: Tensor = copy.deepcopy(observed.norm).double().eval()(observed.x)
        return y


def _short(value: float) -> str:
    """Return a number in at most eight characters; what is rounding beside numbers of order 1 becomes 0."""
    if abs(value) < 1e-6:
        return "0"
    if not 1e-3 <= abs(value) < 1e4:
        return f"{value:.1e}"
    return f"{value:.4f}" if abs(value) < 0.1 else f"{value:.3f}" if abs(value) < 100 else f"{value:.1f}"
