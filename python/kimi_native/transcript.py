"""Conversations on disk: one JSON file of OpenAI-shaped messages, with the declarations of the tools."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from kimi_native.chat.tool import Tool
from kimi_native.chat.types import Message, as_messages
from kimi_native.errors import RequestError

VERSION = 1


def message_dict(message: Message) -> dict[str, Any]:
    """The message in the shape that Message.from_dict reads; fields without a value are left out."""
    calls = [
        {
            "id": call.id,
            "type": "function",
            "function": {"name": call.name, "arguments": call.arguments},
        }
        for call in message.tool_calls
    ]
    fields = {
        "role": message.role,
        "content": message.content,
        "reasoning_content": message.reasoning_content,
        "tool_calls": calls or None,
        "tool_call_id": message.tool_call_id,
        "name": message.name,
    }
    return {name: value for name, value in fields.items() if value is not None}


def save_transcript(
    path: str | os.PathLike[str], messages: Sequence[Message], tools: Sequence[Tool]
) -> None:
    """Writes the file whole or not at all. Raises OSError."""
    content = {
        "version": VERSION,
        "tools": [tool.declaration for tool in tools],
        "messages": [message_dict(message) for message in messages],
    }
    target = Path(path)
    part = target.with_name(target.name + ".part")
    part.write_text(json.dumps(content, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")
    part.replace(target)


def read_transcript(path: str | os.PathLike[str], tools: Sequence[Tool]) -> list[Message]:
    """The messages of a saved conversation, which must have had the same tools, by name.

    Raises RequestError for a file that is no transcript or other tools, OSError.
    """
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
    except ValueError as error:
        raise RequestError(f"transcript: {path} must be JSON ({error})") from error
    if not isinstance(content, dict) or content.get("version") != VERSION:
        raise RequestError(f"transcript: {path} must be a transcript of version {VERSION}")
    declared = [Tool.from_dict(tool).name for tool in content.get("tools") or ()]
    given = [tool.name for tool in tools]
    if sorted(declared) != sorted(given):
        raise RequestError(
            f"transcript: tools must be those of the conversation, {', '.join(declared) or 'none'} "
            f"(got {', '.join(given) or 'none'})"
        )
    messages = content.get("messages")
    return as_messages(messages) if messages else []
