"""Errors in OpenAI's form: a type, a code, the name of the field; and whether to try again."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from starlette.responses import JSONResponse, Response

from bentoml_diffusers import errors as ours
from bentoml_diffusers.errors import DiffusersError, UnreadableRequest
from bentoml_diffusers.serving import refusals
from bentoml_diffusers.serving.error_answers import list_faults_of, public_text
from bentoml_diffusers.serving.faults import MISSING_FIELD, UNKNOWN_FIELD

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from pydantic import ValidationError

    from bentoml_diffusers.errors import Faults


class FieldsRefused(UnreadableRequest):
    """Fields of a request in OpenAI's form are wrong, or cannot be done (400).

    Attributes:
        faults: Where it is wrong, and how.
        code: Of the first one.
    """

    def __init__(self, faults: Faults, code: str = "invalid_value") -> None:
        super().__init__(faults)
        self.code = code

    @classmethod
    def of(cls, error: ValidationError) -> FieldsRefused:
        """For what pydantic finds."""
        found = error.errors(include_url=False, include_input=False, include_context=False)
        code = found[0]["type"]
        known = {"missing": "missing_required_parameter", "unsupported_value": code}
        faults = [(one["loc"] or ("body",), str(one["msg"])) for one in found]
        return cls(faults, known.get(code, "invalid_value"))

    @classmethod
    def unsupported(cls, field: str, reason: str) -> FieldsRefused:
        """For a field that nothing here can do."""
        return cls([((field,), f"is not supported: {reason}")], "unsupported_parameter")


_TYPES = {
    401: "authentication_error",
    403: "permission_error",
    429: "rate_limit_error",
}
_CODES: Mapping[type[DiffusersError], str] = {
    ours.AdapterNotFound: "adapter_not_found",
    ours.AdaptersBusy: "overloaded",
    ours.DeadlineExceeded: "timeout",
    ours.DeviceOutOfMemory: "out_of_memory",
    ours.QueueFull: "rate_limit_exceeded",
    ours.RequestCancelled: "cancelled",
    ours.UnsupportedByPipeline: "unsupported_value",
    refusals.UnsupportedMediaType: "unsupported_media_type",
    refusals.UploadsFull: "overloaded",
}
_CODES_BY_STATUS = {
    400: "invalid_value",
    401: "invalid_api_key",
    403: "forbidden",
    404: "not_found",
    409: "conflict",
    429: "rate_limit_exceeded",
}
_WORTH_REPEATING = (408, 429)


def describe_error(error: DiffusersError, names: Mapping[str, str] | None = None) -> dict[str, Any]:
    """Returns the value of ``error`` in an answer, or in an event of a stream.

    Args:
        error: What became of the request.
        names: What OpenAI's API calls native fields: ``{"mask_image": "mask"}``.
    """
    status = int(error.error_code)
    faults = [
        ([(names or {}).get(str(place[0]), place[0]), *place[1:]], text)
        for place, text in list_faults_of(error)
    ]
    said = "; ".join(_say_fault(say_place(place), text) for place, text in faults[:3])
    kind = "server_error" if status >= 500 else "invalid_request_error"
    return {
        "message": said or public_text(error),
        "type": _TYPES.get(status, kind),
        "param": say_place(faults[0][0]) if faults else None,
        "code": _find_code(error, status),
    }


def error_response(error: DiffusersError, names: Mapping[str, str] | None = None) -> Response:
    """Answers with an error; for the arguments see :func:`describe_error`."""
    return JSONResponse(
        {"error": describe_error(error, names)},
        status_code=int(error.error_code),
        headers=error_headers(error),
    )


def error_headers(error: DiffusersError) -> dict[str, str]:
    """Returns what tells a client when to try again, or that it is in vain."""
    status, seconds = int(error.error_code), getattr(error, "retry_after_s", None)
    if seconds is not None:
        return {"retry-after": str(seconds), "retry-after-ms": str(seconds * 1000)}
    in_vain = status < 500 and status not in _WORTH_REPEATING
    return {"x-should-retry": "false"} if in_vain else {}


def say_place(place: Sequence[str | int]) -> str:
    """Returns ``lora_weights[0].name`` for the path to a field."""
    parts = (f"[{part}]" if isinstance(part, int) else f".{part}" for part in place)
    return "".join(parts).removeprefix(".")


def _say_fault(place: str, text: str) -> str:
    _, is_said, rest = text.partition(f"{place}: ")  # errors of the engine begin with the field
    return f"{place}: {rest if is_said else text}"


def _find_code(error: DiffusersError, status: int) -> str:
    own = getattr(error, "code", None) or _CODES.get(type(error))
    if own is not None:
        return str(own)
    first = next((text for _, text in list_faults_of(error)), "")
    if first.startswith(UNKNOWN_FIELD):
        return "unknown_parameter"
    if first == MISSING_FIELD:
        return "missing_required_parameter"
    return _CODES_BY_STATUS.get(status, "server_error")
