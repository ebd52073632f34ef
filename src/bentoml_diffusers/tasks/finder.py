"""Finds the tasks of a pipeline by name."""

from __future__ import annotations

import contextlib
import functools
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from bentoml_diffusers import _names
from bentoml_diffusers.errors import InvalidRequest, suggest
from bentoml_diffusers.tasks.blocks import read_all_blocks, read_modular_workflows
from bentoml_diffusers.tasks.own import name_own_task
from bentoml_diffusers.tasks.signatures import read_task

if TYPE_CHECKING:
    from collections.abc import Mapping
    from typing import Protocol

    from bentoml_diffusers.tasks.task import Task

    class Finder(Protocol):
        """Knows the tasks of one pipeline."""

        def find(self, name: str) -> Task:
            """Returns the task with a name."""


# Our tasks by the names that blocks use, of which there are several.
_MODULAR_NAMES: Mapping[str, tuple[str, ...]] = {
    "txt2img": ("text2image",),
    "text2img": ("text2image",),
    "img2img": ("image2image", "img2img", "image_conditioned"),
    "inpaint": ("inpainting", "image_conditioned_inpainting"),
}
_IP_ADAPTER_INPUT = "ip_adapter_image"


def is_modular(pipeline: Any) -> bool:
    """True for modular pipelines, which are made of blocks."""
    return hasattr(pipeline, "blocks")


def has_method(cls: type[Any], name: str) -> bool:
    """True if ``cls`` defines the method; ``hasattr`` finds ``__call__`` on every class."""
    return any(name in vars(base) for base in cls.__mro__)


def find_tasks(pipeline: Any, only: str | None = None) -> Finder:
    """Returns the finder for the tasks of a pipeline.

    Args:
        pipeline: A pipeline, classic or modular.
        only: Name of the modular workflow that its blocks were cut down to, if they were.
    """
    return ModularTasks(pipeline, only) if is_modular(pipeline) else ClassicTasks(type(pipeline))


def read_method(pipeline: Any, method: str = "__call__") -> Task:
    """Returns the task of a method, even if the pipeline lacks components for it.

    If it has ``**kwargs`` any name is accepted, as by the method itself.
    """
    if method == "__call__" and is_modular(pipeline):
        return read_all_blocks(pipeline.blocks)
    task = read_task(method, type(pipeline), method)
    return replace(task, takes_all=task.takes_all or bool(task.open_names))


def list_classic_tasks(cls: type[Any]) -> dict[str, Task]:
    """Returns the named tasks that a pipeline class, or a class of its family, can do."""
    tasks = ClassicTasks(cls)
    found = {}
    for name in _names.TASKS:
        with contextlib.suppress(InvalidRequest):
            found[name] = tasks.find(name)
    return found


class ClassicTasks:
    """The tasks of a classic pipeline: its methods, and those of other classes of its family."""

    def __init__(self, cls: type[Any]) -> None:
        self._class = cls
        self._find = functools.cache(self._find_task)

    def find(self, name: str) -> Task:
        """Returns the task with a name.

        Args:
            name: A name such as ``"txt2img"`` or ``"txt2video"``, or a method of the class.

        Raises:
            InvalidRequest: 400, the pipeline has no such task.
        """
        return self._find(name)

    def _find_task(self, name: str) -> Task:
        _check_public(name)
        if has_method(self._class, name):
            return read_task(name, self._class, name)
        return self.find_by_name(name)

    def find_by_name(self, name: str) -> Task:
        """Returns a named task, such as ``"img2img"``. See :meth:`find`."""
        if name not in _names.TASKS:
            listed = ", ".join(_names.TASKS)
            expected = f"one of {listed}, or a method of {self._class.__name__}"
            raise InvalidRequest("task", name, expected)
        if name == name_own_task(read_task("__call__", self._class)):
            return read_task(name, self._class)
        return read_task(name, _names.task_class(self._class, name))


class ModularTasks:
    """The tasks of one modular pipeline.

    Args:
        pipeline: The pipeline; its blocks are read when the first request comes.
        only: Name of the modular workflow that its blocks were cut down to, if they were.
    """

    def __init__(self, pipeline: Any, only: str | None = None) -> None:
        self._pipeline = pipeline
        self._only = only
        self._read = functools.cache(self._read_tasks)
        self._find = functools.cache(self._find_task)

    def find(self, name: str) -> Task:
        """Returns the task with a name.

        Args:
            name: Name of a modular workflow, ``"__call__"``, or one of our tasks such as
                ``"img2img"``.

        Raises:
            InvalidRequest: 400, the blocks cannot do it, or the model lacks components for it.
        """
        return self._find(name)

    def _read_tasks(self) -> dict[str, Task]:
        blocks = self._pipeline.blocks
        whole = read_all_blocks(blocks)
        cut = {self._only: replace(whole, name=self._only)} if self._only else {}
        found = {**read_modular_workflows(blocks), **cut, "__call__": whole}
        return {name: self._complete(task) for name, task in found.items()}

    def _complete(self, task: Task) -> Task:
        """Adds what only the pipeline knows."""
        return replace(
            task,
            pipeline_class=type(self._pipeline),
            is_guided="guidance_scale" not in task.inputs and self._has_guidance_scale,
        )

    def _find_task(self, name: str) -> Task:
        _check_public(name)
        found = self._read().get(self._translate(name))
        if found is None:
            known = [known for known in self._read() if known != "__call__"]
            near = suggest(name, known)
            listed = ", ".join(known) or "__call__"
            raise InvalidRequest("task", name, f"a modular workflow of this model{near}: {listed}")
        missing = found.list_missing(self._components)
        if missing:
            names = ", ".join(sorted(missing))
            raise InvalidRequest("task", name, f"one whose components the model has, not {names}")
        return self._with_adapter_image(found, name)

    def _with_adapter_image(self, found: Task, name: str) -> Task:
        """Requires the IP-Adapter's image: a UNet with an IP-Adapter needs one in every call."""
        item = found.inputs.get(_IP_ADAPTER_INPUT)
        if self._has_ip_adapter and item is None:
            wanted = f"one with {_IP_ADAPTER_INPUT}: the model was loaded with an IP-Adapter"
            raise InvalidRequest("task", name, wanted)
        if self._has_ip_adapter:
            return found.requiring(_IP_ADAPTER_INPUT)
        if item is not None and item.is_required:
            expected = "one that needs no IP-Adapter: the model has none"
            raise InvalidRequest("task", name, expected)
        return found

    def _translate(self, name: str) -> str:
        tasks = self._read()
        if name in tasks or name not in _names.TASKS:
            return name
        if tasks.keys() <= {self._only, "__call__"}:  # blocks with a single workflow
            return "__call__"
        return next((known for known in _MODULAR_NAMES[name] if known in tasks), name)

    @property
    def _components(self) -> dict[str, str]:
        parts = self._pipeline.components.items()
        return {name: type(part).__name__ for name, part in parts if part is not None}

    @property
    def _has_ip_adapter(self) -> bool:
        config = getattr(getattr(self._pipeline, "unet", None), "config", None)
        return getattr(config, "encoder_hid_dim_type", None) == "ip_image_proj"

    @property
    def _has_guidance_scale(self) -> bool:
        guider = getattr(self._pipeline, "guider", None)
        return "guidance_scale" in getattr(guider, "config", {})


def _check_public(name: str) -> None:
    if name.startswith("_") and name != "__call__":
        raise InvalidRequest("task", name, "a task or a public method")
