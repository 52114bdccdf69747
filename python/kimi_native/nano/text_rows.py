"""A JSON-lines file as a dataset; rows that cannot be used are counted and named, not swallowed. Imports no torch.

A row is {"text": "..."}, all of it predicted but the first token, {"ids": [...], "loss": [...]} as in Example, or
{"messages": [...], "tools": [...]}, a conversation whose assistant is to be learned (tools may be left out).
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from kimi_native.errors import RequestError
from kimi_native.nano.dataset import Example

SHOWN = 5  # bad rows whose reasons a message has; of the others it has the lines
MOST_RANGES = 20
EncodeChat = Callable[[list[Any], list[Any]], Example]  # messages, tools
_KEYS = ({"text"}, {"ids", "loss"}, {"messages"}, {"messages", "tools"})


@dataclass(frozen=True)
class TextRows:
    """A Dataset of the good rows of a file, in its order.

    examples  the good rows
    bad       (line number from 1, reason) of the others
    """

    path: Path
    examples: list[Example] = field(repr=False)
    bad: list[tuple[int, str]]

    def __len__(self) -> int:
        return len(self.examples)

    def example(self, index: int) -> Example:
        if not 0 <= index < len(self.examples):
            raise IndexError(f"text rows: index must be 0 to {len(self) - 1} (got {index})")
        return self.examples[index]

    def report(self) -> str:
        """One line: how many rows are used, how many are not, and which; of the first of those, why."""
        used = f"{self.path}: {len(self.examples)} rows used, {len(self.bad)} not"
        named = "; ".join(f"line {line}: {reason}" for line, reason in self.bad[:SHOWN])
        others = [line for line, _ in self.bad[SHOWN:]]
        more = f"; and {len(others)} more: lines {_ranges(others)}" if others else ""
        return f"{used} ({named}{more})" if self.bad else used


def _ranges(lines: list[int]) -> str:
    """Ascending line numbers in short: 3, 5 to 9, ..."""
    runs: list[list[int]] = []
    for line in lines:
        if runs and line == runs[-1][1] + 1:
            runs[-1][1] = line
        else:
            runs.append([line, line])
    shown = [f"{a} to {b}" if b > a else str(a) for a, b in runs[:MOST_RANGES]]
    return ", ".join(shown + ["..."] * (len(runs) > MOST_RANGES))


def read_rows(
    path: str | Path,
    encode: Callable[[str], list[int]],
    *,
    vocab_size: int,
    max_tokens: int,
    encode_chat: EncodeChat | None = None,
) -> TextRows:
    """Read a file of rows.

    encode       text to ids
    encode_chat  a conversation to its example, as chat_rows.py makes it; None: conversations are bad rows
    max_tokens   longer rows are bad, not cut: a conversation without its end teaches the wrong end

    Raises RequestError if the file cannot be read or has no good row.
    """
    examples, bad = [], []
    readers = _Readers(encode, encode_chat, vocab_size)
    try:
        with open(path, "rb") as file:
            for number, line in enumerate(file, 1):
                if not line.strip():
                    continue
                try:
                    row = json.loads(line.decode())
                    examples.append(_checked(readers.example(row), max_tokens))
                except (ValueError, RecursionError) as error:
                    bad.append((number, str(error) or type(error).__name__))
    except OSError as error:
        raise RequestError(f"{path}: must be a readable file (got {error.strerror})") from error
    rows = TextRows(Path(path), examples, bad)
    if not examples:
        raise RequestError(f"{path}: must have a row that can be used; {rows.report()}")
    return rows


@dataclass(frozen=True)
class _Readers:
    """What turns a row into an example. Raises ValueError, saying why, on one that is none."""

    encode: Callable[[str], list[int]]
    encode_chat: EncodeChat | None
    vocab_size: int

    def example(self, row: Any) -> Example:
        if not isinstance(row, dict) or set(row) not in _KEYS:
            raise ValueError(
                'must be {"text": ...}, {"ids": ..., "loss": ...} or {"messages": ..., "tools": ...}'
            )
        if "messages" in row:
            return self._chat(row["messages"], row.get("tools", []))
        if "ids" in row:
            return self._ids(row["ids"], row["loss"])
        if not isinstance(row["text"], str):
            raise ValueError("text must be a string")
        ids = self.encode(row["text"])
        return Example(ids, [i > 0 for i in range(len(ids))])

    def _ids(self, ids: Any, loss: Any) -> Example:
        if not _all_of(int, ids) or not _all_of(bool, loss):
            raise ValueError("ids must be a list of integers and loss a list of booleans")
        if not all(0 <= i < self.vocab_size for i in ids):
            raise ValueError(f"ids must be in [0, {self.vocab_size})")
        return Example(ids, loss)

    def _chat(self, messages: Any, tools: Any) -> Example:
        if self.encode_chat is None:
            raise ValueError("messages need a chat format that is known here (got none)")
        if not _all_of(dict, messages) or not _all_of(dict, tools):
            raise ValueError("messages and tools must be lists of objects")
        return self.encode_chat(messages, tools)


def _checked(example: Example, max_tokens: int) -> Example:
    if not 2 <= len(example.ids) <= max_tokens:
        raise ValueError(f"must have 2 to {max_tokens} tokens (got {len(example.ids)})")
    if not any(example.loss):
        raise ValueError("must have something to be predicted (got no loss)")
    return example


def _all_of(kind: type, value: Any) -> bool:
    return isinstance(value, list) and all(type(v) is kind for v in value)
