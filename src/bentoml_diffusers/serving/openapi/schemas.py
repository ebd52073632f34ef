"""Schemas of OpenAPI 3.0, from the models of requests, which pydantic describes by JSON Schema."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Mapping

    from pydantic import BaseModel

    from bentoml_diffusers.serving.reader import RequestModel

Schema = dict[str, Any]

_DEFS = "#/$defs/"
_COMPONENTS = "#/components/schemas/"
_IN_BASE64: Schema = {"type": "string", "format": "byte"}
_KEPT_OF_FILES = ("description", "title", "default")
_AS_FILE: Schema = {"type": "string", "format": "binary"}


class Schemas:
    """The schemas that a document names, and makes of the models of requests."""

    def __init__(self) -> None:
        self.components: dict[str, Schema] = {}

    def add(self, name: str, schema: Schema) -> Schema:
        """Keeps a schema under a name; returns the reference to it."""
        self.components[name] = schema
        return {"$ref": f"{_COMPONENTS}{name}"}

    def add_model(self, name: str, model: type[BaseModel]) -> Schema:
        """Keeps the schema of any model of pydantic under a name; returns the reference to it."""
        own = model.model_json_schema(ref_template=f"{_COMPONENTS}{{model}}")
        for part_name, part in own.pop("$defs", {}).items():
            self.components[part_name] = _convert(part)
        return self.add(name, {**_convert(own), "title": name})

    def add_request(self, model: type[RequestModel], *, is_form: bool = False) -> Schema:
        """Keeps the body of a request; returns the reference to it.

        Args:
            model: What it is read by.
            is_form: As a form, with files; else as JSON, where files are in base64.
        """
        own = model.model_json_schema()
        for name, part in own.get("$defs", {}).items():
            self.components[name] = _convert(part)
        properties = {
            name: _convert_field(name, field, model, is_form=is_form)
            for name, field in own["properties"].items()
        }
        schema: Schema = {"type": "object", "properties": properties, "additionalProperties": False}
        required = own.get("required", [])
        if required:
            schema["required"] = required
        return self.add(f"{own['title']}{'Form' if is_form else ''}", schema)


def _convert_field(name: str, field: Schema, model: type[RequestModel], *, is_form: bool) -> Schema:
    is_file = name in model.multipart_fields
    if is_file or name in model.base64_fields:
        kept: Schema = {key: field[key] for key in _KEPT_OF_FILES if key in field}
        kind = _AS_FILE if is_form and is_file else _IN_BASE64
        converted: Schema = {**kind, **kept}
    else:
        converted = _convert(field)
    if model.model_fields[name].is_required():
        return converted
    if is_form:
        # Pages fill in an example, and what one would leave out would be sent.
        converted.pop("example", None)
        if converted.get("default", ...) is None:
            del converted["default"]
        converted.pop("nullable", None)
        return converted
    return {**converted, "nullable": True}


def _convert(schema: Mapping[str, Any]) -> Schema:
    """Returns a schema of JSON Schema 2020-12, as pydantic writes it, as one of OpenAPI 3.0."""
    converted: Schema = {}
    for key, value in schema.items():
        if key == "$ref":
            converted["$ref"] = value.replace(_DEFS, _COMPONENTS)
        elif key == "examples":
            converted["example"] = value[0]
        elif key == "const":
            converted["enum"] = [value]
        elif key in ("exclusiveMinimum", "exclusiveMaximum"):
            converted[key.replace("exclusiveM", "m")] = value
            converted[key] = True
        elif key in ("anyOf", "oneOf", "allOf"):
            converted.update(_convert_options(key, value))
        elif key == "properties":
            converted[key] = {name: _convert(part) for name, part in value.items()}
        elif key in ("items", "additionalProperties") and isinstance(value, dict):
            converted[key] = _convert(value)
        else:
            converted[key] = value
    return converted


def _convert_options(key: str, options: list[Schema]) -> Schema:
    """3.0 has no type null: what may be null is marked so."""
    kept = [_convert(one) for one in options if one.get("type") != "null"]
    nullable = {"nullable": True} if len(kept) < len(options) else {}
    return {**kept[0], **nullable} if len(kept) == 1 else {key: kept, **nullable}
