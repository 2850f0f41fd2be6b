"""The commands that change a model: `anynorm fold`, `convert` and `freeze`; each imports what it needs when it runs."""

from pathlib import Path
from typing import Annotated

import typer

from anynorm.apps.factory import MODEL_HELP

Model = Annotated[str, typer.Option("--model", help=MODEL_HELP)]
Weights = Annotated[
    str | None, typer.Option("--weights", metavar="FILE", help="Weights to load first: torch.save's or .safetensors.")
]
Out = Annotated[
    Path | None, typer.Option("--out", metavar="FILE", help="Where the weights go: .safetensors, else as torch.save.")
]
Force = Annotated[bool, typer.Option("--force", help="Write over a file that is there.")]
Strict = Annotated[
    bool, typer.Option("--strict/--no-strict", help="Write nothing where outputs move by more than the tolerance.")
]
Tolerance = Annotated[
    float | None, typer.Option("--tolerance", min=0, help="Of the largest output; what rounding explains if not given.")
]
Where = Annotated[list[str] | None, typer.Option("--where", metavar="NAME", help="Which norms, with * for anything.")]


def fold_model(
    *,
    model: Model,
    weights: Weights = None,
    out: Out = None,
    force: Force = False,
    strict: Strict = True,
    tolerance: Tolerance = None,
    where: Where = None,
) -> None:
    """Fold batch norms into the layers beside them, and write the weights of the plain model."""
    from anynorm import fold
    from anynorm.apps.operations import Files, perform

    files = Files(model, weights, out, force)
    perform("fold", files, fold, strict=strict, tolerance=tolerance, where=tuple(where) if where else None)


def convert_model(
    *,
    model: Model,
    to: Annotated[str, typer.Option("--to", help="group, layer, instance, rms, batch, ghost, renorm, sync, identity.")],
    weights: Weights = None,
    out: Out = None,
    force: Force = False,
    strict: Strict = False,
    tolerance: Tolerance = None,
    where: Where = None,
    groups: Annotated[int | None, typer.Option("--groups", min=1, help="The most groups of group norm.")] = None,
    ghost_size: Annotated[int | None, typer.Option("--ghost-size", min=1, help="Samples in a ghost batch.")] = None,
) -> None:
    """Replace norms by another kind that starts near the old function, and write the weights to train on from."""
    from anynorm import convert
    from anynorm.apps.operations import Files, perform

    given = {"num_groups": groups, "ghost_size": ghost_size}
    options = {name: value for name, value in given.items() if value is not None}
    chosen = tuple(where) if where else None
    files = Files(model, weights, out, force)
    perform("convert", files, convert, to=to, strict=strict, tolerance=tolerance, where=chosen, **options)


def freeze_model(
    *,
    model: Model,
    weights: Weights = None,
    strict: Strict = True,
    tolerance: Tolerance = None,
    where: Where = None,
    statistics: Annotated[bool, typer.Option(help="Normalize by running averages in training too.")] = True,
    updates: Annotated[bool, typer.Option(help="Do not move the running averages.")] = True,
    affine: Annotated[bool, typer.Option(help="Do not train gamma and beta.")] = True,
) -> None:
    """Show which norms of a model can be frozen; that they are is not in weights, so there is nothing to write."""
    from anynorm import freeze
    from anynorm.apps.operations import Files, perform

    chosen = tuple(where) if where else None
    switches = {"statistics": statistics, "updates": updates, "affine": affine}
    perform("freeze", Files(model, weights, None), freeze, strict=strict, tolerance=tolerance, where=chosen, **switches)


def add_commands(app: typer.Typer) -> None:
    """Give a command line these commands."""
    for name, command in (("fold", fold_model), ("convert", convert_model), ("freeze", freeze_model)):
        app.command(name)(command)
