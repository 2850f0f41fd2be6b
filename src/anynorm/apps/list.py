"""`anynorm list`: the family's table, printed from `family.py` and from nothing else."""

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from anynorm.apps.explain.notation import FORMULA
from anynorm.apps.terminal import open_console
from anynorm.family import FAMILY


def print_family(console: Console | None = None) -> None:
    """Print every norm with its answers to the formula's three questions."""
    console = console or open_console()
    console.print(FORMULA, style="bold")
    console.print("One formula; the norms differ in which elements share a mean and a variance,")
    console.print("in where the two come from, and in what gamma and beta belong to.\n")
    console.print(_table())
    console.print(_legend())


def _table() -> Table:
    """Return the table, 80 columns wide at most."""
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, padding=0, pad_edge=False)
    titles = ("norm", "statistics per", "centred", "mean, var from", "gamma", "classes")
    for title, style in zip(titles, ("bold", "cyan", "", "", "", "")):
        table.add_column(title, style=style, overflow="fold")
    for scheme in FAMILY.values():
        sources = ", ".join(scheme.source_names)
        row = (scheme.name, scheme.pattern, "yes" if scheme.centred else "no", sources, scheme.affine)
        table.add_row(*map(Text, row), shorten(scheme.classes))
    return table


def shorten(classes: tuple[str, ...]) -> str:
    """Write BatchNorm1d, BatchNorm2d, BatchNorm3d as BatchNorm1d/2d/3d.

    >>> shorten(("BatchNorm1d", "BatchNorm2d"))
    'BatchNorm1d/2d'
    """
    stem = classes[0].rstrip("123d") if len(classes) > 1 else classes[0]
    if all(name.startswith(stem) for name in classes):
        return "/".join((classes[0], *(name.removeprefix(stem) for name in classes[1:])))
    return ", ".join(classes)


def _legend() -> str:
    """Return the meaning of the letters and sources that the table uses."""
    letters = {
        "n": "samples",
        "c": "channels",
        "s": "positions",
        "d": "features",
        "g": "groups",
        "k": "channels in a group",
        "b": "ghost batches",
        "m": "samples in one",
    }
    used = " ".join(scheme.pattern + " " + scheme.affine for scheme in FAMILY.values())
    used = used.replace("(", " ").replace(")", " ")
    words = ", ".join(f"{letter} {meaning}" for letter, meaning in letters.items() if letter in used.split())
    return (
        f"\n{words}.\nAxes left of the arrow that are missing on its right are averaged over."
        "\nbatch: the values at hand. running: the running averages, used in evaluation."
        "\nrenorm: the values at hand, moved towards the running averages."
        "\nranks: the values at hand in all processes."
    )
