"""What commands print: a table for people, or JSON for programs with ``--output json``."""

from __future__ import annotations

import json
import sys
from typing import TYPE_CHECKING, Any, Literal

import click

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence

    from rich.table import Table

Output = Literal["table", "json"]
_UNBOUNDED = 1_000_000  # columns


def output_option(command: Callable[..., Any]) -> Callable[..., Any]:
    """Adds ``--output`` to a command, which gets it as ``output``."""
    return click.option(
        "--output",
        type=click.Choice(["table", "json"]),
        default="table",
        show_default=True,
        help="A table for people, or JSON with stable fields.",
    )(command)


def print_json(values: Any) -> None:
    """Prints values as JSON in ASCII, so no text in them can control a terminal."""
    click.echo(json.dumps(values, indent=2).replace("\x7f", "\\u007f"))


def print_rows(titles: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    """Prints a table with a header."""
    from rich.table import Table

    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for title in titles:
        table.add_column(title, overflow="fold")
    _print_table(table, rows)


def print_facts(facts: Iterable[tuple[str, object]]) -> None:
    """Prints names and texts in two columns."""
    from rich.table import Table

    table = Table.grid(padding=(0, 2, 0, 0))
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    _print_table(table, facts)


def _print_table(table: Table, rows: Iterable[Sequence[object]]) -> None:
    from rich.console import Console
    from rich.text import Text

    for row in rows:
        table.add_row(*(Text(printable(cell_text(cell))) for cell in row))
    # Only a terminal has a width: a file or a program gets complete rows, one per line.
    width = None if sys.stdout.isatty() else _UNBOUNDED
    console = Console(width=width, highlight=False)
    with console.capture() as capture:
        console.print(table)
    click.echo("\n".join(line.rstrip() for line in capture.get().splitlines()))


def cell_text(value: object) -> str:
    """Returns a value as the text of a cell."""
    if isinstance(value, dict):
        return ", ".join(f"{name} {cell_text(item)}" for name, item in value.items())
    if isinstance(value, (list, tuple)):
        return ", ".join(map(cell_text, value))
    return "" if value is None else str(value)


def printable(text: str) -> str:
    """Escapes control characters: the text may be untrusted, and go to a terminal."""
    return "".join(one if one.isprintable() else repr(one)[1:-1] for one in text)


def present(facts: Mapping[str, object]) -> list[tuple[str, object]]:
    """Returns the facts that are not empty."""
    return [(name, value) for name, value in facts.items() if value not in (None, "", [], {}, ())]
