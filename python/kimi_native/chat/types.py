"""Messages of a conversation and the events of an answer, in the shapes of the OpenAI chat API."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from kimi_native.errors import RequestError

ROLES = ("system", "developer", "user", "assistant", "tool")

# Fields that clients send back with every answer; ignored while empty, refused when they carry something.
_EMPTY_FIELDS = ("refusal", "annotations", "audio", "function_call")
_MESSAGE_FIELDS = (
    "role",
    "content",
    "reasoning",
    "reasoning_content",
    "tool_calls",
    "tool_call_id",
    "name",
)


@dataclass(frozen=True)
class ToolCall:
    """One call the assistant made. arguments is a JSON text, kept as the model wrote it.

    Raises RequestError on a wrong field.
    """

    id: str
    name: str
    arguments: str

    def __post_init__(self) -> None:
        for field in ("id", "name", "arguments"):
            _check_text_field(f"tool call: {field}", getattr(self, field))
        if not self.name:
            raise RequestError("tool call: name must not be empty")

    @classmethod
    def from_dict(cls, call: Mapping[str, Any]) -> ToolCall:
        """{"id", "type": "function", "function": {"name", "arguments"}}; arguments a JSON text or an object.

        An object is written as the chat templates write it: JSON with ", " and ": ". Raises RequestError.
        """
        _check_object("tool call", call)
        # index is what streaming clients leave behind
        _check_fields("tool call", call, ("id", "type", "function", "index"))
        if call.get("type", "function") != "function":
            raise RequestError(f"tool call: type must be 'function' (got {call['type']!r})")
        function = call.get("function")
        _check_object("tool call: function", function)
        _check_fields("tool call: function", function, ("name", "arguments"))
        arguments = function.get("arguments")
        if isinstance(arguments, Mapping):
            arguments = json_text("tool call: arguments", arguments)
        return cls(id=call.get("id") or "", name=function.get("name"), arguments=arguments)


@dataclass(frozen=True)
class Message:
    """One message of a conversation.

    role               one of ROLES
    content            text, or None for none
    reasoning_content  what the assistant thought before content; how much of it a prompt shows is the template's rule
    tool_calls         the assistant's calls, in order
    tool_call_id       of a tool message: the call it answers
    name               shown instead of the role, if given

    Raises RequestError on a wrong field.
    """

    role: str
    content: str | None = None
    reasoning_content: str | None = None
    tool_calls: tuple[ToolCall, ...] = ()
    tool_call_id: str | None = None
    name: str | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "tool_calls", tuple(self.tool_calls))
        if self.role not in ROLES:
            raise RequestError(
                f"message: role must be one of {', '.join(ROLES)} (got {self.role!r})"
            )
        for field in ("content", "reasoning_content", "tool_call_id", "name"):
            value = getattr(self, field)
            if value is not None:
                _check_text_field(f"message: {field}", value)
        if self.role != "assistant" and (self.tool_calls or self.reasoning_content):
            raise RequestError(
                f"message: tool_calls and reasoning_content belong to the assistant (got role={self.role!r})"
            )
        if (self.role == "tool") != bool(self.tool_call_id):
            raise RequestError(
                "message: a tool message, and no other, must have a tool_call_id "
                f"(got role={self.role!r}, tool_call_id={self.tool_call_id!r})"
            )

    @classmethod
    def from_dict(cls, message: Mapping[str, Any]) -> Message:
        """An OpenAI-shaped message. content may be a list of text parts; reasoning is reasoning_content's other name.

        Raises RequestError on a field that is unknown and not empty, or of a wrong type.
        """
        _check_object("message", message)
        _check_fields("message", message, (*_MESSAGE_FIELDS, *_EMPTY_FIELDS))
        for field in _EMPTY_FIELDS:
            if message.get(field):
                raise RequestError(f"message: {field} is not supported (got {message[field]!r})")
        # The newest template of the family reads `reasoning` first.
        reasoning = message.get("reasoning")
        if reasoning is None:
            reasoning = message.get("reasoning_content")
        calls = message.get("tool_calls")
        if calls is not None and not isinstance(calls, list | tuple):
            raise RequestError(f"message: tool_calls must be a list (got {type(calls).__name__})")
        return cls(
            role=message.get("role"),
            content=_content_text(message.get("content")),
            reasoning_content=reasoning,
            tool_calls=tuple(ToolCall.from_dict(call) for call in calls or ()),
            tool_call_id=message.get("tool_call_id"),
            name=message.get("name"),
        )


def as_messages(messages: Iterable[Message | Mapping[str, Any]]) -> list[Message]:
    """Messages of a conversation given as Message or OpenAI-shaped dicts. Raises RequestError if there is none."""
    if isinstance(messages, str | Mapping | Message):
        raise RequestError(f"messages: must be a list (got {type(messages).__name__})")
    converted = [m if isinstance(m, Message) else Message.from_dict(m) for m in messages]
    if not converted:
        raise RequestError("messages: must hold at least one message (got 0)")
    return converted


# ---- events of an answer -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ReasoningDelta:
    """A piece of the reasoning."""

    text: str


@dataclass(frozen=True)
class ContentDelta:
    """A piece of the answer."""

    text: str


@dataclass(frozen=True)
class ToolCallDelta:
    """A piece of call number `index`: its first delta has id and name, the later ones add to arguments."""

    index: int
    id: str | None
    name: str | None
    arguments: str


@dataclass(frozen=True)
class Usage:
    """Tokens of one request. reused_tokens: of the prompt, found in the cache; prefilled_tokens: the others."""

    prompt_tokens: int
    completion_tokens: int
    reused_tokens: int = 0

    @property
    def prefilled_tokens(self) -> int:
        return self.prompt_tokens - self.reused_tokens

    @property
    def total_tokens(self) -> int:
        return self.prompt_tokens + self.completion_tokens


@dataclass(frozen=True)
class Finish:
    """The last event. reason: "stop", "tool_calls", "length", or what the caller of the parser passed.

    unfinished_call: the output ended inside a tool call, so its arguments may be cut short.
    """

    reason: str
    usage: Usage
    unfinished_call: bool = False


Event = ReasoningDelta | ContentDelta | ToolCallDelta | Finish


# ---- checks --------------------------------------------------------------------------------------------------------


def _check_object(what: str, value: Any) -> None:
    if not isinstance(value, Mapping):
        raise RequestError(f"{what}: must be an object (got {type(value).__name__})")


def _check_text_field(what: str, value: Any) -> None:
    if not isinstance(value, str):
        raise RequestError(f"{what} must be a string (got {type(value).__name__})")


def _check_fields(what: str, value: Mapping[str, Any], known: tuple[str, ...]) -> None:
    unknown = [field for field in value if field not in known and value[field] is not None]
    if unknown:
        raise RequestError(f"{what}: unknown field {unknown[0]!r} (known: {', '.join(known)})")


def _content_text(content: Any) -> str | None:
    if not isinstance(content, list | tuple):
        return content
    texts = []
    for part in content:
        _check_object("message: content part", part)
        if part.get("type") != "text" or not isinstance(part.get("text"), str):
            raise RequestError(
                f"message: content parts must be text (got type={part.get('type')!r}, "
                f"text of type {type(part.get('text')).__name__})"
            )
        texts.append(part["text"])
    return "".join(texts)


def json_text(what: str, value: Any, **options: Any) -> str:
    """JSON with non-ASCII characters kept; NaN, or an object that JSON cannot hold, is a RequestError."""
    try:
        return json.dumps(value, ensure_ascii=False, allow_nan=False, **options)
    except (TypeError, ValueError, RecursionError) as error:
        raise RequestError(f"{what} must be representable as JSON ({error})") from error
