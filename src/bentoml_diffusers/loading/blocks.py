"""What the blocks of a modular pipeline take: its modular workflows and their inputs, as data.

diffusers calls a task of its blocks, such as ``text2image``, a *workflow*; here it is always a
*modular workflow*. It is named in the blocks' ``_workflow_map``, with the inputs that trigger it.
"""

from __future__ import annotations

import inspect
import types
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, Union, get_args, get_origin

from bentoml_diffusers.errors import InvalidRequest

if TYPE_CHECKING:
    from collections.abc import Mapping

    from diffusers.modular_pipelines import ModularPipelineBlocks

Kind = Literal[
    "text", "whole number", "number", "flag", "picture", "pair", "generator", "tensor", "other"
]

# What a pipeline gives back, the first of these that its blocks make.
_OUTPUTS = ("images", "videos", "audio", "audios")

# Inputs that some shipped blocks leave without a type.
_KINDS_BY_NAME: Mapping[str, Kind] = {
    **dict.fromkeys(("prompt", "prompt_2", "prompt_3"), "text"),
    **dict.fromkeys(("negative_prompt", "negative_prompt_2", "negative_prompt_3"), "text"),
    **dict.fromkeys(("height", "width", "num_inference_steps", "num_frames"), "whole number"),
    **dict.fromkeys(("num_images_per_prompt", "num_videos_per_prompt"), "whole number"),
    **dict.fromkeys(("clip_skip", "control_mode", "padding_mask_crop"), "whole number"),
    **dict.fromkeys(("max_sequence_length",), "whole number"),
    **dict.fromkeys(("guidance_scale", "strength", "eta"), "number"),
    **dict.fromkeys(("denoising_start", "denoising_end", "decode_noise_scale"), "number"),
    **dict.fromkeys(("original_size", "target_size", "crops_coords_top_left"), "pair"),
    **dict.fromkeys(("negative_original_size", "negative_target_size"), "pair"),
    **dict.fromkeys(("negative_crops_coords_top_left",), "pair"),
    **dict.fromkeys(("latents", "timesteps", "image_latents"), "tensor"),
    "generator": "generator",
}
_KINDS_BY_DEFAULT: tuple[tuple[type, Kind], ...] = (
    (bool, "flag"),
    (int, "whole number"),
    (float, "number"),
    (str, "text"),
)


@dataclass(frozen=True)
class BlockInput:
    """One input of a modular workflow.

    Attributes:
        name: Its name.
        kind: What it takes; of several types that it takes the simplest one.
        default: Value where a request leaves it out; ``None`` where it has none, or where it
            differs from block to block.
        is_required: A request must have it.
        description: From the blocks, often empty.
    """

    name: str
    kind: Kind
    default: Any = None
    is_required: bool = False
    description: str = ""


@dataclass(frozen=True, kw_only=True)
class ModularWorkflow:
    """A task that blocks can do.

    Attributes:
        name: Its name in the blocks; ``"__call__"`` is all of them, as their triggers choose.
        inputs: What it takes, by name.
        alternatives: Sets of inputs, one of which must be given whole; none for most.
        fixed: Inputs that make it what it is, with their values; a request has no say in them.
        components: Class of each component that is loaded for it, by name.
        output: Name of what it gives back, such as ``"images"``.
        is_guided: It has a guider with a ``guidance_scale``, as its blocks make it.
    """

    name: str
    inputs: Mapping[str, BlockInput]
    alternatives: tuple[frozenset[str], ...] = ()
    fixed: Mapping[str, Any] = field(default_factory=dict)
    components: Mapping[str, str] = field(default_factory=dict)
    output: str = "images"
    is_guided: bool = False

    def complete(self, arguments: Mapping[str, Any]) -> dict[str, Any]:
        """Checks a request's arguments and adds those that make the modular workflow.

        Raises:
            InvalidRequest: 400, names an input that is missing or of a wrong type.
        """
        for item in self.inputs.values():
            value = arguments.get(item.name)
            if value is None and item.is_required:
                raise InvalidRequest(item.name, None, f"{_EXPECTED[item.kind]}: {self._needs()}")
            if value is not None and not _fits(item.kind, value):
                raise InvalidRequest(item.name, value, _EXPECTED[item.kind])
        given = {name for name, value in arguments.items() if value is not None}
        if self.alternatives and not any(names <= given for names in self.alternatives):
            wanted = " or ".join(" and ".join(sorted(names)) for names in self.alternatives)
            raise InvalidRequest(wanted.split()[0], None, f"{wanted}: {self._needs()}")
        pairs = {
            name: tuple(value)
            for name, value in arguments.items()
            if isinstance(value, list) and name in self.inputs and self.inputs[name].kind == "pair"
        }
        return {"output": self.output, **arguments, **pairs, **self.fixed}

    def list_missing(self, present: Mapping[str, str]) -> list[str]:
        """Returns the components that it lacks.

        Args:
            present: Class of each component that is there, by name. A ControlNet for several
                kinds of control and one for a single kind do not stand for each other.
        """
        return [
            name
            for name, wanted in sorted(self.components.items())
            if name not in present or ("Union" in wanted) != ("Union" in present[name])
        ]

    def _needs(self) -> str:
        names = [item.name for item in self.inputs.values() if item.is_required]
        return f"{self.name} needs {', '.join(names)}"


def read_modular_workflows(blocks: ModularPipelineBlocks) -> dict[str, ModularWorkflow]:
    """Returns the modular workflows that blocks name; none for blocks that do one thing only."""
    known = {item.name for item in blocks.inputs if item.name}
    return {
        name: _read_one(name, blocks.get_workflow(name), _list_triggers(triggers), known)
        for name, triggers in (getattr(blocks, "_workflow_map", None) or {}).items()
    }


def read_whole(blocks: ModularPipelineBlocks) -> ModularWorkflow:
    """Returns all that blocks take, as one modular workflow named ``"__call__"``.

    Where the blocks choose by what is given, nothing but the blocks can say what is required.
    """
    has_choice = bool(getattr(blocks, "_workflow_map", None))
    inputs = {
        item.name: _read_input(item, _untyped_prompt(item), may_be_required=not has_choice)
        for item in blocks.inputs
        if item.name
    }
    return ModularWorkflow(
        name="__call__",
        inputs=inputs,
        output=_find_output(blocks),
        is_guided=_is_guided(blocks),
    )


def _read_one(
    name: str, blocks: Any, alternatives: list[Mapping[str, Any]], known: set[str]
) -> ModularWorkflow:
    always = set.intersection(*map(set, alternatives))
    own = {item.name: item for item in blocks.inputs if item.name in known}
    fixed = {
        trigger: value
        for trigger, value in alternatives[0].items()
        if trigger in known and (value is not True or trigger not in own)
    }
    rest = tuple(frozenset(triggers) - always for triggers in alternatives)
    return ModularWorkflow(
        name=name,
        inputs={key: _read_input(item, always) for key, item in own.items() if key not in fixed},
        alternatives=rest if all(rest) else (),
        fixed=fixed,
        components={
            spec.name: getattr(spec.type_hint, "__name__", "")
            for spec in blocks.expected_components
            if spec.default_creation_method == "from_pretrained"
        },
        output=_find_output(blocks),
        is_guided=_is_guided(blocks),
    )


def _list_triggers(triggers: Any) -> list[Mapping[str, Any]]:
    """A tuple lists several spellings of one modular workflow."""
    spellings = triggers if isinstance(triggers, tuple) else (triggers,)
    return [{name: value for name, value in one.items() if value} for one in spellings]


def _read_input(item: Any, triggers: set[str], *, may_be_required: bool = True) -> BlockInput:
    required = (item.required or item.name in triggers) and item.default is None
    return BlockInput(
        name=item.name,
        kind=read_kind(item.name, item.type_hint, item.default),
        default=item.default,
        is_required=required and may_be_required,
        description=" ".join((item.description or "").split()),
    )


def _untyped_prompt(item: Any) -> set[str]:
    """Older blocks do not say that they need a prompt."""
    return {"prompt"} if item.type_hint is None else set()


def _find_output(blocks: Any) -> str:
    names = {item.name for item in blocks.outputs}
    return next((name for name in _OUTPUTS if name in names), "images")


def _is_guided(blocks: Any) -> bool:
    hints = [spec.type_hint for spec in blocks.expected_components if spec.name == "guider"]
    return any("guidance_scale" in inspect.signature(hint.__init__).parameters for hint in hints)


def read_kind(name: str, hint: Any, default: Any = None) -> Kind:
    """Returns the kind of an input: from its type, else its name, else its default.

    Args:
        name: Its name.
        hint: Its type hint; of a union the first member that a request can carry counts.
        default: Its default.
    """
    kinds = [_kind_of_type(member) for member in _members(hint)]
    simple = [kind for kind in kinds if kind not in ("tensor", "other")]
    if kinds:
        return (simple or kinds)[0]
    if name in _KINDS_BY_NAME:
        return _KINDS_BY_NAME[name]
    if name == "image" or name.endswith("_image"):
        return "picture"
    return next((kind for cls, kind in _KINDS_BY_DEFAULT if isinstance(default, cls)), "other")


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
        str: "text",
        bool: "flag",
        int: "whole number",
        float: "number",
        Image.Image: "picture",
        torch.Generator: "generator",
        torch.Tensor: "tensor",
        tuple[int, int]: "pair",
    }
    if hint in simple:
        return simple[hint]
    return "tensor" if torch.Tensor in get_args(hint) else "other"


def _fits(kind: Kind, value: Any) -> bool:
    """False for a value that no pipeline could read as this kind; lists hold one per prompt."""
    if isinstance(value, list) and kind != "pair":
        return bool(value) and all(_fits(kind, item) for item in value)
    if not isinstance(value, _TYPES.get(kind, object)):
        return False
    return not (
        (kind in ("whole number", "number") and isinstance(value, bool))
        or (kind == "picture" and isinstance(value, (str, bytes, int, float, dict)))
        or (kind == "pair" and len(value) != 2)
    )


_TYPES: Mapping[Kind, Any] = {
    "text": str,
    "whole number": int,
    "number": (int, float),
    "flag": bool,
    "pair": (list, tuple),
}
_EXPECTED: Mapping[Kind, str] = {
    "text": "text",
    "whole number": "a whole number",
    "number": "a number",
    "flag": "True or False",
    "picture": "a picture",
    "pair": "two whole numbers",
    "generator": "a generator",
    "tensor": "a tensor",
    "other": "a value",
}
