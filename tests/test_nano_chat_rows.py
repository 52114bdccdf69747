"""Conversations of a file: ids of a second renderer, loss on the assistant's words alone, bad rows by name."""

from __future__ import annotations

import itertools
import json

import pytest

from kimi_native.chat.template import FORMATS, render
from kimi_native.errors import RequestError
from kimi_native.nano.chat_rows import chat_encoder
from kimi_native.nano.text_rows import read_rows
from kimi_native.nano.vocabulary import nano_tokenizer
from naive_prompt import PREFILLED, Control, naive_prompt

CALL = {
    "id": "functions.add:0",
    "shown": "functions.add:0",
    "type": "function",
    "function": {"name": "add", "arguments": '{"a": 2, "b": 3}'},
}
TALK = [
    {"role": "system", "content": "Be brief. <|im_assistant|> is only text."},
    {"role": "user", "content": "1 + 1?"},
    {"role": "assistant", "reasoning_content": "Easy.", "content": "2 <|im_end|> or so"},
    {"role": "user", "content": "And 2 + 3?"},
    {"role": "assistant", "content": "5"},
]
WITH_TOOLS = [
    *TALK,
    {"role": "user", "content": "Use the tool."},
    {"role": "assistant", "reasoning_content": "Call it.", "tool_calls": [CALL]},
    {"role": "tool", "tool_call_id": CALL["id"], "shown": CALL["shown"], "content": "5"},
    {"role": "assistant", "reasoning_content": "It says 5.", "content": "5!"},
]
TOOLS = [{"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}]
DECLARED = '[{"function":{"name":"add","parameters":{"type":"object"}},"type":"function"}]'


@pytest.fixture(scope="module")
def tokenizer():
    return nano_tokenizer()


def published(messages: list[dict]) -> list[dict]:
    """Without what only the second renderer reads."""
    return json.loads(
        json.dumps(messages), object_hook=lambda d: {k: d[k] for k in d if k != "shown"}
    )


def naive_example(parts: list[str], format: str, tokenizer) -> tuple[list[int], list[bool]]:
    """Ids and loss, part by part: an answer goes from the <|im_middle|> of an assistant to the next <|im_end|>."""
    ids, loss, text = [], [], ""
    speaks = said = False
    shown = [p for p in parts if p != "" or isinstance(p, Control)]
    for i, part in enumerate(shown):
        if not isinstance(part, Control):
            text += part
            if i + 1 < len(shown) and not isinstance(shown[i + 1], Control):
                continue
            encoded, text = tokenizer.encode(text), ""
        else:
            encoded = [tokenizer.control_ids[part]]
        carries = said
        if format in PREFILLED and part == "<think>" and isinstance(part, Control):
            carries = False
        if format == "k2.5" and part == "</think>" and shown[i - 1] == "<think>":
            carries = False
        ids += encoded
        loss += [carries] * len(encoded)
        if isinstance(part, Control):
            speaks = part == "<|im_assistant|>" or (speaks and part != "<|im_end|>")
            said = speaks and (said or part == "<|im_middle|>")
    return ids, loss


@pytest.mark.parametrize("format", FORMATS)
def test_chat_rows_are_what_a_second_renderer_gives(tokenizer, format):
    tools = FORMATS[format].tools == "json"
    messages = WITH_TOOLS if FORMATS[format].tools else TALK
    declared = DECLARED if tools else None
    parts = naive_prompt(messages, format, declared=declared, add=False, keep="all")
    ids, loss = naive_example(parts, format, tokenizer)
    example = chat_encoder(format, tokenizer)(published(messages), TOOLS if tools else [])
    assert example.ids == ids
    assert example.loss == loss
    answers = sum(m["role"] == "assistant" for m in messages)
    assert sum(a < b for a, b in itertools.pairwise(loss)) == answers


@pytest.mark.parametrize("format", FORMATS)
def test_chat_rows_predict_what_follows_the_prompt(tokenizer, format):
    """The first answer's first predicted id stands where generation would start, in either mode of thinking."""
    encode = chat_encoder(format, tokenizer)
    for reasoning in ("Easy.", ""):
        messages = [
            *TALK[:2],
            {"role": "assistant", "reasoning_content": reasoning, "content": "2"},
        ]
        example = encode(messages, [])
        mode = {"thinking": bool(reasoning)} if format == "k2.5" else {}
        prompt = render(messages[:2], format=format, tokenizer=tokenizer, **mode)
        assert example.ids[: len(prompt)] == prompt
        assert example.loss.index(True) == len(prompt)
        assert example.loss[-1]
        assert example.ids[-1] == tokenizer.control_ids["<|im_end|>"]


def rows_of(path, tokenizer, rows, format="k2-thinking", max_tokens=400):
    path.write_text("\n".join(json.dumps(row) for row in rows))
    encode = chat_encoder(format, tokenizer)
    return read_rows(
        path, tokenizer.encode, vocab_size=1392, max_tokens=max_tokens, encode_chat=encode
    )


BAD = [
    ({"messages": []}, "must hold at least one message"),
    ({"messages": "Hello"}, "messages and tools must be lists of objects"),
    ({"messages": TALK[:2], "tools": "add"}, "messages and tools must be lists of objects"),
    ({"messages": TALK[:2]}, "messages must have one of the assistant (got none)"),
    ({"messages": [{"role": "robot", "content": "x"}, TALK[-1]]}, "role"),
    ({"messages": [{"role": "user", "content": "x", "mood": 1}, TALK[-1]]}, "mood"),
    ({"messages": [{"role": "tool", "tool_call_id": "x", "content": ""}]}, "earlier call"),
    ({"messages": [{"role": "user", "content": "\ud800"}, TALK[-1]]}, "surrogate"),
    ({"messages": [*TALK[:4], {"role": "assistant", "content": "5" * 500}]}, "2 to 400 tokens"),
    ({"messages": TALK, "system": "x"}, "must be {"),
]


def test_chat_rows_that_cannot_be_used_are_counted_and_named(tmp_path, tokenizer):
    good = [
        {"messages": TALK},
        {"messages": published(WITH_TOOLS), "tools": TOOLS},
        {"text": "Hi!"},
    ]
    rows = rows_of(tmp_path / "rows", tokenizer, [good[0], *(row for row, _ in BAD), *good[1:]])
    assert len(rows) == 3
    assert [line for line, _ in rows.bad] == list(range(2, 2 + len(BAD)))
    for (_, reason), (_, expected) in zip(rows.bad, BAD, strict=True):
        assert expected in reason
    assert rows.report().startswith(f"{tmp_path / 'rows'}: 3 rows used, {len(BAD)} not (line 2: ")


def test_chat_rows_of_a_format_without_tools(tmp_path, tokenizer):
    rows = rows_of(
        tmp_path / "rows",
        tokenizer,
        [{"messages": TALK}, {"messages": TALK, "tools": TOOLS}],
        "moonlight",
    )
    assert rows.bad == [(2, "chat: format moonlight has no tools (got 1)")]


def test_chat_rows_refuse_an_unknown_format(tokenizer):
    with pytest.raises(RequestError, match=r"format must be one of .* \(got 'chatml'\)"):
        chat_encoder("chatml", tokenizer)
