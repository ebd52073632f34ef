"""Code that a model brings: found, hashed, trusted. None of it is executed here."""

from bentoml_diffusers.store.code.imports import with_imports
from bentoml_diffusers.store.code.search import (
    FoundCode,
    brings_blocks,
    code_of_class,
    find_code,
    hash_code,
)
from bentoml_diffusers.store.code.trust import is_trusted, trust_code

__all__ = [
    "FoundCode",
    "brings_blocks",
    "code_of_class",
    "find_code",
    "hash_code",
    "is_trusted",
    "trust_code",
    "with_imports",
]
