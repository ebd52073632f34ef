"""Shows errors of all commands as single lines."""

from __future__ import annotations

import contextlib
import functools
import logging
import re
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator


def one_line_errors(command: Callable[..., Any]) -> Callable[..., Any]:
    """Turns errors of BentoML, ours included, into one line and exit status 1.

    Warnings of this package become lines, too.
    """

    @functools.wraps(command)
    def run(*args: Any, **kwargs: Any) -> Any:
        from bentoml.exceptions import BentoMLException

        command_here = click.get_current_context().command
        try:
            with _spoken_warnings(command_here):
                return command(*args, **kwargs)
        except BentoMLException as error:
            raise click.ClickException(name_options(str(error), command_here)) from error

    return run


@contextlib.contextmanager
def _spoken_warnings(command: click.Command) -> Iterator[None]:
    logger = logging.getLogger("bentoml_diffusers")
    handler = _Speaker(command)
    logger.addHandler(handler)
    try:
        yield
    finally:
        logger.removeHandler(handler)


class _Speaker(logging.Handler):
    """Prints warnings in the terms of a command."""

    def __init__(self, command: click.Command) -> None:
        super().__init__(logging.WARNING)
        self._command = command

    def emit(self, record: logging.LogRecord) -> None:
        text = name_options(record.getMessage(), self._command)
        click.echo(f"{record.levelname.capitalize()}: {text}", err=True)


def name_options(text: str, command: click.Command) -> str:
    """Replaces Python's ``allow_pickle=True`` in an error by ``--allow-pickle``."""
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
    # Options of `import`, also if another command says to import again.
    return re.sub(r"\btrust_remote_code=True\b", "--trust-remote-code", text)
