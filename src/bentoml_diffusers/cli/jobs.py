"""``bentoml diffusers jobs``: what becomes of the jobs of a running service."""

from __future__ import annotations

import os
import time
from typing import TYPE_CHECKING, Any

import click

from bentoml_diffusers._names import JOBS_VARIABLE
from bentoml_diffusers.cli.lines import one_line_errors
from bentoml_diffusers.cli.service_report import SERVICE_URL
from bentoml_diffusers.cli.tables import Output, output_option, print_json, print_rows

if TYPE_CHECKING:
    from collections.abc import Callable

_OVER = ("succeeded", "failed", "canceled")
_TIMEOUT_S = 30.0
_LOOK_S = 0.5


def _keep_jobs(_context: click.Context, _option: click.Parameter, folder: str | None) -> None:
    if folder is not None:
        os.environ[JOBS_VARIABLE] = os.path.abspath(folder)


jobs_option = click.option(
    "--jobs",
    "folder",
    metavar="FOLDER",
    expose_value=False,
    callback=_keep_jobs,
    help="Take jobs, too, and keep them in this folder.",
)


@click.group()
def jobs() -> None:
    """See and cancel the jobs of a running service."""


def _of_a_service(command: Callable[..., Any]) -> Callable[..., Any]:
    for option in (
        click.option("--url", default=SERVICE_URL, show_default=True, help="Of the service."),
        click.option("--key", envvar="BENTOML_DIFFUSERS_KEY", help="API key of the service."),
    ):
        command = option(command)
    return command


@jobs.command(name="list")
@_of_a_service
@output_option
@one_line_errors
def list_command(url: str, key: str | None, output: Output) -> None:
    """List your jobs, the latest first."""
    found = _ask("GET", url, key)["results"]
    if output == "json":
        print_json(found)
        return
    rows = [(one["id"], one["status"], one["logs"].strip(), one["created_at"]) for one in found]
    print_rows(("ID", "STATUS", "STEPS", "CREATED"), rows)


@jobs.command()
@click.argument("job_id", metavar="ID")
@_of_a_service
@one_line_errors
def show(job_id: str, url: str, key: str | None) -> None:
    """Show a job as JSON."""
    print_json(_ask("GET", url, key, job_id))


@jobs.command()
@click.argument("job_id", metavar="ID")
@_of_a_service
@one_line_errors
def cancel(job_id: str, url: str, key: str | None) -> None:
    """Cancel a job."""
    click.echo(_ask("POST", url, key, f"{job_id}/cancel")["status"])


@jobs.command()
@click.argument("job_id", metavar="ID")
@_of_a_service
@one_line_errors
def wait(job_id: str, url: str, key: str | None) -> None:
    """Wait for a job; the exit status is 1 unless it succeeds. Prints where its images are."""
    while (job := _ask("GET", url, key, job_id))["status"] not in _OVER:
        time.sleep(_LOOK_S)
    for address in job["output"] or ():
        click.echo(address)
    if job["status"] != "succeeded":
        raise click.ClickException(f"{job_id}: {job['status']}: {job['error'] or 'by its caller'}")


def _ask(method: str, url: str, key: str | None, path: str = "") -> Any:
    import httpx

    address = f"{url.rstrip('/')}/v1/predictions/{path}".rstrip("/")
    headers = {"authorization": f"Bearer {key}"} if key else {}
    try:
        answer = httpx.request(method, address, headers=headers, timeout=_TIMEOUT_S)
        body = answer.json()
    except (httpx.HTTPError, httpx.InvalidURL, ValueError) as error:
        raise click.ClickException(f"no service with jobs answers at {url}: {error}") from None
    if answer.is_error:
        raise click.ClickException(str(body.get("detail") or body.get("error") or body))
    return body
