"""The commands that look at norms: `anynorm doctor` and `anynorm monitor`; each imports what it needs when it runs."""

from pathlib import Path
from typing import Annotated

import typer

from anynorm.apps.factory import MODEL_HELP


def diagnose_model(
    model: Annotated[str | None, typer.Argument(help=MODEL_HELP)] = None,
    *,
    data: Annotated[
        str | None,
        typer.Option("--data", metavar="module:loader", help="Batches as in training: a DataLoader, a list."),
    ] = None,
    weights: Annotated[
        str | None, typer.Option("--weights", metavar="FILE", help="Weights to load first; the mode stays.")
    ] = None,
    loss: Annotated[
        str | None, typer.Option("--loss", metavar="module:function", help="Of (outputs, targets); else cross entropy.")
    ] = None,
    batches: Annotated[int, typer.Option("--batches", min=1, help="The most batches to take.")] = 16,
    check: Annotated[
        list[str] | None, typer.Option("--check", metavar="ID", help="Only this check; may be repeated.")
    ] = None,
    html: Annotated[Path | None, typer.Option("--html", metavar="FILE", help="Also as a page, one file.")] = None,
    json: Annotated[
        str | None, typer.Option("--json", metavar="FILE", help="Also as JSON; - for standard output, alone.")
    ] = None,
    fix: Annotated[bool, typer.Option("--fix", help="Perform the repairs, and prove each.")] = False,
    out: Annotated[
        Path | None, typer.Option("--out", metavar="FILE", help="With --fix: where the repaired weights go.")
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Write over the file of --out.")] = False,
    list_: Annotated[bool, typer.Option("--list", help="Show every check, and no more.")] = False,
) -> None:
    """Find what is wrong with the norms of a model. Exit code: 0 healthy, 1 errors or warnings, 2 could not run."""
    from anynorm.apps.doctor.doctor import Options, examine_model, list_checks
    from anynorm.errors import UserError

    if list_:
        raise typer.Exit(list_checks())
    if model is None:
        raise UserError("doctor: needs a model, as module:factory or a built-in name; --list shows the checks.")
    options = Options(
        model=model,
        data=data,
        weights=weights,
        loss=loss,
        batches=batches,
        checks=tuple(check or ()),
        html=html,
        json=json,
        fix=fix,
        out=out,
        force=force,
    )
    raise typer.Exit(examine_model(options))


def show_monitor(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="What anynorm.Monitor wrote: SQLite or CSV.")],
    *,
    html: Annotated[
        Path | None, typer.Option("--html", metavar="FILE", help="Also draw it as a page, one file (.html).")
    ] = None,
    layer: Annotated[
        str | None, typer.Option("--layer", metavar="NAME", help="One norm alone, over the steps.")
    ] = None,
) -> None:
    """Show what anynorm.Monitor wrote while a model trained: gap, noise, gamma and gradient of every norm."""
    from anynorm.apps.monitor.show import print_monitor

    print_monitor(file, html, layer)


def add_commands(app: typer.Typer) -> None:
    """Give a command line these commands."""
    app.command("doctor")(diagnose_model)
    app.command("monitor")(show_monitor)
