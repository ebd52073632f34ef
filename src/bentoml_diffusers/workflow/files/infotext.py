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

    Of its syntax only ``<lora:name:scale>`` for the LoRAs that were used is written: what stands in
    a prompt was read as letters.

    There is no place in it for images, masks, textual inversions or hashes that A1111 would know:
    it is for reading, the workflow is for replaying.

    Args:
        workflow: What made the image.
        size: Width and height, px.
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
    """Returns the text of an image: a list holds one for each prompt, in the order of images."""
    value = workflow.arguments.get(name)
    if isinstance(value, list) and value:
        per_prompt = workflow.arguments.get("num_images_per_prompt")
        value = value[index // per_prompt % len(value) if isinstance(per_prompt, int) else 0]
    return _as_letters(value) if isinstance(value, str) else ""


def _as_letters(prompt: str) -> str:
    """Writes a prompt so that A1111 reads it as it was read here: without any syntax.

    Brackets are escaped, as A1111 has it; for ``<lora:...>``, ``AND`` and ``BREAK`` it has no
    escape, so they lose what makes them syntax.
    """
    escaped = re.sub(r"[\\()\[\]]", r"\\\g<0>", prompt)
    plain = re.sub(r"<(\w+:[^<>]*)>", r"\1", escaped)
    return re.sub(r"\b(?:AND|BREAK)\b", lambda match: match.group().lower(), plain)


def _loras(workflow: Workflow) -> list[str]:
    """Those with one scale for everything, which is all that A1111's text can say."""
    return [
        f"<lora:{_short(one.name)}:{one.scale:g}>"
        for one in [*workflow.pipeline.static_adapters, *workflow.adapters]
        if one.kind == "lora" and isinstance(one.scale, float) and not one.components
    ]


def _short(name: str) -> str:
    """A1111 knows a LoRA by its file's name without the extension."""
    file = name.rpartition("/")[2].removesuffix(".safetensors").partition(":")[0]
    return file.replace("<", "").replace(">", "")


def _quote(value: str) -> str:
    return json.dumps(value, ensure_ascii=False) if set(value) & set(',:\n"') else value
