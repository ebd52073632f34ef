"""Modern BentoML services over an engine."""

from __future__ import annotations

import asyncio
import logging
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import bentoml
from bentoml import Tag
from bentoml.models import BentoModel
from PIL.Image import Image  # noqa: TC002 - BentoML reads the annotations of an API
from starlette.responses import JSONResponse, Response

from bentoml_diffusers.engine import Engine
from bentoml_diffusers.errors import DiffusersError, InvalidModel, QueueFull, RequestCancelled
from bentoml_diffusers.options import EngineLimits, ModelOptions, RequestLimits
from bentoml_diffusers.serving.codecs import encode_image
from bentoml_diffusers.serving.metrics import process_metrics
from bentoml_diffusers.serving.schema import make_img2img_model, make_txt2img_model
from bentoml_diffusers.store import read_record

if TYPE_CHECKING:
    from collections.abc import Mapping

    from bentoml_diffusers.engine import Result

logger = logging.getLogger(__name__)

_POLL_S = 0.1


def service(
    model: str,
    *,
    name: str = "diffusers",
    limits: RequestLimits | None = None,
    engine_limits: EngineLimits | None = None,
    service_options: Mapping[str, Any] | None = None,
    **options: Any,
) -> bentoml.Service[Any]:
    """Makes a service with ``/txt2img`` and ``/img2img`` for a stored model.

    Args:
        model: Tag of a pipeline in the model store.
        name: Name of the service.
        limits: What a request may ask for.
        engine_limits: How many requests run and wait at once.
        service_options: Arguments for ``bentoml.service``, such as
            ``{"traffic": {"timeout": 60}, "resources": {"gpu": 1}}``.
        **options: See :class:`bentoml_diffusers.ModelOptions`.

    Raises:
        InvalidOption: 400, an unknown option or a wrong value.
    """
    given = ModelOptions.from_mapping(options)
    bounds = limits or RequestLimits()

    @bentoml.service(name=name, **dict(service_options or {}))
    class DiffusersService:
        bento_model = BentoModel(model)

        def __init__(self) -> None:
            self.engine = Engine.from_model(
                _find_model(DiffusersService, model), limits=engine_limits, **given.given()
            )

        @bentoml.on_deployment  # type: ignore[untyped-decorator]
        def check_model() -> None:
            """Runs once, before the workers: BentoML restarts one that fails for ever."""
            _check_is_pipeline(_find_model(DiffusersService, model))

        @bentoml.api(input_spec=make_txt2img_model(bounds))  # type: ignore[untyped-decorator]
        async def txt2img(self, ctx: bentoml.Context, **fields: Any) -> Image:
            """Paints a picture from text. The seed used is in the header `x-seed`."""
            return await answer(self.engine, ctx, "txt2img", fields)  # type: ignore[no-any-return]

        @bentoml.api(input_spec=make_img2img_model(bounds))  # type: ignore[untyped-decorator]
        async def img2img(self, ctx: bentoml.Context, **fields: Any) -> Image:
            """Paints a picture over another one. The seed used is in the header `x-seed`."""
            return await answer(self.engine, ctx, "img2img", fields)  # type: ignore[no-any-return]

        @bentoml.api  # type: ignore[untyped-decorator]
        def adapters(self) -> dict[str, Any]:
            """LoRAs and textual inversions: which can be named, are in memory, are in slots.

            Of the worker that answers: each has slots of its own.
            """
            return asdict(self.engine.report().adapters)

        def __is_ready__(self) -> bool:
            """BentoML asks it for ``/readyz``."""
            return self.engine.is_ready

        @bentoml.on_shutdown  # type: ignore[untyped-decorator]
        def close_engine(self) -> None:
            self.engine.close(cancel=True)

    return DiffusersService


def _find_model(service: Any, tag: str) -> bentoml.Model:
    """A bento is served with the version that it was built with, even if there is a later one."""
    name = Tag.from_taglike(tag).name
    models = service.bento.info.all_models if service.bento else ()
    pinned = next((info.tag for info in models if info.tag.name == name), tag)
    return BentoModel(pinned).resolve()


def _check_is_pipeline(model: bentoml.Model) -> None:
    record = read_record(Path(model.path))
    if record is not None and record.kind != "pipeline":
        raise InvalidModel(model.tag, f"is a {record.kind}, not a pipeline")


async def answer(engine: Engine, ctx: bentoml.Context, task: str, fields: Mapping[str, Any]) -> Any:
    """Runs a request of a service and answers it: a picture with its seed, or an error as JSON.

    The request is stopped within one denoising step when its client goes away or BentoML's
    ``traffic.timeout`` cancels it.
    """
    arguments = {key: value for key, value in fields.items() if value is not None}
    output_format = arguments.pop("output_format")
    for name in ("lora_weights", "textual_inversions"):
        if name in arguments:
            arguments[name] = [choice.model_dump() for choice in arguments[name]]
    metrics = process_metrics()
    try:
        result = await _run_while_connected(engine, ctx, task, arguments)
    except DiffusersError as error:
        metrics.note_error(task, error)
        return _error_response(ctx, error)
    metrics.note_result(task, result)
    body = await asyncio.to_thread(encode_image, result.images[0], output_format)
    return Response(
        body,
        media_type=f"image/{output_format}",
        headers={"x-seed": str(result.seeds[0])} if result.seeds else None,
    )


async def _run_while_connected(
    engine: Engine, ctx: bentoml.Context, task: str, arguments: Mapping[str, Any]
) -> Result:
    running = asyncio.ensure_future(engine.arun(task, **arguments))
    try:
        while True:
            done, _ = await asyncio.wait({running}, timeout=_POLL_S)
            if done:
                return running.result()
            if await ctx.request.is_disconnected():
                raise RequestCancelled("the client went away")
    finally:
        running.cancel()


def _error_response(ctx: bentoml.Context, error: DiffusersError) -> Response:
    status = int(error.error_code)
    ctx.response.status_code = status  # else BentoML puts its own 200 on the answer
    field = getattr(error, "field", None)
    detail = [{"loc": [field], "msg": str(error)}] if field else []
    headers = {"retry-after": str(error.retry_after_s)} if isinstance(error, QueueFull) else None
    body = {"error": _public_text(error), "detail": detail}
    return JSONResponse(body, status_code=status, headers=headers)


def _public_text(error: DiffusersError) -> str:
    """What a client may read: a failure of the pipeline can quote paths of the server."""
    if error.error_code == 500:
        return "the picture could not be painted; the server's log says why"
    return str(error)
