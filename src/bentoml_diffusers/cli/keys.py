"""``bentoml diffusers key``: who may call a service."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from bentoml_diffusers.cli.lines import one_line_errors
from bentoml_diffusers.cli.tables import Output, output_option, print_json, print_rows

if TYPE_CHECKING:
    from collections.abc import Callable

_file_option = click.option(
    "--file",
    type=click.Path(dir_okay=False),
    help="The file of keys; by default diffusers-keys.json in BENTOML_HOME.",
)


@click.group()
def key() -> None:
    """Make and remove API keys: who may call a service, and how much."""


def _limit_options(command: Callable[..., Any]) -> Callable[..., Any]:
    count = click.IntRange(min=1)
    for option in (
        click.option(
            "--priority",
            type=click.IntRange(-8, 8),
            default=0,
            help="Each level doubles its share.",
        ),
        click.option("--max-running", type=count, help="Requests at once."),
        click.option(
            "--pixel-steps-per-minute", type=count, help="Pixels times images times steps."
        ),
        click.option("--requests-per-minute", type=count, help="Requests to start in a minute."),
        click.option(
            "--task",
            "tasks",
            multiple=True,
            help="A task that it may ask for, such as txt2img, or metrics; by default all but "
            "metrics. Repeatable.",
        ),
    ):
        command = option(command)
    return command


@key.command(name="add")
@click.argument("name")
@_file_option
@_limit_options
@one_line_errors
def key_add(name: str, file: str | None, **limits: Any) -> None:
    """Make a key for NAME and print it, once: only its hash is stored."""
    from bentoml_diffusers.serving.key_file import add_key

    path = _find(file)
    made = add_key(path, name, **limits)
    click.echo(f"The key of {name}, whose hash is in {path}:", err=True)
    click.echo(made)


@key.command(name="list")
@_file_option
@output_option
@one_line_errors
def key_list(file: str | None, output: Output) -> None:
    """List the keys by name, with what each may ask for."""
    from bentoml_diffusers.serving.key_file import read_keys

    path = _find(file)
    records = read_keys(path) if path.exists() else []
    if output == "json":
        print_json([_public(asdict(record)) for record in records])
        return
    rows = []
    for record in records:
        limits = (record.requests_per_minute, record.pixel_steps_per_minute, record.max_running)
        cells = ("" if one is None else str(one) for one in limits)
        rows.append((record.name, record.created, ", ".join(record.tasks) or "all", *cells))
    print_rows(("NAME", "CREATED", "TASKS", "REQUESTS/MIN", "PIXEL-STEPS/MIN", "AT ONCE"), rows)


def _public(values: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in values.items() if name != "sha256"}


@key.command(name="remove")
@click.argument("name")
@_file_option
@one_line_errors
def key_remove(name: str, file: str | None) -> None:
    """Remove the key of NAME; services that run refuse it from now on."""
    from bentoml_diffusers.serving.key_file import remove_key

    remove_key(_find(file), name)
    click.echo(f"removed: {name}")


def _find(file: str | None) -> Path:
    from bentoml_diffusers.serving.key_file import default_path

    return Path(file).expanduser().resolve() if file else default_path()
