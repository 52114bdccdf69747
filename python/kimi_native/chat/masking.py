"""The caller's text marked, so that what a template makes of it can be told from what the template wrote itself.

A mark (a character that Unicode sets aside for such uses) stands before and behind every character of the caller but
whitespace, and goes through a template like any other. A control token's name in the output with no mark in it was
written by the template alone; with one in it, it is text, however the template cut and joined it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

from kimi_native.errors import RequestError

_MARKS = [chr(code) for code in range(0xFDD0, 0xFDF0)]  # noncharacters
# What templates compare with, or put inside a control token's name on purpose; these alone stay unmarked.
_ROLES = ("system", "developer", "user", "assistant", "tool")
_TYPES = ("function", "text", "object", "array", "string", "number", "integer", "boolean", "null")
_KEYS = frozenset(
    (
        *("role", "content", "name", "reasoning_content", "tool_calls", "tool_call_id", "id"),
        *("type", "function", "arguments", "description", "parameters", "properties", "required"),
        *("items", "enum", "text", "default", "const", "format", "title", "strict", "nullable"),
        *("anyOf", "oneOf", "allOf", "$ref", "$defs", "additionalProperties", "pattern"),
        *("return_parameters", "exclusiveMinimum", "exclusiveMaximum", "multipleOf", "uniqueItems"),
        *("minimum", "maximum", "minLength", "maxLength", "minItems", "maxItems", "examples"),
    )
)
_FORMATS = ("date", "time", "date-time", "duration", "email", "uri", "uuid", "regex")
# What is required are keys.
_CONSTANTS = {"role": _ROLES, "type": _TYPES, "format": _FORMATS, "required": _KEYS}


class Mask:
    """Marks for one prompt.

    control_ids  the tokenizer's; names of a single character or of whitespace are text here
    values       what the caller gives, as JSON values: the mark is a character that is in none of them

    Raises RequestError if every possible mark is taken.
    """

    def __init__(self, control_ids: Mapping[str, int], values: Any) -> None:
        self._ids = control_ids
        names = sorted((n for n in control_ids if len(n.strip()) > 1), key=len, reverse=True)
        self._control = re.compile("|".join(map(re.escape, names))) if names else None
        self.mark = _unused_mark(json.dumps(values, ensure_ascii=False) + "".join(names))

    def masked(self, value: Any, key: str | None = None) -> Any:
        """A JSON value with all its texts and unusual keys marked."""
        if isinstance(value, str):
            return value if value in _CONSTANTS.get(key or "", ()) else self._masked_text(value)
        if isinstance(value, list):
            return [self.masked(item, key) for item in value]
        if isinstance(value, dict):
            return {
                name if name in _KEYS else self._masked_text(name): self.masked(item, name)
                for name, item in value.items()
            }
        return value

    def unmasked(self, text: str) -> str:
        """The text without marks."""
        return text.replace(self.mark, "")

    def parts(self, text: str) -> list[str | int]:
        """A rendered text as texts without marks, and the ids of the control tokens that the template wrote."""
        parts: list[str | int] = []
        start = 0
        for match in self._control.finditer(text) if self._control else ():
            parts += [self.unmasked(text[start : match.start()]), self._ids[match.group()]]
            start = match.end()
        return [*parts, self.unmasked(text[start:])]

    def holds_name(self, text: str) -> bool:
        """True if a control token's name stands in the text."""
        return self._control is not None and self._control.search(text) is not None

    def _masked_text(self, text: str) -> str:
        return re.sub(r"\S+", lambda run: self.mark + self.mark.join(run.group()) + self.mark, text)


def _unused_mark(text: str) -> str:
    mark = next((mark for mark in _MARKS if mark not in text), None)
    if mark is None:
        raise RequestError("chat: messages must leave one of U+FDD0 .. U+FDEF unused (got all)")
    return mark
