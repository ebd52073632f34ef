"""Tables of the reference, made from the code: options, errors, request fields, commands.

What they say is written once, in docstrings, pydantic fields and click commands.
"""

from __future__ import annotations

import dataclasses
import inspect
import re
from types import NoneType, UnionType
from typing import TYPE_CHECKING, Any, Literal, Union, get_args, get_origin

import click
from docutils import nodes
from docutils.statemachine import StringList
from sphinx.util.docutils import SphinxDirective

import bentoml_diffusers
from bentoml_diffusers import errors
from bentoml_diffusers.cli import diffusers_command
from bentoml_diffusers.serving.endpoints import classic_endpoints
from bentoml_diffusers.serving.replays import make_replay_model

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from pydantic.fields import FieldInfo
    from sphinx.application import Sphinx


_LIMITS = bentoml_diffusers.RequestLimits()
_REQUESTS = {
    **{endpoint.name: endpoint.request for endpoint in classic_endpoints(_LIMITS)},
    "replay": make_replay_model(_LIMITS),
}


class _Generated(SphinxDirective):
    """Writes Markdown and lets the page's parser read it."""

    required_arguments = 0

    def run(self) -> list[nodes.Node]:
        container = nodes.container()
        self.state.nested_parse(StringList(list(self.lines())), self.content_offset, container)
        return container.children

    def lines(self) -> Iterable[str]:
        raise NotImplementedError


class OptionsTable(_Generated):
    """The fields of a dataclass of options."""

    required_arguments = 1

    def lines(self) -> Iterable[str]:
        name = self.arguments[0]
        cls = getattr(bentoml_diffusers, name)
        texts = read_attributes(cls)
        rows = [
            (f"`{item.name}`", _code(_type_text(item.type)), _default_text(item), texts[item.name])
            for item in dataclasses.fields(cls)
        ]
        return make_table(("Option", "Type", "Default", "Meaning"), rows)


class ErrorsTable(_Generated):
    """Every error class with its status and the first line of its docstring."""

    def lines(self) -> Iterable[str]:
        found = [
            item
            for item in vars(errors).values()
            if inspect.isclass(item) and issubclass(item, errors.DiffusersError)
        ]
        rows = (
            (f"`{item.__name__}`", str(int(item.error_code)), _bases_text(item), _summary(item))
            for item in found
        )
        return make_table(("Error", "Status", "Also a", "Meaning"), rows)


class RequestTable(_Generated):
    """The fields of a request of a service."""

    required_arguments = 1

    def lines(self) -> Iterable[str]:
        fields: dict[str, FieldInfo] = _REQUESTS[self.arguments[0]].model_fields
        rows = (
            (
                f"`{name}`",
                _code(_annotation_text(field.annotation)),
                "required" if field.is_required() else _value_text(_default_of(field)),
                _bounds_text(field),
                field.description or "",
            )
            for name, field in fields.items()
        )
        return make_table(("Field", "Type", "Default", "Range", "Meaning"), rows)


class CommandHelp(_Generated):
    """What ``bentoml diffusers NAME --help`` prints."""

    required_arguments = 1

    def lines(self) -> Iterable[str]:
        name = self.arguments[0]
        command = diffusers_command.commands[name]
        path = f"bentoml diffusers {name}"
        # `bentoml diffusers` is a group of BentoML's own, which draws its help differently.
        context = click.Context(command, info_name=path, max_content_width=88)
        return ["```text", *command.get_help(context).splitlines(), "```"]


def read_attributes(cls: type[Any]) -> dict[str, str]:
    """Returns the texts of the section ``Attributes:`` of a Google-style docstring."""
    _, _, section = (inspect.getdoc(cls) or "").partition("Attributes:\n")
    texts: dict[str, str] = {}
    name = ""
    for line in section.splitlines():
        start = re.match(r" {4}(\w+): (.*)", line)
        if start:
            name = start[1]
            texts[name] = start[2]
        elif line.startswith(" " * 8):
            texts[name] += f" {line.strip()}"
        elif line.strip():
            break
    return texts


def make_table(head: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> Iterator[str]:
    """Yields the lines of a Markdown table, without the columns that are empty."""
    columns = [column for column in zip(head, *rows, strict=True) if any(column[1:])]
    head, *rows = zip(*columns, strict=True)
    yield f"| {' | '.join(head)} |"
    yield f"|{' --- |' * len(head)}"
    for row in rows:
        yield f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in row)} |"


def _summary(cls: type[Any]) -> str:
    first = (inspect.getdoc(cls) or "").partition("\n")[0]
    return re.sub(r" \(\d+\)\.$", ".", first)


def _bases_text(cls: type[Any]) -> str:
    builtin = [base.__name__ for base in cls.__bases__ if base.__module__ == "builtins"]
    return _code(", ".join(builtin))


def _type_text(annotation: str) -> str:
    return annotation.removesuffix(" | None").replace("AdapterSpec", "str | Mapping")


def _default_text(item: dataclasses.Field[Any]) -> str:
    return "" if item.default is dataclasses.MISSING else _value_text(item.default)


def _default_of(field: FieldInfo) -> Any:
    return field.get_default(call_default_factory=True)


def _value_text(value: Any) -> str:
    return "" if value is None else _code(repr(value))


def _code(text: str) -> str:
    return f"`{text}`" if text else ""


def _annotation_text(annotation: Any) -> str:
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin in (Union, UnionType):
        named = [item for item in arguments if item is not NoneType]
        return " | ".join(_annotation_text(item) for item in named)
    if origin is Literal:
        return " | ".join(repr(item) for item in arguments)
    if origin is not None:
        return f"{origin.__name__}[{', '.join(map(_annotation_text, arguments))}]"
    return _KNOWN_TYPES.get(annotation.__name__, annotation.__name__)


_KNOWN_TYPES = {
    "Image": "image",
    "LoraChoice": "{name, scale}",
    "Workflow": "file",
    "Any": "base64",
}

_BOUNDS = {
    "ge": "from {}",
    "gt": "above {}",
    "le": "up to {}",
    "multiple_of": "a multiple of {}",
    "min_length": "at least {} long",
    "max_length": "at most {} long",
}


def _bounds_text(field: FieldInfo) -> str:
    parts = [
        text.format(getattr(item, bound))
        for bound, text in _BOUNDS.items()
        for item in field.metadata
        if getattr(item, bound, None) is not None
    ]
    return ", ".join(parts)


def setup(app: Sphinx) -> dict[str, Any]:
    app.add_directive("options-table", OptionsTable)
    app.add_directive("errors-table", ErrorsTable)
    app.add_directive("request-table", RequestTable)
    app.add_directive("command-help", CommandHelp)
    return {"parallel_read_safe": True}
