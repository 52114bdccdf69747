"""A second renderer, from the written rules alone: parts in a list, ids from the published file by naive merging."""

from __future__ import annotations

import base64
import json
from pathlib import Path

from naive_tokenizer import naive_encode

# As published; this file asks no tokenizer for them.
IDS = {
    "<|im_end|>": 163586,
    "<|im_user|>": 163587,
    "<|im_assistant|>": 163588,
    "<|im_system|>": 163594,
    "<|tool_calls_section_begin|>": 163595,
    "<|tool_calls_section_end|>": 163596,
    "<|tool_call_begin|>": 163597,
    "<|tool_call_argument_begin|>": 163598,
    "<|tool_call_end|>": 163599,
    "<|im_middle|>": 163601,
    "<think>": 163606,
    "</think>": 163607,
}
PREFILLED = (
    "k2.5",
    "k2.7-code",
)  # the prompt opens the thinking, and has no system text of its own
KIMI = "You are Kimi, an AI assistant created by Moonshot AI."
MOONLIGHT = "You are a helpful assistant provided by Moonshot-AI."


class Control(str):
    """The name of a control token, as opposed to a text that spells it."""


def role_start(role: str, name: str | None = None) -> list[str]:
    token = "<|im_user|>" if role == "user" else "<|im_system|>"
    token = "<|im_assistant|>" if role == "assistant" else token
    return [Control(token), name or role, Control("<|im_middle|>")]


def plain(content) -> str:
    if content is None:
        return ""
    return content if isinstance(content, str) else "".join(part["text"] for part in content)


def reasoning_shown(messages, index: int, thinking: bool, keep: str) -> str:
    message = messages[index]
    reasoning = message.get("reasoning")
    reasoning = message.get("reasoning_content") if reasoning is None else reasoning
    later = messages[index:]
    is_history = any(m["role"] == "assistant" and not m.get("tool_calls") for m in later)
    if keep == "none" or (keep == "auto" and (is_history or not thinking)):
        return ""
    return reasoning or ""


def call_parts(message) -> list[str]:
    parts: list[str] = []
    for call in message.get("tool_calls") or []:
        arguments = call["function"]["arguments"]
        if not isinstance(arguments, str):
            arguments = json.dumps(arguments, ensure_ascii=False)
        parts += [Control("<|tool_call_begin|>"), call["shown"]]
        parts += [Control("<|tool_call_argument_begin|>"), arguments, Control("<|tool_call_end|>")]
    if not parts:
        return []
    begin, end = "<|tool_calls_section_begin|>", "<|tool_calls_section_end|>"
    return [Control(begin), *parts, Control(end)]


def naive_prompt(
    messages, format, *, declared=None, add=True, thinking=True, keep="auto"
) -> list[str]:
    """Parts of the prompt. declared: the text of the tool declaration; calls and results carry their id as `shown`."""
    parts: list[str] = []
    keep = "all" if format == "k2.7-code" else keep
    if declared is not None:
        parts += [*role_start("tool_declare"), declared, Control("<|im_end|>")]
    if messages[0]["role"] != "system" and format not in PREFILLED:
        default = MOONLIGHT if format == "moonlight" else KIMI
        parts += [*role_start("system"), default, Control("<|im_end|>")]
        parts += ["\n"] if format == "k2-instruct" else []
    for index, message in enumerate(messages):
        parts += role_start(message["role"], message.get("name"))
        if message["role"] == "tool":
            parts += [f"## Return of {message['shown']}\n"]
        if message["role"] == "assistant" and format in ("k2-thinking", *PREFILLED):
            shown = reasoning_shown(messages, index, thinking, keep)
            parts += [Control("<think>"), shown, Control("</think>")]
        parts += [plain(message.get("content")), *call_parts(message), Control("<|im_end|>")]
    if add:
        parts += role_start("assistant")
        if format in PREFILLED:
            parts += [Control("<think>")] + ([] if thinking else [Control("</think>")])
    return parts


def read_ranks(path: Path) -> dict[bytes, int]:
    pairs = (line.split() for line in path.read_bytes().splitlines() if line)
    return {base64.b64decode(token): int(rank) for token, rank in pairs}


def naive_ids(ranks: dict[bytes, int], parts: list[str]) -> list[int]:
    """Texts that touch are one text; a control token is its id, a text that spells one is not."""
    ids: list[int] = []
    text = ""
    for part in [*parts, None]:
        if part is not None and not isinstance(part, Control):
            text += part
            continue
        ids += naive_encode(ranks, text)
        text = ""
        ids += [] if part is None else [IDS[part]]
    return ids
