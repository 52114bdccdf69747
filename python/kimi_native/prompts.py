"""What a prompt may be, and its token ids: a text, messages, or ids; needs no weights."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from kimi_native.chat.template import render
from kimi_native.chat.types import Message
from kimi_native.errors import RequestError

if TYPE_CHECKING:
    from kimi_native.chat.jinja_template import JinjaTemplate
    from kimi_native.config import KimiConfig
    from kimi_native.tokenizer import Tokenizer

Prompt = str | Sequence[int] | Sequence[Message | Mapping[str, Any]]


class TextSide(NamedTuple):
    """What a checkpoint says about text.

    chat_format    one of chat.template.FORMATS, or None: then its own chat_template renders, if it has one
    """

    config: KimiConfig
    tokenizer: Tokenizer
    chat_format: str | None
    chat_template: JinjaTemplate | None


def prompt_ids(
    prompt: Prompt, raw_prompt: bool, options: Mapping[str, Any], text: TextSide
) -> list[int]:
    """The token ids of one prompt.

    options  of chat.template.render; None is not given

    Raises RequestError on a prompt of another type, or options where nothing is rendered.
    """
    given = {name: value for name, value in options.items() if value is not None}
    is_ids = isinstance(prompt, (list, tuple)) and not is_conversation(prompt)
    if (raw_prompt or is_ids) and given:
        raise RequestError(
            f"generate: {next(iter(given))} needs a prompt that the chat format renders"
        )
    if is_ids:
        return list(prompt)
    if raw_prompt:
        if not isinstance(prompt, str):
            raise RequestError("generate: raw_prompt=True needs a text or ids (got messages)")
        return text.tokenizer.encode(prompt)
    if not isinstance(prompt, (str, list, tuple)):
        raise RequestError(
            f"generate: prompt must be a text, messages, or ids (got {type(prompt).__name__})"
        )
    messages = [Message("user", prompt)] if isinstance(prompt, str) else prompt
    if text.chat_format is not None:
        return render(messages, format=text.chat_format, tokenizer=text.tokenizer, **given)
    if text.chat_template is not None:
        return text.chat_template.render(messages, tokenizer=text.tokenizer, **given)
    raise RequestError(
        "generate: this checkpoint has no chat format known here and no chat template "
        f"(got model_type={text.config.model_type}); pass raw_prompt=True to continue a text as it stands"
    )


def is_conversation(prompt: Sequence[Any]) -> bool:
    """Whether a list holds messages."""
    return len(prompt) > 0 and isinstance(prompt[0], (Message, Mapping))


def prompt_list(prompt: Any) -> list[Prompt] | None:
    """The prompts of a list of prompts; None for a single prompt."""
    if not isinstance(prompt, (list, tuple)):
        return None
    if not prompt:
        raise RequestError(
            "generate: prompt must hold at least one token, message or prompt (got none)"
        )
    return list(prompt) if isinstance(prompt[0], (str, list, tuple)) else None
