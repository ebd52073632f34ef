"""Names of models: ``demo`` is the model of the service, ``demo:outline`` it with a LoRA."""

from __future__ import annotations

from dataclasses import dataclass, field
from http import HTTPStatus
from typing import TYPE_CHECKING, Any

from bentoml_diffusers.errors import DiffusersError, shorten

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

JOIN = "+"
# Endpoints of classic and of modular pipelines, for images from text, from an image, and masked.
GENERATION = ("txt2img", "text2image")
EDIT = ("img2img", "image2image")
MASKED_EDIT = ("inpaint", "inpainting")


class UnknownModel(DiffusersError, LookupError):
    """The request names a model that this service is not (404)."""

    error_code = HTTPStatus.NOT_FOUND
    outcome = "invalid"
    field, code = "model", "model_not_found"

    def __init__(self, got: str, known: str) -> None:
        super().__init__(
            f"model: {shorten(got)} is not served here, expected {known!r}, "
            f"or with LoRAs {known}:NAME{JOIN}NAME"
        )


class UnsupportedOperation(DiffusersError):
    """The model of a service cannot do what a path stands for (400)."""

    error_code = HTTPStatus.BAD_REQUEST
    outcome = "invalid"
    field, code = "model", "unsupported_operation"

    def __init__(self, wanted: str, known: Iterable[str]) -> None:
        super().__init__(f"model: does no {wanted} here, only {', '.join(known)}")


def find_task(tasks: Iterable[str], names: Sequence[str]) -> str:
    """Returns the first of several tasks that a service has.

    Raises:
        UnsupportedOperation: 400, it has none of them.
    """
    known = tuple(tasks)
    for name in names:
        if name in known:
            return name
    raise UnsupportedOperation(names[0], known)


@dataclass(frozen=True)
class ServedModel:
    """What clients call the model of a service.

    Attributes:
        name: Of its tag.
        version: Of its tag.
        created: Seconds since 1970.
        aliases: Other names for it, or for it with LoRAs: ``{"gpt-image-1": "demo"}``.
    """

    name: str
    version: str = ""
    created: int = 0
    aliases: Mapping[str, str] = field(default_factory=dict)

    def read(self, text: str) -> tuple[str, ...]:
        """Returns the LoRAs that a name stands for.

        Args:
            text: ``""`` and ``"demo"`` for none, ``"demo:outline+stripes"`` for two.

        Raises:
            UnknownModel: 404, another model.
        """
        if not text:
            return ()
        name, _, rest = self.aliases.get(text, text).partition(":")
        loras = rest.split(JOIN)
        if name != self.name or (rest and not all(loras)):
            raise UnknownModel(text, self.name)
        return () if rest in ("", "latest", self.version) else tuple(loras)

    def list_names(self, loras: Iterable[str]) -> list[str]:
        """Returns the names that a request may use, those of several LoRAs not among them."""
        return [self.name, *(f"{self.name}:{lora}" for lora in loras), *self.aliases]

    def describe(self, name: str) -> dict[str, Any]:
        """Returns an entry of ``/v1/models``."""
        return {
            "id": name,
            "object": "model",
            "created": self.created,
            "owned_by": "bentoml_diffusers",
            "parent": None if name == self.name else self.name,
        }


def add_loras(loras: Sequence[str], fields: Mapping[str, Any]) -> dict[str, Any]:
    """Returns ``lora_weights`` of a model's name and of a field together, where the name has some.

    Args:
        loras: From the name.
        fields: Of the request.
    """
    given = fields.get("lora_weights", [])
    listed = [given] if isinstance(given, (str, dict)) else given
    if not loras or not isinstance(listed, list):  # the field is refused with all others
        return {}
    return {"lora_weights": [*({"name": name} for name in loras), *listed]}
