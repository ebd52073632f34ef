"""The size that a request makes which leaves it out, under the limits of a service.

Only the loaded model knows it.
"""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Any

from bentoml_diffusers.errors import InvalidRequest
from bentoml_diffusers.store import read_config
from bentoml_diffusers.tasks.sizes import default_size

if TYPE_CHECKING:
    from collections.abc import Mapping

    import bentoml

    from bentoml_diffusers.engine import Engine
    from bentoml_diffusers.options import RequestLimits
    from bentoml_diffusers.serving.reader import RequestModel
    from bentoml_diffusers.tasks import Task


def check_default_sizes(engine: Engine, requests: Mapping[str, type[RequestModel]]) -> None:
    """Checks what each task makes where a request gives no size.

    Raises:
        InvalidOption: 400, more than the limits of the service allow.
    """
    for task, request in requests.items():
        with contextlib.suppress(InvalidRequest):  # the model cannot do the task: nobody can ask
            if _has_free_size(engine, task, request):
                defaults = {name: request.model_fields[name].default for name in _SIDES}
                request.limits.check_default_size(*_complete(engine, task, defaults))


def check_stored_size(model: bentoml.Model, requests: Mapping[str, type[RequestModel]]) -> None:
    """Checks the same before a model is loaded, where the configs of its components tell.

    BentoML restarts a worker that fails for ever, but nothing after a failure here.

    Raises:
        InvalidOption: 400, more than the limits of the service allow.
    """
    request = requests.get("txt2img")
    side = _read_stored_side(model)
    if request is not None and request.model_fields["height"].default is None and side is not None:
        request.limits.check_default_size(side, side)


def _read_stored_side(model: bentoml.Model) -> int | None:
    """Returns the side, px, that a classic pipeline makes of its latents' side."""
    denoisers = [read_config(model, name) for name in ("unet", "transformer")]
    samples = [config["sample_size"] for config in denoisers if "sample_size" in config]
    blocks = read_config(model, "vae").get("block_out_channels")
    if not samples or not isinstance(samples[0], int) or not isinstance(blocks, list):
        return None
    return int(samples[0] * 2 ** (len(blocks) - 1))


def check_whole_size(
    engine: Engine, task: str, limits: RequestLimits, arguments: Mapping[str, Any]
) -> None:
    """Checks the size of a request of which one side, or both, are the model's.

    Raises:
        InvalidRequest: 400, larger than the limits of the service allow.
    """
    given = [name for name in _SIDES if arguments.get(name) is not None]
    is_chosen = len(given) == len(_SIDES) or bool(arguments.get("keep_size"))
    if is_chosen or not _takes_size(engine.find_task(task)):
        return
    height, width = _complete(engine, task, arguments)
    if max(height, width) > limits.max_side or height * width > limits.max_pixels:
        field = given[0] if given else _SIDES[0]
        raise InvalidRequest(
            field,
            arguments.get(field),
            f"at most {limits.max_side} pixels per side and {limits.max_pixels} in all: "
            f"with what is not given it is {width} x {height}",
        )


_SIDES = ("height", "width")


def has_size_of_image(task: Task, fields: Mapping[str, Any]) -> bool:
    """True if a request is answered in the size of its image: not by blocks that choose a size."""
    if fields.get("image") is None or task.output.kind != "image":
        return False
    return not task.is_modular or _takes_size(task)


def _takes_size(task: Task) -> bool:
    return set(_SIDES) <= set(task.inputs)


def _has_free_size(engine: Engine, task: str, request: type[RequestModel]) -> bool:
    """False where the size comes from an image."""
    fields = request.model_fields
    image = fields.get("image")
    may_lack_image = image is None or (
        engine.find_task(task).is_modular and not image.is_required()
    )
    return set(_SIDES) <= set(fields) and may_lack_image


def _complete(engine: Engine, task: str, given: Mapping[str, Any]) -> tuple[int, int]:
    height, width = default_size(engine.pipeline, engine.find_task(task))
    return given.get("height") or height, given.get("width") or width
