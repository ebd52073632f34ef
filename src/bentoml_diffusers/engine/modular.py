"""Tasks of a modular pipeline: which modular workflow a request means."""

from __future__ import annotations

import functools
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from bentoml_diffusers import _names
from bentoml_diffusers.errors import InvalidRequest, suggest
from bentoml_diffusers.loading.blocks import read_modular_workflows, read_whole

if TYPE_CHECKING:
    from collections.abc import Mapping

    from bentoml_diffusers.loading.blocks import ModularWorkflow

# Our tasks in the words of the blocks, which have several.
_MODULAR_NAMES: Mapping[str, tuple[str, ...]] = {
    "txt2img": ("text2image",),
    "text2img": ("text2image",),
    "img2img": ("image2image", "img2img", "image_conditioned"),
    "inpaint": ("inpainting", "image_conditioned_inpainting"),
}
_IP_ADAPTER_INPUT = "ip_adapter_image"


class ModularTasks:
    """The tasks of one modular pipeline.

    Args:
        pipeline: The pipeline; its blocks are read when the first request comes.
        only: Name of the modular workflow that its blocks were cut down to, if they were.
    """

    def __init__(self, pipeline: Any, only: str | None = None) -> None:
        self._pipeline = pipeline
        self._only = only
        self._read = functools.cache(self._read_workflows)

    @property
    def _workflows(self) -> dict[str, ModularWorkflow]:
        return self._read()

    def _read_workflows(self) -> dict[str, ModularWorkflow]:
        blocks = self._pipeline.blocks
        whole = read_whole(blocks)
        cut = {self._only: replace(whole, name=self._only)} if self._only else {}
        return {**read_modular_workflows(blocks), **cut, "__call__": whole}

    def find(self, task: str) -> ModularWorkflow:
        """Returns what a task means.

        Args:
            task: Name of a modular workflow, ``"__call__"``, or one of our tasks such as
                ``"img2img"``.

        Raises:
            InvalidRequest: 400, the blocks cannot do it, or the model lacks components for it.
        """
        found = self._workflows.get(self._translate(task))
        if found is None:
            known = [name for name in self._workflows if name != "__call__"]
            near = suggest(task, known)
            listed = ", ".join(known) or "__call__"
            raise InvalidRequest("task", task, f"a modular workflow of this model{near}: {listed}")
        missing = found.list_missing(self._components)
        if missing:
            names = ", ".join(sorted(missing))
            raise InvalidRequest("task", task, f"one whose components the model has, not {names}")
        if self._has_ip_adapter:
            return _with_picture(found, task)
        item = found.inputs.get(_IP_ADAPTER_INPUT)
        if item is not None and item.is_required:
            raise InvalidRequest("task", task, "one that needs no IP-Adapter: the model has none")
        return found

    def _translate(self, task: str) -> str:
        if task in self._workflows or task not in _names.TASKS:
            return task
        if self._workflows.keys() <= {self._only, "__call__"}:  # blocks that do one thing only
            return "__call__"
        names = _MODULAR_NAMES[task]
        return next((name for name in names if name in self._workflows), task)

    @property
    def _components(self) -> dict[str, str]:
        parts = self._pipeline.components.items()
        return {name: type(part).__name__ for name, part in parts if part is not None}

    @property
    def _has_ip_adapter(self) -> bool:
        config = getattr(getattr(self._pipeline, "unet", None), "config", None)
        return getattr(config, "encoder_hid_dim_type", None) == "ip_image_proj"


def _with_picture(workflow: ModularWorkflow, task: str) -> ModularWorkflow:
    """With an IP-Adapter in it, a UNet needs its picture in each call."""
    item = workflow.inputs.get(_IP_ADAPTER_INPUT)
    if item is None:
        wanted = f"one with {_IP_ADAPTER_INPUT}: the model was loaded with an IP-Adapter"
        raise InvalidRequest("task", task, wanted)
    required = replace(item, is_required=True)
    return replace(workflow, inputs={**workflow.inputs, _IP_ADAPTER_INPUT: required})
