"""The index of a modular pipeline: read, made from a classic one, and rewritten for the store.

In diffusers' index each component may be in another repository. In the store all are in the
entry, and the index names nothing outside of it.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import TYPE_CHECKING, Any

from bentoml_diffusers import _names
from bentoml_diffusers.errors import InvalidModel
from bentoml_diffusers.store.entries import MODULAR_INDEX
from bentoml_diffusers.store.sources import check_name, read_components, read_json

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path


@dataclass(frozen=True)
class Component:
    """A component as an index names it.

    Attributes:
        library: Package of its class.
        class_name: Its class.
        repository: Repository or folder with its files; ``None`` if it has none.
        subfolder: Folder in it.
        variant: Variant of its weights.
        revision: Branch, tag or commit of the repository.
    """

    library: str
    class_name: str
    repository: str | None = None
    subfolder: str = ""
    variant: str | None = None
    revision: str | None = None

    def localized(self, name: str) -> list[Any]:
        """Returns its entry for an index in the same folder as its files."""
        kind = [self.library, self.class_name]
        return [
            *kind,
            {
                "type_hint": kind,
                "pretrained_model_name_or_path": None,
                "subfolder": name,
                "variant": self.variant,
                "revision": None,
            },
        ]


def read_modular_index(folder: Path, name: str) -> dict[str, Any]:
    """Reads ``modular_model_index.json``.

    Raises:
        InvalidModel: 400, there is none, or it is broken.
    """
    index = read_json(folder / MODULAR_INDEX, name)
    if not isinstance(index.get("_class_name"), str):
        raise InvalidModel(name, f"has a {MODULAR_INDEX} without _class_name")
    return index


def read_modular_components(index: Mapping[str, Any], source: str) -> dict[str, Component]:
    """Returns the components that an index names, by name, those without files included.

    Raises:
        InvalidModel: 400, a malformed entry, or a class of neither diffusers nor transformers.
    """
    return {
        name: _read_component(name, value, source)
        for name, value in index.items()
        if not name.startswith("_") and _is_component(value)
    }


def modular_index_from(index: Mapping[str, Any], source: str) -> dict[str, Any]:
    """Turns the index of a classic pipeline into that of its modular one.

    Components that are explicitly absent, ``[null, null]``, are left out: diffusers would turn one
    that is made from its config into one that cannot be loaded.

    Raises:
        InvalidModel: 400, diffusers has no blocks for this class.
    """
    cls = _names.modular_class_of(index)
    if cls is None:
        raise InvalidModel(
            source, f"is a {index['_class_name']}, for which diffusers has no modular pipeline"
        )
    modular: dict[str, Any] = {
        "_class_name": cls.__name__,
        "_diffusers_version": index.get("_diffusers_version"),
        "_blocks_class_name": cls.default_blocks_name,
    }
    components = read_components(index, source)
    for name, value in index.items():
        if name in components:
            modular[name] = Component(*components[name]).localized(name)
        elif not name.startswith("_") and value != [None, None]:
            modular[name] = value
    return modular


def write_index(index: Mapping[str, Any]) -> str:
    """Returns the text of an index."""
    return json.dumps(index, indent=2, sort_keys=True) + "\n"


def _is_component(value: object) -> bool:
    """True for ``[library, class, details]``; a config value may be a list as well."""
    return (
        isinstance(value, (list, tuple))
        and len(value) == 3
        and (isinstance(value[0], str) or isinstance(value[2], dict))
    )


def _read_component(name: str, value: Sequence[Any], source: str) -> Component:
    library, class_name, details = value
    if not name.isidentifier() or not isinstance(details, dict):
        raise _malformed(source, name, value)
    hint = details.get("type_hint") or (None, None)
    if library is None and isinstance(hint, (list, tuple)) and len(hint) == 2:
        library, class_name = hint
    if library is None and class_name is None:
        library, class_name = "diffusers", "AutoModel"  # it looks into the component's config
    place = details.get("pretrained_model_name_or_path") or details.get("repo")
    texts = [place, details.get("subfolder"), details.get("variant"), details.get("revision")]
    if not all(text is None or isinstance(text, str) for text in texts):
        raise _malformed(source, name, value)
    if not (isinstance(library, str) and isinstance(class_name, str)):
        raise _malformed(source, name, value)
    if not _names.is_component_class(library, class_name):
        raise InvalidModel(
            source,
            f"names {library}.{class_name} for {name!r} in its {MODULAR_INDEX}, "
            "which is not a class of diffusers or transformers",
            "let the code of its blocks create this component",
        )
    subfolder = details.get("subfolder") or ""
    if subfolder:
        check_name(source, subfolder)
    return Component(
        library,
        class_name,
        place,
        PurePosixPath(subfolder).as_posix() if subfolder else "",
        details.get("variant"),
        details.get("revision"),
    )


def _malformed(source: str, name: str, value: object) -> InvalidModel:
    return InvalidModel(source, f"has a malformed entry {name!r} in its {MODULAR_INDEX}: {value!r}")
