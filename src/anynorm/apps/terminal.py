"""One way to write to the terminal: colour where there is any, 80 columns where nothing is known."""

from collections.abc import Sequence
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

WIDEST = 100  # longer lines of text are hard to read


class PlainConsole(Console):
    """Shows what would steer the terminal instead of sending it: names come from models and files of others."""

    def render_str(self, text: str, **options: Any) -> Text:
        """A string as rich draws it, also in a table."""
        return super().render_str(show_controls(text), **options)


def show_controls(text: str) -> str:
    """Text with each character that is not for print, such as those that begin terminal codes, as Python writes it."""
    return "".join(
        each if each.isprintable() or each == "\n" else each.encode("unicode_escape").decode() for each in text
    )


def open_console(record: bool = False) -> Console:
    """Return a console on the present standard output; piped, it is plain text of 80 columns.

    No text is markup: a model may be called ``[bold]`` or ``net:train:``, and rich would print neither as it is.
    """
    console = PlainConsole(highlight=False, markup=False, emoji=False, record=record)
    console.width = min(console.width, WIDEST)
    return console


def plain_table(*titles: str) -> Table:
    """Return an empty table: first column words, the others numbers."""
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=(0, 1, 0, 0))
    for index, title in enumerate(titles):
        table.add_column(title, justify="left" if index == 0 else "right", no_wrap=True)
    return table


def join_words(words: Sequence[str], last: str = "and") -> str:
    """Return words as a list in a sentence: a, b and c."""
    return f" {last} ".join(filter(None, [", ".join(words[:-1]), *words[-1:]]))


def heading(console: Console, text: str) -> None:
    """Print the title of a part."""
    console.print()
    console.rule(Text(show_controls(text), style="bold"), align="left", style="dim")


def say(console: Console, *sentences: str) -> None:
    """Print each sentence on a line of its own."""
    for sentence in sentences:
        console.print(sentence)
