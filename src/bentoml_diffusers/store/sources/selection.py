"""Which files of a repository or folder a pipeline needs: one variant, one format, no duplicates.

Only names are considered, so the choice is made before anything is downloaded or linked.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import TYPE_CHECKING, Any

from bentoml_diffusers import _names
from bentoml_diffusers.errors import InvalidModel, UntrustedSource
from bentoml_diffusers.store.entries import IP_ADAPTER_FOLDER, PIPELINE_INDEX, SCALES_FILE

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

PICKLE_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
_WEIGHT_SUFFIXES = (
    *PICKLE_SUFFIXES,
    *(".safetensors", ".msgpack", ".h5", ".onnx", ".onnx_data", ".pb", ".xml", ".gguf", ".tflite"),
)
_MAIN_STEMS = ("diffusion_pytorch_model", "model", "pytorch_model")
_SHARD = re.compile(r"-\d{5}-of-\d{5}")
_SHARD_INDEX = re.compile(r"^(.+)\.(safetensors|bin)\.index(?:\.([^.]+))?\.json$")
_ROOT = "root"
_WITHOUT_WEIGHTS = ("Tokenizer", "Processor", "Scheduler", "FeatureExtractor")


@dataclass(frozen=True)
class WeightChoice:
    """Which weights to take.

    Attributes:
        variant: Take this variant, such as ``"fp16"``, where a component has it.
        allow_pickle: Take ``.bin`` files of components without safetensors.
    """

    variant: str | None = None
    allow_pickle: bool = False


BY_DEFAULT = WeightChoice()


@dataclass(frozen=True)
class _Weights:
    """A file with weights: ``unet/diffusion_pytorch_model.fp16-00001-of-00002.safetensors``."""

    name: str
    stem: str
    variant: str | None
    suffix: str


@dataclass(frozen=True)
class Selection:
    """The files that a pipeline needs.

    Attributes:
        files: Paths relative to the repository or folder.
        pickles: Those of them that hold pickled weights.
    """

    files: tuple[str, ...]
    pickles: tuple[str, ...] = ()


def select_files(
    index: Mapping[str, Any],
    names: Iterable[str],
    *,
    source: str,
    weights: WeightChoice = BY_DEFAULT,
) -> Selection:
    """Chooses the files of a pipeline.

    Args:
        index: Content of ``model_index.json``.
        names: All existing files, as relative paths.
        source: Name of the repository or folder, for messages.
        weights: Which weights to take.

    Raises:
        InvalidModel: 400, a component that the index names is missing, or has no weights.
        UntrustedSource: 400, pickled weights without ``allow_pickle``.
    """
    known = sorted(names)
    for name in known:
        check_name(source, name)
    components = read_components(index, source)
    chosen = {PIPELINE_INDEX, *_code_files(index, known, source)}
    with_variant = False
    for component, (library, class_name) in components.items():
        _refuse_own_code(source, component, f"{component}/{library}.py", known)
        places = find_places(source, component, class_name, known)
        if not places and not _names.is_never_loaded(index, component):
            raise InvalidModel(
                source,
                f"lacks the folder of {component!r}, which its {PIPELINE_INDEX} names",
                "save the whole pipeline with save_pretrained; where the pipeline runs without "
                f"it, write [null, null] for it into {PIPELINE_INDEX}",
            )
        for inside in places:
            files = _select_place(source, class_name, inside, weights)
            with_variant |= any(_read_weights(name).variant == weights.variant for name in files)
            chosen.update(files)
    if f"{IP_ADAPTER_FOLDER}/{SCALES_FILE}" in known:  # written by this package's save_model
        chosen.update(_files_in(IP_ADAPTER_FOLDER, known))
    if weights.variant and not with_variant:
        raise _no_variant(source, weights.variant, known)
    taken = tuple(sorted(chosen))
    return Selection(taken, tuple(name for name in taken if name.endswith(PICKLE_SUFFIXES)))


def read_components(index: Mapping[str, Any], source: str) -> dict[str, tuple[str, str]]:
    """Returns library and class of each component that an index names, by its name.

    Raises:
        InvalidModel: 400, a name that is not an identifier.
    """
    components = {}
    for name, value in index.items():
        if name.startswith("_") or not isinstance(value, (list, tuple)) or len(value) != 2:
            continue
        if value[0] is None or not all(isinstance(item, str) for item in value):
            continue
        if not name.isidentifier():
            raise InvalidModel(
                source,
                f"names a component {name!r} in its {PIPELINE_INDEX}, which is not an identifier",
            )
        components[name] = (value[0], value[1])
    return components


def find_places(
    source: str, component: str, class_name: str, names: Sequence[str]
) -> list[list[str]]:
    """Returns the files of each folder that diffusers reads for a component.

    That is its own folder; for classes that hold several models, such as
    ``MultiControlNetModel``, also ``controlnet_1``, ``controlnet_2``...; without a folder of
    its own the root, where the first repositories have their only model.

    Raises:
        InvalidModel: 400, a folder that diffusers writes but does not read.
    """
    first = _files_in(component, names)
    if not first:
        return [at_root] if (at_root := _files_at_root(class_name, names)) else []
    places = [first]
    while class_name.startswith("Multi") and (
        more := _files_in(f"{component}_{len(places)}", names)
    ):
        places.append(more)
    # MultiAdapter writes the third one as `adapter_1_2` (diffusers 0.42.1).
    unread = f"{component}_{len(places) - 1}_{len(places)}"
    if class_name.startswith("Multi") and _files_in(unread, names):
        raise InvalidModel(
            source,
            f"has a folder {unread}, which diffusers writes but does not read",
            f"rename it to {component}_{len(places)}",
        )
    return places


def _files_in(folder: str, names: Iterable[str]) -> list[str]:
    return [name for name in names if name.startswith(f"{folder}/")]


def _files_at_root(class_name: str, names: Sequence[str]) -> list[str]:
    config = "scheduler_config.json" if "Scheduler" in class_name else "config.json"
    if config not in names:
        return []
    return [
        name
        for name in names
        if "/" not in name and (_is_main_weights(name) or name.endswith((".json", ".txt")))
    ]


def _select_place(
    source: str, class_name: str, names: Sequence[str], weights: WeightChoice
) -> list[str]:
    if "/" in names[0]:
        return select_component(source, class_name, names, weights)
    if "Scheduler" in class_name:
        return ["scheduler_config.json"]
    below = [f"{_ROOT}/{name}" for name in names]
    files = select_component(source, class_name, below, weights)
    return [name.removeprefix(f"{_ROOT}/") for name in files]


def check_name(source: str, name: str) -> None:
    """Refuses a file name that points outside of the folder.

    Raises:
        InvalidModel: 400, an absolute path, one with ``..``, or a Windows path.
    """
    parts = PurePosixPath(name).parts
    if not parts or name.startswith("/") or ".." in parts or "\\" in name or ":" in parts[0]:
        raise InvalidModel(
            source, f"names a file outside of its folder: {name!r}", "do not use this model"
        )


def _code_files(index: Mapping[str, Any], names: Sequence[str], source: str) -> list[str]:
    """Files with pipeline code that the index names: ``"_class_name": ["file", "Class"]``."""
    declared = index.get("_class_name")
    if not isinstance(declared, (list, tuple)):
        return []
    file = f"{declared[0]}.py"
    if file not in names:
        raise InvalidModel(
            source, f"lacks {file}, the pipeline code that its index names", "add the file to it"
        )
    return [file]


def _refuse_own_code(source: str, component: str, file: str, names: Sequence[str]) -> None:
    if file in names:
        raise InvalidModel(
            source,
            f"has a component {component!r} with its own code, {file}, which is not supported",
            "let a custom_pipeline define its class",
        )


def select_component(
    source: str, class_name: str, names: Sequence[str], weights: WeightChoice
) -> list[str]:
    """Chooses the files of one component.

    Args:
        source: Name of the repository or folder, for messages.
        class_name: Class of the component.
        names: Its files, each below the component's name.
        weights: Which weights to take.

    Raises:
        InvalidModel: 400, it has no weights, or only in other variants.
        UntrustedSource: 400, pickled weights without ``allow_pickle``.
    """
    component = names[0].split("/")[0]
    there = [_read_weights(name) for name in names if _is_weights(name)]
    others = [name for name in names if not _is_weights(name)]
    if class_name == "OnnxRuntimeModel":
        return [*others, *(item.name for item in there if ".onnx" in item.name)]
    for suffix in ("safetensors", "bin"):
        fitting = [item for item in there if item.suffix == suffix]
        found = _pick(source, component, fitting, weights.variant)
        if found and suffix == "bin" and not weights.allow_pickle:
            raise UntrustedSource(
                f"weights of {component!r} in {source!r}",
                found[0].rpartition("/")[2],
                "safetensors, as a pickle can run code when it is read; "
                "allow_pickle=True reads tensors out of it and stores them as safetensors",
            )
        if found:
            return [*others, *found]
    needs = f"{component}/config.json" in names and not any(
        word in class_name for word in _WITHOUT_WEIGHTS
    )
    if needs:
        raise InvalidModel(source, f"has no weights for {component!r} ({class_name})")
    return others


def _pick(source: str, component: str, weights: list[_Weights], variant: str | None) -> list[str]:
    """The files of the variant if the component has it, else those without variant."""
    main = [item for item in weights if item.stem in _MAIN_STEMS] or weights
    for wanted in dict.fromkeys((variant, None)):
        found = [item.name for item in main if item.variant == wanted]
        if found:
            return found
    if main:
        variants = sorted({item.variant for item in main if item.variant})
        raise InvalidModel(
            source,
            f"has {component!r} only in the variants {', '.join(variants)}, asked for {variant}",
            "give variant=",
        )
    return []


def _no_variant(source: str, variant: str, names: Iterable[str]) -> InvalidModel:
    weights = [_read_weights(name) for name in names if _is_weights(name) and "/" in name]
    variants = sorted({i.variant for i in weights if i.variant and i.stem in _MAIN_STEMS})
    return InvalidModel(
        source,
        f"has no variant {variant!r}, it has {', '.join(variants) or 'none'}",
        "check the name, or leave variant out",
    )


def _is_weights(name: str) -> bool:
    return name.endswith(_WEIGHT_SUFFIXES) or _SHARD_INDEX.match(name) is not None


def _is_main_weights(name: str) -> bool:
    return _is_weights(name) and _read_weights(name).stem in _MAIN_STEMS


def _read_weights(name: str) -> _Weights:
    base = name.rpartition("/")[2]
    shard_index = _SHARD_INDEX.match(base)
    if shard_index:
        stem, suffix, variant = shard_index.groups()
    else:
        stem, _, suffix = _SHARD.sub("", base).rpartition(".")
        variant = None
    stem, _, inner = stem.partition(".")
    return _Weights(name, stem, variant or inner or None, suffix)
