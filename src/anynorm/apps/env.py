"""`anynorm env`: versions, whether the compiled kernels are in use, and how memory is allocated."""

import typer

from anynorm.engine.allocator import describe
from anynorm.engine.paths import describe_environment


def print_environment() -> None:
    """Print a line for each fact."""
    for name, value in {**describe_environment(), **describe()}.items():
        typer.echo(f"{name:12} {value}")
