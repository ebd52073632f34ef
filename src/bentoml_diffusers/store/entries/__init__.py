"""Entries of BentoML's model store: their layout and record, written whole, found again."""

from bentoml_diffusers.store.entries.hashing import (
    check_stamps,
    complete_record,
    hash_file,
    hash_files,
    hash_text,
    hash_tree,
    list_files,
    with_hashes,
)
from bentoml_diffusers.store.entries.layout import (
    ADAPTER_FOLDER,
    API_VERSION,
    BLOCKS_CONFIG,
    BLOCKS_FILE,
    CODE_FOLDER,
    FORMAT_VERSION,
    IP_ADAPTER_FOLDER,
    MODULAR_INDEX,
    MODULE_NAME,
    PIPELINE_FOLDER,
    PIPELINE_INDEX,
    SCALES_FILE,
    UPSTREAM_MODULE_NAMES,
)
from bentoml_diffusers.store.entries.linking import SMALL_BYTES, Linker, LinkMode, storage_errors
from bentoml_diffusers.store.entries.listing import find_stored, get, list_entries, list_records
from bentoml_diffusers.store.entries.lookup import (
    StoredAdapter,
    find_adapter,
    has_adapter,
    list_names,
)
from bentoml_diffusers.store.entries.record import Code, Kind, Record, read_record
from bentoml_diffusers.store.entries.writing import make_tag, write_entry

__all__ = [
    "ADAPTER_FOLDER",
    "API_VERSION",
    "BLOCKS_CONFIG",
    "BLOCKS_FILE",
    "CODE_FOLDER",
    "Code",
    "FORMAT_VERSION",
    "IP_ADAPTER_FOLDER",
    "Kind",
    "LinkMode",
    "Linker",
    "MODULAR_INDEX",
    "MODULE_NAME",
    "PIPELINE_FOLDER",
    "PIPELINE_INDEX",
    "Record",
    "SCALES_FILE",
    "SMALL_BYTES",
    "StoredAdapter",
    "UPSTREAM_MODULE_NAMES",
    "check_stamps",
    "complete_record",
    "find_adapter",
    "find_stored",
    "get",
    "has_adapter",
    "hash_file",
    "hash_files",
    "hash_text",
    "hash_tree",
    "list_entries",
    "list_files",
    "list_names",
    "list_records",
    "make_tag",
    "read_record",
    "storage_errors",
    "with_hashes",
    "write_entry",
]
