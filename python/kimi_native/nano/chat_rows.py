"""Conversations of a file as training data: rendered in a chat format, the assistant's words alone carry loss."""

from __future__ import annotations

from typing import Any

from kimi_native.chat.template import END_THINK, THINK, get_format, render
from kimi_native.nano.dataset import Example
from kimi_native.nano.text_rows import EncodeChat
from kimi_native.nano.transcripts import answer_spans
from kimi_native.tokenizer import Tokenizer


def chat_encoder(format: str, tokenizer: Tokenizer) -> EncodeChat:
    """A function of (messages, tools), both as OpenAI-shaped dicts, to an Example.

    All reasoning is shown, where the format has any. Loss is on what the assistant's messages say, their <|im_end|>
    included, but not on what the prompt gives: the opening of the message, and <think> where the format opens it.

    Raises RequestError on another format; the function raises it on a conversation that cannot be rendered or has no
    assistant's message.
    """
    thinking = get_format(format).thinking

    def encode(messages: list[Any], tools: list[Any]) -> Example:
        ids = render(
            messages,
            format=format,
            tokenizer=tokenizer,
            tools=tools or None,
            add_generation_prompt=False,
            keep_thinking="auto" if thinking == "no" else "all",
        )
        loss = [False] * len(ids)
        for start, stop in answer_spans(ids, tokenizer):
            start += _given(ids[start:stop], thinking, tokenizer)
            loss[start:stop] = [True] * (stop - start)
        if not any(loss):
            raise ValueError("messages must have one of the assistant (got none)")
        return Example(ids, loss)

    return encode


def _given(answer: list[int], thinking: str, tokenizer: Tokenizer) -> int:
    """How many ids of an answer the prompt gives: <think>, or <think></think> where it asks for no thinking."""
    think, end = (tokenizer.control_ids.get(name) for name in (THINK, END_THINK))
    if thinking not in ("switch", "forced") or think is None or answer[0] != think:
        return 0
    return 2 if thinking == "switch" and answer[1] == end else 1
