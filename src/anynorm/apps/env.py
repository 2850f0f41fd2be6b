"""`anynorm env`: versions, whether the compiled kernels are in use, and how memory is allocated."""

import json

import typer

from anynorm.engine.allocator import describe
from anynorm.engine.paths import describe_environment


def print_environment(*, as_json: bool = False) -> None:
    """Print a line for each fact, or all as one JSON object."""
    facts = {**describe_environment(), **describe()}
    if as_json:
        typer.echo(json.dumps(facts, indent=2))
        return
    for name, value in facts.items():
        typer.echo(f"{name:12} {value}")
