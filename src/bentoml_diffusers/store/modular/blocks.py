"""The blocks of a modular pipeline as plain values, and the code that they need.

Blocks that a class builds by itself are stored as that class. Blocks that were assembled in
another way (``from_blocks_dict``, ``sub_blocks.insert``, a modular workflow cut out of a larger
one) are described one by one: diffusers would silently load something else.
"""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bentoml_diffusers import _names
from bentoml_diffusers._compat import BLOCK_STATE
from bentoml_diffusers.errors import InvalidModel
from bentoml_diffusers.store.code import FoundCode, with_imports
from bentoml_diffusers.store.entries import BLOCKS_FILE
from bentoml_diffusers.store.sources import read_json

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterator, Mapping

    from diffusers.modular_pipelines import ModularPipelineBlocks

_BASES = "diffusers.modular_pipelines.modular_pipeline"

# Blocks of diffusers branch on whether these components are there.
_MAY_LACK = (
    *("text_encoder", "tokenizer", "prompt_enhancer", "safety_checker", "watermark"),
    *("sound_tokenizer", "duration_head", "transformer_2"),
)


def describe_blocks(blocks: ModularPipelineBlocks) -> dict[str, Any]:
    """Returns blocks as plain values: ``class``, its ``module`` or ``file``, ``sub_blocks``.

    Raises:
        InvalidModel: 400, a block that its class alone does not recreate.
    """
    cls = type(blocks)
    node = _describe_class(cls)
    fresh = _make(cls)
    changed = _changed_state(blocks, fresh)
    if changed:
        raise InvalidModel(
            cls.__name__,
            f"is a block whose attributes were changed: {', '.join(changed)}",
            "only blocks can be stored that their class creates: set the attributes in the class",
        )
    if not _is_same(blocks, fresh):
        node["sub_blocks"] = {
            name: describe_blocks(block) for name, block in blocks.sub_blocks.items()
        }
    return node


def code_of_blocks(blocks: ModularPipelineBlocks) -> FoundCode | None:
    """Finds the code of all blocks that are not part of diffusers; ``None`` if all are.

    Raises:
        InvalidModel: 400, code that is not in a file, or not all in one folder.
    """
    classes = list(dict.fromkeys(_own_classes(blocks)))
    if not classes:
        return None
    paths = {cls: _file_of(cls) for cls in classes}
    folders = {path.parent for path in paths.values()}
    if len(folders) > 1:
        listed = ", ".join(f"{cls.__name__} in {path.name}" for cls, path in paths.items())
        raise InvalidModel(
            type(blocks).__name__,
            f"has blocks from {len(folders)} folders: {listed}",
            "put their code into one folder",
        )
    folder = folders.pop()
    beside = {path.name: path for path in sorted(folder.glob("*.py"))}
    files: dict[str, Path] = {}
    for path in paths.values():
        files.update(with_imports(path.name, beside))
    root = classes[0]
    is_root = root is type(blocks)
    entry = paths[root].name
    return FoundCode(f"file {entry}", files, entry, root.__name__ if is_root else None)


def modular_workflows(blocks: ModularPipelineBlocks) -> dict[str, Any]:
    """Returns the blocks of each modular workflow; ``""`` names the one without trigger inputs."""
    try:
        return {name: blocks.get_workflow(name) for name in blocks.available_workflows}
    except NotImplementedError:
        pass
    try:
        return {"": blocks.get_execution_blocks()}
    except NotImplementedError:
        return {"": blocks}


def build_blocks(
    node: Mapping[str, Any], find_class: Callable[[str, str], type[Any]]
) -> ModularPipelineBlocks:
    """Makes the blocks that :func:`describe_blocks` described.

    Args:
        node: The description.
        find_class: Returns a class of the model's own code, by file and name.

    Raises:
        InvalidModel: 400, malformed, or a class that does not exist.
    """
    try:
        name, file, module = node["class"], node.get("file"), node.get("module", "diffusers")
        parts = dict(node.get("sub_blocks") or {})
    except (KeyError, TypeError, AttributeError, ValueError) as err:
        raise InvalidModel(BLOCKS_FILE, f"has a malformed block: {node!r}") from err
    cls = find_class(file, name) if file else _names.resolve_blocks_class(name, module)
    if cls is None:
        raise InvalidModel(
            BLOCKS_FILE, f"names the block {module}.{name}, which diffusers does not have"
        )
    blocks: ModularPipelineBlocks = _make(cls)
    if "sub_blocks" in node:
        made = {key: build_blocks(part, find_class) for key, part in parts.items()}
        blocks.sub_blocks.clear()
        blocks.sub_blocks.update(made)
        if hasattr(blocks, "block_names"):  # as `from_blocks_dict` sets them
            blocks.block_names = list(made)
            blocks.block_classes = [type(block) for block in made.values()]
    return blocks


def read_blocks(
    folder: Path,
    index: Mapping[str, Any],
    source: str,
    find_class: Callable[[str, str], type[Any]] | None = None,
) -> ModularPipelineBlocks:
    """Makes the blocks of a folder: those of its ``blocks.json``, or those that its index names.

    Raises:
        InvalidModel: 400, they are missing, or need code that the model does not bring.
    """

    def refuse(file: str, name: str) -> type[Any]:
        raise InvalidModel(
            source, f"names the block {name} of {file}, whose code it does not bring"
        )

    if (folder / BLOCKS_FILE).is_file():
        return build_blocks(read_json(folder / BLOCKS_FILE, source), find_class or refuse)
    return find_blocks(index, source)


def find_blocks(index: Mapping[str, Any], source: str) -> ModularPipelineBlocks:
    """Makes the blocks of diffusers that an index names.

    Raises:
        InvalidModel: 400, it names no blocks that can be built from their class alone.
    """
    name = str(index.get("_blocks_class_name"))
    cls = _names.resolve_blocks_class(name)
    if cls is None or cls.__module__ == _BASES:
        raise InvalidModel(
            source,
            f"names {name} as its blocks, which does not say what they are: diffusers saves only "
            "a class, not blocks put together by from_blocks_dict or cut out by a workflow",
            "give the pipeline itself to save_model, or put the blocks into a class in a file",
        )
    return cls()


def expected_names(blocks: ModularPipelineBlocks) -> set[str]:
    """Returns the components that blocks load from files."""
    return {
        spec.name
        for spec in blocks.expected_components
        if spec.default_creation_method == "from_pretrained"
    }


def complete_workflows(
    blocks: ModularPipelineBlocks, present: Collection[str], source: str, only: str = ""
) -> list[str]:
    """Returns the modular workflows whose components are all present.

    Args:
        blocks: Blocks of a pipeline, or of one modular workflow.
        present: Components that are present.
        source: Name of the source, for messages.
        only: Name of the modular workflow, if the blocks are those of one.

    Raises:
        InvalidModel: 400, there is none, so nothing could be generated.
    """
    gaps = {
        name: sorted(n for n in expected_names(parts) - set(present) if not n.startswith(_MAY_LACK))
        for name, parts in modular_workflows(blocks).items()
    }
    complete = [name for name, missing in gaps.items() if not missing]
    if not complete:
        name, missing = min(gaps.items(), key=lambda item: len(item[1]))
        name = only or name
        text = f"the modular workflow {name!r} needs" if name else "its blocks need"
        raise InvalidModel(
            source,
            f"lacks {', '.join(missing)}, which {text}",
            "add the missing components, and save it again",
        )
    return [name for name in complete if name]


def _describe_class(cls: type[Any]) -> dict[str, Any]:
    if not _is_of_diffusers(cls):
        return {"class": cls.__name__, "file": _file_of(cls).name}
    for module in ("diffusers", cls.__module__):
        if _names.resolve_blocks_class(cls.__name__, module) is cls:
            return {"class": cls.__name__, "module": module}
    raise InvalidModel(cls.__name__, "cannot be found again in diffusers")


def _own_classes(blocks: ModularPipelineBlocks) -> Iterator[type[Any]]:
    if not _is_of_diffusers(type(blocks)):
        yield type(blocks)
    for block in blocks.sub_blocks.values():
        yield from _own_classes(block)


def _is_of_diffusers(cls: type[Any]) -> bool:
    return cls.__module__.partition(".")[0] == "diffusers"


def _file_of(cls: type[Any]) -> Path:
    module = inspect.getmodule(cls)
    file = inspect.getsourcefile(cls) if module and cls.__module__ != "__main__" else None
    if file is None or not Path(file).is_file():
        raise InvalidModel(
            cls.__name__,
            f"is defined in {cls.__module__}, not in a Python file, so its code cannot be stored",
            "put the class into a file and import it from there",
        )
    if getattr(module, cls.__qualname__, None) is not cls:
        raise InvalidModel(
            cls.__name__,
            f"is not what {cls.__module__} has under this name any more, so its code is not known",
            "define it at the top level of a file, and import that file once",
        )
    return Path(file)


def _make(cls: type[Any]) -> Any:
    try:
        return cls()
    except TypeError as err:
        raise InvalidModel(
            cls.__name__,
            f"is a block whose constructor needs arguments: {err}",
            "give them defaults",
        ) from err


def _changed_state(one: Any, other: Any) -> list[str]:
    state, fresh = _state(one), _state(other)
    return sorted(
        name
        for name in {*state, *fresh}
        if name not in state or name not in fresh or not _is_equal(state[name], fresh[name])
    )


def _state(block: Any) -> Mapping[str, Any]:
    return {name: value for name, value in vars(block).items() if name not in BLOCK_STATE}


def _is_equal(one: Any, other: Any) -> bool:
    if one is other:
        return True
    try:
        return bool(one == other) or (type(one) is type(other) and vars(one) == vars(other))
    except (TypeError, ValueError, RuntimeError):
        return False


def _is_same(one: Any, other: Any) -> bool:
    """True for blocks of the same classes, names and attributes, recursively."""
    return (
        type(one) is type(other)
        and not _changed_state(one, other)
        and list(one.sub_blocks) == list(other.sub_blocks)
        and all(_is_same(block, other.sub_blocks[name]) for name, block in one.sub_blocks.items())
    )
