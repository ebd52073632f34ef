"""Into and out of BentoML's model store."""

from bentoml_diffusers.store.adapters import adapter_file, import_lora, import_textual_inversion
from bentoml_diffusers.store.checking import Check, describe, hash_of_model, verify
from bentoml_diffusers.store.importing import import_model
from bentoml_diffusers.store.pipelines import get, list_entries, save_model
from bentoml_diffusers.store.record import Record, read_record

__all__ = [
    "Check",
    "Record",
    "adapter_file",
    "describe",
    "get",
    "hash_of_model",
    "import_lora",
    "import_model",
    "import_textual_inversion",
    "list_entries",
    "read_record",
    "save_model",
    "verify",
]
