"""Figures of the code: lines by package, lengths of modules and functions, comments.

    python -m tools.figures [--top 10]

The aims are in CONTRIBUTING.md.
"""

from __future__ import annotations

import argparse
import ast
import itertools
import math
import statistics
import tokenize
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

SOURCE = Path(__file__).parent.parent / "src" / "bentoml_diffusers"
_Row = tuple[object, ...]
_COLUMNS = (
    *("package", "lines", "modules", "median", "90%"),
    *("functions", "median", "90%", "comments per 100 lines"),
)


@dataclass(frozen=True)
class Module:
    """One file.

    Attributes:
        path: Relative to the package.
        lines: All lines, empty ones included.
        comments: Lines that are a comment or end in one.
        functions: Lines of each function and method by its name, docstring included.
    """

    path: Path
    lines: int
    comments: int
    functions: dict[str, int]

    @property
    def package(self) -> str:
        """Folder below the package; ``"."`` for files that are in no folder."""
        return self.path.parts[0] if len(self.path.parts) > 1 else "."


def read_modules(folder: Path = SOURCE) -> list[Module]:
    """Returns all modules below a folder, in the order of their names."""
    return [read_module(path, folder) for path in sorted(folder.rglob("*.py"))]


def read_module(path: Path, folder: Path) -> Module:
    """Measures one file."""
    text = path.read_text(encoding="utf-8")
    with path.open("rb") as stream:
        comments = sum(one.type == tokenize.COMMENT for one in tokenize.tokenize(stream.readline))
    functions = dict(_measure_functions(ast.parse(text)))
    return Module(path.relative_to(folder), len(text.splitlines()), comments, functions)


def _measure_functions(node: ast.AST, prefix: str = "") -> Iterator[tuple[str, int]]:
    for child in ast.iter_child_nodes(node):
        name = prefix
        if isinstance(child, (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
            name = f"{prefix}.{child.name}" if prefix else child.name
        if isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef)):
            yield name, (child.end_lineno or child.lineno) - child.lineno + 1
        yield from _measure_functions(child, name)


def quantile(values: Iterable[int], share: float) -> int:
    """Returns the smallest value that at least this share of the values does not exceed."""
    ordered = sorted(values)
    return ordered[math.ceil(share * len(ordered)) - 1] if ordered else 0


def table_rows(modules: Sequence[Module]) -> Iterator[_Row]:
    """Yields a row for each package, last one for all."""
    ordered = sorted(modules, key=lambda module: module.package)
    for package, group in itertools.groupby(ordered, lambda module: module.package):
        yield _make_row(package, list(group))
    yield _make_row("all", modules)


def _make_row(name: str, modules: Sequence[Module]) -> _Row:
    sizes = [module.lines for module in modules]
    lengths = [lines for module in modules for lines in module.functions.values()]
    comments = 100 * sum(module.comments for module in modules) / max(1, sum(sizes))
    return (
        *(name, sum(sizes), len(sizes), round(statistics.median(sizes)), quantile(sizes, 0.9)),
        *(len(lengths), quantile(lengths, 0.5), quantile(lengths, 0.9), f"{comments:.1f}"),
    )


def longest(modules: Iterable[Module], top: int) -> Iterator[tuple[str, list[_Row]]]:
    """Yields the longest modules, then the longest functions, each with its lines."""
    sizes = [(module.lines, str(module.path)) for module in modules]
    yield "modules", sorted(sizes, reverse=True)[:top]
    lengths = [
        (lines, f"{module.path}: {name}")
        for module in modules
        for name, lines in module.functions.items()
    ]
    yield "functions", sorted(lengths, reverse=True)[:top]


def print_table(rows: Sequence[_Row]) -> None:
    """Prints columns: the first one to the left, figures to the right."""
    widths = [max(len(str(row[column])) for row in rows) for column in range(len(rows[0]))]
    for first, *rest in rows:
        figures = (str(cell).rjust(width) for cell, width in zip(rest, widths[1:], strict=True))
        print("  ".join([str(first).ljust(widths[0]), *figures]))


def main() -> None:
    """Prints all figures."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--top", type=int, default=10, help="how many of the longest ones (10)")
    top = parser.parse_args().top
    modules = read_modules()
    print_table([_COLUMNS, *table_rows(modules)])
    for what, rows in longest(modules, top):
        print(f"\nlongest {what}")
        for lines, name in rows:
            print(f"{lines:5}  {name}")


if __name__ == "__main__":
    main()
