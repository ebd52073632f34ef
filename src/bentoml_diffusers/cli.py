"""``bentoml diffusers ...``: the commands, found by BentoML through ``bentoml.commands``."""

from __future__ import annotations

import functools
import os
import re
import sys
from typing import TYPE_CHECKING, Any

import click

from bentoml_diffusers._names import TAG_VARIABLE

if TYPE_CHECKING:
    from collections.abc import Callable

_SERVE_ARGUMENTS = {"ignore_unknown_options": True, "allow_extra_args": True}


def _one_line_errors(command: Callable[..., Any]) -> Callable[..., Any]:
    """An error of BentoML's tree, ours included, is one line and exit status 1."""

    @functools.wraps(command)
    def run(*args: Any, **kwargs: Any) -> Any:
        from bentoml.exceptions import BentoMLException

        try:
            return command(*args, **kwargs)
        except BentoMLException as error:
            raise click.ClickException(str(error)) from error

    return run


@click.group(name="diffusers")
def diffusers_command() -> None:
    """Store and serve diffusers pipelines."""


@diffusers_command.command(context_settings=_SERVE_ARGUMENTS)
@click.pass_context
@_one_line_errors
def demo(context: click.Context) -> None:
    """Serve the bundled demo model: it paints coloured shapes.

    Options of `bentoml serve`, such as --port 3001, are passed on.
    """
    from bentoml_diffusers.demo import MODEL_NAME, PROMPTS, import_demo_models

    models = import_demo_models()
    click.echo(f"{models[MODEL_NAME].tag} is in the model store. Ask it for a picture:\n")
    port = _port(context.args)
    click.echo(
        f"  curl http://localhost:{port}/txt2img -H 'content-type: application/json' \\\n"
        f'       -d \'{{"prompt": "{PROMPTS[0]}"}}\' -o picture.png\n\n'
        f"or open http://localhost:{port} in a browser.\n"
    )
    _serve(str(models[MODEL_NAME].tag), context.args)


@diffusers_command.command(context_settings=_SERVE_ARGUMENTS)
@click.argument("tag")
@click.pass_context
@_one_line_errors
def serve(context: click.Context, tag: str) -> None:
    """Serve the pipeline TAG: txt2img and img2img.

    Options of `bentoml serve`, such as --port 3001, are passed on.
    """
    from bentoml_diffusers.store import get

    _serve(str(get(tag).tag), context.args)


@diffusers_command.command(name="import")
@click.argument("name")
@click.argument("source")
@click.option("--revision", default="main", show_default=True, help="Branch, tag or commit.")
@click.option("--variant", help="Variant of the weights, such as fp16.")
@click.option("--pipeline-class", help="Class to load with, by its name in diffusers.")
@click.option("--sync-with-hub-version", is_flag=True, help="Use the hub's commit as the version.")
@_one_line_errors
def import_command(name: str, source: str, **options: Any) -> None:
    """Import a pipeline from the folder or hub repository SOURCE as NAME."""
    from bentoml_diffusers.store import import_model

    click.echo(import_model(name, source, **options).tag)


@diffusers_command.command(name="list")
@_one_line_errors
def list_command() -> None:
    """List the pipelines, LoRAs and textual inversions of the model store."""
    from pathlib import Path

    from bentoml_diffusers.store import list_entries, read_record

    rows = [("TAG", "KIND", "CLASS", "FROM")]
    for model in list_entries():
        record = read_record(Path(model.path))
        if record is None:
            rows.append((str(model.tag), "pipeline", "", "bentoml.diffusers"))
        else:
            rows.append((str(model.tag), record.kind, record.class_name or "", record.source))
    widths = [max(len(row[column]) for row in rows) for column in range(3)]
    for *cells, last in rows:
        padded = (cell.ljust(width) for cell, width in zip(cells, widths, strict=True))
        click.echo("  ".join([*padded, last]))


@diffusers_command.command()
@click.argument("action", type=click.Choice(["show", "install", "remove"]))
@_one_line_errors
def hook(action: str) -> None:
    """Make `bentoml.diffusers` this package in every Python start, without an import.

    Writes, or removes, one line in the folder of installed packages, which Python runs whenever
    it starts. It is not needed where your code says
    `import bentoml_diffusers`, nor for `import bentoml.diffusers` where both packages are
    installed in the same folder.
    """
    from bentoml_diffusers import _hook

    click.echo(getattr(_hook, action)())


def _serve(tag: str, arguments: list[str]) -> None:
    os.environ[TAG_VARIABLE] = tag
    command = [sys.executable, "-m", "bentoml", "serve", "bentoml_diffusers.serving.tagged:svc"]
    sys.stdout.flush()
    os.execv(sys.executable, [*command, *arguments])  # noqa: S606 - signals reach BentoML itself


def _port(arguments: list[str]) -> str:
    """Reads the port out of options that are passed on: ``-p 1``, ``-p1``, ``--port 1``."""
    found = re.search(r"(?:^| )(?:-p|--port)[ =]?(\d+)", " ".join(arguments))
    return found.group(1) if found else os.environ.get("BENTOML_PORT", "3000")
