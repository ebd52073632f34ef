"""LoRAs and textual inversions as entries of the model store."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bentoml_diffusers.errors import InvalidModel, TagConflict
from bentoml_diffusers.store.layout import ADAPTER_FOLDER
from bentoml_diffusers.store.pipelines import get
from bentoml_diffusers.store.record import Kind, Record, hash_file, read_record
from bentoml_diffusers.store.writing import make_tag, write_entry

if TYPE_CHECKING:
    import os

    import bentoml
    from bentoml import Tag

_DOWN_KEYS = (".lora_A.", ".lora_down.", ".lora.down.", "_lora.down.")
_LORA_KEYS = ("lora_A", "lora_B", "lora_down", "lora_up", "lora.down", "lora.up", "lokr_", "hada_")


def import_lora(name: Tag | str, source: str | os.PathLike[str]) -> bentoml.Model:
    """Stores a LoRA file under a name that requests can use.

    Args:
        name: Tag for the LoRA.
        source: A ``.safetensors`` file in any layout that diffusers reads (diffusers, kohya ...).

    Raises:
        InvalidModel: 400, no such file, or no LoRA in it.
        TagConflict: 409, the version exists and is something else.
    """
    path = Path(source).expanduser()
    shapes = _read_shapes(path)
    if not any(part in key for key in shapes for part in _LORA_KEYS):
        raise InvalidModel(path.name, "holds no LoRA: no tensor is named like one")
    ranks = [shape[0] for key, shape in shapes.items() if any(part in key for part in _DOWN_KEYS)]
    details = {"rank": max(ranks, default=None), "tensors": len(shapes)}
    return _import_adapter(name, path, "lora", details)


def import_textual_inversion(
    name: Tag | str, source: str | os.PathLike[str], *, token: str | None = None
) -> bentoml.Model:
    """Stores a textual inversion under a name.

    Args:
        name: Tag for the embedding.
        source: A ``.safetensors`` file with one tensor per token, or with ``emb_params``.
        token: The new word; by default the name of the tensor in the file.

    Raises:
        InvalidModel: 400, no such file, or no embedding in it.
        TagConflict: 409, the version exists and is something else.
    """
    path = Path(source).expanduser()
    shapes = _read_shapes(path)
    if not shapes or any(len(shape) > 2 for shape in shapes.values()):
        raise InvalidModel(path.name, "holds no textual inversion: its tensors are no vectors")
    token = token or next((key for key in shapes if key != "emb_params"), None)
    if token is None:
        raise InvalidModel(path.name, "names no token", "give token=")
    return _import_adapter(name, path, "textual_inversion", {"token": token})


def adapter_file(model: bentoml.Model, kind: Kind) -> tuple[Path, Record]:
    """Returns the file of a stored adapter, and its record.

    Raises:
        InvalidModel: 400, the entry is of another kind.
    """
    record = read_record(Path(model.path))
    if record is None or record.kind != kind:
        holds = record.kind if record else "pipeline"
        raise InvalidModel(model.tag, f"is a {holds}, not a {kind}")
    return next(Path(model.path_of(ADAPTER_FOLDER)).iterdir()), record


def _import_adapter(
    name: Tag | str, path: Path, kind: Kind, details: dict[str, Any]
) -> bentoml.Model:
    tag = make_tag(name)
    record = Record(
        kind=kind, origin=f"file {path.name}", files={path.name: hash_file(path)}, details=details
    )
    try:
        stored = get(tag)
    except LookupError:
        stored = None
    if stored is not None:
        held = read_record(Path(stored.path))
        if held is not None and (held.kind, held.files) == (kind, record.files):
            return stored
        if tag.version:
            raise TagConflict(tag, held.source if held else "another model", record.source)

    def fill(folder: Path) -> Record:
        (folder / ADAPTER_FOLDER).mkdir()
        shutil.copyfile(path, folder / ADAPTER_FOLDER / path.name)
        return replace(record, files={path.name: hash_file(folder / ADAPTER_FOLDER / path.name)})

    return write_entry(tag, record, fill, labels={"kind": kind})


def _read_shapes(path: Path) -> dict[str, tuple[int, ...]]:
    from safetensors import SafetensorError, safe_open

    if not path.is_file():
        raise InvalidModel(path.name, "is no file", "check the path")
    if path.suffix != ".safetensors":
        raise InvalidModel(
            path.name, "is no .safetensors file", "other formats can run code when they are read"
        )
    try:
        with safe_open(path, framework="np") as tensors:
            return {key: tuple(tensors.get_slice(key).get_shape()) for key in tensors.keys()}  # noqa: SIM118
    except SafetensorError as err:
        raise InvalidModel(path.name, f"is broken or truncated: {err}") from err
