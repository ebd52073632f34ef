"""``bentoml diffusers workflow`` and ``bentoml diffusers replay``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from bentoml_diffusers._logs import quiet_loading
from bentoml_diffusers.cli.lines import one_line_errors
from bentoml_diffusers.cli.numerics import reproducible_option
from bentoml_diffusers.cli.tables import Output, output_option, print_facts, print_json

if TYPE_CHECKING:
    import bentoml

    from bentoml_diffusers.engine import Result
    from bentoml_diffusers.workflow import Workflow
    from bentoml_diffusers.workflow.files import Adapter

# Names that AUTOMATIC1111's web UI uses.
_SHORT_NAMES = {
    "steps": "num_inference_steps",
    "cfg_scale": "guidance_scale",
    "sampler": "scheduler",
    "denoising_strength": "strength",
}


@click.group()
def workflow() -> None:
    """Look at workflows."""


@workflow.command(name="show")
@click.argument("file")
@output_option
@one_line_errors
def workflow_show(file: str, output: Output) -> None:
    """Show the workflow in FILE: an image, JSON, a zip, or a folder or hub repository."""
    from bentoml_diffusers.workflow import Workflow
    from bentoml_diffusers.workflow.files import summarize

    loaded = Workflow.load(file)
    if output == "json":
        print_json(json.loads(loaded.to_json(inline_blobs=False)))
    else:
        print_facts(summarize(loaded))


def _read_change(_context: click.Context, _option: click.Parameter, texts: tuple[str, ...]) -> Any:
    changes: dict[str, Any] = {}
    for text in texts:
        name, separator, value = text.partition("=")
        if not (name and separator):
            raise click.BadParameter(f"got {text!r}, expected NAME=VALUE")
        changes[_SHORT_NAMES.get(name, name)] = _read_value(value)
    return changes


def _read_value(text: str) -> Any:
    if text.startswith("@"):
        from PIL import Image

        try:
            return Image.open(Path(text[1:]).expanduser())
        except OSError as err:
            raise click.BadParameter(f"{text[1:]!r} is not an image: {err}") from err
    try:
        return json.loads(text)
    except ValueError:
        return text


def _check_output(
    _context: click.Context, _option: click.Parameter, name: str | None
) -> str | None:
    """Checks the output path before anything is loaded or generated."""
    from bentoml_diffusers.workflow.files import RESULT_SUFFIXES

    if name is not None and Path(name).suffix.lower() not in RESULT_SUFFIXES:
        raise click.BadParameter(f"{name!r} must end in one of {', '.join(RESULT_SUFFIXES)}")
    if name is not None and not Path(name).expanduser().parent.is_dir():
        raise click.BadParameter(f"the folder {str(Path(name).parent)!r} does not exist")
    return name


@click.command()
@click.argument("file")
@click.option(
    "--set",
    "changes",
    multiple=True,
    metavar="NAME=VALUE",
    callback=_read_change,
    help="Change an argument, such as steps=30 or seed=7; @FILE is an image. Repeatable.",
)
@click.option(
    "-o",
    "--output",
    callback=_check_output,
    help="Where the result goes: *.png, *.jpg, *.webp, *.gif, *.mp4, *.webm, *.wav ...",
)
@click.option("--model", "tag", help="Model in the store, instead of the one in the workflow.")
@click.option("--lora-dir", help="Folder with the LoRA files that the workflow names.")
@click.option("--device", help="Where to run, such as cpu; by default the GPU if there is one.")
@click.option("--no-strict", is_flag=True, help="Run it even with other weights or adapters.")
@click.option("--infotext", is_flag=True, help="Write AUTOMATIC1111's text into the image.")
@reproducible_option
@one_line_errors
def replay(
    file: str, changes: dict[str, Any], output: str | None, no_strict: bool, infotext: bool,
    **where: str | None,
) -> None:  # fmt: skip
    """Generate the result of the workflow in FILE again.

    FILE is an image, video or sound, JSON, a zip, or a folder or hub repository. The exit status
    is 1 if the result differs. The new file contains its workflow.
    """
    from bentoml_diffusers.engine import Engine
    from bentoml_diffusers.workflow import Workflow

    recorded = Workflow.load(file)
    model = _find_model(recorded, where["tag"])
    options = _read_options(recorded, where["lora_dir"])
    with quiet_loading(), Engine.from_model(model, device=where["device"], **options) as engine:
        result = engine.replay(recorded, strict=not no_strict, return_workflow=True, **changes)
    if output is not None:
        _save(result, output, infotext=infotext)
    _tell(result)


def _find_model(recorded: Workflow, tag: str | None) -> bentoml.Model:
    """Finds the model by its tag, else by its hash: another store has another version."""
    from bentoml_diffusers.errors import InvalidWorkflow, ModelNotFound
    from bentoml_diffusers.store import get

    if tag is not None:
        return get(tag)
    model = recorded.pipeline.model
    if model is None or model.tag is None:
        raise InvalidWorkflow("workflow.pipeline.model", None, "a stored model: give --model TAG")
    try:
        return get(model.tag)
    except ModelNotFound as error:
        found = _find_same(model.tree_sha256)
        if found is None:
            origin = f"import it from {model.origin}, or " if model.origin else ""
            next_step = f"{origin}give --model TAG"
            raise ModelNotFound(model.tag, "is not in the model store", next_step) from error
        return found


def _find_same(tree_sha256: str | None) -> bentoml.Model | None:
    from bentoml_diffusers.store import list_records

    for model, record in list_records():
        if record is not None and record.tree is not None and record.tree == tree_sha256:
            return model
    return None


def _read_options(recorded: Workflow, lora_dir: str | None) -> dict[str, Any]:
    """Reads the options of the load; adapters are found only in the store or ``lora_dir``."""
    from bentoml_diffusers.engine import NUMERIC_OPTIONS

    given, static = recorded.pipeline.options, recorded.pipeline.static_adapters
    options: dict[str, Any] = {name: given[name] for name in NUMERIC_OPTIONS if name in given}
    if lora_dir:
        options["lora_dir"] = lora_dir
    loras = [
        {"name": name, "scale": one.scale, "components": one.components}
        for one in static
        if one.kind == "lora" and (name := _find_static(one, lora_dir))
    ]
    inversions = [
        {"name": name, "token": one.token}
        for one in static
        if one.kind == "textual_inversion" and (name := _find_static(one, lora_dir))
    ]
    if loras:
        options |= {"lora_weights": loras, "fuse_static_loras": static[0].is_fused}
    if inversions:
        options["textual_inversions"] = inversions
    return options


def _find_static(adapter: Adapter, lora_dir: str | None) -> str | None:
    """Finds static adapters; skips unknown names, since the replay reports a missing adapter."""
    from bentoml_diffusers.errors import ModelNotFound
    from bentoml_diffusers.store import get

    path = Path(lora_dir or "", adapter.name)
    if lora_dir and path.name == adapter.name and path.is_file():
        return str(path)
    try:
        return str(get(adapter.tag).tag) if adapter.tag else None
    except ModelNotFound:
        return None


def _save(result: Result, output: str, *, infotext: bool) -> None:
    for target in result.save(output, infotext=infotext):
        click.echo(f"written: {target}")


def _tell(result: Result) -> None:
    report = result.replay
    for text in report.differences if report else ():
        click.echo(f"differs: {text}")
    if report is None or report.matches is None:
        click.echo("not compared: there is no hash of the same call")
    elif report.matches:
        click.echo("the same, bit for bit")
    else:
        raise click.ClickException("not the same image")
