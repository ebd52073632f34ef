"""Finds token and vectors in the file of a textual inversion, in each known layout."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from bentoml_diffusers.errors import InvalidModel

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

# kohya and diffusers' trainers for several text encoders; the older of diffusers' counts them.
_COMPONENTS = {
    "clip_l": "text_encoder",
    "clip_g": "text_encoder_2",
    "text_encoders_0": "text_encoder",
    "text_encoders_1": "text_encoder_2",
}
_PARAMETER, _TOKEN_ID = "string_to_param.", "string_to_token."
_NAMELESS = ("emb_params", "*")


@dataclass(frozen=True)
class EmbeddingLayout:
    """Where the file of a textual inversion has its token and vectors.

    Attributes:
        token: The token that the file names, if any.
        keys: Key of the vectors by name of their text encoder; under ``None`` those of a file that
            does not say which one they are for.
    """

    token: str | None
    keys: Mapping[str | None, str]


def read_embedding_layout(name: str, shapes: Mapping[str, Sequence[int]]) -> EmbeddingLayout:
    """Finds the vectors in a file by the names of its tensors.

    Args:
        name: Name of the file, for messages.
        shapes: Shape of each tensor by its name.

    Raises:
        InvalidModel: 400, no textual inversion, several of them, or other tensors beside it.
    """
    # Beside the vectors AUTOMATIC1111 has single numbers: the id of the token, the steps.
    keys = [key for key, shape in shapes.items() if shape and not key.startswith(_TOKEN_ID)]
    named: dict[str | None, str] = {_COMPONENTS[key]: key for key in keys if key in _COMPONENTS}
    if named and len(named) == len(keys):
        return EmbeddingLayout(None, named)
    if len(keys) != 1:
        found = ", ".join(sorted(keys)[:5]) or "none"
        raise InvalidModel(
            name,
            f"must hold exactly one textual inversion; its tensors are {found}",
            "it must hold one tensor, or one for each text encoder as clip_l and clip_g",
        )
    token = keys[0].removeprefix(_PARAMETER)
    return EmbeddingLayout(None if token in _NAMELESS else token, {None: keys[0]})
