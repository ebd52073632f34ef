"""A modular pipeline from the hub: its own files, and those in other repositories."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from bentoml_diffusers.store.entries import BLOCKS_CONFIG, MODULAR_INDEX
from bentoml_diffusers.store.modular.folder import (
    find_place,
    local_subfolder,
    names_in,
    select_beside,
    select_part,
)
from bentoml_diffusers.store.modular.index import (
    Component,
    read_modular_components,
    read_modular_index,
)
from bentoml_diffusers.store.sources import Download, Place, Wanted, WeightChoice, download_snapshot

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path


@dataclass(frozen=True)
class ModularDownload(Download):
    """A snapshot, and the components from other repositories.

    Attributes:
        places: Where those are, by name.
        parts: Repository and commit of each, as text.
    """

    places: Mapping[str, Place] = field(default_factory=dict)
    parts: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class _Choice:
    """Which files of a component to take."""

    source: str
    weights: WeightChoice

    def files(
        self, key: str, component: Component, names: Sequence[str], subfolder: str
    ) -> list[str]:
        """Returns the files of a component, with paths in its repository."""
        own = names_in(names, subfolder, key)
        chosen = select_part(self.source, key, component, own, self.weights)
        start = f"{subfolder}/" if subfolder else ""
        return [start + name.removeprefix(f"{key}/") for name in chosen]


def download_modular(wanted: Wanted, index: Path) -> ModularDownload:
    """Downloads what a modular pipeline needs, from other repositories too.

    Offline, or without network, takes what the hub's cache holds.

    Args:
        wanted: The repository.
        index: Its index, in the folder of a snapshot.

    Raises:
        ModelNotFound: 404, a repository that the index names is not there.
        InvalidModel: 400, a component has no files, or they are on another machine.
        UntrustedSource: 400, only pickled weights.
        HubUnavailable: 503, the hub could not be reached, or answered with an error.
        StorageFull: 507, no space left for the files.
    """
    repo_id, proxies = wanted.source, wanted.proxies
    components = read_modular_components(read_modular_index(index.parent, repo_id), repo_id)
    choice = _Choice(source=repo_id, weights=wanted.weights)
    others: dict[str, Component] = {}

    def choose(names: Sequence[str]) -> list[str]:
        taken = [MODULAR_INDEX, *select_beside(names), *(n for n in names if n == BLOCKS_CONFIG)]
        for key, component in components.items():
            subfolder = local_subfolder(key, component, names)
            if subfolder is not None:
                taken += choice.files(key, component, names, subfolder)
            elif _is_repository(component, repo_id):
                others[key] = component
            else:
                find_place(index.parent, key, component, names, repo_id)  # says what is wrong
        return taken

    own = download_snapshot(repo_id, choose, revision=index.parent.name, proxies=proxies)
    found = {key: _download_part(key, one, choice, proxies) for key, one in others.items()}
    return ModularDownload(
        own.folder,
        own.commit,
        {key: Place(part.folder, others[key].subfolder) for key, part in found.items()},
        {key: f"{others[key].repository} at {part.commit}" for key, part in found.items()},
    )


def _download_part(
    key: str, component: Component, choice: _Choice, proxies: Mapping[str, str] | None
) -> Download:
    return download_snapshot(
        component.repository or "",
        lambda names: choice.files(key, component, names, component.subfolder),
        revision=component.revision or "main",
        proxies=proxies,
    )


def _is_repository(component: Component, repo_id: str) -> bool:
    place = component.repository
    return place is not None and place != repo_id and _looks_like_id(place)


def _looks_like_id(text: str) -> bool:
    owner, _, name = text.partition("/")
    return bool(owner and name) and "/" not in name and not text.startswith((".", "~"))
