"""Conversations with tools: think, call, look at the result, think again, until there is an answer.

A Chat holds messages and nothing else of the model: every answer is asked for with the whole conversation, of which the
cache still holds what was asked before. Within one loop messages are only appended, so only what is new is computed.

Tools run only if named in run_tools, or approved one by one; at any other call the loop pauses. A tool that fails or
hangs gives the model a result that says so.
"""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from kimi_native.asynchronous import iterate
from kimi_native.chat.tool import Tool
from kimi_native.chat.types import (
    ContentDelta,
    Event,
    Finish,
    Message,
    ReasoningDelta,
    ToolCall,
    ToolCallDelta,
    Usage,
)
from kimi_native.errors import KimiNativeError, RequestError
from kimi_native.guide import ToolChoice
from kimi_native.tool_runner import ToolResult, cut, run_calls
from kimi_native.transcript import save_transcript

if TYPE_CHECKING:
    from kimi_native.generation import Timing

# messages, tool_choice, whether to stop -> the events of one answer
Answer = Callable[[Sequence[Message], ToolChoice | None, Callable[[], bool]], Iterator[Event]]


@dataclass(frozen=True)
class ChatFinish:
    """The last event of a loop.

    reason   "stop"; "length": an answer met max_tokens or the end of the context; "paused": `pending` calls need
             approve or add_result, then resume; "max_tool_calls"; "canceled"
    usages   of every answer of this loop, in order
    pending  calls without a result
    """

    reason: str
    usages: tuple[Usage, ...]
    pending: tuple[ToolCall, ...] = ()


ChatEvent = Event | ToolResult | ChatFinish


@dataclass(frozen=True)
class Reply:
    """What a loop came to: the last answer's text and reasoning, every tool result, and the end."""

    text: str
    reasoning: str
    results: tuple[ToolResult, ...]
    finish: ChatFinish


class Chat:
    """One conversation; made by Model.chat. Its methods are for one thread, cancel for any.

    messages  all of the conversation so far
    pending   calls of the last answer that have no result yet
    timing    of the last answer that had a Finish; None before
    """

    def __init__(
        self,
        answer: Answer,
        close: Callable[[], None],
        timing: Callable[[], Timing],
        *,
        messages: Iterable[Message],
        tools: Sequence[Tool],
        run_tools: Iterable[str],
        max_tool_calls: int,
        tool_timeout: float,
        can_forbid_calls: bool,
        tool_choice: ToolChoice | None = None,
    ) -> None:
        self._answer, self._close, self._timing = answer, close, timing
        self._tools = {tool.name: tool for tool in tools}
        self._run_tools = _checked_names(run_tools, self._tools)
        self._max_calls = _checked_count(max_tool_calls)
        self._timeout = _checked_timeout(tool_timeout)
        self._can_forbid_calls = can_forbid_calls
        self._tool_choice = tool_choice
        self._messages = list(messages)
        self._calls: tuple[ToolCall, ...] = ()
        self._results: dict[int, ToolResult] = {}
        self._approved: set[int] = set()
        self._num_calls = 0  # that have a result, since the last user message
        self.timing: Timing | None = None
        self._canceled = threading.Event()
        self._busy = threading.Lock()
        self._take_over_calls()

    @property
    def messages(self) -> tuple[Message, ...]:
        return tuple(self._messages)

    @property
    def pending(self) -> tuple[ToolCall, ...]:
        return tuple(call for i, call in enumerate(self._calls) if i not in self._results)

    # ---- talking ----------------------------------------------------------------------------------------------------

    def send(self, text: str) -> Reply:
        """Says something and runs the loop to its end. Raises as `stream` and its iterator."""
        return _reply(self.stream(text))

    def stream(self, text: str) -> Iterator[ChatEvent]:
        """The same, event by event: deltas, a Finish per answer, a ToolResult per call, at the end one ChatFinish.

        Raises RequestError, and says nothing, if calls are pending or the conversation does not fit the context. What
        fails during an answer is raised by the iterator; that answer is then not part of the conversation, which can go
        on with send or resume. Closing the iterator is canceling: what was said so far stays.
        """
        if self.pending:
            waiting = ", ".join(call.id for call in self.pending)
            raise RequestError(
                f"chat: pending calls must have results first (got {waiting}); see approve, add_result and decline"
            )
        self._messages.append(Message("user", text))
        self._num_calls = 0
        self._canceled.clear()
        try:
            answer = self._ask()
        except KimiNativeError:
            self._messages.pop()
            raise
        return self._loop(answer)

    def resume(self) -> Reply:
        """Goes on after a pause, a failure or a cancellation: runs approved calls, then asks for the next answer."""
        return _reply(self.resume_stream())

    def resume_stream(self) -> Iterator[ChatEvent]:
        """`resume`, event by event. Raises RequestError if there is nothing to go on with."""
        if not self._messages or (self._messages[-1].role == "assistant" and not self._calls):
            raise RequestError("chat: resume needs a message or a call to answer (got neither)")
        self._canceled.clear()
        return self._loop(None if self._calls else self._ask())

    async def asend(self, text: str) -> Reply:
        """`send` in a thread; canceling the task cancels the loop."""
        async with contextlib.aclosing(self.astream(text)) as stream:
            return _reply(iter([event async for event in stream]))

    def astream(self, text: str) -> AsyncIterator[ChatEvent]:
        """`stream`, every step in a thread; canceling the task, or closing the iterator, cancels the loop.

        What `stream` raises is raised by the first step.
        """
        return iterate(lambda: self.stream(text), self.cancel)

    def cancel(self) -> None:
        """Ends the running loop at its next token, or while it waits for tools. From any thread."""
        self._canceled.set()

    # ---- calls that wait --------------------------------------------------------------------------------------------

    def approve(self, *call_ids: str) -> None:
        """Lets pending calls run at the next resume; without ids, all. Raises RequestError for one that cannot run."""
        for index in self._pending_indexes(call_ids):
            tool = self._tools.get(self._calls[index].name)
            if tool is None or tool.function is None:
                raise RequestError(
                    f"chat: a call must have a function to be run (got {self._calls[index].id}); use add_result"
                )
            self._approved.add(index)

    def add_result(self, call_id: str, content: str) -> None:
        """Answers a pending call with a text. Raises RequestError if no such call waits."""
        if not isinstance(content, str):
            raise RequestError(f"chat: content must be a text (got {type(content).__name__})")
        (index, *_) = self._pending_indexes([call_id])
        self._set_result(ToolResult(index, self._calls[index], cut(content)))

    def decline(
        self, *call_ids: str, reason: str = "the user declined this call"
    ) -> tuple[ToolResult, ...]:
        """Answers pending calls, without ids all, with an error that the model reads; returns these results."""
        return tuple(
            self._set_result(ToolResult(index, self._calls[index], f"error: {reason}", True))
            for index in self._pending_indexes(call_ids)
        )

    def _pending_indexes(self, call_ids: Sequence[str]) -> list[int]:
        waiting = [i for i in range(len(self._calls)) if i not in self._results]
        unknown = set(call_ids) - {self._calls[i].id for i in waiting}
        if unknown:
            raise RequestError(
                f"chat: a call must be pending (got {unknown.pop()!r}, pending: "
                f"{', '.join(self._calls[i].id for i in waiting) or 'none'})"
            )
        return [i for i in waiting if not call_ids or self._calls[i].id in call_ids]

    # ---- keeping ----------------------------------------------------------------------------------------------------

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes the messages, for Model.chat(transcript=path). Results given while others still pend are left out."""
        save_transcript(path, self._messages, tuple(self._tools.values()))

    def close(self) -> None:
        """Gives back the cache that the conversation keeps. It can go on, and computes it anew then."""
        self._close()

    def __enter__(self) -> Chat:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # ---- the loop ---------------------------------------------------------------------------------------------------

    def _ask(self) -> Iterator[Event]:
        is_first = self._messages[-1].role == "user"
        choice = self._tool_choice if is_first else None
        if self._is_at_limit() and self._can_forbid_calls:
            choice = "none"
        return self._answer(tuple(self._messages), choice, self._canceled.is_set)

    def _is_at_limit(self, num_running: int = 0) -> bool:
        return self._num_calls + num_running >= self._max_calls

    def _loop(self, answer: Iterator[Event] | None) -> Iterator[ChatEvent]:
        usages: list[Usage] = []
        with self._alone():
            while True:
                if answer is not None:
                    finish = yield from self._listen(answer)
                    if finish is not None:
                        usages.append(finish.usage)
                    if finish is None or finish.reason != "tool_calls":
                        reason = "canceled" if finish is None else finish.reason
                        break
                yield from self._run_pending()
                if self.pending:
                    reason = "canceled" if self._canceled.is_set() else "paused"
                    break
                if self._num_calls > self._max_calls and not self._can_forbid_calls:
                    reason = "max_tool_calls"
                    break
                if self._canceled.is_set():
                    reason = "canceled"
                    break
                answer = self._ask()
            yield ChatFinish(reason, tuple(usages), self.pending)

    @contextlib.contextmanager
    def _alone(self) -> Iterator[None]:
        if not self._busy.acquire(blocking=False):
            raise RequestError("chat: one loop at a time (got a second one)")
        try:
            yield
        finally:
            self._busy.release()

    def _listen(self, answer: Iterator[Event]) -> Iterator[Event]:
        """Passes the events of one answer on and takes it into the conversation; returns its Finish, or None."""
        heard = _Heard()
        try:
            for event in answer:
                heard.add(event)
                if heard.finish is not None:
                    self.timing = self._timing()
                yield event
                if self._canceled.is_set():
                    break
        except (
            GeneratorExit
        ):  # any other exception leaves a broken answer, which is no part of the conversation
            self._take(heard)
            raise
        finally:
            answer.close()
        self._take(heard)
        return heard.finish

    def _take(self, heard: _Heard) -> None:
        """The answer as a message. Calls of an answer that was cut short are dropped: the last may be half a call."""
        finish = heard.finish
        calls = heard.calls() if finish is not None and finish.reason == "tool_calls" else ()
        if finish is None and not heard.content:
            return  # canceled before anything was said
        self._messages.append(
            Message("assistant", "".join(heard.content), "".join(heard.reasoning), calls)
        )
        self._calls, self._results, self._approved = calls, {}, set()

    def _run_pending(self) -> Iterator[ToolResult]:
        """Runs what may run, answers what never can, and leaves the rest."""
        if self._canceled.is_set():
            return
        jobs = []
        for index, call in enumerate(self._calls):
            if index in self._results:
                continue
            tool = self._tools.get(call.name)
            if tool is None:
                known = ", ".join(self._tools) or "none"
                refusal = f"error: no tool is called {call.name} (declared: {known})"
            elif self._is_at_limit(len(jobs)):
                refusal = f"error: the limit of {self._max_calls} tool calls is reached"
            elif call.name in self._run_tools or index in self._approved:
                jobs.append((index, tool, call))
                continue
            else:
                continue
            yield self._set_result(ToolResult(index, call, refusal, True))
        for result in run_calls(jobs, timeout=self._timeout, canceled=self._canceled):
            yield self._set_result(result)

    def _set_result(self, result: ToolResult) -> ToolResult:
        """Keeps a result; when the last one is there, all become messages, in the order of the calls."""
        self._results[result.index] = result
        self._num_calls += 1
        if len(self._results) == len(self._calls):
            for index, call in enumerate(self._calls):
                content = self._results[index].content
                self._messages.append(Message("tool", content, tool_call_id=call.id))
            self._calls, self._results, self._approved = (), {}, set()
        return result

    def _take_over_calls(self) -> None:
        """Of a conversation taken up in the middle: the calls of its last message wait, the results before count."""
        for message in reversed(self._messages):
            if message.role == "user":
                break
            self._num_calls += message.role == "tool"
        if self._messages and self._messages[-1].role == "assistant":
            self._calls = self._messages[-1].tool_calls


class _Heard:
    """One answer as far as it was heard."""

    def __init__(self) -> None:
        self.content: list[str] = []
        self.reasoning: list[str] = []
        self.finish: Finish | None = None
        self._heads: list[ToolCallDelta] = []
        self._arguments: list[list[str]] = []

    def add(self, event: Event) -> None:
        if isinstance(event, ContentDelta):
            self.content.append(event.text)
        elif isinstance(event, ReasoningDelta):
            self.reasoning.append(event.text)
        elif isinstance(event, Finish):
            self.finish = event
        else:
            if event.index == len(self._heads):
                self._heads.append(event)
                self._arguments.append([])
            self._arguments[event.index].append(event.arguments)

    def calls(self) -> tuple[ToolCall, ...]:
        return tuple(
            ToolCall(head.id, head.name, "".join(texts))
            for head, texts in zip(self._heads, self._arguments, strict=True)
        )


def _reply(events: Iterator[ChatEvent]) -> Reply:
    heard, results = _Heard(), []
    for event in events:
        if isinstance(event, ToolResult):
            results.append(event)
        elif isinstance(event, ChatFinish):
            finish = event
        else:
            if heard.finish is not None:
                heard = _Heard()  # the next answer
            heard.add(event)
    return Reply("".join(heard.content), "".join(heard.reasoning), tuple(results), finish)


# ---- checks ---------------------------------------------------------------------------------------------------------


def _checked_names(names: Iterable[str], tools: dict[str, Tool]) -> frozenset[str]:
    if isinstance(names, str):
        raise RequestError(f"chat: run_tools must be a list of names (got {names!r})")
    names = frozenset(names)
    for name in names:
        if name not in tools or tools[name].function is None:
            raise RequestError(
                f"chat: run_tools must name declared tools that have a function (got {name!r})"
            )
    return names


def _checked_count(value: int) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        raise RequestError(f"chat: max_tool_calls must be an integer of at least 0 (got {value!r})")
    return value


def _checked_timeout(value: float) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not value > 0:
        raise RequestError(f"chat: tool_timeout must be above 0 seconds (got {value!r})")
    return float(value)
