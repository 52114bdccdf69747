"""A second output parser, of the whole answer at once, and the ids of answers written as text."""

from __future__ import annotations

import functools
import re

from chat_corpus import ARGS, CALL, CALL_END, CLOSE, END, SECTION, SECTION_END, THINK
from kimi_native.chat.call_ids import tool_name
from kimi_native.chat.parser import ParsedOutput
from kimi_native.chat.types import ToolCall


def to_ids(tokenizer, text: str, by_byte: bool) -> list[int]:
    """Ids of a corpus text: control names to their ids, <E6> to that byte; the rest merged, or byte by byte."""
    ids = []
    for piece in control_names(tokenizer).split(text.replace("<EOS>", "[EOS]")):
        if piece in tokenizer.control_ids:
            ids.append(tokenizer.control_ids[piece])
        elif re.fullmatch("<[0-9A-F]{2}>", piece):
            ids.append(byte_id(tokenizer, int(piece[1:3], 16)))
        elif by_byte:
            ids += [byte_id(tokenizer, b) for b in piece.encode()]
        else:
            ids += tokenizer.encode(piece)
    return ids


@functools.cache
def control_names(tokenizer) -> re.Pattern:
    return re.compile(f"({'|'.join(map(re.escape, tokenizer.control_ids))}|<[0-9A-F]{{2}}>)")


@functools.cache
def byte_id(tokenizer, byte: int) -> int:
    return next(i for i in range(256) if tokenizer.decode_bytes([i]) == bytes([byte]))


def naive_parse(tokenizer, ids, thinks):
    """Whole segments first, rules afterwards: nothing is held back because everything is known."""
    name_of = {i: n for n, i in tokenizer.control_ids.items()}
    segments = [["reasoning" if thinks else "content", b""]]
    ended = False
    for token_id in ids:
        name = name_of.get(token_id)
        kind = segments[-1][0]
        if name in ("[EOS]", END):
            ended = True
            break
        if name is None:
            segments[-1][1] += tokenizer.decode_bytes([token_id])
        elif (name == THINK and kind == "content") or (name == CLOSE and kind == "reasoning"):
            segments.append(["reasoning" if name == THINK else "content", b""])
        elif (name == SECTION and kind in ("reasoning", "content")) or (
            name in (SECTION_END, CALL_END) and kind in ("header", "arguments")
        ):
            segments.append(["between", b""])
        elif name == CALL:
            segments.append(["header", b""])
        elif name == ARGS and kind == "header":
            segments.append(["arguments", b""])
    reasoning, content, tool_calls = "", "", []
    last = len(segments) - 1
    unfinished = False
    for i, (kind, data) in enumerate(segments):
        text = data.decode(errors="replace")
        if kind == "reasoning":
            reasoning += text.rstrip()
        elif kind == "content":
            content += text if text.strip() or i == last else ""
        elif kind == "header":
            has_arguments = i < last and segments[i + 1][0] == "arguments"
            unfinished |= i == last
            if tool_name(text.strip()) and i < last:
                arguments = segments[i + 1][1].decode(errors="replace") if has_arguments else ""
                if has_arguments and i + 1 == last:
                    unfinished = True
                    arguments = arguments.lstrip()
                else:
                    arguments = arguments.strip() or "{}"
                tool_calls.append(ToolCall(text.strip(), tool_name(text.strip()), arguments))
    reason = "length" if not ended else "tool_calls" if tool_calls else "stop"
    return ParsedOutput(reasoning or None, content or None, tuple(tool_calls), unfinished, reason)
