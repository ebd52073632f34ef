"""Static textual inversions, which stay loaded."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import TYPE_CHECKING

from bentoml_diffusers.adapters.files import read_tensors
from bentoml_diffusers.adapters.tokens import find_encoders, read_embedding
from bentoml_diffusers.errors import DiffusersError, InvalidModel

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    import torch
    from diffusers import DiffusionPipeline

    from bentoml_diffusers.adapters.sources import Adapter


def load_textual_inversions(pipeline: DiffusionPipeline, adapters: Sequence[Adapter]) -> None:
    """Adds the tokens and vectors of ``adapters`` to tokenizers and text encoders.

    Raises:
        UnsupportedByPipeline: 400, the pipeline's class takes no textual inversions.
        InvalidModel: 400, a file that is not an embedding for these text encoders.
    """
    encoders = find_encoders(pipeline) if adapters else []
    for adapter in adapters:
        with _said_of(adapter, pipeline):
            found = read_embedding(
                pipeline, encoders, adapter.name, _read(adapter), check_finite=True
            )
            _load(pipeline, adapter.token or found.token, found.vectors)


@contextlib.contextmanager
def _said_of(adapter: Adapter, pipeline: DiffusionPipeline) -> Iterator[None]:
    try:
        yield
    except DiffusersError:
        raise
    except (ValueError, OSError, KeyError, RuntimeError) as err:
        raise InvalidModel(
            adapter.name, f"is not a textual inversion for {type(pipeline).__name__}: {err}"
        ) from err


def _read(adapter: Adapter) -> dict[str, torch.Tensor]:
    """Reads a file as for a request; a folder or a repository of the hub through diffusers."""
    from diffusers.loaders.textual_inversion import load_textual_inversion_state_dicts

    if Path(adapter.path).is_file():
        return read_tensors(adapter.name, Path(adapter.path)).tensors
    (found,) = load_textual_inversion_state_dicts(
        [adapter.path], use_safetensors=True, **adapter.arguments
    )
    return found  # type: ignore[no-any-return]


def _load(
    pipeline: DiffusionPipeline, token: str | None, vectors: Mapping[str, torch.Tensor]
) -> None:
    if token is None:
        raise ValueError("its file names no token: pass one as token")
    for component, tensor in vectors.items():
        pipeline.load_textual_inversion(
            tensor,
            token=token,
            text_encoder=getattr(pipeline, component),
            tokenizer=getattr(pipeline, component.replace("text_encoder", "tokenizer")),
        )
