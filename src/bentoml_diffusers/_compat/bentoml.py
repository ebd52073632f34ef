"""Corners of BentoML's store and of its modern services."""

from __future__ import annotations

import functools
import logging
import sys
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import bentoml
from bentoml import Tag

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping


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
    """Returns the model store of the current ``BENTOML_HOME``.

    Until ``bentoml.models`` (1.4) tells its folder in public.
    """
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


def alias_upstream_module(module: Any) -> None:
    """Makes ``bentoml.diffusers`` this package, in whichever way it is reached.

    Until BentoML drops its deprecated module, and after that for code that still says the name.
    """
    sys.modules["bentoml.diffusers"] = module
    bentoml.diffusers = module


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


def read_payload(body: bytes, headers: Mapping[str, str], serde: Any) -> Any:
    """Returns what a service of the same bento sent in BentoML's own format. Unpickles.

    Until BentoML (1.4) reads such a call for a method that reads its own requests.
    """
    from _bentoml_impl.serde import Payload

    return serde.deserialize_value(Payload((body,), metadata=headers))


def log_as_bentoml(name: str) -> None:
    """Lets a logger say as much as BentoML's own, in a process that ``bentoml serve`` started.

    Everyone else's says only warnings there. Until a service can ask for it (BentoML 1.4).
    """
    from bentoml._internal.context import server_context

    mine = logging.getLogger(name)
    if server_context.service_type is not None and mine.level == logging.NOTSET:
        mine.setLevel(logging.getLogger("bentoml").level)


def swagger_folder() -> Path:
    """Returns the folder of Swagger UI's files, which BentoML brings.

    Until its own page loads nothing from foreign hosts (1.4.40), and shows a document of ours.
    """
    from bentoml._internal import server

    return Path(server.__file__).parent / "static_content"
