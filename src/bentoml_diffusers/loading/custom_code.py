"""Imports pipeline code that a model brings, if it is trusted, as a module of its own.

The module's name contains the hash of its files: two models with a ``pipeline.py`` each never
mix, the same code is imported once, and nothing is written to disk.
"""

from __future__ import annotations

import contextlib
import importlib.util
import logging
import re
import sys
import threading
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar, get_origin

from bentoml_diffusers.errors import InvalidModel, InvalidOption, UntrustedSource
from bentoml_diffusers.store import CODE_FOLDER, find_code, hash_code, is_trusted

if TYPE_CHECKING:
    from collections.abc import Iterator
    from types import ModuleType

    import bentoml
    from diffusers import DiffusionPipeline
    from diffusers.modular_pipelines import ModularPipelineBlocks

    from bentoml_diffusers.store import Code

logger = logging.getLogger(__name__)

T = TypeVar("T")

_lock = threading.RLock()
_FILE = re.compile(r"[A-Za-z_]\w*\.py")


class RunningCode:
    """Imported code, as a private package.

    Args:
        module: Module with the pipeline or the blocks.
        class_name: Class in it, if the model names one.
    """

    def __init__(self, module: ModuleType, class_name: str | None) -> None:
        self._module = module
        self._class_name = class_name

    def pipeline_class(self) -> type[DiffusionPipeline]:
        """Returns its pipeline class.

        Raises:
            InvalidModel: 400, it defines none, or several.
        """
        from diffusers import DiffusionPipeline

        return _find_class(self._module, self._class_name, DiffusionPipeline, "pipeline")

    def blocks_class(self) -> type[ModularPipelineBlocks]:
        """Returns its class of blocks.

        Raises:
            InvalidModel: 400, it defines none, or several without a name.
        """
        from diffusers.modular_pipelines import ModularPipelineBlocks

        return _find_class(self._module, self._class_name, ModularPipelineBlocks, "class of blocks")

    def block_class(self, file: str, name: str) -> type[ModularPipelineBlocks]:
        """Returns a block by its file and name.

        Raises:
            InvalidModel: 400, it is not there.
        """
        from diffusers.modular_pipelines import ModularPipelineBlocks

        entry = Path(self._module.__file__ or "")
        module = self._module if file == entry.name else _import_beside(self._module, file)
        return _find_class(module, name, ModularPipelineBlocks, "block")


def run_stored_code(model: bentoml.Model, code: Code, *, trust: bool) -> RunningCode:
    """Imports the code that is stored with a model.

    Raises:
        InvalidModel: 400, the code was changed, or fails.
        UntrustedSource: 400, not trusted in this store.
    """
    folder = Path(model.path_of(CODE_FOLDER))
    digest = hash_code(folder)
    if digest != code.sha256:
        raise InvalidModel(
            model.tag, f"has code that was changed after its import: {digest}", "import it again"
        )
    if not (trust or is_trusted(digest)):
        raise _untrusted(f"{code.entry} of {model.tag}, from {code.origin}", digest)
    return RunningCode(_import_code(folder / code.entry, digest), code.class_name)


def run_code(custom_pipeline: str, model_folder: Path, *, trust: bool) -> RunningCode:
    """Imports code that was not stored with the model.

    Raises:
        InvalidModel: 400, the code fails.
        InvalidOption: 400, no such code.
        UntrustedSource: 400, not trusted.
        HubUnavailable: 503, a community pipeline, and the hub could not be reached.
    """
    inside = model_folder / f"{custom_pipeline}.py"
    found = find_code(
        str(inside) if inside.is_file() else custom_pipeline, None, trust_remote_code=trust
    )
    if found is None:
        raise InvalidOption(
            "custom_pipeline", custom_pipeline, "code, not the name of a bundled pipeline"
        )
    digest = found.sha256
    if not (trust or is_trusted(digest)):
        raise _untrusted(custom_pipeline, digest)
    return RunningCode(_import_code(found.files[found.entry], digest), found.class_name)


def _untrusted(what: str, digest: str) -> UntrustedSource:
    return UntrustedSource(
        "custom_pipeline",
        what,
        f"only trusted code; this has the sha256 {digest}. Review it, "
        "then pass trust_remote_code=True to the import, or here",
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
            raise InvalidModel(path.name, "is not a Python file")
        module = importlib.util.module_from_spec(spec)
        sys.modules[name] = module  # where its relative imports look
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


def _import_beside(package: ModuleType, file: str) -> ModuleType:
    """Imports another file of a private package once, as its own imports would."""
    if not isinstance(file, str) or not _FILE.fullmatch(file):  # the name is not part of the hash
        raise InvalidModel(str(file), "is not a file in the code of the model")
    path = Path(package.__file__ or "").parent / file
    name = f"{package.__name__}.{path.stem}"
    with _lock:
        if name in sys.modules:
            return sys.modules[name]
        spec = importlib.util.spec_from_file_location(name, path)
        if not path.is_file() or spec is None or spec.loader is None:
            raise InvalidModel(file, "is not in the code of the model")
        module = importlib.util.module_from_spec(spec)
        sys.modules[name] = module
        try:
            with _without_bytecode():
                spec.loader.exec_module(module)
        except Exception as err:
            del sys.modules[name]
            raise InvalidModel(file, f"failed: {type(err).__name__}: {err}") from err
        return module


@contextlib.contextmanager
def _without_bytecode() -> Iterator[None]:
    before = sys.dont_write_bytecode
    sys.dont_write_bytecode = True
    try:
        yield
    finally:
        sys.dont_write_bytecode = before


def _find_class(module: ModuleType, name: str | None, base: type[T], kind: str) -> type[T]:
    classes = {
        key: value
        for key, value in vars(module).items()
        # On Python 3.10 `list[int]` counts as a class, too.
        if isinstance(value, type) and get_origin(value) is None and issubclass(value, base)
    }
    if name is None:
        classes = {k: v for k, v in classes.items() if v.__module__ == module.__name__}
    else:
        classes = {k: v for k, v in classes.items() if k == name}
    if len(classes) != 1:
        listed = ", ".join(classes) or "none"
        raise InvalidModel(
            Path(module.__file__ or "").name,
            f"must define one {kind}{f' named {name}' if name else ''}, it has {listed}",
        )
    return next(iter(classes.values()))
