"""Texts and conversations from a file, for `kimi-native routing`: one JSON object on each line."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from kimi_native.argument_files import parse_json, read_text, shown_name
from kimi_native.chat.template import get_format
from kimi_native.chat.types import as_messages
from kimi_native.errors import KimiNativeError, RequestError

if TYPE_CHECKING:
    from kimi_native.generate import Model

_FORMS = '{"text": ...}, {"messages": [...], "tools": [...]} or {"ids": [...]}'


@dataclass(frozen=True)
class Row:
    """One line: of text, messages and ids exactly one is given.

    where  the file and the line, for messages
    """

    where: str
    text: str | None = None
    messages: Sequence[Mapping[str, Any]] | None = None
    ids: Sequence[int] | None = None
    tools: Sequence[Mapping[str, Any]] | None = None


def read_rows(path: str) -> list[Row]:
    """The rows of a file, empty lines left out; `loss` beside ids, as training data has it, is not looked at.

    Raises RequestError naming the line that is no row, or if there is none; OSError.
    """
    rows = []
    for number, line in enumerate(read_text(path).split("\n"), 1):
        if line.strip():
            where = f"{shown_name(path)}: line {number}"
            rows.append(_row(where, parse_json(where, line)))
    if not rows:
        raise RequestError(f"{shown_name(path)}: must hold at least one row (got none)")
    return rows


def row_ids(model: Model, row: Row) -> list[int]:
    """The ids of a row: texts as they stand, conversations in the model's format with all their reasoning.

    A conversation that does not end with the assistant gets the opening of its answer.

    Raises KimiNativeError naming the line: RequestError, TokenizerError.
    """
    try:
        if row.text is not None:
            return model.prompt_ids(row.text, raw_prompt=True)
        if row.ids is not None:
            return model.prompt_ids(list(row.ids))
        messages = as_messages(row.messages or ())
        options: dict[str, Any] = {
            "tools": row.tools,
            "add_generation_prompt": messages[-1].role != "assistant",
        }
        if model.chat_format is not None and get_format(model.chat_format).thinking != "no":
            options["keep_thinking"] = "all"
        return model.prompt_ids(messages, **options)
    except KimiNativeError as error:
        raise type(error)(f"{row.where}: {error}") from error


def _row(where: str, value: Any) -> Row:
    given = set(value) if isinstance(value, dict) else set()
    if given not in ({"text"}, {"messages"}, {"messages", "tools"}, {"ids"}, {"ids", "loss"}):
        raise RequestError(f"{where}: must be {_FORMS} (got {_shown(value)})")
    kind = next(iter(given & {"text", "messages", "ids"}))
    if not isinstance(value[kind], str if kind == "text" else list):
        must = "a string" if kind == "text" else "a list"
        raise RequestError(f"{where}: {kind} must be {must} (got {type(value[kind]).__name__})")
    if not isinstance(value.get("tools"), list | None):
        raise RequestError(f"{where}: tools must be a list (got {type(value['tools']).__name__})")
    return Row(where, **{kind: value[kind], "tools": value.get("tools")})


def _shown(value: Any) -> str:
    if isinstance(value, dict):
        return f"the fields {', '.join(map(repr, list(value)[:8])) or 'of nothing'}"
    return type(value).__name__
