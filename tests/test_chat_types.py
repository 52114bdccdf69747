"""Messages: what clients send is understood, and what is wrong is named."""

from __future__ import annotations

import pytest

from kimi_native.chat.types import Message, ToolCall, as_messages
from kimi_native.errors import RequestError


def call(name, id="", arguments="{}"):
    return {"id": id, "type": "function", "function": {"name": name, "arguments": arguments}}


def test_message_accepts_what_clients_send_back():
    message = Message.from_dict(
        {
            "role": "assistant",
            "content": None,
            "refusal": None,
            "annotations": [],
            "audio": None,
            "function_call": None,
            "reasoning": None,
            "reasoning_content": "R",
            "tool_calls": [{"index": 0, **call("f", "functions.f:0", {"a": "é"})}],
        }
    )
    assert message == Message(
        "assistant",
        reasoning_content="R",
        tool_calls=(ToolCall("functions.f:0", "f", '{"a": "é"}'),),
    )


def test_message_prefers_reasoning_over_reasoning_content():
    message = {"role": "assistant", "reasoning": "new", "reasoning_content": "old"}
    assert Message.from_dict(message).reasoning_content == "new"


def test_message_joins_text_parts():
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    assert Message.from_dict({"role": "user", "content": parts}).content == "ab"
    assert Message.from_dict({"role": "user", "content": []}).content == ""


BAD_MESSAGES = {
    "message: must be an object (got str)": "hello",
    "message: role must be one of system, developer, user, assistant, tool (got None)": {},
    "message: role must be one of system, developer, user, assistant, tool (got 'bot')": {
        "role": "bot"
    },
    "message: role must be one of system, developer, user, assistant, tool (got ['user'])": {
        "role": ["user"]
    },
    "message: content must be a string (got int)": {"role": "user", "content": 7},
    "message: content parts must be text (got type='image_url', text of type NoneType)": {
        "role": "user",
        "content": [{"type": "image_url", "image_url": {}}],
    },
    "message: content part: must be an object (got str)": {"role": "user", "content": ["a"]},
    "message: unknown field 'prefix'": {"role": "assistant", "prefix": True},
    "message: refusal is not supported (got 'no')": {"role": "assistant", "refusal": "no"},
    "message: name must be a string (got int)": {"role": "user", "name": 3},
    "message: tool_calls and reasoning_content belong to the assistant (got role='user')": {
        "role": "user",
        "reasoning": "R",
    },
    "message: a tool message, and no other, must have a tool_call_id (got role='tool'": {
        "role": "tool",
        "content": "r",
    },
    "message: a tool message, and no other, must have a tool_call_id (got role='user'": {
        "role": "user",
        "tool_call_id": "a",
    },
    "message: tool_calls must be a list (got dict)": {"role": "assistant", "tool_calls": {}},
    "tool call: must be an object (got str)": {"role": "assistant", "tool_calls": ["f"]},
    "tool call: type must be 'function' (got 'web')": {
        "role": "assistant",
        "tool_calls": [{"type": "web"}],
    },
    "tool call: function: must be an object (got NoneType)": {
        "role": "assistant",
        "tool_calls": [{"id": "a"}],
    },
    "tool call: unknown field 'extra'": {
        "role": "assistant",
        "tool_calls": [{**call("f"), "extra": 1}],
    },
    "tool call: name must not be empty": {"role": "assistant", "tool_calls": [call("")]},
    "tool call: arguments must be a string (got NoneType)": {
        "role": "assistant",
        "tool_calls": [call("f", "a", None)],
    },
    "tool call: arguments must be representable as JSON": {
        "role": "assistant",
        "tool_calls": [call("f", "a", {"x": float("inf")})],
    },
}


@pytest.mark.parametrize("message", BAD_MESSAGES)
def test_bad_messages_are_refused(message):
    with pytest.raises(RequestError) as caught:
        Message.from_dict(BAD_MESSAGES[message])
    assert str(caught.value).startswith(message)


@pytest.mark.parametrize("messages", [[], "Hello", {"role": "user"}, Message("user", "Hello")])
def test_messages_must_be_a_list_with_something_in_it(messages):
    with pytest.raises(RequestError, match="messages: must"):
        as_messages(messages)
