"""Options of ``bentoml diffusers serve`` and ``demo`` that say where they listen, and to whom."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from bentoml_diffusers._names import ACCESS_VARIABLE

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

_LOOPBACK = "127.0.0.1"
_EVERYWHERE = "0.0.0.0"  # noqa: S104 - BentoML's default


def access_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Adds the options to a command, which gets them by these names."""
    for option in (
        click.option(
            "--keys",
            type=click.Path(dir_okay=False),
            help="File of API keys: requests need one of them. See `bentoml diffusers key`.",
        ),
        click.option(
            "--allowed-host",
            "allowed_hosts",
            multiple=True,
            metavar="NAME",
            help="A name by which clients may call it, beside localhost. Repeatable.",
        ),
        click.option(
            "--cors-origin",
            "cors_origins",
            multiple=True,
            metavar="ORIGIN",
            help="A site whose web pages may call it, such as https://example.com. Repeatable.",
        ),
    ):
        command = option(command)
    return command


def prepare(arguments: Sequence[str], options: Mapping[str, Any]) -> list[str]:
    """Tells the processes of the service what was chosen, and whoever waits where it listens.

    Without keys it listens on the loopback address, unless another one is given.

    Args:
        arguments: Of ``bentoml serve``, passed on.
        options: Of :func:`access_options`.

    Returns:
        The arguments with the address.

    Raises:
        InvalidOption: 400, the keys cannot be read.
    """
    from bentoml_diffusers.serving.key_file import read_keys

    key_file = Path(options["keys"]).resolve() if options["keys"] else None
    if key_file is not None:
        read_keys(key_file)  # an error is said here, not in the log of a worker
    chosen = {
        "keys": None if key_file is None else str(key_file),
        "allowed_hosts": list(options["allowed_hosts"]) or None,
        "cors_origins": list(options["cors_origins"]),
    }
    os.environ[ACCESS_VARIABLE] = json.dumps(chosen)
    host = find_option(arguments, "--host") or os.environ.get("BENTOML_HOST")
    changed = list(arguments)
    if host is None:
        host = _EVERYWHERE if key_file else _LOOPBACK
        changed += ["--host", host]
    click.echo(describe(host, read_port(arguments), has_keys=bool(key_file)) + "\n")
    return changed


def describe(host: str, port: str, *, has_keys: bool) -> str:
    """Says where a service listens, and who may call it."""
    if host in (_LOOPBACK, "localhost", "::1"):
        reach = "this machine only (--host 0.0.0.0 opens it to others)"
    else:
        reach = "all addresses of this machine" if host in (_EVERYWHERE, "::") else host
    who = "whoever has a key" if has_keys else "everyone who reaches it, without a key"
    return f"Listens on {reach}, port {port}; answers {who}."


def read_port(arguments: Sequence[str]) -> str:
    """Returns the port that ``bentoml serve`` will listen on."""
    given = find_option(arguments, "--port") or find_option(arguments, "-p")
    return given or os.environ.get("BENTOML_PORT", "3000")


def find_option(arguments: Sequence[str], name: str) -> str | None:
    """Returns the value of an option that is passed on: ``--host=X``, ``--host X``, ``-pX``."""
    found = None
    for index, word in enumerate(arguments):
        if word == name and index + 1 < len(arguments):
            found = arguments[index + 1]
        elif word.startswith(f"{name}="):
            found = word.removeprefix(f"{name}=")
        elif len(name) == 2 and word.startswith(name) and len(word) > 2:
            found = word[2:]
    return found
