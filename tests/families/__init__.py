"""Tiny pipelines of the families of diffusers: a page for each family, found by being here."""

import importlib
import pkgutil

from families.family import Family

_PAGES = [page.name for page in pkgutil.iter_modules(__path__)]


def load_families() -> list[Family]:
    """Returns all families, by name."""
    modules = [importlib.import_module(f"families.{page}") for page in _PAGES]
    found = [module.FAMILY for module in modules if hasattr(module, "FAMILY")]
    return sorted(found, key=lambda family: family.name)
