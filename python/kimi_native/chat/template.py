"""Prompts from conversations, straight to token ids: one reviewed renderer instead of the checkpoints' templates.

A message is ROLE_TOKEN role_name <|im_middle|> body <|im_end|>, with no newline in between. The control tokens are ids
that this file emits itself; whatever the caller wrote goes through Tokenizer.encode, which cannot give a control id.
So no text can open a role, close a turn or fake a tool result.

Formats: k2-instruct, k2-thinking, k2.5 (also K2.6), k2.7-code and moonlight. Source: the chat templates published with
the checkpoints, byte for byte; of k2.7-code, what is said of it: k2.5 that always thinks and keeps it. The golden
prompts are in tests/test_chat_template.py.
"""

from __future__ import annotations

import json
import re
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from os import PathLike, fspath
from typing import Any, Literal, Protocol, get_args

from kimi_native.chat.template_source import template_source
from kimi_native.chat.tool import ToolLike, declarations
from kimi_native.chat.types import Message, ToolCall, as_messages, json_text
from kimi_native.chat.typescript import typescript_tools
from kimi_native.errors import RequestError, TokenizerError
from kimi_native.tokenizer import Tokenizer

THINK = "<think>"
END_THINK = "</think>"
ROLE_TOKENS = {"user": "<|im_user|>", "assistant": "<|im_assistant|>"}  # every other role: system
OTHER_ROLE_TOKEN = "<|im_system|>"
FAMILY_TOKENS = ("<|im_system|>", "<|im_user|>", "<|im_assistant|>", "<|im_middle|>", "<|im_end|>")

# In the folder's name, or in the cache of a hub, which keeps models--OWNER--NAME/snapshots/REVISION.
_K27_CODE = re.compile(r"(?:\A|[/\-_])kimi-k2\.7-code[^/]*(?:/snapshots/[^/]+)?/?\Z", re.IGNORECASE)

KeepThinking = Literal["auto", "all", "none"]


@dataclass(frozen=True)
class ChatFormat:
    """What the formats differ in.

    default_system  system text where the conversation does not start with a system message
    after_default   text between that message and the next
    tools           how tools are declared, None: the format has neither tools nor tool calls
    thinking        no: no reasoning in prompts; always: the model opens <think> itself; switch: the prompt opens it,
                    or an empty one; forced: the prompt opens it, and all earlier reasoning is shown
    """

    name: str
    default_system: str | None
    after_default: str
    tools: Literal["json", "typescript"] | None
    thinking: Literal["no", "always", "switch", "forced"]


_KIMI = "You are Kimi, an AI assistant created by Moonshot AI."
_MOONLIGHT = "You are a helpful assistant provided by Moonshot-AI."

FORMATS = {
    f.name: f
    for f in (
        # The newline is a leftover of the template's own line break; it is in what the model was trained on.
        ChatFormat("k2-instruct", _KIMI, "\n", tools="json", thinking="no"),
        ChatFormat("k2-thinking", _KIMI, "", tools="json", thinking="always"),
        ChatFormat("k2.5", None, "", tools="typescript", thinking="switch"),
        ChatFormat("k2.7-code", None, "", tools="typescript", thinking="forced"),
        ChatFormat("moonlight", _MOONLIGHT, "", tools=None, thinking="no"),
    )
}


@dataclass(frozen=True)
class _Control:
    """A control token of the template."""

    name: str


class _Quantization(Protocol):
    kind: str


class _Config(Protocol):
    model_type: str
    quantization: _Quantization | None


def detect_format(
    config: _Config, tokenizer: Tokenizer, folder: str | PathLike[str] = ""
) -> str | None:
    """The chat format of a checkpoint, None if it is none of FORMATS.

    config  a KimiConfig; model_type decides, and for deepseek_v3 the tokenizer's control tokens
    folder  of the checkpoint: K2.7-Code has the config.json of K2.5, only its published name tells them apart; of
            kimi_k2 models those think whose chat template writes <think>, without a template those in INT4

    Raises ConfigError on a chat template of a kimi_k2 model that cannot be read.
    """
    if config.model_type == "kimi_k25":
        return "k2.7-code" if _K27_CODE.search(fspath(folder)) else "k2.5"
    if config.model_type == "kimi_k2":
        return "k2-thinking" if _thinks(config, folder) else "k2-instruct"
    if config.model_type == "deepseek_v3" and set(FAMILY_TOKENS) <= set(tokenizer.control_ids):
        return "moonlight"
    return None


def _thinks(config: _Config, folder: str | PathLike[str]) -> bool:
    source = template_source(fspath(folder)) if fspath(folder) else None
    if (
        source is not None
    ):  # the form of the weights may have been changed by whoever copied the model
        return THINK in source
    return config.quantization is not None and config.quantization.kind == "int4"


def get_format(format: str) -> ChatFormat:
    """The ChatFormat of that name. Raises RequestError if there is none."""
    if format not in FORMATS:
        raise RequestError(f"chat: format must be one of {', '.join(FORMATS)} (got {format!r})")
    return FORMATS[format]


def render(
    messages: Iterable[Message | Mapping[str, Any]],
    *,
    format: str,
    tokenizer: Tokenizer,
    tools: Iterable[ToolLike] | None = None,
    add_generation_prompt: bool = True,
    thinking: bool | None = None,
    keep_thinking: KeepThinking = "auto",
) -> list[int]:
    """Token ids of the prompt for a conversation.

    messages               Message or OpenAI-shaped dicts, at least one
    format                 one of FORMATS
    tools                  Tool, Python functions, or OpenAI-shaped dicts, which are shown as they are (keys sorted)
    add_generation_prompt  end with the opening of the assistant's answer
    thinking               k2.5 alone, default True: open the answer with <think>, or with <think></think>
    keep_thinking          how much reasoning of the conversation the model sees again
        auto  as published: what was thought after the last assistant message without tool calls, that is, in the tool
              use still going on; none with thinking=False
        all   every message's
        none  no message's
        k2.7-code shows every message's, as published: there auto is all, and none is refused

    A message whose reasoning is not shown has an empty <think></think>; k2-instruct and moonlight have no reasoning.
    Tool call ids of other providers are renamed (see canonical_tool_ids).

    Raises RequestError on a bad conversation or an argument the format does not have, TokenizerError if the tokenizer
    lacks a control token of the format or a text holds a lone surrogate.
    """
    parts = _prompt(
        as_messages(messages),
        get_format(format),
        declarations(tools),
        add_generation_prompt,
        thinking,
        keep_thinking,
    )
    return tokenizer.encode_parts([_resolve(part, format, tokenizer) for part in parts])


def render_text(
    messages: Iterable[Message | Mapping[str, Any]],
    *,
    format: str,
    tools: Iterable[ToolLike] | None = None,
    add_generation_prompt: bool = True,
    thinking: bool | None = None,
    keep_thinking: KeepThinking = "auto",
) -> str:
    """The prompt of `render` as a string with the control tokens' names in it, to be looked at.

    Not to be encoded: in it, a control token and a text that spells its name look the same.
    """
    parts = _prompt(
        as_messages(messages),
        get_format(format),
        declarations(tools),
        add_generation_prompt,
        thinking,
        keep_thinking,
    )
    return "".join(part.name if isinstance(part, _Control) else part for part in parts)


def _resolve(part: _Control | str, format: str, tokenizer: Tokenizer) -> int | str:
    if isinstance(part, str):
        return part
    token_id = tokenizer.control_ids.get(part.name)
    if token_id is not None:
        return token_id
    # Some published tokenizer files do not name the pair; then it is ordinary text, for the template as for the model.
    if part.name in (THINK, END_THINK):
        return part.name
    raise TokenizerError(
        f"chat: format {format} needs the control token {part.name} (got a tokenizer without it)"
    )


# ---- the prompt's parts --------------------------------------------------------------------------------------------


def _prompt(
    messages: list[Message],
    fmt: ChatFormat,
    tools: list[dict[str, Any]],
    add_generation_prompt: bool,
    thinking: bool | None,
    keep_thinking: KeepThinking,
) -> Iterator[_Control | str]:
    _check_thinking(fmt, thinking, keep_thinking)
    thinking = thinking is not False
    messages = canonical_tool_ids(messages)
    if tools:
        yield from _turn("tool_declare", "tool_declare", [_tools_text(fmt, tools)])
    if fmt.default_system is not None and messages[0].role != "system":
        yield from _turn("system", "system", [fmt.default_system])
        yield fmt.after_default
    keep_thinking = "all" if fmt.thinking == "forced" else keep_thinking
    first_shown = _first_shown(messages, thinking, keep_thinking)
    for index, message in enumerate(messages):
        body = _body(fmt, message, index >= first_shown)
        yield from _turn(message.role, message.name or message.role, body)
    if add_generation_prompt:
        yield from _opening("assistant", "assistant")
        if fmt.thinking in ("switch", "forced"):
            yield _Control(THINK)
            if not thinking:
                yield _Control(END_THINK)


def _check_thinking(fmt: ChatFormat, thinking: bool | None, keep_thinking: str) -> None:
    if keep_thinking not in get_args(KeepThinking):
        raise RequestError(
            f"chat: keep_thinking must be one of {', '.join(get_args(KeepThinking))} (got {keep_thinking!r})"
        )
    if keep_thinking == "all" and fmt.thinking == "no":
        raise RequestError(f"chat: format {fmt.name} has no reasoning (got keep_thinking='all')")
    if fmt.thinking == "forced" and (keep_thinking == "none" or thinking is False):
        given = "thinking=False" if thinking is False else "keep_thinking='none'"
        raise RequestError(f"chat: format {fmt.name} thinks and keeps all reasoning (got {given})")
    if thinking is not None and fmt.thinking not in ("switch", "forced"):
        raise RequestError(
            f"chat: thinking belongs to the format k2.5 (got {thinking} with {fmt.name})"
        )


def _first_shown(messages: list[Message], thinking: bool, keep_thinking: KeepThinking) -> int:
    """Index of the first message whose reasoning is shown."""
    if keep_thinking == "all":
        return 0
    # With thinking switched off the template shows no reasoning at all, unless told to keep it.
    if keep_thinking == "none" or not thinking:
        return len(messages)
    return _end_of_history(messages)


def _end_of_history(messages: list[Message]) -> int:
    """Index after the last assistant message without tool calls: from there on it is the current tool-use turn."""
    for index in range(len(messages) - 1, -1, -1):
        if messages[index].role == "assistant" and not messages[index].tool_calls:
            return index + 1
    return 0


def _opening(role: str, role_name: str) -> Iterator[_Control | str]:
    yield _Control(ROLE_TOKENS.get(role, OTHER_ROLE_TOKEN))
    yield role_name
    yield _Control("<|im_middle|>")


def _turn(role: str, role_name: str, body: Iterable[_Control | str]) -> Iterator[_Control | str]:
    yield from _opening(role, role_name)
    yield from body
    yield _Control("<|im_end|>")


def _body(fmt: ChatFormat, message: Message, shows_reasoning: bool) -> Iterator[_Control | str]:
    if fmt.tools is None and (message.role == "tool" or message.tool_calls):
        raise RequestError(
            f"chat: format {fmt.name} has no tools (got a {message.role} message with a tool call or result)"
        )
    if message.role == "tool":
        yield f"## Return of {message.tool_call_id}\n"
    if message.role == "assistant" and fmt.thinking != "no":
        yield _Control(THINK)
        if shows_reasoning:
            yield message.reasoning_content or ""
        yield _Control(END_THINK)
    yield message.content or ""
    if message.tool_calls:
        yield _Control("<|tool_calls_section_begin|>")
        for call in message.tool_calls:
            yield _Control("<|tool_call_begin|>")
            yield call.id
            yield _Control("<|tool_call_argument_begin|>")
            yield call.arguments
            yield _Control("<|tool_call_end|>")
        yield _Control("<|tool_calls_section_end|>")


def _tools_text(fmt: ChatFormat, tools: list[dict[str, Any]]) -> str:
    """The declaration: TypeScript where the format has it and the schemas allow it, else the list as JSON.

    The list has its keys sorted at every depth and is compact, with non-ASCII kept.
    """
    if fmt.tools is None:
        raise RequestError(f"chat: format {fmt.name} has no tools (got {len(tools)})")
    text = json_text("chat: tools", tools, sort_keys=True, separators=(",", ":"))
    if fmt.tools == "typescript":
        return typescript_tools(json.loads(text)) or text
    return text


# ---- tool call ids -------------------------------------------------------------------------------------------------


def canonical_tool_ids(messages: list[Message]) -> list[Message]:
    """The conversation with every tool call id, and the results' references to it, in the form functions.{name}:{n}.

    An id already of that form, with its call's name, stays as it is. Any other gets as n the number of calls before
    it in the conversation, or the next that is free. A model that sees ids of another form imitates them.

    Raises RequestError for a tool message that answers no call, unless its id has the form (the call may have been cut
    off the history).
    """
    result: list[Message] = []
    used: set[str] = set()
    num_calls = 0
    pending: dict[str, deque[str]] = {}  # id as given -> new ids of the latest message that used it
    for message in messages:
        if message.role == "tool":
            message = replace(message, tool_call_id=_answered_id(message.tool_call_id, pending))
        if message.tool_calls:
            for given in {call.id for call in message.tool_calls}:
                pending[given] = deque()
            calls = []
            for call in message.tool_calls:
                calls.append(replace(call, id=_canonical_id(call, num_calls, used)))
                used.add(calls[-1].id)
                pending[call.id].append(calls[-1].id)
                num_calls += 1
            message = replace(message, tool_calls=tuple(calls))
        result.append(message)
    return result


def _canonical_id(call: ToolCall, number: int, used: set[str]) -> str:
    if re.fullmatch(rf"functions\.{re.escape(call.name)}:[0-9]+", call.id):
        return call.id
    while (new := f"functions.{call.name}:{number}") in used:
        number += 1
    return new


def _answered_id(given: str, pending: dict[str, deque[str]]) -> str:
    ids = pending.get(given)
    if ids:
        # Calls of one message that share an id are answered in their order.
        return ids.popleft() if len(ids) > 1 else ids[0]
    if re.fullmatch(r"functions\..+:[0-9]+", given, re.DOTALL):
        return given
    raise RequestError(
        f"chat: a tool message must answer an earlier call (got tool_call_id={given!r})"
    )
