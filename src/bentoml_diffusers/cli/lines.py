"""What all commands have in common: errors and facts as lines."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable


def one_line_errors(command: Callable[..., Any]) -> Callable[..., Any]:
    """An error of BentoML's tree, ours included, is one line and exit status 1."""

    @functools.wraps(command)
    def run(*args: Any, **kwargs: Any) -> Any:
        from bentoml.exceptions import BentoMLException

        try:
            return command(*args, **kwargs)
        except BentoMLException as error:
            raise click.ClickException(str(error)) from error

    return run


def print_facts(facts: Iterable[tuple[str, str]], width: int = 12) -> None:
    """Prints names and texts in two columns, the first of ``width`` characters."""
    for name, text in facts:
        click.echo(f"{name:{width}} {text}")
