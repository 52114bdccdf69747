"""The three ways in which kimi-nano works on a problem; the system message chooses.

interleaved  think, call one tool, look at the result, think again: what it does unless told otherwise
plan-first   think once, make every call in one message, then answer; an argument "#n" is the result of call n
no-tools     think alone; the user names the prices
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Literal

from kimi_native.chat.tool import Tool
from kimi_native.chat.types import Message
from kimi_native.nano.problems import Problem
from kimi_native.nano.world import TOOLS

Mode = Literal["interleaved", "plan-first", "no-tools"]
SYSTEM_TEXTS: dict[Mode, str | None] = {
    "interleaved": None,
    "plan-first": "Plan first: make all calls at once. #n is the result of call n.",
    "no-tools": "No tools: think alone.",
}
MODES: tuple[Mode, ...] = tuple(SYSTEM_TEXTS)


def opening_messages(problem: Problem, mode: Mode) -> list[Message]:
    """The conversation up to the user's message. Raises ValueError on an unknown mode."""
    if mode not in SYSTEM_TEXTS:
        raise ValueError(f"mode: must be one of {', '.join(MODES)} (got {mode!r})")
    text = SYSTEM_TEXTS[mode]
    system = [Message("system", text)] if text is not None else []
    return [*system, Message("user", problem.text(shows_prices=mode == "no-tools"))]


def mode_of(messages: Sequence[Message]) -> Mode:
    """The mode that the conversation's system message asks for."""
    text = messages[0].content if messages[0].role == "system" else None
    return next((mode for mode, known in SYSTEM_TEXTS.items() if known == text), "interleaved")


# ---- tools ---------------------------------------------------------------------------------------------------------


def _planned(value: Any) -> Any:
    """A schema in which every integer may also be a string: "#n"."""
    if isinstance(value, dict):
        return {
            name: ["integer", "string"] if (name, inner) == ("type", "integer") else _planned(inner)
            for name, inner in value.items()
        }
    return value


_PLAN_TOOLS = tuple(replace(t, parameters=_planned(t.parameters)) for t in TOOLS.values())


def declared_tools(mode: Mode) -> tuple[Tool, ...]:
    """The tools as the mode declares them, bound to no world."""
    if mode == "no-tools":
        return ()
    return _PLAN_TOOLS if mode == "plan-first" else tuple(TOOLS.values())
