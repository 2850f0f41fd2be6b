"""The commands that look at norms: `anynorm monitor`; each imports what it needs when it runs."""

from pathlib import Path
from typing import Annotated

import typer


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
    app.command("monitor")(show_monitor)
