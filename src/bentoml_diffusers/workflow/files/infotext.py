"""The text that AUTOMATIC1111's web UI writes into its images, and many tools read."""

from __future__ import annotations

import json
import re
from typing import TYPE_CHECKING

from bentoml_diffusers import _names

if TYPE_CHECKING:
    from bentoml_diffusers.workflow.files.schema import Workflow


def make_infotext(workflow: Workflow, size: tuple[int, int], index: int = 0) -> str:
    """Returns A1111's ``parameters`` of an image.

    Of its syntax only ``<lora:name:scale>`` is written, for the LoRAs that were used: syntax in a
    prompt was read as plain letters.

    It cannot hold images, masks, textual inversions or A1111's hashes: it is for reading, the
    workflow is for replaying.

    Args:
        workflow: The workflow that made the image.
        size: Width and height, in pixels.
        index: Number of the image among those that the workflow made.
    """
    prompt = _pick(workflow, "prompt", index)
    lines = [" ".join([prompt, *_loras(workflow)]).strip()]
    if negative := _pick(workflow, "negative_prompt", index):
        lines.append(f"Negative prompt: {negative}")
    parameters = _parameters(workflow, size, index).items()
    lines.append(", ".join(f"{name}: {_quote(str(value))}" for name, value in parameters))
    return "\n".join(lines).encode(errors="replace").decode()


def _parameters(workflow: Workflow, size: tuple[int, int], index: int) -> dict[str, object]:
    arguments, scheduler, model = workflow.arguments, workflow.scheduler, workflow.pipeline.model
    clip_skip = arguments.get("clip_skip")
    found = {
        "Steps": arguments.get("num_inference_steps"),
        "Sampler": _names.name_sampler(scheduler.class_name, scheduler.config)
        if scheduler
        else None,
        "CFG scale": arguments.get("guidance_scale"),
        "Seed": workflow.seeds[index] if index < len(workflow.seeds) else None,
        "Size": f"{size[0]}x{size[1]}",
        "Model": model.tag.partition(":")[0] if model and model.tag else None,
        "Denoising strength": arguments.get("strength"),
        "Clip skip": clip_skip + 1 if isinstance(clip_skip, int) else None,
    }
    return {name: value for name, value in found.items() if value is not None}


def _pick(workflow: Workflow, name: str, index: int) -> str:
    """Returns the text for one image: a list has one for each prompt, in image order."""
    value = workflow.arguments.get(name)
    if isinstance(value, list) and value:
        per_prompt = workflow.arguments.get("num_images_per_prompt")
        value = value[index // per_prompt % len(value) if isinstance(per_prompt, int) else 0]
    return _as_letters(value) if isinstance(value, str) else ""


def _as_letters(prompt: str) -> str:
    """Escapes a prompt so that A1111, too, reads it without any syntax.

    Brackets are escaped in A1111's way; for ``<lora:...>``, ``AND`` and ``BREAK`` it has no
    escape, so they are changed into plain letters.
    """
    escaped = re.sub(r"[\\()\[\]]", r"\\\g<0>", prompt)
    plain = re.sub(r"<(\w+:[^<>]*)>", r"\1", escaped)
    return re.sub(r"\b(?:AND|BREAK)\b", lambda match: match.group().lower(), plain)


def _loras(workflow: Workflow) -> list[str]:
    """LoRAs with a single scale, the only ones that A1111's text can express."""
    return [
        f"<lora:{_short(one.name)}:{one.scale:g}>"
        for one in [*workflow.pipeline.static_adapters, *workflow.adapters]
        if one.kind == "lora" and isinstance(one.scale, float) and not one.components
    ]


def _short(name: str) -> str:
    """The name of a LoRA in A1111: that of its file without the extension."""
    file = name.rpartition("/")[2].removesuffix(".safetensors").partition(":")[0]
    return file.replace("<", "").replace(">", "")


def _quote(value: str) -> str:
    return json.dumps(value, ensure_ascii=False) if set(value) & set(',:\n"') else value
