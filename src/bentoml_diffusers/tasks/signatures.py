"""The task of a method of a classic pipeline, read from its signature.

Types come from annotations; where those are missing, and for descriptions, from the docstring.
"""

from __future__ import annotations

import dataclasses
import inspect
import re
from typing import TYPE_CHECKING, Any

from bentoml_diffusers.tasks.hints import read_hints
from bentoml_diffusers.tasks.inputs import Input, read_kind
from bentoml_diffusers.tasks.outputs import USUAL_FPS, Output
from bentoml_diffusers.tasks.task import Task

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Set

# In `**kwargs` of diffusers' own pipelines only these have an effect.
_LEGACY_KEYWORDS = frozenset({"callback", "callback_steps"})
# Inputs with a default in the class, which fails without them all the same.
_NEEDED: Mapping[str, frozenset[str]] = {
    "img2img": frozenset({"image"}),
    "inpaint": frozenset({"image", "mask_image"}),
    "edit": frozenset({"image"}),
    "upscale": frozenset({"image"}),
    "img2video": frozenset({"image"}),
    "video2video": frozenset({"video"}),
}
_NAMED = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)


def read_task(name: str, cls: type[Any], method: str = "__call__") -> Task:
    """Returns the task of a method of a pipeline class.

    Args:
        name: Name of the task; ``"img2img"`` and ``"inpaint"`` need their images.
        cls: The class.
        method: Name of the method.
    """
    function = inspect.unwrap(getattr(cls, method))
    items = list(inspect.signature(function).parameters.values())[1:]
    hints = read_hints(function)
    texts = _read_descriptions(inspect.getdoc(function) or "")
    needed = _NEEDED.get(name, frozenset()) | _control_images(cls, items)
    is_open = any(item.kind is item.VAR_KEYWORD for item in items)
    is_diffusers = getattr(function, "__module__", "").startswith("diffusers.")
    return Task(
        name=name,
        pipeline_class=cls,
        method=method,
        inputs={
            item.name: _read_input(item, hints, texts, needed)
            for item in items
            if item.kind in _NAMED
        },
        output=_find_output(function),
        takes_all=is_open and not is_diffusers,
        open_names=_LEGACY_KEYWORDS if is_open and is_diffusers else frozenset(),
    )


def _control_images(cls: type[Any], items: list[inspect.Parameter]) -> set[str]:
    """Finds the control image, which is called ``image`` if there is no other image input."""
    names = {item.name for item in items}
    if "ControlNet" not in cls.__name__:
        return set()
    return {"control_image"} & names or {"image"} & names


def _read_input(
    item: inspect.Parameter,
    hints: Mapping[str, Any],
    texts: Mapping[str, str],
    needed: Set[str],
) -> Input:
    has_default = item.default is not item.empty
    default = item.default if has_default else None
    return Input(
        name=item.name,
        kind=read_kind(item.name, hints.get(item.name), default),
        hint=hints.get(item.name, Any),
        default=default,
        is_required=not has_default or item.name in needed,
        has_default=has_default,
        description=texts.get(item.name, ""),
    )


def _read_descriptions(text: str) -> dict[str, str]:
    """Returns the description of each argument in a docstring of diffusers' style, on one line."""
    found: dict[str, list[str]] = {}
    name, indent = None, 0
    for line in text.splitlines():
        start = re.match(r"(\s*)`?(\w+)`?(?:, `\w+`)* \(`?.*\):?\s*(.*)$", line)
        if start:
            name, indent = start.group(2), len(start.group(1))
            found[name] = [start.group(3)]
        elif name and line.strip() and len(line) - len(line.lstrip()) > indent:
            found[name].append(line.strip())
        elif line.strip():
            name = None
    return {name: _first_sentence(" ".join(lines)) for name, lines in found.items()}


def _first_sentence(text: str) -> str:
    plain = re.sub(r"\[`~?([^`]+)`\]|\[([^\]]+)\]\([^)]*\)", r"\1\2", " ".join(text.split()))
    return re.split(r"(?<=[a-z0-9)`])\. ", plain)[0].rstrip(".") + "." if plain else ""


def _find_output(function: Callable[..., Any]) -> Output:
    """Finds the output by the class that the code returns, or that the docstring names."""
    fps = _find_fps(function)
    for cls in _list_output_classes(function):
        first, *others = (item.name for item in dataclasses.fields(cls))
        return Output(first, tuple(others), fps)
    return Output("output", fps=fps)


def _find_fps(function: Callable[..., Any]) -> float:
    """Finds the frame rate in the docstring's example, the only place that has it."""
    found = re.search(r"\bfps=(\d+)", inspect.getdoc(function) or "")
    return float(found.group(1)) if found else USUAL_FPS


def _list_output_classes(function: Callable[..., Any]) -> Iterator[type[Any]]:
    from diffusers.utils import BaseOutput

    try:
        source = inspect.getsource(function)
    except (OSError, TypeError):  # its source is not available
        source = ""
    names = re.findall(r"return (\w+)\(", source)
    names += [name.rpartition(".")[2] for name in re.findall(r"`~?([\w.]+Output)`", source)]
    known = {"ImagePipelineOutput": _image_output()}
    for name in names:
        found = getattr(function, "__globals__", {}).get(name, known.get(name))
        if isinstance(found, type) and issubclass(found, BaseOutput):
            yield found


def _image_output() -> type[Any]:
    from diffusers import ImagePipelineOutput

    found: type[Any] = ImagePipelineOutput
    return found
