"""Into and out of BentoML's model store."""

from bentoml_diffusers.store.adapters import import_lora, import_textual_inversion
from bentoml_diffusers.store.checking import Check, describe, hash_of_model, verify
from bentoml_diffusers.store.importing import import_model
from bentoml_diffusers.store.lookup import StoredAdapter, find_adapter, has_adapter, list_names
from bentoml_diffusers.store.pipelines import get, list_entries, list_records, save_model
from bentoml_diffusers.store.record import Record, read_record

__all__ = [
    "Check",
    "Record",
    "StoredAdapter",
    "describe",
    "find_adapter",
    "get",
    "has_adapter",
    "hash_of_model",
    "import_lora",
    "import_model",
    "import_textual_inversion",
    "list_entries",
    "list_names",
    "list_records",
    "read_record",
    "save_model",
    "verify",
]
