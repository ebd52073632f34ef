"""The optional hook at interpreter start: ``bentoml diffusers hook install``."""

from __future__ import annotations

import sys
import sysconfig
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Sequence
    from importlib.machinery import ModuleSpec
    from types import ModuleType

_LINE = "import bentoml_diffusers._hook as hook; hook.watch()\n"


def _path() -> Path:
    return Path(sysconfig.get_path("purelib")) / "bentoml_diffusers_hook.pth"


def show() -> str:
    """Describes the hook, and whether it is installed."""
    state = "installed" if _path().is_file() else "not installed"
    return f"{state}: {_path()} with the line\n  {_LINE.strip()}"


def install() -> str:
    """Installs the hook."""
    _path().write_text(_LINE)
    return f"written: {_path()}\nremove it with: bentoml diffusers hook remove"


def remove() -> str:
    """Removes the hook."""
    if not _path().is_file():
        return f"there was none: {_path()}"
    _path().unlink()
    return f"removed: {_path()}"


def watch() -> None:
    """Waits for the import of ``bentoml``, then takes the name ``bentoml.diffusers``."""
    sys.meta_path.insert(0, _Watcher())


class _Watcher:
    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        del path, target
        if name != "bentoml":
            return None
        sys.meta_path.remove(self)
        spec = find_spec("bentoml")
        if spec is not None and spec.loader is not None:
            spec.loader = _Loader(spec.loader)  # type: ignore[assignment]
        return spec


class _Loader:
    def __init__(self, loader: Any) -> None:
        self._loader = loader

    def __getattr__(self, name: str) -> Any:
        return getattr(self._loader, name)

    def create_module(self, spec: ModuleSpec) -> Any:
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        self._loader.exec_module(module)
        import bentoml_diffusers  # noqa: F401 - takes the name `bentoml.diffusers`
