"""What a page of a family declares, and how its pipelines are made."""

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from importlib.util import find_spec
from typing import Any

import diffusers
import numpy as np
import torch
from PIL import Image

_RANDOM = np.random.default_rng(0)
IMAGE, OTHER_IMAGE = (
    Image.fromarray(_RANDOM.integers(0, 255, (32, 32, 3), dtype=np.uint8)) for _ in range(2)
)
MASK = Image.new("L", (32, 32), 0)
MASK.paste(255, (8, 8, 24, 24))
VIDEO = [Image.fromarray(_RANDOM.integers(0, 255, (32, 32, 3), dtype=np.uint8)) for _ in range(5)]
# Two of equal length, and a longer one.
PROMPTS = ("a red circle", "a blue circle", "a green square on the left")


@dataclass(frozen=True)
class Variant:
    """What a class has beside the rest of its family.

    Attributes:
        arguments: Of each call, beside those of the family; ``None`` leaves one out.
        parts: From the components of the family to those that differ.
        alone: Why no forward of its denoiser is shared; empty where it is.
        shares: How many of the three requests share one; ``None``: as the family says.
        without: Checks that cannot be done, with the reason of each.
        needs: Packages that the class needs beside those of diffusers.
        broken: Why it does not run in diffusers itself; empty where it does.
        base: The class itself where diffusers has it under no public name.
    """

    arguments: Mapping[str, Any] = field(default_factory=dict)
    parts: Callable[[dict[str, Any]], dict[str, Any]] = lambda parts: {}
    alone: str = ""
    shares: int | None = None
    without: Mapping[str, str] = field(default_factory=dict)
    needs: tuple[str, ...] = ()
    broken: str = ""
    base: type | None = None


@dataclass(frozen=True)
class Family:
    """Pipeline classes that are made of the same components.

    Attributes:
        name: As people call it.
        make: Returns the components by name. It is called with PyTorch's generator seeded.
        classes: Names of classes in diffusers, what follows a blank says how they are made; a
            mapping is that of :attr:`Variant.arguments`.
        arguments: Of each call.
        adjust: Changes a pipeline that was made, such as the sizes that it takes.
        prompts: One for each of three requests that run at once; empty for no prompt.
        vary: Further arguments of each of the three, such as a list of images.
        quick: These classes run in the ordinary test run.
        lora_layers: Names of layers of the denoiser that a LoRA is made for.
        alone: Why no class of it shares forwards of its denoiser; empty where they do.
        most: How many of the three requests share one: two where text of unlike length does not.
        without: Checks that cannot be done with any of them, with the reason of each.
        needs: Packages that they need beside those of diffusers.
    """

    name: str
    make: Callable[[], dict[str, Any]]
    classes: Mapping[str, Variant | Mapping[str, Any]]
    arguments: Mapping[str, Any] = field(default_factory=dict)
    adjust: Callable[[Any], None] = lambda pipeline: None
    prompts: tuple[str, ...] = PROMPTS
    vary: tuple[Mapping[str, Any], ...] = ({}, {}, {})
    quick: tuple[str, ...] = ()
    lora_layers: tuple[str, ...] = ("to_q", "to_k", "to_v")
    alone: str = ""
    most: int = 3
    without: Mapping[str, str] = field(default_factory=dict)
    needs: tuple[str, ...] = ()

    def variant(self, name: str) -> Variant:
        """Returns what the family says of one of its classes."""
        found = self.classes[name]
        return found if isinstance(found, Variant) else Variant(found)

    def why_alone(self, name: str) -> str:
        """Returns why the class shares no forward of its denoiser, or nothing."""
        return self.variant(name).alone or self.alone

    def shares(self, name: str) -> int:
        """Returns how many of the three requests share a forward of the denoiser."""
        return self.variant(name).shares or self.most

    def why_not(self, name: str, check: str) -> str:
        """Returns why a check of the class is left out, or nothing."""
        return {**self.without, **self.variant(name).without}.get(check, "")

    def why_missing(self, name: str) -> str:
        """Returns why the class cannot be made here, or nothing."""
        if self.variant(name).broken:
            return self.variant(name).broken
        needs = {*self.needs, *self.variant(name).needs}
        missing = sorted(package for package in needs if find_spec(package) is None)
        if missing:
            return f"needs {', '.join(missing)}"
        has = self.variant(name).base or hasattr(diffusers, name.partition(" ")[0])
        return "" if has else f"diffusers {diffusers.__version__} has no such class"

    def find_class(self, name: str) -> Any:
        """Returns the class."""
        return self.variant(name).base or getattr(diffusers, name.partition(" ")[0])

    def calls(self, name: str) -> list[dict[str, Any]]:
        """Returns the arguments of three requests that differ."""
        shared = {"num_inference_steps": 3, **self.arguments, **self.variant(name).arguments}
        takes = inspect.signature(self.find_class(name).__call__).parameters
        if "output_type" in takes:
            shared.setdefault("output_type", "np")
        prompts = [{"prompt": text} for text in self.prompts] or [{}] * 3
        calls = [
            {**prompt, **more, **shared} for prompt, more in zip(prompts, self.vary, strict=True)
        ]
        return [{key: value for key, value in call.items() if value is not None} for call in calls]

    def build(self, name: str) -> Any:
        """Returns a pipeline of the class, its weights random but seeded."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            parts = self.make()
            parts |= self.variant(name).parts(parts)
            for part in parts.values():
                if isinstance(part, torch.nn.Module):
                    wake(part.eval())
            pipeline = assemble(self.find_class(name), parts)
        pipeline.set_progress_bar_config(disable=True)
        self.adjust(pipeline)
        return pipeline


def assemble(cls: Any, parts: Mapping[str, Any]) -> Any:
    """Returns a pipeline of those components that the class takes; without what is optional."""
    given = {}
    for name, parameter in inspect.signature(cls.__init__).parameters.items():
        if name in parts:
            given[name] = parts[name]
        elif parameter.default is parameter.empty and name not in ("self", "kwargs"):
            given[name] = None
    return cls(**given)


def config_of(model: Any, **changes: Any) -> dict[str, Any]:
    """Returns what a model was made with, some of it changed.

    Not by `from_config`: that takes the defaults for what once was a default.
    """
    known = {name: value for name, value in model.config.items() if not name.startswith("_")}
    return {**known, **changes}


def wake(module: torch.nn.Module) -> None:
    """Fills matrices that are zero before a training: what they read would have no effect."""
    with torch.no_grad():
        for parameter in module.parameters():
            if parameter.ndim > 1 and parameter.is_floating_point() and not parameter.any():
                parameter.normal_(0, 0.1)


def numbers(output: Any) -> np.ndarray:
    """Returns the first thing that a pipeline made, as floats; images from 0 to 1."""
    values = output.to_tuple() if hasattr(output, "to_tuple") else output
    first = values[0]
    if isinstance(first, torch.Tensor):
        return first.detach().float().cpu().numpy()
    if isinstance(first, (list, tuple)):
        first = [numbers((item,)) if not isinstance(item, Image.Image) else item for item in first]
    array = np.asarray([np.asarray(item) for item in first] if isinstance(first, list) else first)
    return array.astype(np.float64) / (255 if array.dtype == np.uint8 else 1)
