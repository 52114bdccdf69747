"""Ids of tool calls: functions.{name}:{number}, the number counting the calls of the whole conversation from 0.

Models write other forms at times, imitating the ids of other providers in their history or forgetting a part:
functions_f_0, f:0, functions(f):2.0, functions.f30, get-weather for get_weather, or the number alone. With the declared
tools at hand, most of them name one tool without doubt. A name that none of the tools has is never made up.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from kimi_native.chat.tool import ToolLike, declarations
from kimi_native.tokenizer import Tokenizer


def tool_name(call_id: str) -> str:
    """Function name of a call id: `functions.` and the last `:digits` are taken off, where they are there."""
    return re.sub(r":[0-9]+\Z", "", call_id).removeprefix("functions.").strip()


def is_number(header: str) -> bool:
    """True for a header that is a number and nothing else."""
    return re.fullmatch(r"[0-9]+", header) is not None


class DeclaredTools:
    """Names and parameters of the tools that a call may mean. Raises RequestError as tool.declarations does."""

    def __init__(self, tools: Iterable[ToolLike] | None) -> None:
        functions = [tool.get("function") for tool in declarations(tools)]
        self._parameters: dict[str, Any] = {
            function["name"]: function.get("parameters")
            for function in functions
            if isinstance(function, Mapping) and isinstance(function.get("name"), str)
        }

    def __bool__(self) -> bool:
        return bool(self._parameters)

    def is_native(self, header: str) -> bool:
        """True for functions.{name}:{digits} with a declared name: an id as the model should write it."""
        name = tool_name(header)
        return name in self._parameters and header.startswith(f"functions.{name}:")

    def name_in(self, header: str) -> str | None:
        """The one tool whose name the header may be a form of."""
        if tool_name(header) in self._parameters:
            return tool_name(header)
        written = re.sub(r"\s+", "", header)
        for swap in (False, True):
            found = [name for name in self._parameters if _is_form_of(written, name, swap)]
            if found:
                return found[0] if len(found) == 1 else None
        return None

    def name_for(self, arguments: str) -> str | None:
        """The one tool that takes arguments of these names, and has none missing."""
        try:
            values = json.loads(arguments)
        except (ValueError, RecursionError):
            return None
        if not isinstance(values, dict):
            return None
        found = [name for name, schema in self._parameters.items() if _takes(schema, set(values))]
        return found[0] if len(found) == 1 else None


def _is_form_of(header: str, name: str, swap: bool) -> bool:
    """swap: - and _ count as the same."""
    pattern = re.escape(name)
    if swap:
        pattern = re.sub(r"\\-|_", "[-_]", pattern)
    prefix = r"(?:functions?[._:/(])?"
    number = r"\)?(?:[:_.#-]?[0-9]+(?:\.[0-9]+)?)?"
    return re.fullmatch(prefix + pattern + number, header) is not None


def calls_in(tokenizer: Tokenizer, prompt_ids: Sequence[int]) -> list[str]:
    """The ids of the calls that a prompt shows, in order."""
    begin = tokenizer.control_ids.get("<|tool_call_begin|>")
    control = set(tokenizer.control_ids.values())
    found = []
    for start in [i + 1 for i, token_id in enumerate(prompt_ids) if token_id == begin]:
        end = start
        while end < len(prompt_ids) and prompt_ids[end] not in control:
            end += 1
        found.append(tokenizer.decode(list(prompt_ids[start:end])).strip())
    return found


def _takes(schema: Any, names: set[str]) -> bool:
    if not isinstance(schema, Mapping):
        return not names
    properties, required = schema.get("properties") or {}, schema.get("required") or []
    if not isinstance(properties, Mapping) or not isinstance(required, list | tuple):
        return False
    return names <= set(properties) and all(name in names for name in required)
