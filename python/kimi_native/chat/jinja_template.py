"""Prompts by a checkpoint's own chat template, for checkpoints whose format is none of template.FORMATS.

The template is code of whoever published the checkpoint, so it runs in a sandbox (sandbox.py). Text of the caller can
never become a control token: it is marked before the template sees it (masking.py), and only names without a mark in
them are control tokens afterwards. A template that decides by that text (say, one that cuts an answer at </think>)
would write something else with the marks in; that is an error, not another prompt.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kimi_native.chat.masking import Mask
from kimi_native.chat.sandbox import Sandbox
from kimi_native.chat.template_source import read_tokenizer_config, template_source
from kimi_native.chat.tool import ToolLike, declarations
from kimi_native.chat.types import Message, as_messages, json_text
from kimi_native.errors import RequestError
from kimi_native.tokenizer import Tokenizer

_TOKEN_NAMES = ("bos_token", "eos_token", "pad_token", "unk_token")


@dataclass(frozen=True)
class JinjaTemplate:
    """A chat template and what it needs.

    source   of the template
    tokens   names of control tokens that templates know by their use: bos_token, eos_token, ...
    sandbox  where it runs
    """

    source: str
    tokens: Mapping[str, str]
    sandbox: Sandbox

    def render(
        self,
        messages: Iterable[Message | Mapping[str, Any]],
        *,
        tokenizer: Tokenizer,
        tools: Iterable[ToolLike] | None = None,
        add_generation_prompt: bool = True,
        thinking: bool | None = None,
        keep_thinking: str = "auto",
    ) -> list[int]:
        """Token ids of the prompt for a conversation; arguments as chat.template.render has them.

        thinking       given to the template as `thinking` and `enable_thinking`; what it makes of them is its own
        keep_thinking  "auto": which reasoning is shown is the template's decision

        Raises RequestError on a bad conversation, an error in the template (with its line), a broken limit, or a
        template that decides by the text of a message; TokenizerError for a lone surrogate.
        """
        if keep_thinking != "auto":
            raise RequestError(
                f"chat template: keep_thinking must be 'auto', the template decides (got {keep_thinking!r})"
            )
        messages = as_messages(messages)
        declared = json.loads(json_text("chat: tools", declarations(tools))) or None
        fixed = {**self.tokens, "add_generation_prompt": add_generation_prompt, "documents": None}
        if thinking is not None:
            fixed |= {"thinking": thinking, "enable_thinking": thinking}
        given = {"messages": [_message_dict(m, _arguments) for m in messages], "tools": declared}
        try:
            return self._ids(given, fixed, tokenizer)
        except RequestError:
            if not any(m.tool_calls for m in messages):
                raise
            # Some templates take arguments as text. If that is no better, the first error is the one to see.
            given["messages"] = [_message_dict(m, str) for m in messages]
            with contextlib.suppress(RequestError):
                return self._ids(given, fixed, tokenizer)
            raise

    def _ids(self, given: dict[str, Any], fixed: dict[str, Any], tokenizer: Tokenizer) -> list[int]:
        """given: what is the caller's; fixed: the other variables."""
        mask = Mask(tokenizer.control_ids, given)
        try:
            masked = {key: mask.masked(value) for key, value in given.items()}
        except RecursionError:
            raise RequestError("chat: tools and arguments must not nest so deep") from None
        marked, plain = self.sandbox.render(
            self.source, [{**masked, **fixed}, {**given, **fixed}], mask.mark
        )
        if mask.unmasked(marked) != plain:
            raise RequestError(
                "chat template: must not decide by the text of a message (got another prompt with that text marked); "
                "give reasoning as reasoning_content and calls as tool_calls"
            )
        parts = mask.parts(marked)
        if not any(mask.holds_name(part) for part in parts if isinstance(part, str)):
            return tokenizer.encode_with_control(plain)
        return tokenizer.encode_parts(parts)


def find_template(folder: str | Path) -> JinjaTemplate | None:
    """The chat template of a checkpoint folder, None if it has none. Raises ConfigError on a malformed file."""
    source = template_source(folder)
    if source is None:
        return None
    config = read_tokenizer_config(folder)
    tokens = {name: _token_name(config.get(name)) for name in _TOKEN_NAMES}
    return JinjaTemplate(source, {k: v for k, v in tokens.items() if v is not None}, Sandbox())


def _token_name(value: Any) -> str | None:
    if isinstance(value, dict):
        value = value.get("content")
    return value if isinstance(value, str) else None


def _message_dict(message: Message, arguments: Callable[[str], Any]) -> dict[str, Any]:
    """As templates expect a message, absent fields absent; `arguments` turns those of a call into what is shown."""
    given: dict[str, Any] = {"role": message.role, "content": message.content or ""}
    for field in ("reasoning_content", "tool_call_id", "name"):
        if getattr(message, field) is not None:
            given[field] = getattr(message, field)
    if message.tool_calls:
        given["tool_calls"] = [
            {
                "id": call.id,
                "type": "function",
                "function": {"name": call.name, "arguments": arguments(call.arguments)},
            }
            for call in message.tool_calls
        ]
    return given


def _arguments(text: str) -> Any:
    """The object that the text holds, or the text."""
    try:
        value = json.loads(text or "{}")
    except (ValueError, RecursionError):
        return text
    return value if isinstance(value, dict) else text
