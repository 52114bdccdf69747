"""The arguments of a tool call: JSON text to the keyword arguments of a Python function."""

from __future__ import annotations

import dataclasses
import enum
import json
import types
import typing
from collections.abc import Callable, Mapping
from typing import Any, Literal, Union

from kimi_native.chat.function_schema import (
    LISTS,
    MAPPINGS,
    Field,
    fields_of,
    parameters_of,
    takes_any_keyword,
)
from kimi_native.errors import RequestError

_JSON_NAMES = {
    str: "a string",
    int: "an integer",
    float: "a number",
    bool: "true or false",
    type(None): "null",
    list: "an array",
    dict: "an object",
}


def read_object(text: str, where: str) -> dict[str, Any]:
    """The JSON object in the text. Raises RequestError on anything else, a key given twice, NaN and infinities."""

    def pairs(items: list[tuple[str, Any]]) -> dict[str, Any]:
        values = dict(items)
        if len(values) != len(items):
            names = [name for name, _ in items]
            twice = next(name for name in names if names.count(name) > 1)
            raise RequestError(f"{where}: argument {twice!r} must be given once (got it twice)")
        return values

    def constant(name: str) -> None:
        raise RequestError(f"{where}: numbers must be finite (got {name})")

    try:
        values = json.loads(text, object_pairs_hook=pairs, parse_constant=constant)
    except RequestError:
        raise
    except RecursionError:
        raise RequestError(f"{where}: arguments must not nest so deep") from None
    except ValueError as error:
        raise RequestError(f"{where}: arguments must be valid JSON ({error})") from None
    if not isinstance(values, dict):
        raise RequestError(f"{where}: arguments must be an object (got {_shown(values)})")
    return values


def keyword_arguments(
    function: Callable[..., Any], values: Mapping[str, Any], where: str
) -> dict[str, Any]:
    """JSON values as the function's types: enum members, dataclasses, tuples; a type this module does not know passes.

    Raises RequestError, naming the argument, for one that is missing, unknown or of the wrong type.
    """
    fields = parameters_of(function)
    if takes_any_keyword(function):
        known = {field.name for field in fields}
        fields += [Field(name, Any) for name in values if name not in known]
    return _read_fields(fields, values, f"{where}: argument ", "")


def _read_fields(
    fields: list[Field], values: Mapping[str, Any], where: str, path: str
) -> dict[str, Any]:
    known = {field.name: field for field in fields}
    for name in values:
        if name not in known:
            expected = ", ".join(known) or "none"
            raise RequestError(f"{where}{path + name!r} must be one of: {expected}")
    for field in fields:
        if field.is_required and field.name not in values:
            raise RequestError(f"{where}{path + field.name!r} must be given (got none)")
    return {
        name: from_json(known[name].hint, value, where, path + name)
        for name, value in values.items()
    }


def from_json(hint: Any, value: Any, where: str, path: str) -> Any:
    """A JSON value as the type asks for it; `where` and `path` begin the message of a RequestError."""
    hint = type(None) if hint is None else hint
    base, args = typing.get_origin(hint) or hint, typing.get_args(hint)
    if base is typing.Annotated:
        return from_json(args[0], value, where, path)
    if base in (Union, types.UnionType):
        return _read_union(args, value, where, path)
    if base is Literal:
        return _read_choice([(arg, getattr(arg, "value", arg)) for arg in args], value, where, path)
    if base in LISTS:
        return _read_list(base, args, value, where, path)
    if base in MAPPINGS:
        _check(isinstance(value, dict), dict, value, where, path)
        item = args[1] if args else Any
        return {name: from_json(item, v, where, f"{path}.{name}") for name, v in value.items()}
    if isinstance(base, type):
        return _read_class(base, value, where, path)
    return value


def _read_class(cls: type, value: Any, where: str, path: str) -> Any:
    if issubclass(cls, enum.Enum):
        return _read_choice([(member, member.value) for member in cls], value, where, path)
    if typing.is_typeddict(cls) or dataclasses.is_dataclass(cls):
        _check(isinstance(value, dict), dict, value, where, path)
        values = _read_fields(fields_of(cls, f"{where}{path!r}"), value, where, f"{path}.")
        return _made(cls, values, where, path)
    if cls is float:
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        _check(is_number, float, value, where, path)
        return _as_float(value, where, path)
    if cls is int and isinstance(value, float) and value.is_integer():
        return int(value)  # 3.0 is an integer to JSON schema
    if cls in _JSON_NAMES:
        _check(type(value) is cls, cls, value, where, path)
    return value


def _made(cls: type, values: dict[str, Any], where: str, path: str) -> Any:
    try:
        return cls(**values)
    except (TypeError, ValueError) as error:  # what its __post_init__ has to say
        raise RequestError(f"{where}{path!r} must make a {cls.__name__} ({error})") from error


def _as_float(value: float, where: str, path: str) -> float:
    try:
        number = float(value)
    except OverflowError:
        number = float("inf")
    if number - number != 0:  # 1e999 is read as an infinity
        raise RequestError(f"{where}{path!r} must be in the range of a float (got more)")
    return number


def _read_union(args: tuple[Any, ...], value: Any, where: str, path: str) -> Any:
    """The first type that the value fits."""
    messages = []
    for arg in args:
        try:
            return from_json(arg, value, where, path)
        except RequestError as error:
            messages.append(str(error))
    others = [arg for arg in args if arg is not type(None)]
    if len(others) == 1:
        raise RequestError(messages[args.index(others[0])])
    names = " or ".join(_JSON_NAMES.get(arg) or getattr(arg, "__name__", str(arg)) for arg in args)
    raise RequestError(f"{where}{path!r} must be {names} (got {_shown(value)})")


def _read_choice(choices: list[tuple[Any, Any]], value: Any, where: str, path: str) -> Any:
    for member, shown in choices:
        if type(shown) is type(value) and shown == value:
            return member
    names = ", ".join(_shown(shown) for _, shown in choices)
    raise RequestError(f"{where}{path!r} must be one of: {names} (got {_shown(value)})")


def _read_list(base: type, args: tuple[Any, ...], value: Any, where: str, path: str) -> Any:
    _check(isinstance(value, list), list, value, where, path)
    item = args[0] if args else Any
    items = [from_json(item, v, where, f"{path}[{i}]") for i, v in enumerate(value)]
    return tuple(items) if base is tuple else items


def _check(holds: bool, kind: type, value: Any, where: str, path: str) -> None:
    if not holds:
        raise RequestError(f"{where}{path!r} must be {_JSON_NAMES[kind]} (got {_shown(value)})")


def _shown(value: Any) -> str:
    """A value as JSON, cut short."""
    try:
        text = json.dumps(value, ensure_ascii=False)
    except RecursionError:
        return "a deep value"
    return text if len(text) <= 60 else text[:57] + "..."
