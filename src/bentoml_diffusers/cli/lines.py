"""What all commands have in common: errors as lines."""

from __future__ import annotations

import functools
import re
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from collections.abc import Callable


def one_line_errors(command: Callable[..., Any]) -> Callable[..., Any]:
    """An error of BentoML's tree, ours included, is one line and exit status 1."""

    @functools.wraps(command)
    def run(*args: Any, **kwargs: Any) -> Any:
        from bentoml.exceptions import BentoMLException

        try:
            return command(*args, **kwargs)
        except BentoMLException as error:
            command_here = click.get_current_context().command
            raise click.ClickException(name_options(str(error), command_here)) from error

    return run


def name_options(text: str, command: click.Command) -> str:
    """Says ``--allow-pickle`` where an error speaks of Python's ``allow_pickle=True``."""
    for option in command.params:
        if not isinstance(option, click.Option) or not option.name:
            continue
        flag = option.opts[-1]
        for pattern, spoken in (
            (rf"\b{option.name}=True\b", flag),
            (rf"\b{option.name}='([^']*)'", rf"{flag} \1"),
            (rf"\b{option.name}=(?=\w)", f"{flag} "),
            (rf"\b{option.name}=", flag),
            (rf"option '{option.name}'", f"option {flag}"),
            (rf"^{option.name}:|(?<=leave ){option.name}(?= out)", flag),
        ):
            text = re.sub(pattern, spoken, text)
    return text
