"""Which versions of packages are installed."""

from __future__ import annotations

import importlib.metadata


def find_version(package: str) -> str | None:
    """Returns the version of an installed package; ``None`` if it is not installed."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def unmet_requirements(package: str = "bentoml-diffusers") -> list[str]:
    """Returns which requirements of a package the installed versions do not meet, in words."""
    from packaging.requirements import Requirement

    unmet = []
    for requirement in map(Requirement, importlib.metadata.requires(package) or ()):
        if requirement.marker and not requirement.marker.evaluate({"extra": ""}):
            continue
        version = find_version(requirement.name)
        if version is None:
            unmet.append(f"{requirement.name} is not installed, expected {requirement.specifier}")
        elif not requirement.specifier.contains(version, prereleases=True):
            unmet.append(f"{requirement.name} is {version}, expected {requirement.specifier}")
    return unmet
