"""Runs pipeline code that a model brings, when it is trusted, as a module of its own.

Its name is made from the hash of its files: two models with a ``pipeline.py`` each never mix,
the same code is loaded once, and nothing is written anywhere.
"""

from __future__ import annotations

import contextlib
import importlib.util
import logging
import sys
import threading
from pathlib import Path
from typing import TYPE_CHECKING

from bentoml_diffusers.errors import InvalidModel, InvalidOption, UntrustedSource
from bentoml_diffusers.store.code import find_code, hash_code
from bentoml_diffusers.store.layout import CODE_FOLDER
from bentoml_diffusers.store.trust import is_trusted

if TYPE_CHECKING:
    from collections.abc import Iterator
    from types import ModuleType

    import bentoml
    from diffusers import DiffusionPipeline

    from bentoml_diffusers.store.record import Code

logger = logging.getLogger(__name__)

_lock = threading.RLock()


def load_stored_code(model: bentoml.Model, code: Code, *, trust: bool) -> type[DiffusionPipeline]:
    """Returns the pipeline class of the code that is stored with a model.

    Runs that code.

    Raises:
        InvalidModel: 400, the code is not what was stored, or defines no pipeline.
        UntrustedSource: 400, not trusted here.
    """
    folder = Path(model.path_of(CODE_FOLDER))
    digest = hash_code(folder)
    if digest != code.sha256:
        raise InvalidModel(
            model.tag, f"has other code than was stored: {digest}", "import it again"
        )
    if not (trust or is_trusted(digest)):
        raise _untrusted(f"{code.entry} of {model.tag}, from {code.origin}", digest)
    return _find_class(_import_code(folder / code.entry, digest), code.class_name)


def load_code(custom_pipeline: str, model_folder: Path, *, trust: bool) -> type[DiffusionPipeline]:
    """Returns the pipeline class of code that was not stored with the model.

    Runs that code.

    Raises:
        InvalidModel: 400, the code fails, or defines no pipeline.
        InvalidOption: 400, no such code.
        UntrustedSource: 400, not trusted.
        HubUnavailable: 503, a community pipeline, and the hub could not be reached.
    """
    inside = model_folder / f"{custom_pipeline}.py"
    found = find_code(
        str(inside) if inside.is_file() else custom_pipeline, None, trust_remote_code=trust
    )
    if found is None:
        raise InvalidOption("custom_pipeline", custom_pipeline, "code that is not of this package")
    digest = found.sha256
    if not (trust or is_trusted(digest)):
        raise _untrusted(custom_pipeline, digest)
    return _find_class(_import_code(found.files[found.entry], digest), found.class_name)


def _untrusted(what: str, digest: str) -> UntrustedSource:
    return UntrustedSource(
        "custom_pipeline",
        what,
        f"code that you trust; this one has the sha256 {digest}. Read it, "
        "then give trust_remote_code=True",
    )


def _import_code(path: Path, digest: str) -> ModuleType:
    name = f"_bentoml_diffusers_code_{digest[:24]}"
    with _lock:
        if name in sys.modules:
            return sys.modules[name]
        spec = importlib.util.spec_from_file_location(
            name, path, submodule_search_locations=[str(path.parent)]
        )
        if spec is None or spec.loader is None:
            raise InvalidModel(path.name, "is no Python file")
        module = importlib.util.module_from_spec(spec)
        sys.modules[name] = module  # its relative imports look here
        try:
            with _without_bytecode():
                spec.loader.exec_module(module)
        except BaseException as err:
            for loaded in [item for item in sys.modules if item.partition(".")[0] == name]:
                del sys.modules[loaded]
            if not isinstance(err, Exception):
                raise
            raise InvalidModel(path.name, f"failed: {type(err).__name__}: {err}") from err
        logger.info("running the code of %s, sha256 %s", path.name, digest)
        return module


@contextlib.contextmanager
def _without_bytecode() -> Iterator[None]:
    before = sys.dont_write_bytecode
    sys.dont_write_bytecode = True
    try:
        yield
    finally:
        sys.dont_write_bytecode = before


def _find_class(module: ModuleType, name: str | None) -> type[DiffusionPipeline]:
    from diffusers import DiffusionPipeline

    classes = {
        key: value
        for key, value in vars(module).items()
        if isinstance(value, type) and issubclass(value, DiffusionPipeline)
    }
    if name is None:
        classes = {k: v for k, v in classes.items() if v.__module__ == module.__name__}
    else:
        classes = {k: v for k, v in classes.items() if k == name}
    if len(classes) != 1:
        listed = ", ".join(classes) or "none"
        raise InvalidModel(
            Path(module.__file__ or "").name,
            f"must define one pipeline{f' named {name}' if name else ''}, it has {listed}",
        )
    return next(iter(classes.values()))
