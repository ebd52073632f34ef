"""Reads the annotations of a function, and checks the arguments of a call against them.

The check is lenient: any sequence passes for a list, an integer for a number, and anything for an
annotation that is not understood. On the rest pipelines would fail later, deep inside.
"""

from __future__ import annotations

import collections.abc
import numbers
import types
import typing
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from PIL import Image

from bentoml_diffusers.errors import InvalidRequest

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from bentoml_diffusers.tasks.task import Task

_UNIONS = (typing.Union, types.UnionType)
_SEQUENCES = (list, tuple, collections.abc.Sequence)
_ARRAYS = (np.ndarray, torch.Tensor)
_WORDS = {
    bool: "a boolean",
    int: "an integer",
    float: "a number",
    str: "text",
    torch.Tensor: "a tensor",
    torch.Generator: "a generator",
    type(None): "null",
}


def read_hints(function: Callable[..., Any]) -> dict[str, Any]:
    """Returns the annotations of a function, without those that cannot be evaluated."""
    try:
        return typing.get_type_hints(function)
    except Exception:  # noqa: BLE001 - evaluates annotations from other packages
        hints = getattr(function, "__annotations__", {})
        return {name: hint for name, hint in hints.items() if not isinstance(hint, str)}


def check_hints(task: Task, arguments: Mapping[str, Any]) -> None:
    """Checks that each argument has a type that its annotation allows.

    Ignores annotations that contradict their own default, and those of code outside of
    diffusers.

    Raises:
        InvalidRequest: 400, names the first that has not.
    """
    method = getattr(task.pipeline_class, task.method)
    if task.is_modular or not getattr(method, "__module__", "").startswith("diffusers."):
        return
    for name, value in arguments.items():
        item = task.inputs.get(name)
        if item is None or value is None or value is item.default:
            continue
        is_silent = item.default is not None and not _fits(item.default, item.hint)
        is_loose = _is_of_images(name, value) and _names_images(item.hint)
        if not (is_silent or is_loose or _fits(value, item.hint)):
            raise InvalidRequest(name, _shown(value), _describe(item.hint))


def _is_of_images(name: str, value: Any) -> bool:
    """True for images and videos: annotations of these are often wrong.

    Wan says of `last_image`, and Flux's filling of `image`, that it is a tensor; AnimateDiff of
    `video` that it is a list of lists.
    """
    if isinstance(value, (list, tuple)):
        return bool(value) and all(_is_of_images(name, item) for item in value)
    is_named = any(word in name for word in ("image", "video", "mask"))
    return is_named and not name.endswith(("latents", "embeds")) and isinstance(value, Image.Image)


def _names_images(hint: Any) -> bool:
    is_one = isinstance(hint, type) and (issubclass(hint, Image.Image) or _is_tensor_type(hint))
    return is_one or any(_names_images(part) for part in typing.get_args(hint))


def _fits(value: Any, hint: Any) -> bool:
    origin, parts = typing.get_origin(hint), typing.get_args(hint)
    if hint is Any:
        return True
    if origin in _UNIONS:
        return any(_fits(value, part) for part in parts)
    if origin in _SEQUENCES or hint in _SEQUENCES:
        item = parts[0] if parts else Any
        if isinstance(value, _ARRAYS):
            return item in (int, float, Any)
        return isinstance(value, (list, tuple)) and all(_fits(one, item) for one in value)
    if origin in (dict, collections.abc.Mapping):
        return isinstance(value, collections.abc.Mapping)
    if origin is collections.abc.Callable:
        return callable(value)
    if origin is not None or not isinstance(hint, type):
        return True
    return _is_instance(value, hint)


def _is_instance(value: Any, kind: type[Any]) -> bool:
    is_bool = isinstance(value, (bool, np.bool_))
    if kind is bool:
        return is_bool
    if kind in (int, float):
        wanted = numbers.Integral if kind is int else numbers.Real
        return isinstance(value, wanted) and not is_bool
    if kind is dict:
        return isinstance(value, collections.abc.Mapping)
    if _is_tensor_type(kind):
        return isinstance(value, torch.Tensor)
    return isinstance(value, kind)


def _is_tensor_type(kind: type[Any]) -> bool:
    """Also of ``torch.FloatTensor``, which is no subclass: only of the CPU, and in float32."""
    return issubclass(kind, torch.Tensor) or (
        kind.__module__ == "torch" and kind.__name__.endswith("Tensor")
    )


def _shown(value: Any) -> Any:
    """Describes a value without the numbers in an array."""
    return type(value).__name__ if isinstance(value, _ARRAYS) else value


def _describe(hint: Any) -> str:
    origin, parts = typing.get_origin(hint), typing.get_args(hint)
    if origin in _UNIONS:
        words = [_describe(part) for part in parts if part is not type(None)]
        return " or ".join(dict.fromkeys(words))
    if origin in _SEQUENCES:
        return f"a list of {_describe(parts[0]).removeprefix('a ')}" if parts else "a list"
    if origin in (dict, collections.abc.Mapping) or hint is dict:
        return "a mapping"
    if origin is collections.abc.Callable:
        return "a function"
    if isinstance(hint, type) and _is_tensor_type(hint):
        return _WORDS[torch.Tensor]
    return _WORDS.get(hint, getattr(hint, "__name__", str(hint)))
