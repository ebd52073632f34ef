"""``bentoml diffusers mellon``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from bentoml_diffusers._logs import quiet_loading
from bentoml_diffusers.cli.lines import one_line_errors


@click.command()
@click.argument("tag")
@click.option("-o", "--output", type=click.Path(dir_okay=False), help="File to write to.")
@click.option("--modular-workflow", help="Only this part of it, such as text2image.")
@click.option("--trust-remote-code", is_flag=True, help="Run the code of its blocks.")
@one_line_errors
def mellon(tag: str, output: str | None, **options: Any) -> None:
    """Write the Mellon node config of the modular pipeline TAG."""
    from bentoml_diffusers.loading import mellon_config
    from bentoml_diffusers.options import ModelOptions
    from bentoml_diffusers.store import get

    with quiet_loading():
        text = mellon_config(get(tag), ModelOptions(**options))
    if output is None:
        click.echo(text, nl=False)
    else:
        Path(output).write_text(text)
        click.echo(f"wrote {output}")
