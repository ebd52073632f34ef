"""What a dialect makes of a request, and what it gets back: an answer, or events on the way."""

from __future__ import annotations

import secrets
from collections import Counter
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeAlias

from bentoml_diffusers.options import MAX_SEED

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from PIL.Image import Image
    from starlette.types import Scope

    from bentoml_diffusers.engine import Result
    from bentoml_diffusers.workflow import Workflow


KEY = "bentoml_diffusers.key"  # name and priority of the API key, in the scope of a request


@dataclass(frozen=True)
class Caller:
    """Who asks. Two requests of one caller may cancel each other.

    Attributes:
        name: Of the API key; empty without keys.
        address: Of the client, or of the proxy that it comes through.
        priority: Of the API key.
    """

    name: str = ""
    address: str = ""
    priority: int = field(default=0, compare=False)

    @classmethod
    def of(cls, scope: Scope) -> Caller:
        """Returns who sent a request."""
        client = scope.get("client")
        name, priority = scope.get(KEY, ("", 0))
        return cls(name, client[0] if client else "", priority)

    @property
    def options(self) -> dict[str, Any]:
        """What the engine is told: whose turn it is, and with which share."""
        return {"caller": self.name or self.address, "priority": self.priority}


@dataclass(frozen=True)
class Previews:
    """Which previews a caller wants of each image; the engine decodes no others.

    Attributes:
        count: How many, spread over the steps; 0 for as many as ``interval_s`` allows.
        interval_s: Seconds from one to the next, at least.
        is_full: They are decoded by the autoencoder; else coarse, and next to free.
    """

    count: int = 0
    interval_s: float = 0.5
    is_full: bool = True


@dataclass(frozen=True, kw_only=True)
class Call:
    """A request of any dialect, translated.

    Attributes:
        task: Of the engine.
        arguments: Of :meth:`bentoml_diffusers.Engine.arun`: those of the pipeline, and the options
            of the request, such as ``seed`` and ``lora_weights``. A list of prompts is one call.
        n: Images of each prompt.
        previews: Which ones :meth:`Dispatcher.stream` gives; ``None`` for none.
        request_id: By which its caller may cancel it.
        caller: Who asks.
    """

    task: str
    arguments: Mapping[str, Any]
    n: int = 1
    previews: Previews | None = None
    request_id: str = field(default_factory=lambda: secrets.token_hex(16))
    caller: Caller = Caller()

    def split(self) -> list[dict[str, Any]]:
        """Returns the arguments of each image. Its seed is one of a list, or the next number."""
        texts = list(_split_prompts(self.arguments))
        count = len(texts) * self.n
        if count == 1:
            return [{**self.arguments, **texts[0]}]
        given = self.arguments.get("seed")
        first = secrets.randbits(32) if given is None else given
        seeds = (
            list(first)
            if isinstance(first, list)
            else [(first + image) % (MAX_SEED + 1) for image in range(count)]
        )
        prompts = (text for text in texts for _ in range(self.n))
        return [
            {**self.arguments, **text, "seed": seed}
            for text, seed in zip(prompts, seeds, strict=True)
        ]


def _split_prompts(arguments: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """Yields the texts of each prompt: lists are one for each, all else is the same for all."""
    lists = {name: value for name, value in arguments.items() if _is_texts(name, value)}
    if not lists:
        yield {}
    for row in zip(*lists.values(), strict=True):
        yield dict(zip(lists, row, strict=True))


def _is_texts(name: str, value: Any) -> bool:
    return isinstance(value, list) and "prompt" in name and all(isinstance(v, str) for v in value)


@dataclass(frozen=True, kw_only=True)
class Answer:
    """What came of a call.

    Attributes:
        request_id: Of the call.
        results: One for each image, in order; each with its seed and its workflow.
    """

    request_id: str
    results: tuple[Result, ...]

    @property
    def seeds(self) -> tuple[int, ...]:
        """Of each image; none where the noise came from elsewhere."""
        return tuple(seed for result in self.results for seed in result.seeds)

    @property
    def warnings(self) -> tuple[str, ...]:
        """Of all images, each text once."""
        return tuple(dict.fromkeys(text for one in self.results for text in one.warnings))

    @property
    def flags(self) -> tuple[bool, ...]:
        """What the safety checker said of each image; none without one."""
        return tuple(flag for one in self.results for flag in one.nsfw_content_detected)

    @property
    def batches(self) -> dict[int, int]:
        """How many forwards were shared by how many requests."""
        total: Counter[int] = Counter()
        for result in self.results:
            total.update(result.batches)
        return dict(total)

    @property
    def queue_s(self) -> float:
        """Seconds before the first image began."""
        return min(result.queue_s for result in self.results)

    @property
    def run_s(self) -> float:
        """Seconds from there to the end of the last one."""
        return max(result.queue_s + result.run_s for result in self.results) - self.queue_s

    @property
    def workflow(self) -> Workflow | None:
        """Of the first image."""
        return self.results[0].workflow


@dataclass(frozen=True)
class Queued:
    """The call was taken on.

    Attributes:
        position: Requests that wait before it; 0 if it begins at once.
        seconds: Until it begins, by estimate; ``None`` if nothing is known.
    """

    position: int
    seconds: float | None = None


@dataclass(frozen=True)
class Step:
    """A denoising step is done.

    Attributes:
        index: Of the image, from 0.
        step: How many are done.
        of: How many there are.
        seconds_left: Until the last one is done, by the pace so far.
    """

    index: int
    step: int
    of: int
    seconds_left: float | None = None


@dataclass(frozen=True)
class Preview:
    """What an image looks like after a step.

    Attributes:
        index: Of the image, from 0.
        step: How many are done.
        of: How many there are.
        image: In the size of the final one.
    """

    index: int
    step: int
    of: int
    image: Image


@dataclass(frozen=True)
class Done:
    """One of the images is done.

    Attributes:
        index: Of the image, from 0.
        result: With the image.
    """

    index: int
    result: Result


Event: TypeAlias = "Queued | Step | Preview | Done | Answer"
