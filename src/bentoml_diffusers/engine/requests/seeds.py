"""Seeds of a request: one per image, drawn if there is none."""

from __future__ import annotations

import secrets
from typing import TYPE_CHECKING, Any

from bentoml_diffusers.errors import InvalidRequest
from bentoml_diffusers.options import MAX_SEED
from bentoml_diffusers.tasks.checks import count_images

if TYPE_CHECKING:
    from collections.abc import Mapping

    from bentoml_diffusers.tasks import Task


def choose_seeds(
    task: Task, seed: int | list[int] | None, arguments: Mapping[str, Any]
) -> tuple[int, ...]:
    """Returns one seed of 32 bits per image; empty if the noise does not come from seeds.

    Raises:
        InvalidRequest: 400, not a seed, or not one per image.
    """
    if arguments.get("generator") is not None or "generator" not in task.inputs:
        if seed is not None:
            raise InvalidRequest("seed", seed, "no seed: the noise comes from generator or latents")
        return ()
    count = count_images(arguments)
    given = seed if isinstance(seed, list) else [secrets.randbits(32) if seed is None else seed]
    for value in given:
        if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value <= MAX_SEED:
            raise InvalidRequest("seed", value, f"an integer from 0 to {MAX_SEED}")
    if isinstance(seed, list) and len(seed) != count:
        raise InvalidRequest("seed", seed, f"one seed, or {count}, one per image")
    if isinstance(seed, list):
        return tuple(seed)
    return tuple((given[0] + image) % (MAX_SEED + 1) for image in range(count))
