"""One input of a task; its kind is read from its type, else its name, else its default."""

from __future__ import annotations

import types
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, Union, get_args, get_origin

if TYPE_CHECKING:
    from collections.abc import Mapping

Kind = Literal[
    "string", "integer", "number", "boolean", "image", "mask", "video", "audio",
    "pair", "generator", "tensor", "structure", "other",
]  # fmt: skip

# The number of results per prompt; the name depends on what the class makes.
COUNTS_PER_PROMPT = (
    "num_images_per_prompt",
    "num_videos_per_prompt",
    "num_waveforms_per_prompt",
    "batch_size",
)
# Inputs without a type in the class or block.
_KINDS_BY_NAME: Mapping[str, Kind] = {
    **dict.fromkeys(("prompt", "prompt_2", "prompt_3"), "string"),
    **dict.fromkeys(("negative_prompt", "negative_prompt_2", "negative_prompt_3"), "string"),
    **dict.fromkeys(("height", "width", "num_inference_steps", "num_frames"), "integer"),
    **dict.fromkeys(COUNTS_PER_PROMPT, "integer"),
    **dict.fromkeys(("clip_skip", "control_mode", "padding_mask_crop"), "integer"),
    **dict.fromkeys(("max_sequence_length",), "integer"),
    **dict.fromkeys(("guidance_scale", "strength", "eta"), "number"),
    **dict.fromkeys(("denoising_start", "denoising_end", "decode_noise_scale"), "number"),
    **dict.fromkeys(("original_size", "target_size", "crops_coords_top_left"), "pair"),
    **dict.fromkeys(("negative_original_size", "negative_target_size"), "pair"),
    **dict.fromkeys(("negative_crops_coords_top_left",), "pair"),
    **dict.fromkeys(("latents", "timesteps", "image_latents"), "tensor"),
    "generator": "generator",
}
_KINDS_BY_DEFAULT: tuple[tuple[type, Kind], ...] = (
    (bool, "boolean"),
    (int, "integer"),
    (float, "number"),
    (str, "string"),
)
# Image inputs that are told apart by name: diffusers has one type for all of them.
_IMAGES_BY_NAME: Mapping[str, Kind] = {
    "mask": "mask",
    "mask_image": "mask",
    "control_mask": "mask",
    "video": "video",
    "control_video": "video",
    "source_video": "video",
}
# Last choice in a union: requests cannot carry them.
_OPAQUE: tuple[Kind, ...] = ("tensor", "structure", "other")


@dataclass(frozen=True)
class Input:
    """One input of a task.

    Attributes:
        name: Its name.
        kind: What it takes; of several types the simplest one.
        default: Value if a request leaves it out; ``None`` if it has none, or if it differs
            between blocks.
        is_required: Requests must have it.
        has_default: The method has a default for it, even where requests must have it.
        description: Text from the class or the blocks, often empty.
        hint: Its annotation; ``Any`` if there is none.
    """

    name: str
    kind: Kind
    default: Any = None
    is_required: bool = False
    has_default: bool = False
    description: str = ""
    hint: Any = field(default=Any, repr=False, compare=False)

    def fits(self, value: object) -> bool:
        """False for a value that no pipeline could read as this kind; a list has one per prompt."""
        return _fits(self.kind, value)

    @property
    def expected(self) -> str:
        """What it takes, as text for an error."""
        return _EXPECTED[self.kind]


def read_kind(name: str, hint: Any, default: Any = None) -> Kind:
    """Returns the kind of an input.

    Args:
        name: Its name.
        hint: Its type hint; in a union the first member that a request can carry counts.
        default: Its default.
    """
    kinds = [_kind_of_type(member) for member in _members(hint)]
    simple = [kind for kind in kinds if kind not in _OPAQUE]
    if kinds:
        kind = (simple or kinds)[0]
    elif name in _KINDS_BY_NAME:
        kind = _KINDS_BY_NAME[name]
    elif name in _IMAGES_BY_NAME or name == "image" or name.endswith("_image"):
        kind = "image"
    else:
        kind = next((kind for cls, kind in _KINDS_BY_DEFAULT if isinstance(default, cls)), "other")
    if kind == "image" and name.endswith("latents"):  # an image type, since diffusers encodes it
        return "tensor"
    is_frames = _IMAGES_BY_NAME.get(name) == "video" and kind in _OPAQUE  # such as lists of lists
    return _IMAGES_BY_NAME.get(name, kind) if kind == "image" or is_frames else kind


def _members(hint: Any) -> list[Any]:
    if hint is None or hint is Any:
        return []
    is_union = isinstance(hint, types.UnionType) or get_origin(hint) is Union
    members = get_args(hint) if is_union else (hint,)
    return [member for member in members if member is not type(None)]


def _kind_of_type(hint: Any) -> Kind:
    import torch
    from PIL import Image

    simple: dict[Any, Kind] = {
        str: "string",
        bool: "boolean",
        int: "integer",
        float: "number",
        Image.Image: "image",
        torch.Generator: "generator",
        torch.Tensor: "tensor",
        tuple[int, int]: "pair",
    }
    if hint in simple:
        return simple[hint]
    if isinstance(hint, type) and hint.__module__.startswith("torch") and "Tensor" in hint.__name__:
        return "tensor"  # such as `torch.FloatTensor`, which is not a subclass of it
    members = get_args(hint)
    if get_origin(hint) is list and Image.Image in _flatten(members):
        return "image"
    if torch.Tensor in members:
        return "tensor"
    is_structure = (get_origin(hint) or hint) in (list, tuple, dict)
    return "structure" if is_structure else "other"


def _flatten(members: tuple[Any, ...]) -> list[Any]:
    """Yields the members of unions among the arguments of a type."""
    return [inner for member in members for inner in _members(member)]


def _fits(kind: Kind, value: object) -> bool:
    if isinstance(value, list) and kind not in ("pair", "structure", "other"):
        return bool(value) and all(_fits(kind, item) for item in value)
    if not isinstance(value, _TYPES.get(kind, object)):
        return False
    return not (
        (kind in ("integer", "number") and isinstance(value, bool))
        or (kind in ("image", "mask") and isinstance(value, (str, bytes, int, float, dict)))
        or (kind == "pair" and len(value) != 2)
    )


_TYPES: Mapping[Kind, Any] = {
    "string": str,
    "integer": int,
    "number": (int, float),
    "boolean": bool,
    "pair": (list, tuple),
}
_EXPECTED: Mapping[Kind, str] = {
    "string": "a string",
    "integer": "an integer",
    "number": "a number",
    "boolean": "a boolean",
    "image": "an image",
    "mask": "an image, white where the result is generated",
    "video": "a video, as a list of frames",
    "audio": "audio samples",
    "pair": "two integers",
    "generator": "a generator",
    "tensor": "a tensor",
    "structure": "a list or mapping",
    "other": "a value",
}
