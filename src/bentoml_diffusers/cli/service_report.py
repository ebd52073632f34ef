"""Asks a running service about its adapters."""

from __future__ import annotations

from typing import Any

import click

SERVICE_URL = "http://localhost:3000"
_TIMEOUT_S = 10.0


def read_loaded(url: str) -> dict[str, Any]:
    """Returns the :class:`AdapterReport` of a service as JSON."""
    return _post(f"{url.rstrip('/')}/adapters")


def describe_loaded(report: dict[str, Any]) -> list[tuple[str, str]]:
    """Returns the report as text."""
    megabytes = report["in_memory_bytes"] / 1e6
    reads = f"{report['misses']} read in {report['load_s']:.2f} s, {report['hits']} found in memory"
    return [
        ("LoRAs", _listed(report["known"])),
        ("embeddings", _listed(report["known_inversions"])),
        ("in memory", f"{_listed(report['in_memory'])} ({megabytes:.1f} MB)"),
        ("in slots", f"{_listed(report['in_slots'])} ({report['slots']} slots)"),
        ("reads", reads),
    ]


def _post(url: str) -> dict[str, Any]:
    import httpx

    try:
        answer = httpx.post(url, json={}, timeout=_TIMEOUT_S).raise_for_status()
        return dict(answer.json())
    except (httpx.HTTPError, httpx.InvalidURL, ValueError, TypeError) as error:
        raise click.ClickException(
            f"no service of this package responds at {url}: {error}"
        ) from None


def _listed(names: list[str]) -> str:
    return ", ".join(names) or "none"
