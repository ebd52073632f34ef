"""``bentoml diffusers ...``: the commands, found by BentoML through ``bentoml.commands``."""

from __future__ import annotations

import os
import sys
from typing import Any

import click

from bentoml_diffusers._logs import quiet_loading
from bentoml_diffusers._names import EMBED_VARIABLE, TAG_VARIABLE
from bentoml_diffusers.cli.doctor import doctor
from bentoml_diffusers.cli.entries import embedding, info, list_command, lora
from bentoml_diffusers.cli.jobs import jobs, jobs_option
from bentoml_diffusers.cli.keys import key
from bentoml_diffusers.cli.lines import one_line_errors
from bentoml_diffusers.cli.listening import access_options, prepare, read_port
from bentoml_diffusers.cli.mellon import mellon
from bentoml_diffusers.cli.numerics import reproducible_option
from bentoml_diffusers.cli.workflows import replay, workflow

_SERVE_ARGUMENTS = {"ignore_unknown_options": True, "allow_extra_args": True}


@click.group(name="diffusers")
def diffusers_command() -> None:
    """Store and serve diffusers pipelines."""


for command in (info, list_command, lora, embedding, workflow, replay, jobs, key, mellon, doctor):
    diffusers_command.add_command(command)


@diffusers_command.command(context_settings=_SERVE_ARGUMENTS)
@access_options
@jobs_option
@reproducible_option
@click.pass_context
@one_line_errors
def demo(context: click.Context, **access: Any) -> None:
    """Serve the bundled demo model: it generates coloured shapes.

    Its images contain their workflows, so they can be generated again. Options of
    `bentoml serve`, such as --port 3001, are passed on.
    """
    from bentoml_diffusers.demo import MODEL_NAME, PROMPTS, import_demo_models

    models = import_demo_models()
    click.echo(f"{models[MODEL_NAME].tag} is in the model store. Ask it for an image:\n")
    port = read_port(context.args)
    click.echo(
        f"  curl http://localhost:{port}/txt2img -H 'content-type: application/json' \\\n"
        f'       -d \'{{"prompt": "{PROMPTS[0]}"}}\' -o image.png\n\n'
        f"or open http://localhost:{port} in a browser.\n"
    )
    _serve(str(models[MODEL_NAME].tag), context.args, access, workflow=True)


@diffusers_command.command(context_settings=_SERVE_ARGUMENTS)
@click.argument("tag")
@click.option("--embed-workflow", "workflow", is_flag=True, help="Write workflows into images.")
@click.option("--embed-infotext", "infotext", is_flag=True, help="Also AUTOMATIC1111's text.")
@access_options
@jobs_option
@reproducible_option
@click.pass_context
@one_line_errors
def serve(context: click.Context, tag: str, workflow: bool, infotext: bool, **access: Any) -> None:
    """Serve the pipeline TAG: txt2img, img2img and inpaint.

    Options of `bentoml serve`, such as --port 3001, are passed on.
    """
    from bentoml_diffusers.store import get

    _serve(str(get(tag).tag), context.args, access, workflow=workflow, infotext=infotext)


@diffusers_command.command(name="import")
@click.argument("name")
@click.argument("source")
@click.option("--revision", default="main", show_default=True, help="Branch, tag or commit.")
@click.option("--variant", help="Variant of the weights, such as fp16.")
@click.option("--pipeline-class", help="Class to load with, by its name in diffusers.")
@click.option("--sync-with-hub-version", is_flag=True, help="Use the hub's commit as the version.")
@click.option(
    "--custom-pipeline", help="Pipeline code to store with the model: a file, folder or name."
)
@click.option("--trust-remote-code", is_flag=True, help="Trust the model's code in this store.")
@click.option("--allow-pickle", is_flag=True, help="Read tensors out of .bin and .ckpt files.")
@click.option("--config", help="For a single file: folder or tag with its configs.")
@click.option(
    "--link",
    type=click.Choice(["auto", "hard", "copy"]),
    default="auto",
    show_default=True,
    help="How files of a folder are put into the store.",
)
@one_line_errors
def import_command(name: str, source: str, **options: Any) -> None:
    """Import a pipeline from the folder, file or hub repository SOURCE as NAME."""
    from bentoml_diffusers.store import import_model

    with quiet_loading():
        model = import_model(name, source, **options)
    click.echo(model.tag)


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
    if not check.is_intact:
        raise click.ClickException(f"{model.tag} differs from what was stored; import it again")
    click.echo(f"{model.tag} is intact: {check.files} files")


@diffusers_command.command()
@click.argument("action", type=click.Choice(["show", "install", "remove"]))
@one_line_errors
def hook(action: str) -> None:
    """Make `bentoml.diffusers` this package in every Python start, without an import.

    Writes, or removes, a file with one line in site-packages, which Python runs whenever
    it starts. It is not needed if your code has
    `import bentoml_diffusers`, nor for `import bentoml.diffusers` where both packages are
    installed in the same folder.
    """
    from bentoml_diffusers import _hook

    click.echo(getattr(_hook, action)())


def _serve(tag: str, arguments: list[str], access: dict[str, Any], **embed: bool) -> None:
    arguments = prepare(arguments, access)
    os.environ[TAG_VARIABLE] = tag
    os.environ[EMBED_VARIABLE] = " ".join(name for name, is_on in embed.items() if is_on)
    command = [sys.executable, "-m", "bentoml", "serve", "bentoml_diffusers.serving.tagged:svc"]
    sys.stdout.flush()
    os.execv(sys.executable, [*command, *arguments])  # noqa: S606 - signals reach BentoML itself
