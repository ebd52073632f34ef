"""``bentoml diffusers list|info|lora|embedding``: what is in the model store."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from bentoml_diffusers.cli.lines import one_line_errors
from bentoml_diffusers.cli.service_report import SERVICE_URL, describe_loaded, read_loaded
from bentoml_diffusers.cli.tables import (
    Output,
    output_option,
    present,
    print_facts,
    print_json,
    print_rows,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

_COLUMNS = {
    "": (("KIND", "kind"), ("CLASS", "class_name")),
    "lora": (("FOR", "architecture"), ("RANK", "rank"), ("WORDS", "trigger_words")),
    "textual_inversion": (("FOR", "architecture"), ("TOKEN", "token"), ("VECTORS", "vectors")),
}


@click.command()
@click.argument("tag")
@output_option
@one_line_errors
def info(tag: str, output: Output) -> None:
    """Show origin and contents of the model, LoRA or embedding TAG."""
    from bentoml_diffusers.store import describe, get

    facts = describe(get(tag))
    if output == "json":
        print_json(facts)
        return
    code, details, files = (facts.pop(name, None) for name in ("code", "details", "files"))
    print_facts(present({**facts, "code": code and _code_text(code), **(details or {})}))
    if files:
        click.echo()
        print_rows(("FILE", "SHA256"), sorted(files.items()))


def _code_text(code: dict[str, Any]) -> str:
    trust = "trusted here" if code["is_trusted"] else "not trusted in this store"
    return f"{code['entry']} from {code['origin']}, {code['sha256']}, {trust}"


@click.command(name="list")
@output_option
@one_line_errors
def list_command(output: Output) -> None:
    """List the pipelines, LoRAs and textual inversions of the model store."""
    _print_entries("", output)


@click.group()
def lora() -> None:
    """Store LoRAs by name."""


@click.group()
def embedding() -> None:
    """Store textual inversions by name."""


def _adapter_options(command: Callable[..., Any]) -> Callable[..., Any]:
    for option in (
        click.argument("source"),
        click.argument("name"),
        click.option("--weight-name", help="File in the folder or repository."),
        click.option("--base-model", help="Model that it was trained on; only recorded."),
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
@click.option(
    "--loaded", is_flag=True, help="Those that a running service has in memory and in slots."
)
@click.option("--url", default=SERVICE_URL, show_default=True, help="Address of the service.")
@output_option
@one_line_errors
def lora_list(loaded: bool, url: str, output: Output) -> None:
    """List the LoRAs of the model store, or of a running service."""
    if not loaded:
        _print_entries("lora", output)
    elif output == "json":
        print_json(read_loaded(url))
    else:
        print_facts(describe_loaded(read_loaded(url)))


@embedding.command(name="add")
@_adapter_options
@click.option("--token", help="The placeholder token; by default the one in the file.")
@one_line_errors
def embedding_add(name: str, source: str, **options: Any) -> None:
    """Store the textual inversion in the file, folder or hub repository SOURCE as NAME."""
    from bentoml_diffusers.store import import_textual_inversion

    click.echo(import_textual_inversion(name, source, **options).tag)


@embedding.command(name="list")
@output_option
@one_line_errors
def embedding_list(output: Output) -> None:
    """List the textual inversions of the model store."""
    _print_entries("textual_inversion", output)


def _print_entries(kind: str, output: Output) -> None:
    entries = list(_read_entries(kind))
    if output == "json":
        print_json(entries)
        return
    rows = []
    for entry in entries:
        values = {**entry["details"], **entry}
        cells = (values.get(key) for _, key in _COLUMNS[kind])
        rows.append((entry["tag"], *cells, entry["source"]))
    print_rows(("TAG", *(title for title, _ in _COLUMNS[kind]), "FROM"), rows)


def _read_entries(kind: str) -> Iterator[dict[str, Any]]:
    from bentoml_diffusers.store import list_records

    for model, record in list_records():
        found = record.kind if record else "pipeline"
        if kind in ("", found):
            yield {
                "tag": str(model.tag),
                "kind": found,
                "class_name": record and record.class_name,
                "source": record.source if record else "bentoml.diffusers",
                "details": dict(record.details) if record else {},
            }
