"""Scales of a LoRA by component and block, as diffusers' ``set_adapters`` takes them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import partial
from typing import TYPE_CHECKING, Any, TypeAlias

from bentoml_diffusers._compat import lora_components, unwrap_compiled
from bentoml_diffusers.errors import InvalidRequest, suggest

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    import torch
    from diffusers import DiffusionPipeline

# A number; or for each component a number, or a mapping by block.
Scale: TypeAlias = "float | Mapping[str, Any]"
# For each component a number, or numbers by part of a layer's path.
LayerScales: TypeAlias = "dict[str, float | dict[str, float]]"

MAX_SCALE = 100.0
_MAX_KEYS = 64
_MAX_DEPTH = 3  # component, side, block
# diffusers names their blocks "down", "mid", "up"; for other models it takes parts of paths.
_WITH_SIDES = ("UNet2DConditionModel", "UNetMotionModel")


def read_scale(field: str, value: object, largest: float = MAX_SCALE) -> float:
    """Returns a number that scales a LoRA.

    Raises:
        InvalidRequest: 400, not a number, or too large.
    """
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise InvalidRequest(field, value, "a number")
    if abs(value) > largest or not math.isfinite(value):
        raise InvalidRequest(field, value, f"from {-largest:g} to {largest:g}")
    return float(value)


def read_scales(field: str, value: object, largest: float = MAX_SCALE, depth: int = 0) -> Scale:
    """Returns a number, or numbers by component and block, whether or not those exist.

    Raises:
        InvalidRequest: 400, it contains something other than numbers, or too many.
    """
    if not isinstance(value, Mapping):
        return read_scale(field, value, largest)
    if depth == _MAX_DEPTH or not 0 < len(value) <= _MAX_KEYS:
        raise InvalidRequest(field, value, "a number, or one for each component and block")
    found: dict[str, Any] = {}
    for key, inner in value.items():
        place = f"{field}.{key}"
        if isinstance(inner, (list, tuple)) and depth > 0:  # one for each attention of a block
            found[str(key)] = [read_scale(place, one, largest) for one in inner]
        else:
            found[str(key)] = read_scales(place, inner, largest, depth + 1)
    return found


def expand_scales(
    pipeline: DiffusionPipeline,
    field: str,
    scale: Mapping[str, Any],
    paths_of: Callable[[str], Iterable[str]] | None = None,
) -> LayerScales:
    """Returns the scales that diffusers' ``set_adapters`` would give to a pipeline's layers.

    Args:
        pipeline: Not changed.
        field: Name of the field, for messages.
        scale: What :func:`read_scales` returned.
        paths_of: Returns the paths of a component's layers, for a thread that must not walk
            over modules while PEFT changes them.

    Raises:
        InvalidRequest: 400, a component or block that does not exist; diffusers ignores some.
    """
    components = {
        name: module
        for name in lora_components(pipeline)
        if (module := getattr(pipeline, name, None)) is not None
    }
    _check_keys(field, scale, list(components))
    paths_of = paths_of or (lambda name: dict(components[name].named_modules()))
    return {
        name: _expand(f"{field}.{name}", components[name], value, partial(paths_of, name))
        for name, value in scale.items()
    }


def scale_of(scales: LayerScales, component: str, path: str) -> float:
    """Returns the scale of a layer, by default 1."""
    found = scales.get(component, 1.0)
    if not isinstance(found, dict):
        return found
    named = next((value for part, value in found.items() if part in path), None)
    if named is not None:
        return named
    # diffusers gives a residual block the scale of the attention after it.
    parts = path.split(".")
    after = f"{parts[0]}.{parts[1]}.attentions.{parts[3]}" if len(parts) > 3 else ""
    return found.get(after, 1.0)


def _expand(
    field: str, module: torch.nn.Module, value: Any, list_paths: Callable[[], Iterable[str]]
) -> float | dict[str, float]:
    module = unwrap_compiled(module)
    if not isinstance(value, dict):
        if isinstance(value, list):
            raise InvalidRequest(field, value, "a number, or one for each block")
        return float(value)
    if type(module).__name__ in _WITH_SIDES:
        _check_keys(field, value, ["down", "mid", "up"])
        return dict(_expand_sides(field, module, value))
    paths = list(list_paths())
    for part, one in value.items():
        if not any(part in path for path in paths):
            raise InvalidRequest(f"{field}.{part}", one, "a part of a layer's name")
        read_scale(f"{field}.{part}", one)
    return value


def _expand_sides(field: str, unet: Any, value: dict[str, Any]) -> Iterator[tuple[str, float]]:
    """Yields the scale of each attention of a UNet by its path."""
    for side in ("down", "up"):
        blocks = {
            f"block_{index}": (f"{side}_blocks.{index}", len(block.attentions))
            for index, block in enumerate(getattr(unet, f"{side}_blocks"))
            if hasattr(block, "attentions")
        }
        given = value.get(side, {})
        if isinstance(given, dict):
            _check_keys(f"{field}.{side}", given, list(blocks))
        for name, (path, number) in blocks.items():
            mine, place = given, f"{field}.{side}"
            if isinstance(given, dict):
                mine, place = given.get(name, 1.0), f"{place}.{name}"
            for index, scale in enumerate(_spread(place, mine, number)):
                yield f"{path}.attentions.{index}", scale
    if "mid" in value:
        number = len(getattr(unet.mid_block, "attentions", ()))
        yield "mid_block.attentions.0", _spread(f"{field}.mid", value["mid"], number)[0]


def _spread(field: str, value: Any, number: int) -> list[float]:
    """Expands one number to all attentions of a block, or checks that there is one for each."""
    values = value if isinstance(value, list) else [value]
    if len(values) not in (1, number) or not number or isinstance(value, dict):
        raise InvalidRequest(field, value, f"a number, or a list of {number}")
    return values * number if len(values) == 1 else values


def _check_keys(field: str, value: Mapping[str, Any], known: list[str]) -> None:
    for key in value:
        if key not in known:
            expected = f"one of {', '.join(known)}{suggest(key, known)}"
            raise InvalidRequest(field, key, expected)
