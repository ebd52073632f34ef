"""Seeds of a request: one per image, drawn where none was given."""

from __future__ import annotations

import inspect
import secrets
from typing import TYPE_CHECKING, Any

from bentoml_diffusers.errors import InvalidRequest

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

MAX_SEED = 2**32 - 1


def choose_seeds(
    method: Callable[..., Any], seed: int | list[int] | None, arguments: Mapping[str, Any]
) -> tuple[int, ...]:
    """Returns one seed of 32 bits per image; none where the noise comes from elsewhere.

    Raises:
        InvalidRequest: 400, not a seed, or not one per image.
    """
    if arguments.get("generator") is not None or not _takes_generators(method):
        if seed is not None:
            raise InvalidRequest("seed", seed, "no seed: the noise comes from elsewhere")
        return ()
    count = _count_images(arguments)
    given = seed if isinstance(seed, list) else [secrets.randbits(32) if seed is None else seed]
    for value in given:
        if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value <= MAX_SEED:
            raise InvalidRequest("seed", value, f"a whole number from 0 to {MAX_SEED}")
    if isinstance(seed, list) and len(seed) != count:
        raise InvalidRequest("seed", seed, f"one seed, or {count}, one per image")
    if isinstance(seed, list):
        return tuple(seed)
    return tuple((given[0] + image) % (MAX_SEED + 1) for image in range(count))


def _takes_generators(method: Callable[..., Any]) -> bool:
    return "generator" in inspect.signature(method).parameters


def _count_images(arguments: Mapping[str, Any]) -> int:
    prompt = arguments.get("prompt")
    embeds = arguments.get("prompt_embeds")
    prompts = len(prompt) if isinstance(prompt, list) else 1
    if embeds is not None:
        prompts = len(embeds)
    per_prompt = arguments.get("num_images_per_prompt") or arguments.get("batch_size") or 1
    return prompts * int(per_prompt)
