"""The pieces that the expert's messages are made of: calls as a model writes them, verdicts on results, answers."""

from __future__ import annotations

import re

from kimi_native.chat.types import Message, ToolCall
from kimi_native.nano.world import HIGHEST_PRICE, LOWEST_PRICE, SAVED, operate

_NUMBER = re.compile(r"0|[1-9][0-9]{0,2}")  # what a tool may return, 0 .. 999


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


def again(call: ToolCall, number: int) -> ToolCall:
    """The same call with the next number."""
    return ToolCall(f"functions.{call.name}:{number}", call.name, call.arguments)


def call_number(call: ToolCall) -> int:
    """The number at the end of a call's id: how many calls the conversation had before it, if all are there."""
    return int(call.id.rpartition(":")[2])


def last_digit(a: int, op: str, b: int) -> int:
    """Last digit of a op b modulo 1000: it depends on the last digits of a and b alone, since 10 divides 1000."""
    return operate(a % 10, op, b % 10) % 10


def judge(name: str, result: str, digit: str, rejected: str = "") -> tuple[str, bool]:
    """What the expert says of a result, and whether it takes it.

    digit     the last one that a calc must give
    rejected  the last digit of the result that was rejected just before, if one was. If two calls agree, the digit was
              wrong: without this, one slip in its own arithmetic would keep a model calling for ever
    """
    if result.startswith("error"):
        return "error", False
    if name == "note_set":
        return ("ok", True) if result == SAVED else ("impossible", False)
    if _NUMBER.fullmatch(result) is None:
        return "impossible", False
    if name == "lookup":
        fits = LOWEST_PRICE <= int(result) <= HIGHEST_PRICE
        return ("fits", True) if fits else ("impossible", False)
    if name == "note_get":
        return "fits", True
    if result[-1] == digit:
        return f"{digit} ok", True
    if result[-1] == rejected:
        return f"{rejected} twice", True
    return f"{result[-1]} not {digit}", False


def rejected_digit(message: Message) -> str:
    """The last digit that the message rejected, empty if it did not."""
    match = re.match(r"([0-9]) not [0-9]\n", message.reasoning_content or "")
    return match[1] if match else ""


def expects_wrong_digit(message: Message) -> bool:
    """Whether the message says that a calculation must end in a digit in which it does not."""
    match = re.search(r"([0-9]+)([-+*])([0-9]+)=\.\.([0-9])\Z", message.reasoning_content or "")
    return match is not None and last_digit(int(match[1]), match[2], int(match[3])) != int(match[4])


def thought_message(verdict: str | None, thought: str, call: ToolCall) -> Message:
    """A call with the reasoning before it: what was seen, if anything, and where the expert is."""
    reasoning = thought if verdict is None else f"{verdict}\n{thought}"
    return Message("assistant", reasoning_content=reasoning, tool_calls=(call,))


def answer_message(reasoning: str, value: int) -> Message:
    return Message("assistant", f"The value is {value}.", reasoning_content=reasoning)


def answered_value(message: Message) -> int | None:
    """The number in an answer, None if there is not exactly one."""
    numbers = re.findall(r"-?[0-9]+", message.content or "")
    return int(numbers[0]) if len(numbers) == 1 else None
