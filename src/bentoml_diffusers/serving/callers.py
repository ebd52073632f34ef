"""Callers that do not send what HTTP's own clients send: BentoML's client, and neighbours.

A neighbour is a service of the same deployment that has this one by ``bentoml.depends``.
"""

from __future__ import annotations

import ipaddress
import json
from pathlib import PurePath
from typing import TYPE_CHECKING, Any

from bentoml_diffusers._compat import read_payload
from bentoml_diffusers.errors import UnreadableRequest

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping

    from starlette.requests import Request

PICKLE = "application/vnd.bentoml+pickle"


def is_neighbour(request: Request, serde: Any) -> bool:
    """True if BentoML takes a pickle from this caller, and it is a process of this machine.

    BentoML refuses pickles where a service is the main one of ``bentoml serve``, else it trusts
    whoever asks; with ``--service-name`` that can be anybody. So it must be its Unix socket, or
    the loopback address that it uses where there are none.
    """
    host, port = request.scope.get("server") or ("", 0)
    is_local = port is None or is_loopback(host)
    return getattr(serde, "media_type", None) == PICKLE and is_local


def is_loopback(host: str) -> bool:
    """True for an address that no other machine reaches."""
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False


def read_neighbour(body: bytes, headers: Mapping[str, str], serde: Any) -> dict[str, Any]:
    """Returns the arguments of a neighbour's call. Unpickles: see :func:`is_neighbour`."""
    values = read_payload(body, headers, serde)
    if not isinstance(values, dict):
        raise UnreadableRequest([(("body",), "expected arguments by name")])
    return values


def is_bentoml_client(headers: Mapping[str, str]) -> bool:
    """True for ``bentoml.SyncHTTPClient`` and its like, which write each field of a form as JSON.

    BentoML's server does so with the forms of all clients: it would take the quotes from a prompt
    that is meant to have them, and read the prompt ``12`` as a number.
    """
    return headers.get("user-agent", "").startswith("BentoML HTTP Client/")


def decode_field(text: str) -> Any:
    """Decodes a field of a form of BentoML's client."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return text  # an address in place of a file


class Arguments(dict[str, Any]):
    """What BentoML's client is called with: it goes out as it is, and is checked where it arrives.

    BentoML would check it here, fill in the defaults, and send images re-encoded.

    Args:
        given: By name.
        multipart_fields: Names of files. BentoML makes a form of a call that could have some.
    """

    def __init__(self, given: Mapping[str, Any], multipart_fields: Collection[str]) -> None:
        super().__init__(given)
        self.multipart_fields = multipart_fields

    def model_dump(self) -> dict[str, Any]:
        """For a neighbour."""
        return {
            name: _read_path(value) if name in self.multipart_fields else value
            for name, value in self.items()
        }

    def model_dump_json(self, exclude: Collection[str] = ()) -> str:
        """For JSON."""
        return json.dumps({name: self[name] for name in self if name not in exclude})


def _read_path(value: Any) -> Any:
    if isinstance(value, PurePath):
        with open(value, "rb") as file:
            return file.read()
    return value
