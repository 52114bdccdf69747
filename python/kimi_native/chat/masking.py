"""The caller's text marked, so that what a template makes of it can be told from what the template wrote itself.

A mark (a character that Unicode sets aside for such uses) stands on both sides of every character that control tokens
are recognised by, and of a text that lies inside one's name. It goes through a template like any other character. A
name in the output without a mark in it is the template's own; a name with one is text.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from typing import Any

from kimi_native.errors import RequestError

_MARKS = [chr(code) for code in range(0xFDD0, 0xFDF0)]  # noncharacters
# What templates compare with or put inside a control token's name themselves; these alone stay unmarked.
_ROLES = ("system", "developer", "user", "assistant", "tool")
_TYPES = ("function", "text", "object", "array", "string", "number", "integer", "boolean", "null")
_KEYS = frozenset(
    (
        *("role", "content", "name", "reasoning_content", "tool_calls", "tool_call_id", "id"),
        *("type", "function", "arguments", "description", "parameters", "properties"),
        *("required", "items", "enum", "text"),
    )
)
_CONSTANTS = {"role": _ROLES, "type": _TYPES, "required": _KEYS}  # what is required are keys


class Mask:
    """Marks for one prompt.

    names   of the tokenizer's control tokens; those of whitespace alone are text here
    values  what the caller gives, as JSON values: the mark is a character that is in none of them

    Raises RequestError if every possible mark is taken.
    """

    def __init__(self, names: Iterable[str], values: Any) -> None:
        self._names = sorted({n for n in names if n.strip()}, key=len, reverse=True)
        taken = json.dumps(values, ensure_ascii=False) + "".join(self._names)
        self.mark = next((mark for mark in _MARKS if mark not in taken), "")
        if not self.mark:
            raise RequestError("chat: messages must leave one of U+FDD0 .. U+FDEF unused (got all)")
        ends = {c for name in self._names for c in name[0] + name[-1]}
        signs = {c for name in self._names for c in name if not (c.isalnum() or c in "_-")}
        self._signs = _one_of(map(re.escape, sorted(c for c in ends | signs if not c.isspace())))
        self._control = _one_of(map(re.escape, self._names))

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

    def parts(self, text: str, names: dict[str, int]) -> list[str | int]:
        """A rendered text as texts without marks, and the ids of the control tokens that the template wrote."""
        if self._control is None:
            return [self.unmasked(text)]
        pieces = re.split(f"({self._control.pattern})", text)
        return [
            names[piece] if index % 2 else self.unmasked(piece)
            for index, piece in enumerate(pieces)
            if piece
        ]

    def holds_name(self, text: str) -> bool:
        """True if a control token's name stands in the text."""
        return self._control is not None and self._control.search(text) is not None

    def _masked_text(self, text: str) -> str:
        if self._signs is not None:
            text = self._signs.sub(lambda match: self.mark + match.group() + self.mark, text)
        bare = text.strip()
        # A template may write both ends of a name and the caller what is between them.
        if bare and any(bare in name for name in self._names):
            return text.replace(bare, self.mark + bare + self.mark)
        return text


def _one_of(patterns: Iterable[str]) -> re.Pattern[str] | None:
    joined = "|".join(patterns)
    return re.compile(joined) if joined else None
