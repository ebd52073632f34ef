"""Into and out of BentoML's model store.

Four wings, each of which may import those before it: ``entries`` writes and finds what the store
holds; ``sources`` knows folders and the hub; ``code`` finds the code that a model brings, and
says whether it may run; ``modular`` is what modular pipelines need of all three. The files above
them import, save, describe and check whole models and adapters.
"""

from bentoml_diffusers.store.adapter_files import describe_lora, read_adapter
from bentoml_diffusers.store.adapters import import_lora, import_textual_inversion
from bentoml_diffusers.store.checking import Check, describe, hash_of_model, verify
from bentoml_diffusers.store.code import code_of_class, find_code, hash_code, is_trusted
from bentoml_diffusers.store.contents import (
    Index,
    has_ip_adapter,
    read_component_classes,
    read_config,
    read_index,
)
from bentoml_diffusers.store.embedding_files import read_embedding_layout
from bentoml_diffusers.store.entries import (
    API_VERSION,
    CODE_FOLDER,
    IP_ADAPTER_FOLDER,
    MODULAR_INDEX,
    MODULE_NAME,
    PIPELINE_FOLDER,
    PIPELINE_INDEX,
    SCALES_FILE,
    Code,
    Record,
    StoredAdapter,
    check_stamps,
    complete_record,
    find_adapter,
    get,
    has_adapter,
    hash_file,
    hash_tree,
    list_entries,
    list_names,
    list_records,
    read_record,
    storage_errors,
)
from bentoml_diffusers.store.importing import import_model
from bentoml_diffusers.store.modular import (
    complete_workflows,
    expected_names,
    read_blocks,
    read_modular_components,
)
from bentoml_diffusers.store.omissions import find_left_out
from bentoml_diffusers.store.peft_folder import PEFT_CONFIG, PEFT_TENSORS
from bentoml_diffusers.store.saving import save_model
from bentoml_diffusers.store.sources import (
    download_file,
    find_places,
    read_json,
    upload_files,
)

__all__ = [
    "Index",
    "API_VERSION",
    "CODE_FOLDER",
    "Check",
    "Code",
    "IP_ADAPTER_FOLDER",
    "MODULAR_INDEX",
    "MODULE_NAME",
    "PEFT_CONFIG",
    "PEFT_TENSORS",
    "PIPELINE_FOLDER",
    "PIPELINE_INDEX",
    "Record",
    "SCALES_FILE",
    "StoredAdapter",
    "check_stamps",
    "code_of_class",
    "complete_record",
    "complete_workflows",
    "describe",
    "describe_lora",
    "download_file",
    "expected_names",
    "find_adapter",
    "find_code",
    "find_left_out",
    "find_places",
    "get",
    "has_adapter",
    "has_ip_adapter",
    "hash_code",
    "hash_file",
    "hash_of_model",
    "hash_tree",
    "import_lora",
    "import_model",
    "import_textual_inversion",
    "is_trusted",
    "list_entries",
    "list_names",
    "list_records",
    "read_adapter",
    "read_blocks",
    "read_component_classes",
    "read_config",
    "read_embedding_layout",
    "read_index",
    "read_json",
    "read_modular_components",
    "read_record",
    "save_model",
    "storage_errors",
    "upload_files",
    "verify",
]
