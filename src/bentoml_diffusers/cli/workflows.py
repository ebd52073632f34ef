"""``bentoml diffusers workflow`` and ``bentoml diffusers replay``."""

from __future__ import annotations

import click

from bentoml_diffusers.cli.lines import one_line_errors, print_facts


@click.group()
def workflow() -> None:
    """Look at workflows."""


@workflow.command(name="show")
@click.argument("file")
@one_line_errors
def workflow_show(file: str) -> None:
    """Show the workflow in FILE: a picture, JSON, a zip, or a folder or hub repository."""
    from bentoml_diffusers.workflow import Workflow
    from bentoml_diffusers.workflow.summary import summarize

    print_facts(summarize(Workflow.load(file)))
