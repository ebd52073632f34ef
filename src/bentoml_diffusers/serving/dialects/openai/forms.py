"""Forms as OpenAI's clients write them: lists and objects by names in brackets."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

from bentoml_diffusers.errors import UnreadableRequest
from bentoml_diffusers.serving.reader import read_structure

if TYPE_CHECKING:
    from collections.abc import Iterable

_NAME = re.compile(r"([^\[\]]+)((?:\[[^\[\]]*\])*)")
_MAX_DEPTH = 8  # of brackets; a LoRA's scale by block has 5


def fold_form(items: Iterable[tuple[str, Any]]) -> dict[str, Any]:
    """Returns the fields of a form as JSON would have them.

    ``image[]`` repeated is a list; ``lora_weights[][name]`` belongs to the last object of a list,
    or to a new one where that has the name already; ``size[width]`` is an object. Text that is a
    JSON list or object is read as one.

    Args:
        items: Names and values in their order; files as they are.

    Raises:
        UnreadableRequest: 400, a name that cannot be, or one that is given twice.
    """
    root: dict[str, Any] = {}
    for name, value in items:
        path = _split(name)
        found = read_structure(value) if isinstance(value, str) else value
        if not _put(root, path, found):
            raise UnreadableRequest([((path[0],), "given more than once, or in two forms")])
    return root


def _split(name: str) -> list[str]:
    """Returns ``["a", "", "b"]`` for ``a[][b]``."""
    match = _NAME.fullmatch(name)
    path = [name] if match is None else [match[1], *re.findall(r"\[([^\[\]]*)\]", match[2])]
    if match is None or len(path) > _MAX_DEPTH:
        raise UnreadableRequest([((name[:100],), "not a name of a field")])
    return path


def _put(target: Any, path: list[str], value: Any) -> bool:
    """Puts a value at its place; ``False`` if that is taken, or is of another kind."""
    key, *rest = path
    if isinstance(target, list):
        return _put_item(target, key, rest, value)
    if not isinstance(target, dict) or not key:
        return False
    if not rest:
        is_free = key not in target
        target.setdefault(key, value)
        return is_free
    if key not in target:
        target[key] = _make_container(rest[0])
    return _put(target[key], rest, value)


def _put_item(target: list[Any], key: str, rest: list[str], value: Any) -> bool:
    """Without a number a new item begins where the last one has its key already."""
    is_new = key == str(len(target)) if key else not rest
    if key not in ("", str(len(target)), str(len(target) - 1)):
        return False
    if not rest:
        target.append(value)
        return is_new
    if not is_new and target and _put(target[-1], rest, value):
        return True
    target.append(_make_container(rest[0]))
    return (is_new or key == "") and _put(target[-1], rest, value)


def _make_container(key: str) -> Any:
    return [] if key == "" or key.isdecimal() else {}
