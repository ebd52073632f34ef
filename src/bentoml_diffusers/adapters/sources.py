"""Resolves the names of LoRAs and textual inversions to files, within the allowed sources."""

from __future__ import annotations

import functools
import os
import re
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple

from bentoml_diffusers.adapters.scales import Scale, read_scale, read_scales
from bentoml_diffusers.errors import (
    AdapterNotFound,
    InvalidModel,
    InvalidRequest,
    UntrustedSource,
)
from bentoml_diffusers.options import ADAPTER_SOURCES, AdapterSource
from bentoml_diffusers.store import (
    PEFT_CONFIG,
    PEFT_TENSORS,
    find_adapter,
    has_adapter,
    list_names,
)
from bentoml_diffusers.tasks import ADAPTER_OPTIONS

Kind = Literal["lora", "textual_inversion"]

MAX_PER_REQUEST = 16
_MAX_NAME = 1024
_NO_FILE_NAME = re.compile("[\0\ud800-\udfff]")  # NUL, and lone surrogates
_MAX_COMPARED = 200
_LISTING_S = 5.0
# Keys in requests; an operator's mapping may have any argument of diffusers' loader.
_ITEM_KEYS: dict[Kind, tuple[str, ...]] = {
    "lora": ("name", "model_name", "scale", "components", "weight_name"),
    "textual_inversion": ("name", "model_name", "token", "weight_name"),
}
_HUB_KEYS = ("revision", "subfolder")
_OWN_KEYS = ("scale", "token", "components", "load_into_transformer_2")  # not passed to the loader


class _Place(NamedTuple):
    """The file that a name refers to, and what the store knows about it."""

    path: str
    token: str | None = None
    tag: str | None = None
    components: tuple[str, ...] = ()


@dataclass(frozen=True)
class Adapter:
    """One adapter, resolved to a file.

    Attributes:
        name: The name in the request.
        path: A local file, or a folder or hub repository for diffusers to look into.
        scale: Weight of a LoRA; 1 is as trained, 0 is none, negative is the opposite. By component
            and block if it is a mapping, see :mod:`bentoml_diffusers.adapters.scales`.
        token: Placeholder token of a textual inversion, ``None`` for the one in its file.
        arguments: More arguments for diffusers' loader, such as ``weight_name``.
        tag: Tag of the store's entry, if it is from the store.
        components: Denoisers that a LoRA is loaded into; if empty, the one that diffusers chooses.
    """

    name: str
    path: str
    scale: Scale = 1.0
    token: str | None = None
    arguments: Mapping[str, Any] = field(default_factory=dict)
    tag: str | None = None
    components: tuple[str, ...] = ()


@dataclass(frozen=True)
class AdapterFinder:
    """Finds adapters by name.

    Attributes:
        kind: The kind of adapter that it finds.
        sources: The allowed sources, see ``ModelOptions.adapter_sources``.
        folder: Folder for relative file names; ``None``: names of files are refused.
        is_trusted: The names come from the operator: all arguments of diffusers' loaders pass.
    """

    kind: Kind
    sources: tuple[AdapterSource, ...]
    folder: Path | None
    is_trusted: bool = False

    @property
    def field(self) -> str:
        """Name of the request's field, for messages."""
        return ADAPTER_OPTIONS[self.kind]

    def find_all(self, value: object) -> list[Adapter]:
        """Returns the adapters that ``value`` names: one name, a mapping, or a list of either.

        Raises:
            InvalidRequest: 400, malformed.
            UntrustedSource: 400, outside of the allowed sources.
            AdapterNotFound: 404, no such adapter.
        """
        if value is None:
            return []
        many = isinstance(value, Sequence) and not isinstance(value, str)
        items = list(value) if many else [value]  # type: ignore[call-overload]
        if len(items) > MAX_PER_REQUEST and not self.is_trusted:
            raise InvalidRequest(self.field, len(items), f"at most {MAX_PER_REQUEST} of them")
        return [self._find(item) for item in items]

    def _find(self, item: object) -> Adapter:
        if isinstance(item, str):
            return self._find_name(item.strip())
        if not isinstance(item, Mapping):
            raise InvalidRequest(self.field, item, "a name, a mapping, or a list of either")
        values = dict(item)
        name = values.pop("name", None) or values.pop("model_name", None)
        if not isinstance(name, str):
            raise InvalidRequest(f"{self.field}.name", item, "the name of an adapter")
        known = (*_ITEM_KEYS[self.kind], *(_HUB_KEYS if "hub" in self.sources else ()))
        if not (self.is_trusted or {*item} <= {*known}):
            raise InvalidRequest(self.field, item, f"only the keys {', '.join(known)}")
        found = self._find_place(name, values)
        return replace(found, **self._read_own(values, found))

    def _read_own(self, values: Mapping[str, Any], found: Adapter) -> dict[str, Any]:
        """Reads the keys of a mapping that do not locate the file."""
        token, components = values.get("token"), values.get("components")
        if token is not None and not (isinstance(token, str) and token.strip() == token != ""):
            raise InvalidRequest(f"{self.field}.token", token, "a word")
        if components is None and values.get("load_into_transformer_2"):
            components = ["transformer_2"]  # the form that diffusers' loader of Wan takes
        if not isinstance(components, (list, tuple)):
            components = [] if components is None else [components]
        names = tuple(components)
        if not all(isinstance(one, str) for one in names) or len(set(names)) != len(names):
            raise InvalidRequest(
                f"{self.field}.components", components, "a list of component names"
            )
        scale = read_scales(f"{self.field}.scale", values.get("scale", 1.0))
        return {
            "scale": scale,
            "token": token or found.token,
            "components": names or found.components,
        }

    def _find_place(self, name: str, values: Mapping[str, Any]) -> Adapter:
        more = {key: value for key, value in values.items() if key not in _OWN_KEYS}
        weight_name = more.pop("weight_name", None)
        if weight_name is None:
            return self._find_name(name, **more)
        return self._find_in_folder(name, str(weight_name), more)

    def _find_name(self, name: str, **more: Any) -> Adapter:
        self._check_name(name)
        for source in self.sources:
            found = getattr(self, f"_in_{source}")(name)
            if found is not None:
                path = found.path
                if source == "hub" and name.count("/") > 1:
                    # "owner/repository/file", as bentoml.diffusers wrote it
                    owner, repository, more["weight_name"] = name.split("/", 2)
                    path = f"{owner}/{repository}"
                known = {"token": found.token, "tag": found.tag, "components": found.components}
                return Adapter(name, path, arguments=more, **known)
        raise self._not_found(name)

    def _find_in_folder(self, name: str, weight_name: str, more: dict[str, Any]) -> Adapter:
        """``{"model_name": folder or repository, "weight_name": file}``."""
        self._check_name(f"{name}/{weight_name}")
        if self.folder is not None and os.path.isdir(self.folder / name):
            return self._find_name(f"{name}/{weight_name}", **more)
        if "path" in self.sources and os.path.isdir(os.path.expanduser(name)):
            path = Path(name).expanduser() / weight_name
            return self._find_name(str(path), **more)
        if "hub" in self.sources and not Path(name).is_absolute():
            return Adapter(name, name, arguments={**more, "weight_name": weight_name})
        raise self._not_found(f"{name}/{weight_name}")

    def _check_name(self, name: str) -> None:
        if not name or _NO_FILE_NAME.search(name) or len(name) > _MAX_NAME:
            raise InvalidRequest(self.field, name, "the name of an adapter")

    def _in_store(self, name: str) -> _Place | None:
        if "/" in name or name.endswith(".safetensors"):
            return None
        found = find_adapter(name, self.kind)
        if found is None:
            return None
        return _Place(str(found.path), found.token, found.tag, found.components)

    def _in_lora_dir(self, name: str) -> _Place | None:
        if self.folder is None or os.path.isabs(name):
            return None
        root = os.path.realpath(self.folder)  # `Path.resolve` takes longer than all the rest
        path = os.path.realpath(os.path.join(root, name))
        return self._checked_file(path) if path.startswith(os.path.join(root, "")) else None

    def _in_path(self, name: str) -> _Place | None:
        return self._checked_file(os.path.expanduser(name))

    def _in_hub(self, name: str) -> _Place | None:
        is_repository = "/" in name and not name.startswith((".", "/", "~"))
        return _Place(name) if is_repository else None

    def _checked_file(self, path: str) -> _Place | None:
        if not path.endswith(".safetensors") or not os.path.isfile(path):
            return None
        folder, file = os.path.split(path)
        if file == PEFT_TENSORS and os.path.isfile(os.path.join(folder, PEFT_CONFIG)):
            raise InvalidModel(
                os.path.basename(folder),
                "was written by save_pretrained of PEFT, whose alpha is in another file",
                "put it into the model store with import_lora, and use its name there",
            )
        return _Place(path)

    def _not_found(self, name: str) -> Exception:
        """Raises "refused" if the name can belong to no allowed source, else "not found"."""
        reaches_out = (
            Path(name).is_absolute()
            or ".." in Path(name).parts
            or "://" in name
            or name.startswith("~")
            or self._is_link_out(name)
        )
        is_pickle = Path(name).suffix in (".bin", ".pt", ".pth", ".ckpt", ".pkl")
        in_hub_form = "/" in name and (self.folder is None or not name.endswith(".safetensors"))
        if reaches_out or is_pickle or in_hub_form:
            return UntrustedSource(self.field, name, self._allowed())
        return AdapterNotFound(self.field, name, self._known_like(name))

    def _is_link_out(self, name: str) -> bool:
        if self.folder is None:
            return False
        root = os.path.realpath(self.folder)  # `Path.resolve` raises for a loop of symlinks
        return not Path(os.path.realpath(os.path.join(root, name))).is_relative_to(root)

    def _allowed(self) -> str:
        words = {
            "store": "tags of the model store",
            "lora_dir": "safetensors files below lora_dir",
            "path": "safetensors files by their path",
            "hub": "repositories of the hub",
        }
        return ", ".join(words[source] for source in ADAPTER_SOURCES if source in self.sources)

    def known(self) -> list[str]:
        """Returns the names that requests can use."""
        return [name for name in self._names() if self._is_known(name)]

    def _known_like(self, name: str) -> list[str]:
        """Reads only a few entries of the store: clients can send any number of unknown names."""
        return [one for one in _near(name, self._names()) if self._is_known(one)]

    def _names(self) -> list[str]:
        """Names of files and of store entries; the latter may be of another kind."""
        names: set[str] = set()
        if "store" in self.sources:
            names.update(list_names())
        if "lora_dir" in self.sources and self.folder is not None and self.folder.is_dir():
            names |= _files_below(self.folder, int(time.monotonic() / _LISTING_S))
        return sorted(names)

    def _is_known(self, name: str) -> bool:
        return name.endswith(".safetensors") or has_adapter(name, self.kind)


@functools.lru_cache(maxsize=8)
def _files_below(folder: Path, _when: int) -> frozenset[str]:
    """Lists a folder at most once per ``_LISTING_S``: clients can send many unknown names."""
    found = folder.rglob("*.safetensors")
    return frozenset(path.relative_to(folder).as_posix() for path in found if os.path.isfile(path))


def _near(name: str, known: list[str]) -> list[str]:
    """Of very many names only those with a common prefix: comparing all takes too long."""
    if len(known) <= _MAX_COMPARED:
        return known
    alike = [one for one in known if one[:3] == name[:3]] or known
    return sorted(alike, key=lambda one: one[: len(name)] != name)[:_MAX_COMPARED]


def read_layer_scale(arguments: Mapping[str, Any], *, can_differ: bool = True) -> float:
    """Returns the scale of all LoRAs that the arguments of a pipeline ask for, 1 by default.

    Args:
        arguments: Arguments of the pipeline.
        can_differ: False where LoRAs are fused with the weights, which no scale reaches.

    Raises:
        InvalidRequest: 400, not a number, too large, or without effect.
    """
    scale = 1.0
    for name, value in arguments.items():
        if name.endswith("attention_kwargs") and isinstance(value, Mapping) and "scale" in value:
            mine = read_scale(f"{name}.scale", value["scale"])
            if mine != 1 and not can_differ:
                raise InvalidRequest(
                    f"{name}.scale", mine, "1, because LoRAs are fused into this model's weights"
                )
            scale *= mine
    return scale
