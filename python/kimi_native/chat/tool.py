"""Tools: what the model may ask for, as it is declared to the model and as Python runs it."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from kimi_native.chat.arguments import keyword_arguments, read_object
from kimi_native.chat.docstrings import parse_docstring
from kimi_native.chat.function_schema import function_schema
from kimi_native.errors import RequestError


@dataclass(frozen=True)
class Tool:
    """A tool with its parameters as JSON schema.

    name         letters, digits, "_", "-" and "."
    description  for the model; None: not declared
    parameters   JSON schema of an object; None: not declared
    function     what a call of the tool runs; None: the caller runs it. It is never run by itself
    extra        further fields of the declared function, such as strict

    Raises RequestError on a wrong field.
    """

    name: str
    description: str | None
    parameters: Mapping[str, Any] | None
    function: Callable[..., Any] | None = field(default=None, repr=False)
    extra: Mapping[str, Any] = field(default_factory=dict, kw_only=True)

    def __post_init__(self) -> None:
        if not isinstance(self.name, str) or not re.fullmatch(r"[\w.-]+", self.name):
            raise RequestError(
                f"tool: name must be letters, digits, '_', '-' and '.' (got {self.name!r})"
            )
        if not isinstance(self.description, str | None):
            raise RequestError(
                f"tool: description of {self.name} must be a string (got {type(self.description).__name__})"
            )
        if not isinstance(self.parameters, Mapping | None):
            raise RequestError(
                f"tool: parameters of {self.name} must be an object (got {type(self.parameters).__name__})"
            )
        if self.function is not None and not callable(self.function):
            raise RequestError(
                f"tool: function of {self.name} must be callable (got {type(self.function).__name__})"
            )

    @classmethod
    def from_function(cls, function: Callable[..., Any]) -> Tool:
        """A tool from a Python function: its name, the text of its docstring, a schema from its type hints.

        Parameter descriptions come from the docstring (Google, NumPy or Sphinx style) or from Annotated[T, "text"].
        See function_schema for the types. Raises RequestError, naming the parameter, on what it cannot declare.
        """
        if not (inspect.isfunction(function) or inspect.ismethod(function)):
            raise RequestError(
                f"tool: must be a Tool, an object or a Python function (got {function!r})"
            )
        if inspect.iscoroutinefunction(function) or inspect.isasyncgenfunction(function):
            raise RequestError(f"tool: {function.__name__} must be a plain function (got async)")
        description = parse_docstring(function.__doc__).description
        return cls(function.__name__, description or None, function_schema(function), function)

    @classmethod
    def from_dict(cls, tool: Mapping[str, Any]) -> Tool:
        """{"type": "function", "function": {"name", "description", "parameters", ...}}, as the OpenAI API has it.

        Raises RequestError on another type, an unknown field beside "function", or a field of a wrong type.
        """
        if not isinstance(tool, Mapping):
            raise RequestError(f"tool: must be an object (got {type(tool).__name__})")
        unknown = [name for name in tool if name not in ("type", "function")]
        if tool.get("type") != "function" or unknown:
            raise RequestError(
                f"tool: must be {{'type': 'function', 'function': ...}} (got {dict(tool)!r})"
            )
        function = tool.get("function")
        if not isinstance(function, Mapping):
            raise RequestError(f"tool: function must be an object (got {type(function).__name__})")
        own = ("name", "description", "parameters")
        extra = {name: value for name, value in function.items() if name not in own}
        return cls(*(function.get(name) for name in own), extra=extra)

    @property
    def declaration(self) -> dict[str, Any]:
        """The tool in the shape from_dict reads, as the chat templates want it."""
        function: dict[str, Any] = {"name": self.name}
        if self.description is not None:
            function["description"] = self.description
        if self.parameters is not None:
            function["parameters"] = self.parameters
        return {"type": "function", "function": function | dict(self.extra)}

    def read_arguments(self, text: str) -> dict[str, Any]:
        """Keyword arguments for `function` from the JSON text of a call; without one, the JSON values as they are.

        Values become what the type hints of the function say: enum members, dataclasses, tuples, floats. Raises
        RequestError if the text holds no JSON object, or for an argument that is missing, unknown or of a wrong type.
        """
        where = f"tool {self.name}"
        values = read_object(text, where)
        return values if self.function is None else keyword_arguments(self.function, values, where)


ToolLike = Tool | Mapping[str, Any] | Callable[..., Any]


def as_tools(tools: Iterable[ToolLike] | None) -> tuple[Tool, ...]:
    """Tools given as Tool, OpenAI-shaped dict or Python function. Raises RequestError if two have the same name."""
    converted = tuple(
        Tool.from_dict(tool) if isinstance(tool, Mapping) else _as_tool(tool)
        for tool in _as_list(tools)
    )
    _check_names([tool.name for tool in converted])
    return converted


def declarations(tools: Iterable[ToolLike] | None) -> list[dict[str, Any]]:
    """What the model is told of the tools. A dict stays as it is, whatever kind of tool it declares.

    Raises RequestError as as_tools does, but for the content of dicts.
    """
    declared = [
        dict(tool) if isinstance(tool, Mapping) else _as_tool(tool).declaration
        for tool in _as_list(tools)
    ]
    functions = [tool.get("function") for tool in declared]
    names = [function.get("name") for function in functions if isinstance(function, Mapping)]
    _check_names([name for name in names if isinstance(name, str)])
    return declared


def _as_list(tools: Iterable[ToolLike] | None) -> list[ToolLike]:
    if tools is None:
        return []
    if isinstance(tools, str | Mapping | Tool) or not isinstance(tools, Iterable):
        raise RequestError(f"tools: must be a list (got {type(tools).__name__})")
    return list(tools)


def _as_tool(tool: Tool | Callable[..., Any]) -> Tool:
    return tool if isinstance(tool, Tool) else Tool.from_function(tool)


def _check_names(names: Sequence[str]) -> None:
    twice = [name for name in names if names.count(name) > 1]
    if twice:
        raise RequestError(f"tools: names must differ (got {twice[0]!r} twice)")
