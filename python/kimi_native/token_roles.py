"""What a token is: its place in a conversation, or the kind of its characters. Imports no torch.

The place follows from the ids alone: control tokens open and close turns, reasoning and calls (chat/template.py), and
no text can give their ids.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Iterable, Sequence
from typing import Literal, get_args

from kimi_native.chat.template import END_THINK, FAMILY_TOKENS, THINK
from kimi_native.errors import RequestError
from kimi_native.tokenizer import Tokenizer

Labels = Literal["auto", "roles", "characters"]

# special: control tokens and the role names after them. text: what the assistant says, and text of no turn.
ROLES = ("special", "system", "user", "reasoning", "call", "result", "text")
# bytes: a token that is a part of a character.
CHARACTERS = ("special", "words", "digits", "punctuation", "spaces", "bytes")

_RESULT_START = "## Return of "
_OPENS = {THINK: "reasoning", "<|tool_calls_section_begin|>": "call"}
_CLOSES = (END_THINK, "<|tool_calls_section_end|>")


def label_names(
    sequences: Iterable[Sequence[int]], tokenizer: Tokenizer, labels: Labels = "auto"
) -> tuple[str, ...]:
    """ROLES or CHARACTERS: which of them `labels` means for these ids. Raises RequestError on another word.

    auto  ROLES if a sequence opens a turn, else CHARACTERS
    """
    if labels not in get_args(Labels):
        raise RequestError(
            f"routing: labels must be one of {', '.join(get_args(Labels))} (got {labels!r})"
        )
    middle = tokenizer.control_ids.get("<|im_middle|>")
    if labels == "auto":
        labels = "roles" if any(middle in ids for ids in sequences) else "characters"
    return ROLES if labels == "roles" else CHARACTERS


def token_labels(ids: Sequence[int], tokenizer: Tokenizer, names: tuple[str, ...]) -> list[str]:
    """One of `names`, which are ROLES or CHARACTERS, for each id. Raises TokenizerError on an unknown id."""
    if names == ROLES:
        return token_roles(ids, tokenizer)
    control = set(tokenizer.control_ids.values())
    return ["special" if i in control else characters(tokenizer.decode_bytes([i])) for i in ids]


def token_roles(ids: Sequence[int], tokenizer: Tokenizer) -> list[str]:
    """One of ROLES for each id of a conversation in one of chat.template.FORMATS."""
    control = {token_id: name for name, token_id in tokenizer.control_ids.items()}
    openings, end = FAMILY_TOKENS[:3], FAMILY_TOKENS[4]
    roles, role, opening, header = [], "text", "", 0
    for position, token_id in enumerate(ids):
        name = control.get(token_id)
        if name is None:
            roles.append(role)
            continue
        roles.append("special")
        if name in openings:
            opening, header, role = name, position + 1, "special"
        elif name == "<|im_middle|>" and role == "special":
            role = _role_of_turn(opening, ids, header, position, tokenizer)
        elif name == end:
            role = "text"
        elif opening == "<|im_assistant|>":
            role = _OPENS.get(name, "text" if name in _CLOSES else role)
    return roles


def _role_of_turn(
    opening: str, ids: Sequence[int], header: int, middle: int, tokenizer: Tokenizer
) -> str:
    if opening != "<|im_system|>":
        return "user" if opening == "<|im_user|>" else "text"
    # A tool's message may carry the tool's name instead of its role, but always starts the same way.
    start = tokenizer.decode(ids[middle + 1 : middle + 1 + len(_RESULT_START)])
    is_result = tokenizer.decode(ids[header:middle]) == "tool" or start.startswith(_RESULT_START)
    return "result" if is_result else "system"


def characters(token: bytes) -> str:
    """One of CHARACTERS for a token's bytes: what most of its characters are, of equals the first in that order."""
    try:
        text = token.decode("utf-8")
    except UnicodeDecodeError:
        return "bytes"
    kinds = [_kind(c) for c in text if not c.isspace()]
    return max(("words", "digits", "punctuation"), key=kinds.count) if kinds else "spaces"


def _kind(character: str) -> str:
    category = unicodedata.category(character)[0]
    return {"L": "words", "M": "words", "N": "digits"}.get(category, "punctuation")
