"""Tool declarations of the formats k2.5 and k2.7-code: JSON schema as TypeScript types.

    # Tools

    ## functions
    namespace functions {
    // Get weather information.
    type get_weather = (_: {
      // City name
      city: string,
      // maximum: 7, minimum: 1
      days?: number
    }) => any;
    }

Required properties come first, then the optional ones, each by name. $defs become interfaces; a function whose schema
refers to itself ("#") gets one named parameters. oneOf, allOf, a const without a type and other references have no
such form. The quirks are the published encoder's, byte for byte: the model was trained on them.
"""

from __future__ import annotations

import json
from collections.abc import Hashable
from dataclasses import dataclass, field
from typing import Any

_INDENT = "  "
_DEFINITION = "#/$defs/"
_CONSTRAINTS = {
    "string": ("maxLength", "minLength", "pattern"),
    "number": ("maximum", "minimum"),
    "integer": ("maximum", "minimum"),
    "array": ("maxItems", "minItems"),
}
# What a type is called where it is one of a list of types.
_LISTED = {
    "string": "string",
    "number": "number",
    "integer": "number",
    "boolean": "boolean",
    "null": "null",
    "object": "{}",
    "array": "Array<any>",
}
_ENUM_VALUES = {"string": str, "number": int | float, "integer": int, "boolean": bool}


class _NoTypeError(Exception):
    """The schema has no TypeScript form."""


@dataclass
class _Scope:
    """What is known of one function's schema so far.

    definitions     by name
    refers_to_root  there is a reference to the whole schema
    is_unwritable   some text cannot be written. Unlike a schema that has no type, this does no harm in a place that
                    ends up not being written
    """

    definitions: dict[str, Any] = field(default_factory=dict)
    refers_to_root: bool = False
    is_unwritable: bool = False


@dataclass(frozen=True)
class _Property:
    name: str
    is_optional: bool
    text: str


@dataclass(frozen=True)
class _Object:
    """Properties in the order of their names; rest: the type of all further ones, None if nothing is said of them."""

    properties: list[_Property]
    rest: str | None = None
    is_rest_unwritable: bool = False


def typescript_tools(tools: list[Any]) -> str | None:
    """The declaration of OpenAI-shaped tools, None if it has no such form: then the model gets the JSON list.

    tools  as JSON values with their keys sorted; other types than "function" are left out
    """
    try:
        functions = [
            _function_text(tool["function"])
            for tool in tools
            if tool.get("type") == "function" and tool.get("function")
        ]
    except (_NoTypeError, RecursionError):
        return None
    if not functions:
        return None
    return "\n".join(["# Tools\n\n## functions\nnamespace functions {", *functions, "}\n"])


def _function_text(function: Any) -> str:
    _require(isinstance(function, dict), "a function must be an object")
    scope = _Scope()
    name = function.get("name", "function")
    parameters = function.get("parameters") or {}
    _require(isinstance(parameters, dict), "parameters must be an object")
    root = _read_object(parameters, "", scope)
    refers_to_root = scope.refers_to_root  # what the definitions refer to comes too late
    parts = []
    if refers_to_root:
        fields = ",\n".join(p.text for p in root.properties)
        parts.append("interface parameters " + (f"{{\n{fields}\n}}" if fields else "{}"))
    for definition, schema in list(scope.definitions.items()):
        parts.append(_interface_text(definition, schema, scope))
    parts.append(_comment_text(_description_lines(function, scope), ""))
    type_text = "parameters" if refers_to_root else _object_text(root, "", scope)
    _require(not scope.is_unwritable, "all text must be writable")
    parts.append(f"type {name} = (_: {type_text}) => any;")
    return "\n".join(part for part in parts if part)


def _interface_text(name: str, schema: Any, scope: _Scope) -> str:
    _require(isinstance(schema, dict), "a definition must be an object")
    text = _type_text(schema, "", scope)
    lines = _description_lines(schema, scope)
    return (_comment_text(lines, "") + "\n" if lines else "") + f"interface {name} {text}"


# ---- types ---------------------------------------------------------------------------------------------------------


def _kind(schema: Any) -> str:
    """What decides the type: the first of the keys below that is there."""
    if isinstance(schema, bool):
        return "any" if schema else "null"
    _require(isinstance(schema, dict), "a schema must be an object")
    for key in ("$ref", "anyOf", "enum"):
        if key in schema:
            return key
    if not schema:
        return "any"
    _require("type" in schema, "a schema must have a type")
    kind = schema["type"]
    if isinstance(kind, list):
        return "types"
    return kind if kind in ("object", "array") else "scalar"


def _type_text(schema: Any, indent: str, scope: _Scope) -> str:
    match _kind(schema):
        case "$ref":
            return _reference_text(schema["$ref"], scope)
        case "anyOf":
            _require(isinstance(schema["anyOf"], list), "anyOf must be a list")
            scope.is_unwritable |= any(_is_nameless(one) for one in schema["anyOf"])
            return " | ".join([_type_text(one, indent, scope) for one in schema["anyOf"]])
        case "enum":
            return _enum_text(schema, scope)
        case "types":
            return " | ".join(_listed_text(one) for one in schema["type"])
        case "object":
            return _object_text(_read_object(schema, indent, scope), indent, scope)
        case "array":
            return _array_text(schema, indent, scope)
        case "scalar":
            return "number" if schema["type"] == "integer" else str(schema["type"])
        case plain:
            return plain


def _is_nameless(schema: Any) -> bool:
    """True for a type that is no text. Alone it is written as Python prints it; joined to text it is unwritable."""
    return (
        isinstance(schema, dict)
        and _kind(schema) == "scalar"
        and not isinstance(schema["type"], str)
    )


def _reference_text(reference: Any, scope: _Scope) -> str:
    if reference == "#":
        scope.refers_to_root = True
        return "parameters"
    is_definition = isinstance(reference, str) and reference.startswith(_DEFINITION)
    _require(is_definition, "a reference must lead to # or $defs")
    name = reference.rsplit("/", 1)[-1]
    _require(isinstance(scope.definitions.get(name), dict), "a reference must be defined before")
    return name


def _enum_text(schema: dict[str, Any], scope: _Scope) -> str:
    values = schema["enum"]
    if not isinstance(values, list | str | dict):
        _require("type" not in schema, "enum must be a list")
        scope.is_unwritable = True
        return ""
    if "type" in schema:
        kind = _enum_kind(schema["type"])
        allowed = _ENUM_VALUES.get(kind, object) if isinstance(kind, str) else object
        is_fit = all(value is None or isinstance(value, allowed) for value in values)
        _require(is_fit, "enum values must be of the type")
    return " | ".join(f'"{value}"' if isinstance(value, str) else str(value) for value in values)


def _enum_kind(kind: Any) -> Any:
    """The one type that is not null."""
    if not isinstance(kind, list):
        return kind
    is_known = len(kind) == 1 or (len(kind) == 2 and "null" in kind)
    _require(is_known, "the types of an enum must be one, and null")
    return kind[0] if len(kind) == 1 or kind[0] != "null" else kind[1]


def _listed_text(kind: Any) -> str:
    _require(isinstance(kind, str) and kind in _LISTED, "a listed type must be known")
    return _LISTED[kind]


def _array_text(schema: dict[str, Any], indent: str, scope: _Scope) -> str:
    items = schema.get("items") or {}
    comments = _comments(items, scope)
    if not comments:
        return f"Array<{_type_text(items, indent, scope)}>"
    scope.is_unwritable |= _is_nameless(items)
    inner = indent + _INDENT
    text = _type_text(items, inner, scope)
    return f"Array<\n{_comment_text(comments, inner)}\n{inner}{text}\n{indent}>"


# ---- objects -------------------------------------------------------------------------------------------------------


def _read_object(schema: dict[str, Any], indent: str, scope: _Scope) -> _Object:
    """The object's parts, written at the indentation of what is inside it. The order decides what is defined when."""
    inner = indent + _INDENT
    definitions = schema.get("$defs") or {}
    _require(isinstance(definitions, dict), "$defs must be an object")
    scope.definitions |= definitions
    rest, is_rest_unwritable = _read_rest(schema.get("additionalProperties"), inner, scope)
    if "properties" not in schema:
        return _Object([], rest, is_rest_unwritable)
    properties = schema["properties"]
    _require(isinstance(properties, dict), "properties must be an object")
    required = schema.get("required", [])
    is_named = isinstance(required, list | str | dict) and all(
        isinstance(name, Hashable) for name in required
    )
    _require(is_named, "required must be a list of names")
    required = set(required)
    read = [
        _property(name, name not in required, one, inner, scope) for name, one in properties.items()
    ]
    return _Object(read, rest, is_rest_unwritable)


def _read_rest(schema: Any, indent: str, scope: _Scope) -> tuple[str | None, bool]:
    """The type of further properties, and whether it is unwritable: what it is in may not be written."""
    if schema is None:
        return None, False
    if isinstance(schema, bool):
        return "any" if schema else "never", False
    if not isinstance(schema, dict):
        return None, True
    before, scope.is_unwritable = scope.is_unwritable, False
    text = _type_text(schema, indent, scope)
    is_unwritable, scope.is_unwritable = scope.is_unwritable, before
    return text, is_unwritable


def _property(name: str, is_optional: bool, schema: Any, indent: str, scope: _Scope) -> _Property:
    text = f"{indent}{name}{'?' if is_optional else ''}: {_type_text(schema, indent, scope)}"
    comments = _comments(schema, scope)
    default = schema.get("default") if isinstance(schema, dict) else None
    if default is not None:
        comments.append(f"Default: {_default_text(default)}")
    above = _comment_text(comments, indent)
    return _Property(name, is_optional, f"{above}\n{text}" if comments else text)


def _default_text(default: Any) -> str:
    # True and 1e-07 as Python writes them, text and the rest as JSON.
    return (
        repr(default)
        if isinstance(default, int | float)
        else json.dumps(default, ensure_ascii=False)
    )


def _object_text(parts: _Object, indent: str, scope: _Scope) -> str:
    ordered = sorted(parts.properties, key=lambda p: (p.is_optional, p.name))
    texts = [p.text for p in ordered]
    scope.is_unwritable |= parts.is_rest_unwritable
    if parts.rest is not None:
        texts.append(f"{indent}{_INDENT}[k: string]: {parts.rest}")
    return "{\n" + ",\n".join(texts) + f"\n{indent}}}" if texts else "{}"


# ---- comments ------------------------------------------------------------------------------------------------------


def _comments(schema: Any, scope: _Scope) -> list[str]:
    """Lines above a property or item: its description, then its constraints in one line."""
    if not isinstance(schema, dict):
        return []
    lines = _description_lines(schema, scope)
    if _kind(schema) in ("array", "scalar") and isinstance(schema["type"], str):
        keys = _CONSTRAINTS.get(schema["type"], ())
        constraints = [f"{key}: {schema[key]}" for key in keys if key in schema]
        lines += [", ".join(constraints)] if constraints else []
    return lines


def _description_lines(schema: dict[str, Any], scope: _Scope) -> list[str]:
    description = schema.get("description") or ""
    if not isinstance(description, str):
        scope.is_unwritable = True
        return []
    return description.split("\n") if description else []


def _comment_text(lines: list[str], indent: str) -> str:
    return "\n".join(f"{indent}// {line}" if line else "" for line in lines)


def _require(holds: bool, message: str) -> None:
    if not holds:
        raise _NoTypeError(message)
