"""What a chat shows: on a terminal, as plain text for a pipe, or as JSON lines."""

from __future__ import annotations

import json
import sys
from typing import TYPE_CHECKING

from kimi_native.chat.types import ContentDelta, Finish, ReasoningDelta, ToolCall, ToolCallDelta
from kimi_native.conversation import ChatEvent, ChatFinish
from kimi_native.terminal import event_dict, note, print_json, shown
from kimi_native.tool_runner import ToolResult

if TYPE_CHECKING:
    from kimi_native.generation import Timing

_MAX_LINES = 12  # of a result or of arguments; the model sees all of them
_MAX_CHARS = 2000


def answer_line(finish: Finish, timing: Timing, max_context: int) -> str:
    """What an answer cost: speed, prompt tokens found in the cache and computed, and the context that is used."""
    usage = finish.usage
    rate = timing.decode_tokens_per_s
    parts = [
        "1 token" if rate is None else f"{rate:.1f} tokens/s",
        f"prompt: {usage.reused_tokens} reused, {usage.prefilled_tokens} prefilled",
        f"context: {usage.total_tokens} of {max_context}",
    ]
    if finish.reason == "length":
        is_full = usage.total_tokens >= max_context
        parts.append("the context is full" if is_full else "cut off by max tokens")
    return " | ".join(parts)


class CallTexts:
    """Puts the deltas of calls together; a call is complete when the next one begins, or at the end."""

    def __init__(self) -> None:
        self._head: ToolCallDelta | None = None
        self._arguments: list[str] = []

    def push(self, delta: ToolCallDelta) -> ToolCall | None:
        """The call before, if this delta begins another one."""
        done = self.flush() if delta.id is not None else None
        if delta.id is not None:
            self._head = delta
        self._arguments.append(delta.arguments)
        return done

    def flush(self) -> ToolCall | None:
        head, arguments = self._head, "".join(self._arguments)
        self._head, self._arguments = None, []
        return None if head is None else ToolCall(head.id, head.name, arguments)


class Screen:
    """A terminal: reasoning dimmed as it comes, then the content; calls and results as panels."""

    def __init__(self) -> None:
        from rich.console import Console

        self._console = Console(file=sys.stdout, highlight=False)
        self._calls = CallTexts()
        self._said: type | None = None  # what the open line belongs to

    def show(self, event: ChatEvent) -> None:
        if isinstance(event, ReasoningDelta | ContentDelta):
            self._stream(event)
        elif isinstance(event, ToolCallDelta):
            self.end_line()
            self._show_call(self._calls.push(event))
        elif isinstance(event, Finish):
            self.end_line()
            self._show_call(self._calls.flush(), unfinished=event.unfinished_call)
        elif isinstance(event, ToolResult):
            color = "red" if event.is_error else "green"
            title = f"{'error' if event.is_error else 'result'} of {event.call.id}"
            self._panel(title, event.content, color, _duration(event.seconds))

    def line(self, text: str) -> None:
        """A dim line about the chat."""
        from rich.text import Text

        self.end_line()
        self._console.print(Text(shown(text)), style="dim")

    def end_line(self) -> None:
        """Ends the line that is being streamed, and its style."""
        if self._said is not None:
            self._said = None
            self._console.out()

    def clear(self) -> None:
        """Forgets what an answer that was stopped left half done."""
        self.end_line()
        self._calls.flush()

    def _stream(self, event: ReasoningDelta | ContentDelta) -> None:
        text = event.text
        if self._said is not type(event):
            text = text.lstrip("\n")
            if not text:
                return
            if self._said is not None:
                self._console.out("\n")
            self._said = type(event)
        style = "dim" if isinstance(event, ReasoningDelta) else None
        self._console.out(shown(text), style=style, end="", highlight=False)

    def _show_call(self, call: ToolCall | None, *, unfinished: bool = False) -> None:
        if call is not None:
            title = f"call {call.id}" + (" (unfinished)" if unfinished else "")
            self._panel(title, _pretty(call.arguments), "cyan")

    def _panel(self, title: str, text: str, color: str, subtitle: str | None = None) -> None:
        from rich import box
        from rich.panel import Panel
        from rich.text import Text

        body = Text(shown(_shortened(text)), overflow="fold")
        self._console.print(
            Panel(
                body,
                box=box.ROUNDED,
                title=Text(shown(title)),
                title_align="left",
                subtitle=None if subtitle is None else Text(subtitle, style="dim"),
                subtitle_align="right",
                border_style=color,
                expand=False,
            )
        )


class Plain:
    """A pipe: the text of the answers on stdout, at least one line for each message; all else as notes on stderr."""

    def __init__(self) -> None:
        self._is_open = False  # a line
        self._is_empty = True  # the answer to this message

    def show(self, event: ChatEvent) -> None:
        if isinstance(event, ContentDelta):
            sys.stdout.write(shown(event.text))
            sys.stdout.flush()
            self._is_open, self._is_empty = True, False
        elif isinstance(event, Finish):
            self.clear()
            if event.reason == "length":
                note("the answer was cut off: --max-tokens or the context is used up")
        elif isinstance(event, ToolResult):
            outcome = f": {event.content}" if event.is_error else " ran"
            note(f"{event.call.id} with {_shortened(event.call.arguments)}{outcome}")
        elif isinstance(event, ChatFinish) and event.reason != "paused":
            self._is_open |= self._is_empty
            self._is_empty = True
            self.clear()

    def line(self, text: str) -> None:
        note(text)

    def clear(self) -> None:
        if self._is_open:
            sys.stdout.write("\n")
            sys.stdout.flush()
        self._is_open = False


class JsonLines:
    """A pipe: every event as a line of JSON; notes on stderr."""

    def show(self, event: ChatEvent) -> None:
        print_json(event_dict(event))
        sys.stdout.flush()

    def line(self, text: str) -> None:
        note(text)

    def clear(self) -> None:
        pass


def _duration(seconds: float) -> str | None:
    """None for what did not run."""
    if seconds == 0:
        return None
    return f"{seconds:.1f} s" if seconds >= 1 else f"{seconds * 1000:.1f} ms"


def _pretty(arguments: str) -> str:
    """Arguments one to a line; what is no JSON object as it is."""
    try:
        values = json.loads(arguments)
    except (ValueError, RecursionError):
        return arguments
    if not isinstance(values, dict) or not values:
        return arguments
    return "\n".join(f"{name}: {json.dumps(v, ensure_ascii=False)}" for name, v in values.items())


def _shortened(text: str) -> str:
    lines = text[:_MAX_CHARS].splitlines()
    if len(text) <= _MAX_CHARS and len(lines) <= _MAX_LINES:
        return text
    kept = "\n".join(lines[:_MAX_LINES])
    return f"{kept}\n... {len(text) - len(kept)} more characters"
