"""Tools: Python functions as JSON schema, and a model's arguments as what those functions take."""

from __future__ import annotations

import dataclasses
import enum
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal, NotRequired, Optional, TypedDict, Union

import pytest

import kimi_native as kn
from kimi_native.chat.docstrings import parse_docstring
from kimi_native.chat.tool import Tool, as_tools
from kimi_native.errors import RequestError


class Unit(enum.Enum):
    CELSIUS = "c"
    FAHRENHEIT = "f"


class Level(enum.IntEnum):
    LOW = 1
    HIGH = 2


@dataclasses.dataclass(frozen=True)
class Point:
    """A place.

    Attributes:
        lat: degrees north
    """

    lat: float
    lon: float
    label: str | None = None
    tags: tuple[str, ...] = ()

    def __post_init__(self):
        if abs(self.lat) > 90:
            raise ValueError("lat out of range")


@dataclasses.dataclass
class Pair:
    a: int
    unit: Unit = Unit.CELSIUS
    hidden: int = dataclasses.field(init=False, default=0)


class Filter(TypedDict):
    """What to look for."""

    word: str
    limit: NotRequired[Annotated[int, "at most"]]


@dataclasses.dataclass
class Tree:
    children: list[Tree]


def get_weather(city: str, days: int = 3, unit: Literal["c", "f"] = "c") -> str:
    """Get weather information.

    Longer text.

    Args:
        city: City name
        days (int): How many days,
            from today on
    Returns:
        text: nothing to see
    """
    return f"{city} {days} {unit}"


def test_tool_from_function_declares_signature_and_docstring():
    assert Tool.from_function(get_weather).declaration == {
        "type": "function",
        "function": {
            "name": "get_weather",
            "description": "Get weather information.\n\nLonger text.",
            "parameters": {
                "type": "object",
                "properties": {
                    "city": {"type": "string", "description": "City name"},
                    "days": {
                        "type": "integer",
                        "description": "How many days, from today on",
                        "default": 3,
                    },
                    "unit": {"type": "string", "enum": ["c", "f"], "default": "c"},
                },
                "required": ["city"],
            },
        },
    }


def schema_of(hint: Any, **default: Any) -> dict:
    def f(x): ...

    f.__annotations__ = {"x": hint}
    f.__defaults__ = tuple(default.values()) or None
    return Tool.from_function(f).parameters["properties"]["x"]


NUMBER = {"type": "number"}
POINT = {
    "type": "object",
    "properties": {
        "lat": {"type": "number", "description": "degrees north"},
        "lon": NUMBER,
        "label": {"anyOf": [{"type": "string"}, {"type": "null"}]},
        "tags": {"type": "array", "items": {"type": "string"}, "default": []},
    },
    "required": ["lat", "lon"],
    "description": "A place.",
}
PAIR = {
    "type": "object",
    "properties": {
        "a": {"type": "integer"},
        "unit": {"type": "string", "enum": ["c", "f"], "default": "c"},
    },
    "required": ["a"],
}
FILTER = {
    "type": "object",
    "properties": {
        "word": {"type": "string"},
        "limit": {"type": "integer", "description": "at most"},
    },
    "required": ["word"],
    "description": "What to look for.",
}
SCHEMAS = [
    (str, {"type": "string"}),
    (int, {"type": "integer"}),
    (float, NUMBER),
    (bool, {"type": "boolean"}),
    (None, {"type": "null"}),
    ("int", {"type": "integer"}),
    (Any, {}),
    (object, {}),
    (list, {"type": "array"}),
    (list[Any], {"type": "array"}),
    (list[list[int]], {"type": "array", "items": {"type": "array", "items": {"type": "integer"}}}),
    (Sequence[str], {"type": "array", "items": {"type": "string"}}),
    (tuple[float, ...], {"type": "array", "items": NUMBER}),
    (dict, {"type": "object"}),
    (dict[str, Any], {"type": "object"}),
    (Mapping[str, float], {"type": "object", "additionalProperties": NUMBER}),
    (Optional[int], {"anyOf": [{"type": "integer"}, {"type": "null"}]}),  # noqa: UP045
    (Union[int, str], {"anyOf": [{"type": "integer"}, {"type": "string"}]}),  # noqa: UP007
    (int | None, {"anyOf": [{"type": "integer"}, {"type": "null"}]}),
    (Literal[1, 2], {"type": "integer", "enum": [1, 2]}),
    (Literal["a", None], {"enum": ["a", None]}),
    (Literal[Unit.CELSIUS], {"type": "string", "enum": ["c"]}),
    (Unit, {"type": "string", "enum": ["c", "f"]}),
    (Level, {"type": "integer", "enum": [1, 2]}),
    (Annotated[int, 5, "how many"], {"type": "integer", "description": "how many"}),
    (Annotated[int, 5], {"type": "integer"}),
    (Point, POINT),
    (Pair, PAIR),
    (Filter, FILTER),
    (list[Filter], {"type": "array", "items": FILTER}),
]


@pytest.mark.parametrize(("hint", "schema"), SCHEMAS, ids=lambda x: str(x)[:40])
def test_tool_schema_of_a_type(hint, schema):
    assert schema_of(hint) == schema


@pytest.mark.parametrize(
    ("hint", "default", "shown"),
    [
        (Unit, Unit.FAHRENHEIT, {"default": "f"}),
        (str | None, None, {}),
        (bool, False, {"default": False}),
        (list[int], (1, 2), {"default": [1, 2]}),
        (Pair, Pair(1), {"default": {"a": 1, "unit": "c"}}),
        (Any, {"a": [None, Unit.CELSIUS]}, {"default": {"a": [None, "c"]}}),
        (Any, object(), {}),
        (float, float("nan"), {}),
        (dict, {1: 2}, {}),
    ],
    ids=str,
)
def test_tool_schema_shows_a_default_that_json_can_hold(hint, default, shown):
    assert schema_of(hint, x=default) == {**schema_of(hint), **shown}


def unresolvable(x: Missing): ...  # noqa: F821


def star(*rows: int): ...


def double_star(**options: int): ...


def positional(x, /): ...


def untyped(a: int, x): ...


async def later(a: int): ...


REFUSED = [
    (unresolvable, "tool: unresolvable: type hint of parameter 'x' must be resolvable (got name"),
    (star, "tool: star: parameters must have names (got *rows)"),
    (double_star, "tool: double_star: parameters must have names (got **options)"),
    (positional, "tool: positional: parameter 'x' must take a keyword"),
    (untyped, "tool: untyped: parameter 'x' must have a type hint (got none)"),
    (later, "tool: later must be a plain function (got async)"),
    (lambda: 1, "tool: name must be letters, digits, '_', '-' and '.' (got '<lambda>')"),
    (print, "tool: must be a Tool, an object or a Python function (got <built-in function print>)"),
    (Point, "tool: must be a Tool, an object or a Python function (got <class"),
    (7, "tool: must be a Tool, an object or a Python function (got 7)"),
]


@pytest.mark.parametrize(("function", "message"), REFUSED, ids=lambda x: str(x)[:40])
def test_tool_refuses_a_function_it_cannot_declare(function, message):
    with pytest.raises(RequestError) as caught:
        Tool.from_function(function)
    assert str(caught.value).startswith(message)


@pytest.mark.parametrize(
    ("hint", "message"),
    [
        (bytes, "parameter 'x' must have a type that JSON can hold (got bytes)"),
        (set[int], "parameter 'x' must have a type that JSON can hold (got set)"),
        (list[complex], "parameter 'x'[] must have a type that JSON can hold (got complex)"),
        ([int], "parameter 'x' must have a type that JSON can hold (got [<class 'int'>])"),
        (dict[int, str], "parameter 'x' must have str keys (got int)"),
        (tuple[int, str], "parameter 'x' must be a tuple[T, ...] (got another tuple)"),
        (Literal[b"a"], "parameter 'x' must have choices that are text, numbers"),
        (Tree, "parameter 'x'.children[] must not contain itself (got Tree)"),
    ],
    ids=str,
)
def test_tool_refuses_a_type_and_names_the_parameter(hint, message):
    with pytest.raises(RequestError) as caught:
        schema_of(hint)
    assert str(caught.value).startswith(f"tool: f: {message}")


def test_tool_does_not_need_the_hint_of_the_result():
    def f(x: int) -> Missing: ...  # noqa: F821

    assert Tool.from_function(f).parameters["required"] == ["x"]


def test_tool_of_a_method_has_no_self():
    class Box:
        def put(self, x: int):
            """Puts."""

    tool = Tool.from_function(Box().put)
    assert (tool.name, tool.description, list(tool.parameters["properties"])) == (
        "put",
        "Puts.",
        ["x"],
    )


def test_tool_without_parameters_or_docstring():
    def now(): ...

    tool = Tool.from_function(now)
    assert tool.declaration["function"] == {
        "name": "now",
        "parameters": {"type": "object", "properties": {}},
    }
    assert tool.read_arguments("{}") == {}


# ---- docstrings ----------------------------------------------------------------------------------------------------

GOOGLE = """Does it.

    Text: with a colon.

    Args:
        a: First: with a colon
        b (list[int], optional): Second
            over two lines

            and a paragraph
        *rest: Third

    Example:
        >>> a: no parameter
    """
NUMPY = """Does it.

    Text: with a colon.

    Parameters
    ----------
    a : int
        First: with a colon
    b, c : list of int, optional
        Second
        over two lines
    d

    Returns
    -------
    e : int
        no parameter
    """
SPHINX = """Does it.

    Text: with a colon.

    :param a: First: with a colon
    :param list b: Second
        over two lines
    :type b: list
    :raises ValueError: no parameter
    :return: no parameter
    """


@pytest.mark.parametrize(
    ("text", "parameters"),
    [
        (
            GOOGLE,
            {
                "a": "First: with a colon",
                "b": "Second over two lines and a paragraph",
                "rest": "Third",
            },
        ),
        (
            NUMPY,
            {
                "a": "First: with a colon",
                "b": "Second over two lines",
                "c": "Second over two lines",
            },
        ),
        (SPHINX, {"a": "First: with a colon", "b": "Second over two lines"}),
    ],
    ids=["google", "numpy", "sphinx"],
)
def test_docstring_styles(text, parameters):
    parsed = parse_docstring(text)
    assert parsed.description == "Does it.\n\nText: with a colon."
    assert parsed.parameters == parameters


@pytest.mark.parametrize(
    "text", [None, "", "   \n", "Args:", "Args:\n", "Parameters\n---", ":param"]
)
def test_docstring_without_parameters(text):
    assert parse_docstring(text).parameters == {}


# ---- dicts ---------------------------------------------------------------------------------------------------------


def declared(**function: Any) -> dict:
    return {"type": "function", "function": {"name": "f", **function}}


@pytest.mark.parametrize(
    "tool",
    [
        declared(),
        declared(description=""),
        declared(description="é", parameters={}),
        declared(parameters={"type": "object", "$defs": {}}, strict=True),
    ],
    ids=str,
)
def test_tool_from_dict_gives_the_dict_back(tool):
    assert Tool.from_dict(tool).declaration == tool


@pytest.mark.parametrize(
    ("tool", "message"),
    [
        ({}, "tool: must be {'type': 'function', 'function': ...} (got {})"),
        ({"type": "web_search"}, "tool: must be {'type': 'function'"),
        ({**declared(), "x": 1}, "tool: must be {'type': 'function'"),
        ({"type": "function"}, "tool: function must be an object (got NoneType)"),
        (declared(name=None), "tool: name must be letters, digits, '_', '-' and '.' (got None)"),
        (declared(name="a b"), "tool: name must be letters, digits, '_', '-' and '.' (got 'a b')"),
        (declared(name="a\n"), "tool: name must be letters"),
        (declared(description=1), "tool: description of f must be a string (got int)"),
        (declared(parameters=[]), "tool: parameters of f must be an object (got list)"),
    ],
    ids=str,
)
def test_tool_from_dict_refuses(tool, message):
    with pytest.raises(RequestError) as caught:
        Tool.from_dict(tool)
    assert str(caught.value).startswith(message)


def test_tool_function_must_be_callable():
    with pytest.raises(RequestError, match="function of f must be callable"):
        Tool("f", None, None, 7)


def test_as_tools_takes_tools_dicts_and_functions():
    tools = as_tools([get_weather, declared(), Tool("g", None, None)])
    assert [tool.name for tool in tools] == ["get_weather", "f", "g"]
    assert [tool.function for tool in tools] == [get_weather, None, None]
    assert as_tools(tools) == tools
    assert as_tools(None) == as_tools([]) == ()
    assert kn.Tool is Tool


@pytest.mark.parametrize(
    ("tools", "message"),
    [
        ([declared(), Tool("f", None, None)], "tools: names must differ (got 'f' twice)"),
        (declared(), "tools: must be a list (got dict)"),
        ("get_weather", "tools: must be a list (got str)"),
        (Tool("f", None, None), "tools: must be a list (got Tool)"),
        (get_weather, "tools: must be a list (got function)"),
        (
            ["get_weather"],
            "tool: must be a Tool, an object or a Python function (got 'get_weather')",
        ),
    ],
    ids=str,
)
def test_as_tools_refuses(tools, message):
    with pytest.raises(RequestError) as caught:
        as_tools(tools)
    assert str(caught.value) == message


# ---- arguments -----------------------------------------------------------------------------------------------------


def read(hint: Any, text: str) -> Any:
    def f(x): ...

    f.__annotations__ = {"x": hint}
    return Tool.from_function(f).read_arguments(f'{{"x": {text}}}')["x"]


@pytest.mark.parametrize(
    ("hint", "text", "value"),
    [
        (str, '"é"', "é"),
        (int, "3.0", 3),
        (int, "-7", -7),
        (float, "3", 3.0),
        (bool, "true", True),
        (None, "null", None),
        (Any, '{"a": [1]}', {"a": [1]}),
        (list[float], "[1, 2.5]", [1.0, 2.5]),
        (tuple[Unit, ...], '["f"]', (Unit.FAHRENHEIT,)),
        (dict[str, Unit], '{"a": "c"}', {"a": Unit.CELSIUS}),
        (int | str, '"7"', "7"),
        (Unit | None, "null", None),
        (list[int] | dict[str, int], '{"a": 1}', {"a": 1}),
        (Literal["a", 1, True], "true", True),
        (Literal["a", True, 1], "1", 1),
        (Literal[Unit.CELSIUS], '"c"', Unit.CELSIUS),
        (Level, "2", Level.HIGH),
        (Annotated[Unit, "u"], '"f"', Unit.FAHRENHEIT),
        (Point, '{"lat": 1, "lon": 2, "tags": ["a"]}', Point(1.0, 2.0, None, ("a",))),
        (list[Pair], '[{"a": 1, "unit": "f"}]', [Pair(1, Unit.FAHRENHEIT)]),
        (Filter, '{"word": "w"}', {"word": "w"}),
    ],
    ids=str,
)
def test_tool_reads_an_argument(hint, text, value):
    actual = read(hint, text)
    assert actual == value
    assert type(actual) is type(value)


@pytest.mark.parametrize(
    ("hint", "text", "message"),
    [
        (int, '"3"', "argument 'x' must be an integer (got \"3\")"),
        (int, "3.5", "argument 'x' must be an integer (got 3.5)"),
        (int, "true", "argument 'x' must be an integer (got true)"),
        (float, "false", "argument 'x' must be a number (got false)"),
        (float, "1e999", "argument 'x' must be in the range of a float (got more)"),
        (float, "1" + 400 * "0", "argument 'x' must be in the range of a float (got more)"),
        (bool, "1", "argument 'x' must be true or false (got 1)"),
        (None, "0", "argument 'x' must be null (got 0)"),
        (str, "[]", "argument 'x' must be a string (got [])"),
        (list[int], "[1, null]", "argument 'x[1]' must be an integer (got null)"),
        (dict[str, int], '{"a": "b"}', "argument 'x.a' must be an integer (got \"b\")"),
        (dict, "[]", "argument 'x' must be an object (got [])"),
        (Unit, '"k"', 'argument \'x\' must be one of: "c", "f" (got "k")'),
        (Literal[1], "true", "argument 'x' must be one of: 1 (got true)"),
        (int | str, "[]", "argument 'x' must be an integer or a string (got [])"),
        (list[int] | None, '["a"]', "argument 'x[0]' must be an integer (got \"a\")"),
        (Point, '{"lat": 1}', "argument 'x.lon' must be given (got none)"),
        (Point, '{"lat": 91, "lon": 0}', "argument 'x' must make a Point (lat out of range)"),
        (Filter, '{"word": "w", "a": 1}', "argument 'x.a' must be one of: word, limit"),
        (str, '"a", "x": "b"', "argument 'x' must be given once (got it twice)"),
        (Any, "NaN", "numbers must be finite (got NaN)"),
        (Any, "[" * 100000 + "]" * 100000, "arguments must not nest so deep"),
        (str, '"' + 99 * "a", "arguments must be valid JSON (Unterminated string"),
    ],
    ids=lambda x: str(x)[:40],
)
def test_tool_refuses_an_argument_and_names_it(hint, text, message):
    with pytest.raises(RequestError) as caught:
        read(hint, text)
    assert str(caught.value).startswith(f"tool f: {message}")


def test_tool_names_missing_and_unknown_arguments():
    tool = Tool.from_function(get_weather)
    assert tool.read_arguments('{"city": "Rome"}') == {"city": "Rome"}
    with pytest.raises(RequestError, match="argument 'city' must be given"):
        tool.read_arguments("{}")
    with pytest.raises(RequestError, match="argument 'town' must be one of: city, days, unit"):
        tool.read_arguments('{"town": "Rome"}')


@pytest.mark.parametrize("text", ["", "[]", "null", '"{}"', "{", "{'a': 1}"])
def test_tool_arguments_must_be_an_object(text):
    with pytest.raises(RequestError, match="tool f: arguments must be"):
        Tool("f", None, None).read_arguments(text)


def test_tool_without_function_gives_the_values_as_they_are():
    assert Tool("f", None, None).read_arguments('{"a": 1, "b": {}}') == {"a": 1, "b": {}}


def test_tool_with_a_function_given_beside_it_passes_what_it_does_not_know():
    def f(a, unit: Unit = Unit.CELSIUS, data: bytes = b"", **rest): ...

    tool = Tool("f", None, {}, f)
    arguments = '{"a": 1, "unit": "f", "data": "x", "more": []}'
    assert tool.read_arguments(arguments) == {
        "a": 1,
        "unit": Unit.FAHRENHEIT,
        "data": "x",
        "more": [],
    }


def test_tool_read_arguments_fit_the_function():
    tool = Tool.from_function(get_weather)
    assert tool.function(**tool.read_arguments('{"city": "Rome", "days": 1}')) == "Rome 1 c"
