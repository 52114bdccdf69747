"""JSON schema of a typed Python function's parameters; arguments.py goes the other way.

Python                                   JSON schema
str, int, float, bool, None              string, integer, number, boolean, null
Any, object                              {}
list[T], Sequence[T], tuple[T, ...]      array with items
dict[str, T], Mapping[str, T]            object with additionalProperties
Literal, Enum                            enum
Optional, Union, |                       anyOf
TypedDict, dataclass                     object with properties
Annotated[T, "text"]                     T with that description
"""

from __future__ import annotations

import collections.abc
import contextlib
import dataclasses
import enum
import inspect
import math
import types
import typing
from collections.abc import Callable, Mapping
from typing import Any, Literal, Union

from kimi_native.chat.docstrings import parse_docstring
from kimi_native.errors import RequestError

SCALARS = {
    str: "string",
    int: "integer",
    float: "number",
    bool: "boolean",
    type(None): "null",
}
LISTS = (list, tuple, collections.abc.Sequence)
MAPPINGS = (dict, collections.abc.Mapping)
_REQUIRED = inspect.Parameter.empty  # default of a field that has none


@dataclasses.dataclass(frozen=True)
class Field:
    """A parameter of a function, or a field of a TypedDict or dataclass."""

    name: str
    hint: Any
    default: Any = _REQUIRED
    is_required: bool = True


# ---- functions -----------------------------------------------------------------------------------------------------


def function_schema(function: Callable[..., Any]) -> dict[str, Any]:
    """JSON schema of the arguments: an object with a property per parameter, described as the docstring does.

    Raises RequestError, naming the parameter, for *args, **kwargs, positional-only or unannotated ones, and for types
    that are not in the table above.
    """
    where = f"tool: {function.__name__}"
    for name, parameter in inspect.signature(function).parameters.items():
        if parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
            star = "*" if parameter.kind is parameter.VAR_POSITIONAL else "**"
            raise RequestError(f"{where}: parameters must have names (got {star}{name})")
        if parameter.kind is parameter.POSITIONAL_ONLY:
            raise RequestError(
                f"{where}: parameter {name!r} must take a keyword (got a positional-only one)"
            )
        if parameter.annotation is parameter.empty:
            raise RequestError(f"{where}: parameter {name!r} must have a type hint (got none)")
    descriptions = parse_docstring(function.__doc__).parameters
    return _fields_schema(parameters_of(function), descriptions, f"{where}: parameter", ())


def parameters_of(function: Callable[..., Any]) -> list[Field]:
    """The parameters that a call can name. Raises RequestError on a type hint that cannot be resolved."""
    fields = []
    for name, parameter in inspect.signature(function).parameters.items():
        if parameter.kind in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY):
            hint = _resolved_hint(function, name, parameter.annotation)
            fields.append(
                Field(name, hint, parameter.default, parameter.default is parameter.empty)
            )
    return fields


def takes_any_keyword(function: Callable[..., Any]) -> bool:
    """True for a function with **kwargs."""
    parameters = inspect.signature(function).parameters.values()
    return any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters)


def _resolved_hint(function: Callable[..., Any], name: str, annotation: Any) -> Any:
    if annotation is inspect.Parameter.empty:
        return Any
    # One hint at a time: another one, or that of the result, may be for type checkers alone.
    holder = types.SimpleNamespace(__annotations__={name: annotation})
    names = getattr(inspect.unwrap(function), "__globals__", {})
    try:
        return typing.get_type_hints(holder, names, include_extras=True)[name]
    except (NameError, TypeError, AttributeError, SyntaxError) as error:
        raise RequestError(
            f"tool: {getattr(function, '__name__', function)}: type hint of parameter {name!r} must be "
            f"resolvable (got {error})"
        ) from None


# ---- types to schemas ----------------------------------------------------------------------------------------------


def to_schema(hint: Any, where: str, outer: tuple[Any, ...] = ()) -> dict[str, Any]:
    """JSON schema of a type. outer: the classes it is in. Raises RequestError, beginning with `where`."""
    hint = type(None) if hint is None else hint
    base, args = typing.get_origin(hint) or hint, typing.get_args(hint)
    if base is typing.Annotated:
        schema = to_schema(args[0], where, outer)
        texts = [text for text in args[1:] if isinstance(text, str)]
        return {**schema, "description": texts[0]} if texts else schema
    if base in (Any, object):
        return {}
    if base in (Union, types.UnionType):
        return {"anyOf": [to_schema(arg, where, outer) for arg in args]}
    if base is Literal:
        return _enum_schema(list(args), where)
    if base in LISTS:
        return _array_schema(base, args, where, outer)
    if base in MAPPINGS:
        return _mapping_schema(args, where, outer)
    if isinstance(base, type):
        if issubclass(base, enum.Enum):
            return _enum_schema([member.value for member in base], where)
        if typing.is_typeddict(base) or dataclasses.is_dataclass(base):
            return _class_schema(base, where, outer)
        if base in SCALARS:
            return {"type": SCALARS[base]}
    raise RequestError(f"{where} must have a type that JSON can hold (got {_type_name(hint)})")


def _enum_schema(values: list[Any], where: str) -> dict[str, Any]:
    values = [value.value if isinstance(value, enum.Enum) else value for value in values]
    kinds = {SCALARS.get(type(value)) for value in values}
    if None in kinds:
        raise RequestError(
            f"{where} must have choices that are text, numbers, truth values or None (got {values!r})"
        )
    return {"enum": values, **({"type": kinds.pop()} if len(kinds) == 1 else {})}


def _array_schema(
    base: type, args: tuple[Any, ...], where: str, outer: tuple[Any, ...]
) -> dict[str, Any]:
    if base is tuple and args and args[1:] != (...,):
        raise RequestError(f"{where} must be a tuple[T, ...] (got another tuple)")
    items = to_schema(args[0], f"{where}[]", outer) if args else {}
    return {"type": "array", **({"items": items} if items else {})}


def _mapping_schema(args: tuple[Any, ...], where: str, outer: tuple[Any, ...]) -> dict[str, Any]:
    if args and args[0] is not str:
        raise RequestError(f"{where} must have str keys (got {_type_name(args[0])})")
    values = to_schema(args[1], f"{where}[]", outer) if args else {}
    return {"type": "object", **({"additionalProperties": values} if values else {})}


def _class_schema(cls: type, where: str, outer: tuple[Any, ...]) -> dict[str, Any]:
    if cls in outer:
        raise RequestError(f"{where} must not contain itself (got {cls.__name__})")
    own_text = cls.__dict__.get("__doc__") or ""
    if own_text.startswith(f"{cls.__name__}("):  # the one a dataclass gets by itself
        own_text = ""
    doc = parse_docstring(own_text)
    schema = _fields_schema(fields_of(cls, where), doc.parameters, where, (*outer, cls))
    return {**schema, "description": doc.description} if doc.description else schema


def _fields_schema(
    fields: list[Field], descriptions: Mapping[str, str], where: str, outer: tuple[Any, ...]
) -> dict[str, Any]:
    properties = {}
    for field in fields:
        name = f"{where}.{field.name}" if outer else f"{where} {field.name!r}"
        schema = to_schema(field.hint, name, outer)
        is_annotated = typing.get_origin(field.hint) is typing.Annotated
        if field.name in descriptions and not (is_annotated and "description" in schema):
            schema["description"] = descriptions[field.name]
        # None says no more than that the parameter may be left out; what JSON cannot hold is not shown.
        if field.default is not _REQUIRED and field.default is not None:
            with contextlib.suppress(TypeError):
                schema["default"] = _json_value(field.default)
        properties[field.name] = schema
    required = [field.name for field in fields if field.is_required]
    return {
        "type": "object",
        "properties": properties,
        **({"required": required} if required else {}),
    }


def fields_of(cls: type, where: str) -> list[Field]:
    """The fields of a TypedDict or dataclass that its making takes."""
    try:
        hints = typing.get_type_hints(cls, include_extras=True)
    except (NameError, TypeError, AttributeError, SyntaxError) as error:
        raise RequestError(
            f"{where}: type hints of {cls.__name__} must be resolvable (got {error})"
        ) from None
    if typing.is_typeddict(cls):
        return [_typed_dict_field(cls, name, hint) for name, hint in hints.items()]
    fields = []
    for field in dataclasses.fields(cls):
        default = field.default if field.default is not dataclasses.MISSING else _REQUIRED
        is_required = default is _REQUIRED and field.default_factory is dataclasses.MISSING
        if field.init:
            fields.append(Field(field.name, hints[field.name], default, is_required))
    return fields


def _typed_dict_field(cls: Any, name: str, hint: Any) -> Field:
    # __required_keys__ knows the class's total, but not the qualifiers where hints are postponed to strings.
    qualifier = typing.get_origin(hint)
    if qualifier in (typing.Required, typing.NotRequired):
        hint = typing.get_args(hint)[0]
        return Field(name, hint, is_required=qualifier is typing.Required)
    return Field(name, hint, is_required=name in cls.__required_keys__)


def _json_value(value: Any) -> Any:
    """A default as JSON shows it. Raises TypeError if JSON cannot."""
    if isinstance(value, enum.Enum):
        return _json_value(value.value)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        value = {f.name: getattr(value, f.name) for f in dataclasses.fields(value) if f.init}
    if isinstance(value, Mapping) and all(isinstance(key, str) for key in value):
        return {key: _json_value(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_json_value(item) for item in value]
    if value is not None and not isinstance(value, str | int | float):
        raise TypeError(f"no JSON value (got {type(value).__name__})")
    if isinstance(value, float) and not math.isfinite(value):
        raise TypeError(f"no JSON number (got {value})")
    return value


def _type_name(hint: Any) -> str:
    return getattr(hint, "__name__", None) or str(hint)
