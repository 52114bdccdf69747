"""Events from output ids: reasoning, content and tool calls, told apart by token id and not by text.

    state      on                           next state
    REASONING  </think>                     CONTENT
    REASONING  section begin                BETWEEN     (the model often leaves </think> out)
    CONTENT    section begin                BETWEEN
    CONTENT    <think>                      REASONING
    BETWEEN    call begin                   HEADER      text here, and after the section, is dropped
    HEADER     argument begin               ARGUMENTS   the header is the call's id
    ARGUMENTS  call end, section end        BETWEEN
    any        <|im_end|>, [EOS]            the end: what is open is given out as it stands

A call may also begin without its section, end with the next call's begin, and have no argument part at all (then its
arguments are {}). Every other control id changes nothing. No control id ever reaches a text.
Source: the output grammar of the published tool-call guide, and what models were seen to do with it.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from enum import Enum, auto

from kimi_native.chat.call_ids import DeclaredTools, calls_in, is_number, tool_name
from kimi_native.chat.template import END_THINK, FAMILY_TOKENS, THINK, get_format
from kimi_native.chat.tool import ToolLike
from kimi_native.chat.types import (
    ContentDelta,
    Event,
    Finish,
    ReasoningDelta,
    ToolCall,
    ToolCallDelta,
    Usage,
)
from kimi_native.errors import RequestError
from kimi_native.tokenizer import Tokenizer


class _State(Enum):
    REASONING = auto()
    CONTENT = auto()
    BETWEEN = auto()
    HEADER = auto()
    ARGUMENTS = auto()


class _Marker(Enum):
    THINK = auto()
    END_THINK = auto()
    SECTION_BEGIN = auto()
    SECTION_END = auto()
    CALL_BEGIN = auto()
    ARGUMENT_BEGIN = auto()
    CALL_END = auto()


_MARKERS = {
    THINK: _Marker.THINK,
    END_THINK: _Marker.END_THINK,
    "<|tool_calls_section_begin|>": _Marker.SECTION_BEGIN,
    "<|tool_calls_section_end|>": _Marker.SECTION_END,
    # a spelling that other tokenizers of the family use
    "<|tool_call_section_begin|>": _Marker.SECTION_BEGIN,
    "<|tool_call_section_end|>": _Marker.SECTION_END,
    "<|tool_call_begin|>": _Marker.CALL_BEGIN,
    "<|tool_call_argument_begin|>": _Marker.ARGUMENT_BEGIN,
    "<|tool_call_end|>": _Marker.CALL_END,
}

_NEXT = {
    (_State.REASONING, _Marker.END_THINK): _State.CONTENT,
    (_State.REASONING, _Marker.SECTION_BEGIN): _State.BETWEEN,
    (_State.REASONING, _Marker.CALL_BEGIN): _State.HEADER,
    (_State.CONTENT, _Marker.THINK): _State.REASONING,
    (_State.CONTENT, _Marker.SECTION_BEGIN): _State.BETWEEN,
    (_State.CONTENT, _Marker.CALL_BEGIN): _State.HEADER,
    (_State.BETWEEN, _Marker.CALL_BEGIN): _State.HEADER,
    (_State.HEADER, _Marker.ARGUMENT_BEGIN): _State.ARGUMENTS,
    (_State.HEADER, _Marker.CALL_END): _State.BETWEEN,
    (_State.HEADER, _Marker.SECTION_END): _State.BETWEEN,
    (_State.HEADER, _Marker.CALL_BEGIN): _State.HEADER,
    (_State.ARGUMENTS, _Marker.CALL_END): _State.BETWEEN,
    (_State.ARGUMENTS, _Marker.SECTION_END): _State.BETWEEN,
    (_State.ARGUMENTS, _Marker.CALL_BEGIN): _State.HEADER,
}


class OutputParser:
    """Turns the ids of one answer into events, one id at a time.

    tokenizer   of the checkpoint
    format      one of template.FORMATS, or None for plain text: content until a marker says otherwise
    prompt_ids  the prompt, if any: what it already opened (such as a prefilled <think>) decides the first state
    tools       the declared tools, if any, as Tool, dict or function: a call whose id is another form of
                functions.{name}:{number}, but can mean only one of them, gets that name, and as number the calls before
                it, those of the prompt included. All other ids stay as the model wrote them

    Text is given out as soon as it is certain: an unfinished UTF-8 character, whitespace that would end the reasoning
    or the arguments, and whitespace that would start the content or the arguments wait for what follows. A marker that
    the tokenizer has no id for (some lack <think>) is found in the text. A call whose header is a number alone waits
    for its arguments, which tell the tool.
    Raises RequestError on an unknown format or bad tools, TokenizerError on an id outside the vocabulary.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        *,
        format: str | None,
        prompt_ids: Sequence[int] = (),
        tools: Iterable[ToolLike] | None = None,
    ) -> None:
        thinks = format is not None and get_format(format).thinking != "no"
        ids = tokenizer.control_ids
        self._markers = {ids[name]: marker for name, marker in _MARKERS.items() if name in ids}
        self._control = frozenset(ids.values())
        self._end_ids = frozenset(tokenizer.eos_ids)
        self._text_markers = {
            name: _MARKERS[name] for name in (THINK, END_THINK) if thinks and name not in ids
        }
        self._decoder = tokenizer.stream()
        self._state = _State.REASONING if thinks else _State.CONTENT
        self._events: list[Event] = []
        self._unscanned = ""  # text that may be the beginning of a text marker
        self._held: list[str] = []  # text whose fate depends on what follows, or the header
        self._channel_started = False  # something other than whitespace came since the state began
        self._call_open = False
        self._num_calls = 0
        self._tools = DeclaredTools(tools)
        self._call_ids: set[str] = set()  # of prompt and answer
        self._call_number = 0  # calls of prompt and answer
        self._nameless: str | None = None  # header of a call that waits for its arguments
        self._nameless_arguments: list[str] = []
        self._ended = False
        self._finished = False
        self._unfinished_call = False
        self._num_completion = 0
        self._num_prompt = len(prompt_ids)
        self._replay_prompt(tokenizer, prompt_ids)

    def push(self, token_id: int) -> list[Event]:
        """The events that this id completes, often none. Ids after the end of the answer are ignored."""
        if not self._ended:
            self._num_completion += 1
            self._on_id(token_id)
        return self._take_events()

    def finish(self, reason: str | None = None, *, usage: Usage | None = None) -> list[Event]:
        """The last events, Finish at the end.

        reason  why the generation ended. Default: "stop" after an end token, else "length". "stop" becomes "tool_calls"
                if the answer holds a tool call.
        usage   default: the number of prompt ids given and of ids pushed

        Raises RuntimeError when called twice.
        """
        if self._finished:
            raise RuntimeError("chat: finish must be called once (got a second call)")
        if reason is None:
            reason = "stop" if self._ended else "length"
        if not self._ended:
            self._end()
        if reason == "stop" and self._num_calls:
            reason = "tool_calls"
        usage = usage or Usage(self._num_prompt, self._num_completion)
        self._finished = True
        self._events.append(Finish(reason, usage, self._unfinished_call))
        return self._take_events()

    # ---- ids and text ----

    def _on_id(self, token_id: int) -> None:
        if token_id in self._end_ids:
            self._end()
        elif token_id in self._markers:
            self._on_marker(self._markers[token_id])
        elif token_id not in self._control:
            self._on_text(self._decoder.push(token_id))

    def _on_text(self, text: str) -> None:
        if not self._text_markers or self._state not in (_State.REASONING, _State.CONTENT):
            self._on_channel_text(text)
            return
        self._unscanned += text
        while match := re.search("|".join(self._text_markers), self._unscanned):
            self._on_channel_text(self._unscanned[: match.start()])
            self._unscanned = self._unscanned[match.end() :]
            self._move(self._text_markers[match.group()])
        certain = len(self._unscanned) - self._possible_marker_chars()
        self._on_channel_text(self._unscanned[:certain])
        self._unscanned = self._unscanned[certain:]

    def _possible_marker_chars(self) -> int:
        """Length of the longest end of the text that is the beginning of a marker."""
        for size in range(min(len(self._unscanned), len(END_THINK) - 1), 0, -1):
            if any(name.startswith(self._unscanned[-size:]) for name in self._text_markers):
                return size
        return 0

    def _on_channel_text(self, text: str) -> None:
        if not text or self._state is _State.BETWEEN:
            return
        if self._state is _State.HEADER:
            self._held.append(text)
            return
        body = text.rstrip() if self._state is not _State.CONTENT else text
        if not body or (body.isspace() and not self._channel_started):
            self._held.append(text)
            return
        before = "".join(self._held)
        if self._state is _State.ARGUMENTS and not self._channel_started:
            before, body = "", body.lstrip()
        self._held = [text[len(text.rstrip()) :]] if self._state is not _State.CONTENT else []
        self._channel_started = True
        self._emit(before + body)

    def _emit(self, text: str) -> None:
        if not text:
            return
        if self._state is _State.REASONING:
            self._events.append(ReasoningDelta(text))
        elif self._state is _State.CONTENT:
            self._events.append(ContentDelta(text))
        elif self._nameless is not None:
            self._nameless_arguments.append(text)
        elif self._state is _State.ARGUMENTS and self._call_open:
            self._events.append(ToolCallDelta(self._num_calls - 1, None, None, text))

    # ---- states ----

    def _on_marker(self, marker: _Marker) -> None:
        if (self._state, marker) in _NEXT:
            self._flush_decoder()
            self._move(marker)

    def _move(self, marker: _Marker) -> None:
        """To the next state; the held whitespace of the old one is dropped."""
        next_state = _NEXT.get((self._state, marker))
        if next_state is None:
            return
        if self._state is _State.HEADER:
            self._open_call()
        if self._state is _State.ARGUMENTS and not self._channel_started:
            self._emit("{}")
        if self._state is _State.HEADER and marker is not _Marker.ARGUMENT_BEGIN:
            self._state = _State.ARGUMENTS
            self._emit("{}")
        if next_state is not _State.ARGUMENTS:
            self._name_call()
            self._call_open = False
        self._state = next_state
        self._held = []
        self._channel_started = False

    def _open_call(self) -> None:
        """A call begins with its header; one without any names no function and is dropped with its arguments."""
        header = "".join(self._held).strip()
        self._call_open = bool(tool_name(header))
        if not self._call_open:
            return
        self._num_calls += 1
        if self._tools and is_number(header):
            self._nameless = header
        else:
            self._tell_call(header, self._tools.name_in(header))

    def _tell_call(self, header: str, name: str | None) -> None:
        """The call's first event. name: the declared tool that the header means, None: it is taken as written."""
        call_id = header
        if name is not None and not self._tools.is_native(header):
            number = self._call_number
            while (call_id := f"functions.{name}:{number}") in self._call_ids:
                number += 1
        self._call_ids.add(call_id)
        self._call_number += 1
        name = name or tool_name(header)
        self._events.append(ToolCallDelta(self._num_calls - 1, call_id, name, ""))

    def _name_call(self) -> None:
        """Tells of the call that waited for its arguments, if one did."""
        if self._nameless is None:
            return
        arguments = "".join(self._nameless_arguments)
        self._tell_call(self._nameless, self._tools.name_for(arguments))
        self._nameless, self._nameless_arguments = None, []
        if arguments:
            self._events.append(ToolCallDelta(self._num_calls - 1, None, None, arguments))

    def _flush_decoder(self) -> None:
        self._on_text(self._decoder.flush())
        unscanned, self._unscanned = self._unscanned, ""
        self._on_channel_text(unscanned)

    def _end(self) -> None:
        self._flush_decoder()
        self._unfinished_call = self._call_open or self._state is _State.HEADER
        is_cut_short = self._state is _State.ARGUMENTS and self._channel_started
        if self._state is _State.CONTENT or is_cut_short:
            self._emit("".join(self._held))
        self._name_call()
        self._held = []
        self._ended = True

    def _replay_prompt(self, tokenizer: Tokenizer, prompt_ids: Sequence[int]) -> None:
        """Takes over the state in which the prompt leaves the answer, with the tool call it may have opened."""
        boundaries = {tokenizer.control_ids.get(name) for name in FAMILY_TOKENS} | self._end_ids
        start = len(prompt_ids)
        while start > 0 and prompt_ids[start - 1] not in boundaries:
            start -= 1
        if self._tools:
            earlier = calls_in(tokenizer, prompt_ids[:start])
            self._call_ids, self._call_number = set(earlier), len(earlier)
        for token_id in prompt_ids[start:]:
            self._on_id(token_id)
        if self._state in (_State.REASONING, _State.CONTENT):
            self._held = []  # belongs to the prompt; a header or arguments are told anew from their beginning
        self._events = [
            replace(event, index=0)
            for event in self._events
            if self._call_open
            and isinstance(event, ToolCallDelta)
            and event.index == self._num_calls - 1
        ]
        self._num_calls = int(self._call_open)

    def _take_events(self) -> list[Event]:
        events, self._events = self._events, []
        return events


# ---- the whole answer ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ParsedOutput:
    """An answer in one piece; reasoning and content are None if there was none.

    unfinished_call: the answer ended inside a tool call. That call is the last of tool_calls, with arguments cut short,
    or not in it at all if not even its header was complete.
    """

    reasoning: str | None
    content: str | None
    tool_calls: tuple[ToolCall, ...]
    unfinished_call: bool
    finish_reason: str


def parse(
    tokenizer: Tokenizer,
    ids: Iterable[int],
    *,
    format: str | None,
    prompt_ids: Sequence[int] = (),
    tools: Iterable[ToolLike] | None = None,
) -> ParsedOutput:
    """The answer whose ids these are: OutputParser in one go. Raises as it does."""
    parser = OutputParser(tokenizer, format=format, prompt_ids=prompt_ids, tools=tools)
    events = [event for token_id in ids for event in parser.push(token_id)]
    return merge_events([*events, *parser.finish()])


def merge_events(events: Iterable[Event]) -> ParsedOutput:
    """The answer that an event stream tells. Raises RequestError if it does not end with Finish."""
    reasoning: list[str] = []
    content: list[str] = []
    calls: list[ToolCallDelta] = []
    arguments: list[list[str]] = []
    finish = None
    for event in events:
        if isinstance(event, ReasoningDelta):
            reasoning.append(event.text)
        elif isinstance(event, ContentDelta):
            content.append(event.text)
        elif isinstance(event, ToolCallDelta):
            if event.index == len(calls):
                calls.append(event)
                arguments.append([])
            arguments[event.index].append(event.arguments)
        else:
            finish = event
    if finish is None:
        raise RequestError("chat: an event stream must end with Finish (got none)")
    return ParsedOutput(
        reasoning="".join(reasoning) if reasoning else None,
        content="".join(content) if content else None,
        tool_calls=tuple(
            ToolCall(call.id, call.name, "".join(texts))
            for call, texts in zip(calls, arguments, strict=True)
        ),
        unfinished_call=finish.unfinished_call,
        finish_reason=finish.reason,
    )
