"""Every error that this package raises on purpose, each with its HTTP status and its outcome.

The outcome is what a request that ends with it counts as, in :class:`EngineReport` and in the
metrics of a service: ``invalid`` for what the caller can fix, ``refused`` if there is no room
now, ``expired`` after its deadline, ``cancelled``, and ``failed`` for all else.

::

    BentoMLException (BentoML)
    └── DiffusersError                      500
        ├── InvalidRequest    (ValueError)  400   a field of a request is wrong
        │   └── InvalidWorkflow             400   a workflow is broken, changed or too large
        ├── UnreadableRequest (ValueError)  400   the body of a request, or fields of it, are wrong
        ├── InvalidOption     (ValueError)  400   an option of a model or service is wrong
        ├── InvalidModel      (ValueError)  400   a source is not a pipeline, LoRA or embedding
        ├── UntrustedSource   (ValueError)  400   a name reaches outside what is allowed
        ├── UnsupportedByPipeline           400   the pipeline's class cannot do it
        ├── ModelNotFound     (LookupError) 404   not in the model store or on the hub
        ├── AdapterNotFound   (LookupError) 404   no such LoRA or textual inversion
        ├── TagConflict       (ValueError)  409   the tag holds something else
        ├── WorkflowMismatch  (ValueError)  409   a workflow does not match what is installed
        ├── CodecMissing      (ImportError) 501   PyAV is not installed
        ├── QueueFull                       429   too many requests wait
        ├── DeadlineUnreachable             503   what waits leaves too little time for it
        ├── HubUnavailable                  503   the hub could not be reached, or failed
        ├── StorageFull       (OSError)     507   no space left in the model store
        ├── StoreNotWritable  (OSError)     507   the model store is read-only
        ├── RequestCancelled                503   cancelled by its caller, or on shutdown
        ├── DeadlineExceeded  (TimeoutError) 504  ran past its deadline
        ├── PipelineFailed                  500   the pipeline raised
        ├── AdaptersBusy                    503   running requests hold every adapter slot
        └── DeviceOutOfMemory               503   the device has too little memory
"""

from __future__ import annotations

import difflib
import re
from http import HTTPStatus
from typing import TYPE_CHECKING, Any, ClassVar, Literal, TypeAlias

from bentoml.exceptions import BentoMLException, InvalidArgument, NotFound

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence


# The path of each wrong field, and what is wrong.
Faults: TypeAlias = "Sequence[tuple[Sequence[str | int], str]]"
Outcome: TypeAlias = Literal["invalid", "refused", "expired", "cancelled", "failed"]
_ADDRESS = re.compile(r" at 0x[0-9a-fA-F]+")
_FAULTS_SAID = 3  # number of wrong fields in the text of an error


class DiffusersError(BentoMLException):  # type: ignore[misc]
    """Root of the tree, a 500; pickles across processes with its text and status."""

    outcome: ClassVar[Outcome] = "failed"

    def __init_subclass__(cls) -> None:
        """Stays out of BentoML's table of statuses: its client creates errors from a text alone."""

    def __reduce__(self) -> tuple[Any, ...]:
        return _rebuild, (type(self), str(self), dict(self.__dict__))

    def say(self, text: str) -> None:
        """Replaces the text of the error."""
        self.args, self.message = (text,), text


def _rebuild(cls: type[DiffusersError], message: str, state: dict[str, Any]) -> DiffusersError:
    error: DiffusersError = cls.__new__(cls)
    error.args = (message,)
    error.__dict__.update(state)
    return error


class InvalidRequest(DiffusersError, InvalidArgument, ValueError):  # type: ignore[misc]
    """A field of a request is wrong (400)."""

    error_code = HTTPStatus.BAD_REQUEST
    outcome = "invalid"

    def __init__(self, field: str, got: object, expected: str) -> None:
        self.field = field
        super().__init__(f"{field}: got {shorten(got)}, expected {expected}")


class InvalidWorkflow(InvalidRequest):
    """A workflow is broken, modified, of a newer version, or beyond the limits (400)."""

    @classmethod
    def within(cls, error: InvalidRequest, place: str) -> InvalidWorkflow:
        """For an invalid request that a workflow contains at ``place``."""
        moved = cls(f"{place}.{error.field}", None, "")
        moved.say(f"{place}.{error}")
        return moved


class UnreadableRequest(DiffusersError, InvalidArgument, ValueError):  # type: ignore[misc]
    """The body of a request to a service, or some of its fields, cannot be read (400).

    Attributes:
        faults: The path to each wrong field, and a sentence about it.
    """

    error_code = HTTPStatus.BAD_REQUEST
    outcome = "invalid"

    def __init__(self, faults: Faults) -> None:
        self.faults = faults
        texts = [f"{'.'.join(map(str, place))}: {text}" for place, text in faults[:_FAULTS_SAID]]
        if len(faults) > _FAULTS_SAID:
            texts.append(f"and {len(faults) - _FAULTS_SAID} more")
        super().__init__("; ".join(texts))


class InvalidOption(DiffusersError, InvalidArgument, ValueError):  # type: ignore[misc]
    """An option of a model, a runner or a service is unknown or has a wrong value (400)."""

    error_code = HTTPStatus.BAD_REQUEST
    outcome = "invalid"

    def __init__(self, option: str, got: object, expected: str) -> None:
        self.option = option
        super().__init__(f"option {option!r}: got {shorten(got)}, expected {expected}")

    @classmethod
    def unknown(cls, option: str, known: Iterable[str]) -> InvalidOption:
        """For an option that does not exist; names the near matches and the known ones."""
        names = sorted(known)
        error = cls(option, None, "")
        error.say(f"unknown option {option!r}{suggest(option, names)}, known: {', '.join(names)}")
        return error


class InvalidModel(DiffusersError, ValueError):
    """A source holds no pipeline, LoRA or textual inversion (400)."""

    error_code = HTTPStatus.BAD_REQUEST
    outcome = "invalid"

    def __init__(self, source: object, problem: str, next_step: str = "") -> None:
        super().__init__(_sentence(f"{str(source)!r} {problem}", next_step))

    @classmethod
    def for_tokenizer(cls, source: object, name: str, kind: str) -> InvalidModel:
        """For a tokenizer that would give the same image for all prompts."""
        return cls(
            source,
            f"has a {name} ({kind}) that gives the same or only unknown tokens for all prompts",
            "its files are damaged, or of another version of transformers: import the model "
            "again, or install the version that saved it",
        )


class UntrustedSource(DiffusersError, ValueError):
    """A name reaches outside the sources that the operator allowed (400)."""

    error_code = HTTPStatus.BAD_REQUEST
    outcome = "invalid"

    def __init__(self, field: str, got: object, allowed: str) -> None:
        self.field = field
        super().__init__(f"{field}: {shorten(got)} is refused; allowed: {allowed}")


class UnsupportedByPipeline(DiffusersError, NotImplementedError):
    """The pipeline's class lacks what was asked for (400)."""

    error_code = HTTPStatus.BAD_REQUEST
    outcome = "invalid"

    def __init__(self, pipeline_class: str, what: str) -> None:
        super().__init__(f"{pipeline_class} does not support {what}")


class ModelNotFound(DiffusersError, NotFound, LookupError):  # type: ignore[misc]
    """The model is not in the store, or not on the hub (404)."""

    error_code = HTTPStatus.NOT_FOUND
    outcome = "invalid"

    def __init__(self, name: object, problem: str, next_step: str = "") -> None:
        super().__init__(_sentence(f"model {str(name)!r} {problem}", next_step))

    @classmethod
    def no_workflow(cls, name: str) -> ModelNotFound:
        """For a workflow that is neither a file, nor a folder, nor on the hub."""
        error = cls(name, "")
        error.say(_sentence(f"{name!r}: no such file, folder or hub repository", "check the path"))
        return error


class AdapterNotFound(DiffusersError, NotFound, LookupError):  # type: ignore[misc]
    """There is no LoRA or textual inversion of that name (404)."""

    error_code = HTTPStatus.NOT_FOUND
    outcome = "invalid"

    def __init__(self, field: str, name: str, known: Iterable[str]) -> None:
        self.field = field
        names = sorted(known)
        listed = ", ".join(names[:20]) or "none"
        super().__init__(
            f"{field}: {shorten(name)} was not found{suggest(name, names)}; known: {listed}"
        )


class TagConflict(DiffusersError, ValueError):
    """The tag is taken by something else (409)."""

    error_code = HTTPStatus.CONFLICT
    outcome = "invalid"

    def __init__(self, tag: object, holds: str, asked: str) -> None:
        super().__init__(
            f"tag {str(tag)!r} already holds {holds}, asked for {asked}; "
            "choose another tag, give a new version (name:version), or delete the old model"
        )


class WorkflowMismatch(DiffusersError, ValueError):
    """A workflow was made with another pipeline, model, code or adapter (409).

    Attributes:
        field: The first part that differs, such as ``"workflow.pipeline.model"``.
        differences: All that prevents a replay, as text.
    """

    error_code = HTTPStatus.CONFLICT
    outcome = "invalid"

    def __init__(self, field: str, differences: Sequence[str]) -> None:
        self.field = field
        self.differences = tuple(differences)
        super().__init__(
            f"the workflow cannot be repeated here: {'; '.join(differences)}; "
            "use the original components, or strict=False to run it with the installed ones"
        )


class CodecMissing(DiffusersError, ImportError):
    """Video and audio files need PyAV, which is not installed (501)."""

    error_code = HTTPStatus.NOT_IMPLEMENTED

    def __init__(self, what: str) -> None:
        super().__init__(f"{what} files need PyAV; pip install 'bentoml-diffusers[video]'")


class QueueFull(DiffusersError):
    """Too many requests wait (429).

    Attributes:
        retry_after_s: Estimated seconds until there is room; a service sends it as
            ``Retry-After``.
    """

    error_code = HTTPStatus.TOO_MANY_REQUESTS
    outcome = "refused"

    def __init__(self, waiting: int, retry_after_s: int) -> None:
        self.retry_after_s = retry_after_s
        super().__init__(f"{waiting} requests are waiting; try again in {retry_after_s} seconds")


class DeadlineUnreachable(DiffusersError):
    """What waits leaves too little time for a request; see ``retry_after_s`` (503)."""

    error_code = HTTPStatus.SERVICE_UNAVAILABLE
    outcome = "refused"

    def __init__(self, seconds: float, retry_after_s: int) -> None:
        self.retry_after_s = retry_after_s
        super().__init__(
            f"it would be done in {seconds:.2g} seconds only, after its deadline; "
            f"try again in {retry_after_s} seconds, or give it more time"
        )


class HubUnavailable(DiffusersError):
    """The hub could not be reached, or did not answer as it should (503)."""

    error_code = HTTPStatus.SERVICE_UNAVAILABLE

    def __init__(self, source: object, problem: str) -> None:
        super().__init__(
            f"could not get {str(source)!r} from the hub: {problem}; try again: "
            "files that are complete are not downloaded twice"
        )


class StorageFull(DiffusersError, OSError):
    """There is no space left in the model store (507)."""

    error_code = HTTPStatus.INSUFFICIENT_STORAGE

    def __init__(self, what: object) -> None:
        super().__init__(
            f"no space left for {str(what)!r}; free some, or set BENTOML_HOME to another disk"
        )


class StoreNotWritable(DiffusersError, OSError):
    """The model store is read-only, or belongs to somebody else (507)."""

    error_code = HTTPStatus.INSUFFICIENT_STORAGE

    def __init__(self, store: object, reason: str) -> None:
        super().__init__(
            f"the model store {str(store)!r} cannot be written: {reason}; change its permissions, "
            "or set BENTOML_HOME to another folder"
        )


class RequestCancelled(DiffusersError):
    """The request was cancelled by its caller, or by the engine's shutdown (503)."""

    error_code = HTTPStatus.SERVICE_UNAVAILABLE
    outcome = "cancelled"

    def __init__(self, reason: str = "the request was cancelled") -> None:
        super().__init__(reason)


class DeadlineExceeded(DiffusersError, TimeoutError):
    """The request ran past its deadline and was stopped, or would even alone (504)."""

    error_code = HTTPStatus.GATEWAY_TIMEOUT
    outcome = "expired"

    def __init__(self, timeout_s: float, needed_s: float | None = None) -> None:
        end = "the request was stopped"
        if needed_s is not None:
            end = f"it would take about {needed_s:.2g}: ask for fewer steps"
        super().__init__(f"not finished within {timeout_s:g} seconds; {end}")


class PipelineFailed(DiffusersError):
    """The pipeline raised an error that is not the caller's fault (500)."""

    error_code = HTTPStatus.INTERNAL_SERVER_ERROR

    def __init__(self, pipeline_class: str, error: BaseException) -> None:
        super().__init__(f"{pipeline_class} failed: {type(error).__name__}: {error}")


class AdaptersBusy(DiffusersError):
    """Running requests hold so many adapters that there is no room for more (503)."""

    error_code = HTTPStatus.SERVICE_UNAVAILABLE
    outcome = "refused"

    def __init__(self, option: str, size: int, wanted: int) -> None:
        super().__init__(
            f"no room for {wanted} more: running requests hold all of {option}={size}; "
            f"try again when one is done, or raise {option}"
        )


class DeviceOutOfMemory(DiffusersError):
    """The device has too little memory for this request (503)."""

    error_code = HTTPStatus.SERVICE_UNAVAILABLE

    def __init__(self, what: str) -> None:
        super().__init__(
            f"too little device memory for {what}; ask for a smaller or for fewer images"
        )


def outcome_of(error: BaseException) -> Outcome:
    """Returns what a request that ends with an error counts as."""
    return error.outcome if isinstance(error, DiffusersError) else "failed"


def shorten(value: object, limit: int = 120) -> str:
    """Returns ``repr(value)`` without addresses in memory, cut to ``limit`` characters."""
    text = _ADDRESS.sub("", repr(value))
    return text if len(text) <= limit else f"{text[: limit - 1]}…"


def suggest(name: str, known: Iterable[str]) -> str:
    """Returns `` (did you mean 'x'?)`` for near matches, else an empty string.

    Never the name itself, which may be known as something else.
    """
    others = [one for one in known if one != name]
    return suggest_one_of(difflib.get_close_matches(name, others, n=3))


def suggest_one_of(names: Iterable[str]) -> str:
    """Returns `` (did you mean 'x' or 'y'?)``, for no names an empty string."""
    listed = " or ".join(map(repr, names))
    return f" (did you mean {listed}?)" if listed else ""


def _sentence(text: str, next_step: str) -> str:
    return f"{text}; {next_step}" if next_step else text
