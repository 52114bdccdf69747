"""Tools from a file the user names: which functions count, and what is wrong with a file in one line."""

from __future__ import annotations

import dataclasses
import sys

import pytest

from kimi_native.errors import RequestError
from kimi_native.tool_file import load_tools

FUNCTIONS = '''
from __future__ import annotations
from dataclasses import dataclass
from os.path import join  # of another module: no tool

@dataclass
class Place:
    city: str

def weather(place: Place, days: int = 1) -> dict:
    """Tells the weather."""
    return {"city": place.city, "days": days}

def now():
    return "noon"

def untyped(x):
    return x

def _private(x: int) -> int:
    return x
'''


@pytest.fixture
def load(tmp_path):
    def load(source: str, name: str = "tools.py"):
        (tmp_path / name).write_text(source)
        return load_tools(str(tmp_path / name))

    return load


def test_tool_file_gives_public_functions_with_type_hints_in_order(load):
    tools = load(FUNCTIONS)
    assert [tool.name for tool in tools] == ["weather", "now"]
    assert tools[0].description == "Tells the weather."
    arguments = tools[0].read_arguments('{"place":{"city":"Berlin"},"days":2}')
    assert dataclasses.is_dataclass(arguments["place"])
    assert tools[0].function(**arguments) == {"city": "Berlin", "days": 2}


def test_tool_file_list_decides_alone(load):
    (tool,) = load(FUNCTIONS + "\nTOOLS = [now]\n")
    assert tool.name == "now"


def test_tool_files_do_not_meet(load):
    """Each file has names of its own."""
    (first,) = load("def a() -> str:\n    return NAME\nNAME = 'first'\n", "one.py")
    (second,) = load("def a() -> str:\n    return NAME\nNAME = 'second'\n", "two.py")
    assert (first.function(), second.function()) == ("first", "second")
    assert "one" not in sys.modules
    assert "tools" not in sys.modules


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("", "must hold a list TOOLS or public functions with type hints"),
        ("TOOLS = []", "must hold a list TOOLS"),
        ("TOOLS = 3", "tools: must be a list"),
        ("TOOLS = [print]", "Python function"),
        ("def f(x: complex) -> str: ...", "parameter 'x' must have a type"),
        ("async def f(x: int) -> str: ...", "plain function"),
        ("1 / 0", "must run .ZeroDivisionError: division by zero"),
        ("def f(:", "must run .SyntaxError"),
        ("raise SystemExit(3)", "must run .SystemExit: 3"),
        ("TOOLS = [{'type': 'function', 'function': {'name': 'f'}}]", "f must have a function"),
    ],
)
def test_tool_file_errors_name_the_file(load, source, message):
    with pytest.raises(RequestError, match=message) as caught:
        load(source)
    assert "tools.py: " in str(caught.value)


def test_tool_file_must_be_python(load, tmp_path):
    with pytest.raises(RequestError, match=r"notes\.txt: must be a Python file that ends in \.py"):
        load("x = 1", "notes.txt")
    with pytest.raises(RequestError, match=r"must be a Python file .got none there"):
        load_tools(str(tmp_path))


def test_tool_file_passes_an_interrupt_on(load):
    with pytest.raises(KeyboardInterrupt):
        load("raise KeyboardInterrupt")
