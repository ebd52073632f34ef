"""The only place that looks at versions, or into private corners, of other packages.

Each entry says what will let us delete it.
"""

from __future__ import annotations

import functools
import importlib.metadata
import inspect
import logging
import os
import pickle
import sys
import warnings
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import bentoml
from bentoml import Tag

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    import torch


def find_version(package: str) -> str | None:
    """Returns the version of an installed package; ``None`` if it is not installed."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


@dataclass(frozen=True)
class StoreAccess:
    """BentoML's model store on disk. Until ``bentoml.models.create`` writes atomically."""

    root: Path

    def set_latest(self, tag: Tag) -> None:
        """Makes ``tag`` the latest version of its name."""
        temporary = self.root / tag.name / f".latest-{tag.version}"
        temporary.write_text(tag.version)
        temporary.rename(self.root / tag.latest_path())


def model_store() -> StoreAccess:
    """Returns the model store of the current ``BENTOML_HOME``."""
    from bentoml._internal.configuration.containers import BentoMLContainer

    return StoreAccess(Path(BentoMLContainer.model_store_dir.get()))


def parse_models_by_libyaml() -> None:
    """Lets BentoML parse ``model.yaml`` in C: a model is found in 1 ms, not in 4.

    Until its ``ModelInfo.from_yaml_file`` does so (not in 1.4.40).
    """
    import yaml
    from bentoml._internal.models import model

    if yaml.__with_libyaml__:
        fast = functools.partial(yaml.load, Loader=yaml.CSafeLoader)
        model.yaml = SimpleNamespace(**{**vars(yaml), "safe_load": fast})


def api_with_headers(headers: Mapping[str, str], **options: Any) -> Callable[[Any], Any]:
    """Returns a decorator like ``bentoml.api``, whose OpenAPI entry has the headers of the answer.

    Until ``bentoml.api`` takes them (not in 1.4.40).

    Args:
        headers: What each of them says.
        **options: Arguments of ``bentoml.api``.
    """
    from _bentoml_sdk.method import APIMethod

    class DocumentedMethod(APIMethod):  # type: ignore[misc]
        __slots__ = ()

        def openapi_response(self) -> dict[str, Any]:
            listed = {
                name: {"description": text, "schema": {"type": "string"}}
                for name, text in headers.items()
            }
            return {**APIMethod.openapi_response(self), "headers": listed}

    return lambda function: DocumentedMethod(function, **options)


def is_runner_process() -> bool:
    """True in the process of a legacy runner that ``bentoml serve`` started."""
    from bentoml._internal.context import server_context

    return bool(server_context.service_type == "runner")


def bound_host(service_name: str) -> str:
    """Returns the address that ``bentoml serve`` listens on for a service; empty if unknown.

    Until BentoML tells a service. Its workers know the address of each by a map of URLs, in which
    all addresses of the machine are ``localhost``.
    """
    from bentoml._internal.configuration.containers import BentoMLContainer

    url = str(BentoMLContainer.remote_runner_mapping.get().get(service_name, ""))
    return url.partition("://")[2].rpartition(":")[0]


def find_origin_check() -> Callable[[str], bool]:
    """Returns whether BentoML's ``http.cors`` lets the pages of an origin ask.

    Until BentoML's own check refuses forms, too, for which browsers ask for no permission.
    """
    from bentoml._internal.configuration.containers import BentoMLContainer
    from starlette.applications import Starlette
    from starlette.middleware.cors import CORSMiddleware

    is_enabled = BentoMLContainer.http.cors.enabled.get()
    options = BentoMLContainer.access_control_options.get() if is_enabled else {}
    return CORSMiddleware(Starlette(), **options).is_allowed_origin


def quiet_refusals() -> None:
    """Lets BentoML log one line for a request that was refused, and no traceback.

    It logs one for each error, its own and those of this package, that a legacy service or a
    pickle on a public port answers with 4xx. Until it logs them by their status (1.4.40).
    """
    logger = logging.getLogger("bentoml._internal.server.http_app")
    if _shorten_refusal not in logger.filters:
        logger.addFilter(_shorten_refusal)


def _shorten_refusal(record: logging.LogRecord) -> bool:
    error = record.exc_info[1] if record.exc_info else None
    is_own = type(error).__module__.startswith("bentoml_diffusers.")
    status = int(getattr(error, "error_code", 500))
    if status == 415 or (is_own and status < 500):
        record.msg, record.args = f"{record.getMessage()}: {status} %s", (str(error)[:500],)
        record.exc_info, record.levelno, record.levelname = None, logging.WARNING, "WARNING"
    return True


def runner_timeout_s() -> float | None:
    """Seconds that a call of a runner may take; ``None`` outside of one.

    A little less than BentoML's own timeout, whose answer has no text.
    """
    from bentoml._internal.configuration.containers import BentoMLContainer

    if not is_runner_process():
        return None
    return 0.95 * float(BentoMLContainer.runners_config.get()["traffic"]["timeout"])


def restore_text_model(view: Any, encoder: Any) -> None:
    """Lets a view of a text encoder have the ``text_model`` that it itself is by now.

    transformers 5 made one class of the two, and diffusers (0.42) asks the inner one for its final
    norm where ``clip_skip`` is given. Until it asks the encoder.
    """
    if hasattr(encoder, "final_layer_norm") and not hasattr(encoder, "text_model"):
        vars(view)["text_model"] = encoder


def service_timeout_s(service: Any) -> float | None:
    """Seconds that a request of a modern service may take; ``None``: as long as it takes.

    A little less than BentoML's own ``traffic.timeout``, whose answer comes from outside of the
    service. Until a service can ask for it in public (BentoML 1.4).
    """
    from bentoml._internal.configuration.containers import BentoMLContainer

    # Empty where no server runs, as for a service that is made in a test.
    known = BentoMLContainer.config.get().get("services", {})
    given = (known.get(service.name, {}), service.config, known)
    found = (config.get("traffic", {}).get("timeout") for config in given)
    timeout_s = next((one for one in found if one is not None), None)
    return None if timeout_s is None else 0.95 * float(timeout_s)


def fix_execution_device(pipeline: Any) -> None:
    """Notes where a pipeline runs, by a subclass of its class.

    Until diffusers (0.42) looks for it without a walk over all modules, which takes milliseconds,
    at each call, and at each block of a modular pipeline.
    """
    cls = type(pipeline)
    names = {"__module__": cls.__module__, "__qualname__": cls.__qualname__, "__doc__": cls.__doc__}
    fixed = {"_execution_device": pipeline._execution_device, **names}
    pipeline.__class__ = type(cls.__name__, (cls,), fixed)


def signature_of(function: Callable[..., Any]) -> inspect.Signature:
    """Returns the signature of a model's method, also behind diffusers' ``apply_forward_hook``.

    Until diffusers 0.42 is the lowest: the wrapper of 0.41 tells of ``*args`` and ``**kwargs``.
    """
    wrapper = getattr(function, "__func__", None)
    if wrapper is not None and wrapper.__qualname__ == "apply_forward_hook.<locals>.wrapper":
        method = inspect.getclosurevars(wrapper).nonlocals["method"]
        function = method.__get__(function.__self__)  # type: ignore[attr-defined]
    return inspect.signature(function)


def compile_in_place(pipeline: Any) -> None:
    """Turns what ``torch.compile(module)`` wrapped into modules that are compiled in their place.

    A wrapper is of no class of diffusers, and is in the path of each layer in it, so that neither
    diffusers nor PEFT finds them. Until diffusers (0.42) loads LoRAs into wrapped modules.
    """
    import torch

    for name, part in pipeline.components.items():
        plain = _compile_in_place(part) if isinstance(part, torch.nn.Module) else part
        if plain is not part:
            setattr(pipeline, name, plain)


def _compile_in_place(module: torch.nn.Module) -> torch.nn.Module:
    """Returns the module without its wrapper, if it has one."""
    parts = module._modules
    for name, part in parts.items():
        if part is not None:
            parts[name] = _compile_in_place(part)
    wrapped: Any = parts.get("_orig_mod")
    if wrapped is None:
        return module
    # As `Module.compile` does it.
    wrapped._compiled_call_impl = module.dynamo_ctx(wrapped._call_impl)  # type: ignore[operator]
    return wrapped  # type: ignore[no-any-return]


def is_compiled(module: torch.nn.Module) -> bool:
    """True if a module, or a part of it, is compiled in its place.

    Until torch (2.13) tells it in public.
    """
    return any(part._compiled_call_impl is not None for part in module.modules())


def quiet_lora_loading() -> None:
    """Silences what diffusers and PEFT say at every ordinary LoRA of a request.

    That it has no part for the text encoder (diffusers 0.42), and that there is more than one
    (PEFT 0.21). Until they say it at a lower level.
    """
    warnings.filterwarnings("ignore", message="Already found a `peft_config` attribute")
    logging.getLogger("diffusers.loaders.lora_base").addFilter(
        lambda record: "No LoRA keys associated to" not in record.getMessage()
    )


def reads_lokr(pipeline: Any) -> bool:
    """True if diffusers' own loader of a pipeline's class reads LoKr (0.42: Z-Image and Flux 2).

    Until diffusers says which kinds a class takes.
    """
    convert = getattr(pipeline, "lora_state_dict", None)
    return convert is not None and "lokr" in inspect.getsource(inspect.unwrap(convert.__func__))


def reads_alpha_of_file(pipeline: Any) -> bool:
    """True if diffusers takes a LoRA's alpha from the metadata of its file (0.42: MiniMax-H3).

    Until diffusers reads such metadata of tensors in memory.
    """
    convert = getattr(pipeline, "lora_state_dict", None)
    return convert is not None and "file_metadata" in inspect.getsource(
        inspect.unwrap(convert.__func__)
    )


def attention_backend() -> str:
    """Name of the attention kernel that diffusers uses where no module says otherwise.

    Until diffusers tells it in public.
    """
    from diffusers.models.attention_dispatch import _AttentionBackendRegistry

    backend, _ = _AttentionBackendRegistry.get_active_backend()
    return str(backend.value)


def alias_upstream_module(module: Any) -> None:
    """Makes ``bentoml.diffusers`` this package, in whichever way it is reached.

    Until BentoML drops its deprecated module, and after that for code that still says the name.
    """
    sys.modules["bentoml.diffusers"] = module
    bentoml.diffusers = module


def let_runner_calls_overlap() -> None:
    """Lets the calls of a runner run side by side if its runnable has ``max_concurrent_calls``.

    BentoML allows one call at a time in each runner process, also for runnables that say that
    they support threads. Until ``LocalRunnerRef`` honours ``SUPPORTS_CPU_MULTI_THREADING``.
    """
    import anyio
    from bentoml._internal.runner.runner_handle.local import LocalRunnerRef

    if getattr(LocalRunnerRef, "lets_calls_overlap", False):
        return
    start = LocalRunnerRef.__init__

    @functools.wraps(start)
    def start_with_limit(self: Any, runner: Any) -> None:
        start(self, runner)
        calls = getattr(self._runnable, "max_concurrent_calls", None)
        self._limiter = anyio.CapacityLimiter(calls) if calls else None

    LocalRunnerRef.__init__ = start_with_limit
    LocalRunnerRef.lets_calls_overlap = True


def keep_thread_counts() -> None:
    """Lets a number of threads that the operator sets reach the workers of a runner.

    BentoML sets ``OMP_NUM_THREADS``, ``MKL_NUM_THREADS`` and others to the number of CPUs in each
    worker, whatever is set. Applies to runnables with ``keeps_thread_counts``. Until
    ``DefaultStrategy.get_worker_env`` leaves alone what is set (not in 1.4.40).
    """
    from bentoml._internal.runner.strategy import THREAD_ENVS, DefaultStrategy

    if getattr(DefaultStrategy, "keeps_thread_counts", False):
        return
    decide = DefaultStrategy.get_worker_env

    @functools.wraps(decide)
    def get_worker_env(cls: Any, runnable_class: Any, *args: Any) -> dict[str, Any]:
        del cls
        environ: dict[str, Any] = decide(runnable_class, *args)
        is_set = any(name in os.environ for name in THREAD_ENVS)
        if not (is_set and getattr(runnable_class, "keeps_thread_counts", False)):
            return environ
        # None of them: torch asks MKL first, and MKL what OpenMP says where it is told nothing.
        return {name: value for name, value in environ.items() if name not in THREAD_ENVS}

    DefaultStrategy.get_worker_env = classmethod(get_worker_env)
    DefaultStrategy.keeps_thread_counts = True


def install_image_container() -> None:
    """Lets PIL images of any making pass to a legacy runner.

    BentoML encodes an image argument in ``image.format``, which is ``None`` for every image that
    was created or resized, and fails; here it travels as it is. Until BentoML's
    ``PILImageContainer`` does so (broken in 1.4.40).
    """
    from bentoml._internal.runner.container import (
        DataContainerRegistry,
        Payload,
        PILImageContainer,
    )
    from bentoml._internal.types import LazyType

    class PicklePILContainer(PILImageContainer):  # type: ignore[misc]
        """A PIL image as pickled pixels: exact, for every mode, and faster than PNG."""

        @classmethod
        def to_payload(cls, batch: Any, batch_dim: int) -> Payload:
            del batch_dim
            return cls.create_payload(pickle.dumps(batch.copy()), batch_size=1)

        @classmethod
        def from_payload(cls, payload: Payload) -> Any:
            return pickle.loads(payload.data)  # noqa: S301 - between BentoML's own processes

    image_type = LazyType("PIL.Image", "Image")
    DataContainerRegistry.register_container(image_type, image_type, PicklePILContainer)


def installed_version(name: str) -> str | None:
    """Returns the version of an installed package; ``None`` without it."""
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def unmet_requirements(package: str = "bentoml-diffusers") -> list[str]:
    """Returns which requirements of a package the installed versions do not meet, in words."""
    from packaging.requirements import Requirement

    unmet = []
    for requirement in map(Requirement, importlib.metadata.requires(package) or ()):
        if requirement.marker and not requirement.marker.evaluate({"extra": ""}):
            continue
        version = installed_version(requirement.name)
        if version is None:
            unmet.append(f"{requirement.name} is not installed, expected {requirement.specifier}")
        elif not requirement.specifier.contains(version, prereleases=True):
            unmet.append(f"{requirement.name} is {version}, expected {requirement.specifier}")
    return unmet
