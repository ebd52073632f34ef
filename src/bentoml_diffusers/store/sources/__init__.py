"""Where a pipeline comes from: a folder or the hub, which of its files, and pickles in them."""

from bentoml_diffusers.store.sources.hub import (
    Download,
    download_file,
    download_pipeline,
    download_snapshot,
    find_index,
    list_repository,
    upload_files,
)
from bentoml_diffusers.store.sources.pickles import (
    convert_pickle,
    convert_shard_index,
    converted_name,
    is_pickle_shard_index,
    read_pickle,
)
from bentoml_diffusers.store.sources.selection import (
    PICKLE_SUFFIXES,
    Selection,
    check_name,
    find_places,
    read_components,
    select_component,
    select_files,
)
from bentoml_diffusers.store.sources.source import (
    Place,
    Source,
    check_file,
    check_safetensors,
    class_name,
    list_names,
    open_folder,
    read_index,
    read_json,
)

__all__ = [
    "Download",
    "PICKLE_SUFFIXES",
    "Place",
    "Selection",
    "Source",
    "check_file",
    "check_name",
    "check_safetensors",
    "class_name",
    "convert_pickle",
    "convert_shard_index",
    "converted_name",
    "download_file",
    "download_pipeline",
    "download_snapshot",
    "find_index",
    "find_places",
    "is_pickle_shard_index",
    "list_names",
    "list_repository",
    "open_folder",
    "read_components",
    "read_index",
    "read_json",
    "read_pickle",
    "select_component",
    "select_files",
    "upload_files",
]
