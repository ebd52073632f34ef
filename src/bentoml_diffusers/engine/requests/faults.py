"""Decides whether a failed call of diffusers is the caller's fault or the server's."""

from __future__ import annotations

import dis
import inspect
import re
from typing import TYPE_CHECKING, Any

from bentoml_diffusers._compat import CHECKS
from bentoml_diffusers.errors import InvalidRequest

if TYPE_CHECKING:
    from collections.abc import Mapping
    from types import TracebackType

_RAISE = dis.opmap["RAISE_VARARGS"]
# Where diffusers checks arguments. Its models and loaders raise for other reasons.
_PLACES = ("diffusers.pipelines.", "diffusers.modular_pipelines.", "diffusers.schedulers.")
_MODULES = ("diffusers.image_processor", "diffusers.video_processor", "diffusers.utils.torch_utils")


def check_inputs(
    pipeline: Any, cls: type[Any], defaults: Mapping[str, Any], arguments: Mapping[str, Any]
) -> None:
    """Runs the checks of the pipeline's own class before the request is queued.

    They use only arguments and config. If they need something that only the call computes, such as
    a default size, the check is left to the call.

    Args:
        pipeline: The engine's; not changed.
        cls: Class that runs the task.
        defaults: Defaults of its parameters.
        arguments: Arguments of the call.

    Raises:
        InvalidRequest: 400, they refuse an argument.
    """
    check = getattr(cls, CHECKS, None)
    if check is None:
        return
    names = list(inspect.signature(check).parameters)[1:]
    # It is an argument that diffusers takes beside those in its signature.
    known = {"callback_steps": None, **defaults, **arguments}
    if any(name not in known for name in names) or any(
        known.get(name, 1) is None for name in ("height", "width")
    ):
        return
    stand_in = object.__new__(cls)
    stand_in.__dict__.update(pipeline.__dict__)
    try:
        check(stand_in, **{name: known[name] for name in names})
    except (ValueError, TypeError) as err:
        if _is_raised_on_purpose(err):
            raise invalid_request(err) from err
    except Exception:  # noqa: BLE001, S110 - the call itself decides
        pass


def invalid_request_from(error: BaseException, *, has_denoised: bool) -> InvalidRequest | None:
    """Returns the error as the caller's fault, if it is that.

    That is whatever a pipeline's ``check_inputs`` raises, and each ``raise ValueError`` in a
    pipeline or its helpers before the first run of the denoiser.

    Args:
        error: The error that a pipeline raised.
        has_denoised: The denoiser has run.
    """
    names = {frame.f_code.co_name for frame, _ in _walk(error.__traceback__)}
    is_checked = CHECKS in names
    is_early = not has_denoised and isinstance(error, (ValueError, TypeError))
    is_invalid = is_checked or (is_early and _is_raised_on_purpose(error))
    return invalid_request(error) if is_invalid else None


def invalid_request(error: BaseException) -> InvalidRequest:
    """Converts an error of diffusers, which names the field in backticks."""
    field = re.search(r"`(\w+)`", str(error))
    invalid = InvalidRequest(field.group(1) if field else "arguments", "", "")
    invalid.say(str(error))
    return invalid


def _is_raised_on_purpose(error: BaseException) -> bool:
    """True if it comes from a ``raise`` in diffusers, not from an operation that failed."""
    *_, (frame, instruction) = _walk(error.__traceback__)
    module = frame.f_globals.get("__name__", "")
    if not module.startswith(_PLACES) and module not in _MODULES:
        return False
    return bool(frame.f_code.co_code[instruction] == _RAISE)


def _walk(trace: TracebackType | None) -> Any:
    while trace is not None:
        yield trace.tb_frame, trace.tb_lasti
        trace = trace.tb_next
