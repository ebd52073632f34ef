"""A folder with a modular pipeline: where the files of each component are, and which are taken."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

from bentoml_diffusers.errors import InvalidModel
from bentoml_diffusers.store.entries import (
    BLOCKS_CONFIG,
    BLOCKS_FILE,
    IP_ADAPTER_FOLDER,
    MODULAR_INDEX,
)
from bentoml_diffusers.store.modular.blocks import expected_names, find_blocks
from bentoml_diffusers.store.modular.index import (
    Component,
    modular_index_from,
    read_modular_components,
    read_modular_index,
    write_index,
)
from bentoml_diffusers.store.sources import (
    PICKLE_SUFFIXES,
    Place,
    Selection,
    Source,
    WeightChoice,
    check_file,
    list_names,
    select_component,
)

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence
    from pathlib import Path

_AT_ROOT = (".json", ".txt", ".model", ".jinja", ".safetensors", *PICKLE_SUFFIXES)


def open_modular(
    folder: Path,
    *,
    name: str,
    weights: WeightChoice,
    elsewhere: Mapping[str, Place] | None = None,
) -> Source:
    """Inspects a folder with a modular pipeline before any file is taken from it.

    Args:
        folder: Has ``modular_model_index.json``.
        name: What messages call it.
        weights: Which weights to take.
        elsewhere: Components whose files are in other folders.

    Raises:
        InvalidModel: 400, a broken index, or a component or code that it names is missing.
        UntrustedSource: 400, pickled weights without ``allow_pickle``.
    """
    index = read_modular_index(folder, name)
    names = list_names(folder)
    found = read_modular_components(index, name)
    places = {
        key: place
        for key, component in found.items()
        if (place := (elsewhere or {}).get(key) or find_place(folder, key, component, names, name))
    }
    return make_source(folder, index, places, name=name, weights=weights, more=select_beside(names))


def open_as_modular(classic: Source, *, has_own_blocks: bool = False) -> Source:
    """Opens a classic pipeline as a modular one, with those components that the blocks know.

    Args:
        classic: The folder of the classic pipeline.
        has_own_blocks: Its blocks are custom code, so it is not known yet what they need.

    Raises:
        InvalidModel: 400, diffusers has no blocks for this class.
    """
    index = modular_index_from(classic.index, classic.name)
    components = read_modular_components(index, classic.name)
    if not has_own_blocks:
        known = expected_names(find_blocks(index, classic.name))
        index = {
            key: value for key, value in index.items() if key in known or key not in components
        }
        components = {key: components[key] for key in components if key in known}
    places = {name: Place(classic.folder, name) for name in components}
    files = tuple(n for n in classic.selection.files if n.partition("/")[0] in places)
    pickles = tuple(n for n in classic.selection.pickles if n in files)
    return Source(
        classic.name,
        classic.folder,
        index,
        Selection(files, pickles),
        places,
        {MODULAR_INDEX: write_index(index)},
    )


def make_source(
    folder: Path,
    index: Mapping[str, Any],
    places: Mapping[str, Place],
    *,
    name: str,
    weights: WeightChoice,
    more: Iterable[str] = (),
) -> Source:
    """Selects the files of the components, and rewrites the index to name only those.

    Raises:
        InvalidModel: 400, a component that is incomplete.
        UntrustedSource: 400, pickled weights without ``allow_pickle``.
    """
    chosen: list[str] = list(more)
    localized = dict(index)
    with_variant = False
    for key, component in read_modular_components(index, name).items():
        if key not in places:
            localized.pop(key)  # named in the index, but without files: stays None
            continue
        variant = weights.variant or component.variant
        files = select_part(name, key, component, list_place(places[key], key), weights)
        has_variant = variant is not None and any(f".{variant}" in file for file in files)
        kept = Component(
            component.library, component.class_name, variant=variant if has_variant else None
        )
        localized[key] = kept.localized(key)
        chosen += files
        with_variant |= has_variant
    if weights.variant and not with_variant:
        problem = f"has no variant {weights.variant!r}"
        raise InvalidModel(name, problem, "check the variant, or leave it out")
    taken = tuple(sorted(chosen))
    pickles = tuple(file for file in taken if file.endswith(PICKLE_SUFFIXES))
    source = Source(
        name,
        folder,
        localized,
        Selection(taken, pickles),
        dict(places),
        {MODULAR_INDEX: write_index(localized)},
    )
    for file in taken:
        check_file(source, file)
    return source


def select_part(
    source: str,
    key: str,
    component: Component,
    names: Sequence[str],
    weights: WeightChoice,
) -> list[str]:
    """Chooses the files of one component, whose names begin with its name.

    If no variant is asked for, the one that the index names is taken.

    Raises:
        InvalidModel: 400, it has no weights, or brings its own code.
        UntrustedSource: 400, pickled weights without ``allow_pickle``.
    """
    code = next((name for name in names if name.endswith(".py")), None)
    if code is not None:
        raise InvalidModel(
            source,
            f"has a component {key!r} with its own code, {code}, which is not supported",
            "let its blocks define the class",
        )
    if not names:
        raise InvalidModel(source, f"has no files for {key!r}, which its {MODULAR_INDEX} names")
    wanted = replace(weights, variant=weights.variant or component.variant)
    return select_component(source, component.class_name, names, wanted)


def find_place(
    folder: Path, key: str, component: Component, names: Iterable[str], source: str
) -> Place | None:
    """Returns where the files of a component are; ``None`` for one that has no files at all.

    As in diffusers, files of the folder take precedence over the index.

    Raises:
        InvalidModel: 400, the index names its files, but they are not in the folder.
    """
    subfolder = local_subfolder(key, component, names)
    if subfolder is not None:
        return Place(folder, subfolder)
    if component.repository is None:
        return None
    raise InvalidModel(
        source,
        f"has no files for {key!r}: its {MODULAR_INDEX} names {component.repository!r}, "
        "which is not in the folder",
        "load it with diffusers (load_components) and pass it to save_model, or import the "
        "repository itself from the hub",
    )


def local_subfolder(key: str, component: Component, names: Iterable[str]) -> str | None:
    """Returns the folder among ``names`` that has a component's files, if any."""
    known = list(names)
    for subfolder in dict.fromkeys((component.subfolder, key)):
        if subfolder and any(name.startswith(f"{subfolder}/") for name in known):
            return subfolder
    return None


def list_place(place: Place, key: str) -> list[str]:
    """Returns the files of a component, with paths below its name."""
    return names_in(list_names(place.folder), place.subfolder, key)


def names_in(names: Iterable[str], subfolder: str, key: str) -> list[str]:
    """Returns those of a repository's files that are a component's, with paths below its name."""
    if subfolder:
        start = f"{subfolder}/"
        return [f"{key}/{name.removeprefix(start)}" for name in names if name.startswith(start)]
    return [f"{key}/{name}" for name in names if "/" not in name and name.endswith(_AT_ROOT)]


def select_beside(names: Iterable[str]) -> list[str]:
    """Returns the files of a modular pipeline that belong to no component."""
    known = list(names)
    code = [name for name in known if "/" not in name and name.endswith(".py")]
    adapters = [name for name in known if name.startswith(f"{IP_ADAPTER_FOLDER}/")]
    named = [name for name in (BLOCKS_CONFIG, BLOCKS_FILE) if name in known]
    return [*(code if BLOCKS_CONFIG in known else ()), *adapters, *named]
