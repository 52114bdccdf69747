"""Runs the tool calls of one answer, all at once, each in a thread of its own; whatever goes wrong becomes a result."""

from __future__ import annotations

import json
import queue
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from kimi_native.chat.tool import Tool
from kimi_native.chat.types import ToolCall

MAX_RESULT_CHARS = 200_000
_POLL_S = 0.05  # how soon a cancellation is noticed while tools run


@dataclass(frozen=True)
class ToolResult:
    """What the model is told about one of its calls.

    index     of the call in its answer
    is_error  the tool failed, timed out or could not be called: content says why
    seconds   that it ran
    """

    index: int
    call: ToolCall
    content: str
    is_error: bool = False
    seconds: float = 0.0


def run_calls(
    calls: Sequence[tuple[int, Tool, ToolCall]], *, timeout: float, canceled: threading.Event
) -> Iterator[ToolResult]:
    """The results as they come in; those that are not there after `timeout` seconds are errors.

    Ends early, with results missing, once `canceled` is set. A thread cannot be killed: a tool that timed out or was
    canceled goes on in the background, and what it returns is dropped.
    """
    results: queue.SimpleQueue[ToolResult] = queue.SimpleQueue()
    started = time.monotonic()
    for index, tool, call in calls:
        threading.Thread(
            target=lambda *job: results.put(run_call(*job)),
            args=(index, tool, call),
            name=f"tool {call.id}",
            daemon=True,
        ).start()
    waiting = {index: call for index, _, call in calls}
    while waiting and not canceled.is_set():
        left = started + timeout - time.monotonic()
        try:
            result = results.get(timeout=min(_POLL_S, max(left, 0.001)))
        except queue.Empty:
            if left > 0:
                continue
            for index, call in waiting.items():
                text = f"error: {call.name} timed out after {timeout:g} s"
                yield ToolResult(index, call, text, True, timeout)
            return
        del waiting[result.index]
        yield result


def run_call(index: int, tool: Tool, call: ToolCall) -> ToolResult:
    """Runs one call here and now. Raises nothing."""
    started = time.monotonic()
    try:
        arguments = tool.read_arguments(call.arguments)
        content, is_error = result_text(tool.function(**arguments)), False
    # Anything a tool raises, SystemExit too, is for the model to read: it must not end the conversation.
    except BaseException as error:
        content, is_error = f"error: {type(error).__name__}: {error}", True
    return ToolResult(index, call, cut(content), is_error, time.monotonic() - started)


def result_text(value: Any) -> str:
    """A text as it is; anything else as JSON, and what JSON does not know as its str()."""
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)


def cut(text: str) -> str:
    """At most MAX_RESULT_CHARS characters, saying so where more was cut off."""
    if len(text) <= MAX_RESULT_CHARS:
        return text
    return f"{text[:MAX_RESULT_CHARS]}\n[cut: {len(text) - MAX_RESULT_CHARS} more characters]"
