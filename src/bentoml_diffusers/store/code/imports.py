"""Finds the files that a Python file imports from its own folder, without executing any."""

from __future__ import annotations

import ast
from typing import TYPE_CHECKING

from bentoml_diffusers.errors import InvalidModel

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from pathlib import Path


def with_imports(entry: str, beside: Mapping[str, Path]) -> dict[str, Path]:
    """Returns a file and those of its folder that it imports, by their names.

    Args:
        entry: Name of the file.
        beside: All files of its folder by their names.

    Raises:
        InvalidModel: 400, it imports a file that is not in its folder, or by an absolute name.
    """
    needed = {entry: beside[entry]}
    waiting = [entry]
    while waiting:
        name = waiting.pop()
        for module in _modules_beside(name, beside):
            if module not in needed:
                needed[module] = beside[module]
                waiting.append(module)
    return needed


def _modules_beside(name: str, beside: Mapping[str, Path]) -> Iterator[str]:
    try:
        tree = ast.parse(beside[name].read_bytes())
    except (SyntaxError, ValueError) as err:
        raise InvalidModel(name, f"is not a Python file: {err}") from err
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.level:
            yield from _relative(name, node, beside)
        elif isinstance(node, (ast.Import, ast.ImportFrom)):
            modules = (
                [alias.name for alias in node.names]
                if isinstance(node, ast.Import)
                else [node.module or ""]
            )
            for module in modules:
                file = f"{module.partition('.')[0]}.py"
                if file in beside and file != name:
                    raise InvalidModel(
                        name,
                        f"imports {module!r}, a file in its folder, by an absolute name",
                        f"write `from .{module} import ...`",
                    )


def _relative(name: str, node: ast.ImportFrom, beside: Mapping[str, Path]) -> Iterator[str]:
    modules = [node.module] if node.module else [alias.name for alias in node.names]
    for module in modules:
        file = f"{module}.py"
        if node.level > 1 or file not in beside:
            raise InvalidModel(
                name,
                f"imports {'.' * node.level}{module}, which is not in its folder",
                "put all of the code into one folder, without subfolders",
            )
        yield file
