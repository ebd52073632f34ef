"""``bentoml diffusers ...``: the commands, found by BentoML through ``bentoml.commands``."""

from __future__ import annotations

import os
import re
import sys
from typing import TYPE_CHECKING, Any

import click

from bentoml_diffusers._names import EMBED_VARIABLE, TAG_VARIABLE
from bentoml_diffusers.cli.lines import one_line_errors, print_facts
from bentoml_diffusers.cli.mellon import mellon
from bentoml_diffusers.cli.numerics import reproducible_option
from bentoml_diffusers.cli.running import SERVICE_URL, describe_loaded
from bentoml_diffusers.cli.workflows import replay, workflow

if TYPE_CHECKING:
    from collections.abc import Callable

_SERVE_ARGUMENTS = {"ignore_unknown_options": True, "allow_extra_args": True}


@click.group(name="diffusers")
def diffusers_command() -> None:
    """Store and serve diffusers pipelines."""


diffusers_command.add_command(workflow)
diffusers_command.add_command(replay)
diffusers_command.add_command(mellon)


@diffusers_command.command(context_settings=_SERVE_ARGUMENTS)
@reproducible_option
@click.pass_context
@one_line_errors
def demo(context: click.Context) -> None:
    """Serve the bundled demo model: it paints coloured shapes.

    Its pictures hold their workflows, so that they can be painted again. Options of
    `bentoml serve`, such as --port 3001, are passed on.
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
    _serve(str(models[MODEL_NAME].tag), context.args, workflow=True)


@diffusers_command.command(context_settings=_SERVE_ARGUMENTS)
@click.argument("tag")
@click.option("--embed-workflow", "workflow", is_flag=True, help="Write workflows into pictures.")
@click.option("--embed-infotext", "infotext", is_flag=True, help="And AUTOMATIC1111's text.")
@reproducible_option
@click.pass_context
@one_line_errors
def serve(context: click.Context, tag: str, **embed: bool) -> None:
    """Serve the pipeline TAG: txt2img, img2img and inpaint.

    Options of `bentoml serve`, such as --port 3001, are passed on.
    """
    from bentoml_diffusers.store import get

    _serve(str(get(tag).tag), context.args, **embed)


@diffusers_command.command(name="import")
@click.argument("name")
@click.argument("source")
@click.option("--revision", default="main", show_default=True, help="Branch, tag or commit.")
@click.option("--variant", help="Variant of the weights, such as fp16.")
@click.option("--pipeline-class", help="Class to load with, by its name in diffusers.")
@click.option("--sync-with-hub-version", is_flag=True, help="Use the hub's commit as the version.")
@click.option("--custom-pipeline", help="Pipeline code to store with it: a file, folder or name.")
@click.option("--trust-remote-code", is_flag=True, help="Let this store run the model's code.")
@click.option("--allow-pickle", is_flag=True, help="Read tensors out of .bin and .ckpt files.")
@click.option("--config", help="For a single file: folder or tag to take its configs from.")
@click.option(
    "--link",
    type=click.Choice(["auto", "hard", "copy"]),
    default="auto",
    show_default=True,
    help="How files of a folder come in.",
)
@one_line_errors
def import_command(name: str, source: str, **options: Any) -> None:
    """Import a pipeline from the folder, file or hub repository SOURCE as NAME."""
    from bentoml_diffusers.store import import_model

    click.echo(import_model(name, source, **options).tag)


@diffusers_command.command()
@click.argument("tag")
@one_line_errors
def info(tag: str) -> None:
    """Show where the model, LoRA or embedding TAG is from, and what is in it."""
    from bentoml_diffusers.store import describe, get

    print_facts(describe(get(tag)))


@diffusers_command.command()
@click.argument("tag")
@one_line_errors
def verify(tag: str) -> None:
    """Check the hashes of all files of TAG; the exit status is 1 if one differs."""
    from bentoml_diffusers.store import get
    from bentoml_diffusers.store import verify as verify_model

    model = get(tag)
    check = verify_model(model)
    if check is None:
        raise click.ClickException(f"{model.tag} has no record: BentoML's own module stored it")
    for word, paths in (
        ("changed", check.changed),
        ("missing", check.missing),
        ("added", check.added),
    ):
        for path in paths:
            click.echo(f"{word}: {path}")
    if not check.is_whole:
        raise click.ClickException(f"{model.tag} is not what was stored; import it again")
    click.echo(f"{model.tag} is whole: {check.files} files")


@diffusers_command.command(name="list")
@one_line_errors
def list_command() -> None:
    """List the pipelines, LoRAs and textual inversions of the model store."""
    _list_entries("")


@diffusers_command.group()
def lora() -> None:
    """Store LoRAs by name."""


@diffusers_command.group()
def embedding() -> None:
    """Store textual inversions by name."""


def _adapter_options(command: Callable[..., Any]) -> Callable[..., Any]:
    for option in (
        click.argument("source"),
        click.argument("name"),
        click.option("--weight-name", help="File in the folder or repository."),
        click.option("--base-model", help="What it was trained on; recorded."),
        click.option("--revision", default="main", show_default=True, help="Branch or commit."),
        click.option(
            "--allow-pickle", is_flag=True, help="Read tensors out of .bin and .pt files."
        ),
    ):
        command = option(command)
    return command


@lora.command(name="add")
@_adapter_options
@click.option(
    "--component",
    "components",
    multiple=True,
    help="Denoiser that it is for, such as transformer_2 of Wan 2.2.",
)
@one_line_errors
def lora_add(name: str, source: str, **options: Any) -> None:
    """Store the LoRA in the file, folder or hub repository SOURCE as NAME."""
    from bentoml_diffusers.store import import_lora

    click.echo(import_lora(name, source, **options).tag)


@lora.command(name="list")
@click.option("--loaded", is_flag=True, help="Those of a running service: in memory, in slots.")
@click.option("--url", default=SERVICE_URL, show_default=True, help="Where the service is.")
@one_line_errors
def lora_list(loaded: bool, url: str) -> None:
    """List the LoRAs of the model store, or of a running service."""
    if loaded:
        print_facts(describe_loaded(url))
    else:
        _list_entries("lora")


@embedding.command(name="add")
@_adapter_options
@click.option("--token", help="The new word; by default what the file says.")
@one_line_errors
def embedding_add(name: str, source: str, **options: Any) -> None:
    """Store the textual inversion in the file, folder or hub repository SOURCE as NAME."""
    from bentoml_diffusers.store import import_textual_inversion

    click.echo(import_textual_inversion(name, source, **options).tag)


@embedding.command(name="list")
@one_line_errors
def embedding_list() -> None:
    """List the textual inversions of the model store."""
    _list_entries("textual_inversion")


def _list_entries(kind: str) -> None:
    from bentoml_diffusers.store import list_records

    columns = _ADAPTER_COLUMNS.get(kind)
    rows = [("TAG", *(title for title, _ in columns or _COLUMNS), "FROM")]
    for model, record in list_records():
        if kind and (record is None or record.kind != kind):
            continue
        if record is None:
            rows.append((str(model.tag), "pipeline", "", "bentoml.diffusers"))
            continue
        values = {**record.details, "kind": record.kind, "class": record.class_name}
        texts = [_cell(values.get(key)) for _, key in columns or _COLUMNS]
        rows.append((str(model.tag), *texts, record.source))
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]) - 1)]
    for *cells, last in rows:
        padded = (cell.ljust(width) for cell, width in zip(cells, widths, strict=True))
        click.echo("  ".join([*padded, last]))


_COLUMNS = (("KIND", "kind"), ("CLASS", "class"))
_ADAPTER_COLUMNS = {
    "lora": (("FOR", "architecture"), ("RANK", "rank"), ("WORDS", "trigger_words")),
    "textual_inversion": (("FOR", "architecture"), ("TOKEN", "token"), ("VECTORS", "vectors")),
}


def _cell(value: object) -> str:
    if isinstance(value, list):
        return ", ".join(map(str, value))
    return "" if value is None else str(value)


@diffusers_command.command()
@click.argument("action", type=click.Choice(["show", "install", "remove"]))
@one_line_errors
def hook(action: str) -> None:
    """Make `bentoml.diffusers` this package in every Python start, without an import.

    Writes, or removes, one line in the folder of installed packages, which Python runs whenever
    it starts. It is not needed where your code says
    `import bentoml_diffusers`, nor for `import bentoml.diffusers` where both packages are
    installed in the same folder.
    """
    from bentoml_diffusers import _hook

    click.echo(getattr(_hook, action)())


def _serve(tag: str, arguments: list[str], **embed: bool) -> None:
    os.environ[TAG_VARIABLE] = tag
    os.environ[EMBED_VARIABLE] = " ".join(name for name, is_on in embed.items() if is_on)
    command = [sys.executable, "-m", "bentoml", "serve", "bentoml_diffusers.serving.tagged:svc"]
    sys.stdout.flush()
    os.execv(sys.executable, [*command, *arguments])  # noqa: S606 - signals reach BentoML itself


def _port(arguments: list[str]) -> str:
    """Reads the port out of options that are passed on: ``-p 1``, ``-p1``, ``--port 1``."""
    found = re.search(r"(?:^| )(?:-p|--port)[ =]?(\d+)", " ".join(arguments))
    return found.group(1) if found else os.environ.get("BENTOML_PORT", "3000")
