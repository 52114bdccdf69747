"""What a prompt may be: a text, messages, or ids; and lists of these."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from kimi_native.chat.types import Message
from kimi_native.errors import RequestError

Prompt = str | Sequence[int] | Sequence[Message | Mapping[str, Any]]


def is_conversation(prompt: Sequence[Any]) -> bool:
    return len(prompt) > 0 and isinstance(prompt[0], (Message, Mapping))


def as_prompts(prompt: Any) -> list[Prompt] | None:
    """The prompts of a list of prompts; None for a single prompt."""
    if not isinstance(prompt, (list, tuple)):
        return None
    if not prompt:
        raise RequestError(
            "generate: prompt must hold at least one token, message or prompt (got none)"
        )
    return list(prompt) if isinstance(prompt[0], (str, list, tuple)) else None
