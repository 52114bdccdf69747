"""The pieces that the expert's messages are made of: calls as a model writes them, and answers."""

from __future__ import annotations

import re

from kimi_native.chat.types import Message, ToolCall
from kimi_native.nano.world import operate


def calc_call(number: int, a: str, op: str, b: str) -> ToolCall:
    """A call of calc; a and b: numbers, or "#n" for the result of call n."""
    return _call("calc", number, f'{{"a":{_operand(a)},"op":"{op}","b":{_operand(b)}}}')


def lookup_call(number: int, key: str) -> ToolCall:
    return _call("lookup", number, f'{{"key":"{key}"}}')


def note_set_call(number: int, name: str, value: str) -> ToolCall:
    return _call("note_set", number, f'{{"name":"{name}","value":{_operand(value)}}}')


def note_get_call(number: int, name: str) -> ToolCall:
    return _call("note_get", number, f'{{"name":"{name}"}}')


def _call(name: str, number: int, arguments: str) -> ToolCall:
    return ToolCall(f"functions.{name}:{number}", name, arguments)


def _operand(text: str) -> str:
    return f'"{text}"' if text.startswith("#") else text


def call_number(call: ToolCall) -> int:
    """The number at the end of a call's id: how many calls the conversation had before it, if all are there."""
    return int(call.id.rpartition(":")[2])


def last_digit(a: int, op: str, b: int) -> int:
    """Last digit of a op b modulo 1000: it depends on the last digits of a and b alone, since 10 divides 1000."""
    return operate(a % 10, op, b % 10) % 10


def answer_message(reasoning: str, value: int) -> Message:
    return Message("assistant", f"The value is {value}.", reasoning_content=reasoning)


def answered_value(message: Message) -> int | None:
    """The number in an answer, None if there is not exactly one."""
    numbers = re.findall(r"-?[0-9]+", message.content or "")
    return int(numbers[0]) if len(numbers) == 1 else None
