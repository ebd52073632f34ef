"""Modern BentoML services over an engine."""

from __future__ import annotations

import contextlib
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import bentoml
from bentoml import Tag
from bentoml.models import BentoModel

from bentoml_diffusers import _compat
from bentoml_diffusers._compat import service_timeout_s
from bentoml_diffusers._logs import quiet_loading
from bentoml_diffusers.adapters.static import find_static_adapters
from bentoml_diffusers.engine import Engine
from bentoml_diffusers.errors import DiffusersError, InvalidModel, InvalidRequest
from bentoml_diffusers.loading.pipeline import stored_options
from bentoml_diffusers.options import EngineLimits, ModelOptions, RequestLimits
from bentoml_diffusers.serving.dialects import (
    DEFAULT_DIALECTS,
    DialectContext,
    choose_dialects,
    make_apis,
    make_app,
)
from bentoml_diffusers.serving.dispatcher import NOTHING, Dispatcher
from bentoml_diffusers.serving.endpoints import find_endpoints
from bentoml_diffusers.serving.guards import OPEN, list_guards
from bentoml_diffusers.serving.jobs import Jobs
from bentoml_diffusers.serving.keys import KeyRing
from bentoml_diffusers.serving.options import JobOptions, OpenAIOptions
from bentoml_diffusers.serving.pins import pin_adapters
from bentoml_diffusers.serving.request_ids import RequestIds
from bentoml_diffusers.serving.sizes import check_default_sizes, check_stored_size
from bentoml_diffusers.serving.startup import say_loading
from bentoml_diffusers.serving.uploads import UploadBudget
from bentoml_diffusers.store import get, read_record
from bentoml_diffusers.tasks import shows_options

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Mapping, Sequence

    from bentoml_diffusers.options import EmbedOptions
    from bentoml_diffusers.serving.access import AccessOptions, KeyOptions


@shows_options(ModelOptions)
def service(
    model: str,
    *,
    name: str = "diffusers",
    limits: RequestLimits | None = None,
    engine_limits: EngineLimits | None = None,
    embed: EmbedOptions = NOTHING,
    allowed_hosts: Collection[str] | None = None,
    dialects: Sequence[str] = DEFAULT_DIALECTS,
    openai: OpenAIOptions | None = None,
    keys: KeyOptions | None = None,
    access: AccessOptions = OPEN,
    jobs: JobOptions | None = None,
    service_options: Mapping[str, Any] | None = None,
    **options: Any,
) -> bentoml.Service[Any]:
    """Makes a service for a stored model.

    A classic pipeline has ``/txt2img``, ``/img2img`` and ``/inpaint``; a modular one has an
    endpoint for each modular workflow that its components suffice for, such as ``/text2image``,
    whose fields are the inputs of its blocks. It must be in the store when this is called, and the
    code of its blocks trusted. ``/replay`` repeats a workflow of one of these.

    Args:
        model: Tag of a pipeline in the model store.
        name: Name of the service.
        limits: What a request may ask for.
        engine_limits: How many requests run and wait at once.
        embed: What is written into the images; by default nothing.
        allowed_hosts: Names by which clients may call the service (header ``Host``), beside
            ``localhost`` and loopback addresses; all others get 403. ``None`` takes any name, but
            from web pages none that they could have pointed at this machine themselves. Where
            ``bentoml serve`` listens on a loopback address only, it takes none: there a web page
            of a stranger could reach the service by a name that points at it.
        dialects: The APIs that it speaks, by name.
        openai: How it speaks OpenAI's.
        keys: API keys that clients need; ``None``: everyone may call who can reach the service.
        access: Which paths are open, need a key, or are closed; which web pages may call.
        jobs: Takes jobs too, in the API of Replicate, and where it keeps them.
        service_options: Arguments for ``bentoml.service``, such as
            ``{"traffic": {"timeout": 60}, "resources": {"gpu": 1}}``.
        **options: See :class:`bentoml_diffusers.ModelOptions`.

    Raises:
        InvalidOption: 400, an unknown option or a wrong value, or limits below what a request gets
            that leaves it out.
        InvalidModel: 400, a modular pipeline that generates no images.
        UntrustedSource: 400, the code of a modular pipeline is not trusted.
    """
    given = ModelOptions.from_mapping(options)
    bounds = limits or RequestLimits()
    with quiet_loading():  # the classes of the pipeline are imported
        endpoints = find_endpoints(model, given, bounds)
    uploads = UploadBudget(bounds.max_open_upload_bytes)
    for endpoint in endpoints:
        endpoint.request.uploads = uploads
    context = DialectContext(
        name=name,
        model=model,
        endpoints=endpoints,
        limits=bounds,
        uploads=uploads,
        dialects=choose_dialects(dialects, has_jobs=jobs is not None),
        openai=openai or OpenAIOptions(),
    )
    requests, apis = context.requests, make_apis(context)
    _compat.quiet_refusals()
    _compat.bound_connections(
        receive_timeout_s=access.receive_timeout_s,
        send_timeout_s=access.send_timeout_s,
        max_connections=access.max_connections,
    )

    needed = {f"adapter_{n}": BentoModel(tag) for n, tag in enumerate(_static_tags(model, given))}

    @bentoml.service(name=name, **dict(service_options or {}))
    class DiffusersService(type("Endpoints", (), {**apis, **needed})):  # type: ignore[misc]
        bento_model = BentoModel(model)

        def __init__(self) -> None:
            found = _find_model(DiffusersService, model)
            options = stored_options(found).overridden_by(given)
            pinned = pin_adapters(options, _bento_tags(DiffusersService))
            with say_loading(found.tag):
                self.engine = Engine.from_model(
                    found,
                    limits=_with_timeout(engine_limits or EngineLimits(), DiffusersService),
                    **{**given.given(), **pinned},
                )
                _find_tasks(self.engine, requests)
            check_default_sizes(self.engine, requests)
            context.load(Dispatcher(self.engine, requests, embed), found)
            if jobs is not None:
                context.load_jobs(Jobs(jobs, name, Dispatcher(self.engine, requests, embed)))

        @bentoml.on_deployment  # type: ignore[untyped-decorator]
        def check_model() -> None:
            """Runs once, before the workers: BentoML restarts one that fails for ever."""
            if keys is not None:
                KeyRing(keys)
            found = _find_model(DiffusersService, model)
            _check_is_pipeline(found)
            check_stored_size(found, requests)

        def __repr__(self) -> str:
            return f"<Service {name!r}: {', '.join(apis)}; {self.engine!r}>"

        def __is_ready__(self) -> bool:
            """BentoML asks it for ``/readyz``."""
            return self.engine.is_ready

        @bentoml.on_shutdown  # type: ignore[untyped-decorator]
        def close_engine(self) -> None:
            if jobs is not None:
                context.jobs.close()
            self.engine.close(cancel=True)

    DiffusersService.mount_asgi_app(make_app(context), path="/", name="dialects")
    DiffusersService.add_asgi_middleware(RequestIds)
    for middleware, settings in list_guards(name, allowed_hosts, keys, access):
        DiffusersService.add_asgi_middleware(middleware, **settings)
    return DiffusersService


def _with_timeout(limits: EngineLimits, service: Any) -> EngineLimits:
    """So the engine itself knows which requests are late, and answers with its own error."""
    if limits.timeout_s is not None:
        return limits
    return replace(limits, timeout_s=service_timeout_s(service))


def _static_tags(model: str, given: ModelOptions) -> list[str]:
    """Tags of the adapters that the service is loaded with: its bento needs them, too."""
    try:
        found = find_static_adapters(stored_options(get(model)).overridden_by(given))
    except DiffusersError:
        return []  # the start says what is missing
    tags = (adapter.tag for adapter in (*found.loras, *found.inversions))
    return list(dict.fromkeys(tag for tag in tags if tag is not None))


def _find_model(service: Any, tag: str) -> bentoml.Model:
    """A bento is served with the version that it was built with, even if there is a later one."""
    name = Tag.from_taglike(tag).name
    pinned = next((one for one in _bento_tags(service) if one.name == name), tag)
    return BentoModel(pinned).resolve()


def _bento_tags(service: Any) -> list[Tag]:
    """Tags of the models in a service's bento; none without one."""
    return [info.tag for info in service.bento.info.all_models] if service.bento else []


def _find_tasks(engine: Engine, tasks: Iterable[str]) -> None:
    """Imports now what the first request of each task would wait a second for."""
    for task in tasks:
        with contextlib.suppress(InvalidRequest):
            engine.find_task(task)


def _check_is_pipeline(model: bentoml.Model) -> None:
    record = read_record(Path(model.path))
    if record is not None and record.kind != "pipeline":
        raise InvalidModel(model.tag, f"is a {record.kind}, not a pipeline")
