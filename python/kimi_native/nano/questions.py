"""Single questions: what is 17 * 23, what does a fig cost. With tools the expert calls one; without, it counts.

What is 17 * 23?                         with calc         17*23=..1      calc(17, "*", 23)   -> 391
                                                           1 ok           The value is 391.
                                         without           17*20=340 17*3=51 340+51=391       The value is 391.
What is the price of fig?                with lookup       price of fig   lookup("fig")       -> 23
                                                           fits           The value is 23.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from kimi_native.chat.types import Message
from kimi_native.nano.dice import Dice
from kimi_native.nano.texts import (
    again,
    answer_message,
    calc_call,
    call_number,
    judge,
    last_digit,
    lookup_call,
    rejected_digit,
    thought_message,
)
from kimi_native.nano.world import KEYS, MODULUS, operate

_WORDS = {"+": "plus", "-": "minus", "*": "times"}
_SIGNS = {**{op: op for op in _WORDS}, **{word: op for op, word in _WORDS.items()}}
_CALCULATIONS = (
    *(
        "What is {}?",
        "What's {}?",
        "How much is {}?",
        "Compute {}.",
        "Calculate {}.",
        "{}",
        "{} = ?",
    ),
    *("Hi, what is {}?", "Tell me what {} is.", "what is {}"),
)
_PRICES = (
    *("What is the price of {}?", "What does {} cost?", "How much is {}?", "The price of {}?"),
    *("Look up {}.", "Tell me the price of {}."),
)
_CALCULATION = re.compile(r"([0-9]{1,3}) ?([-+*]|plus|minus|times) ?([0-9]{1,3})")


@dataclass(frozen=True)
class Question:
    """A calculation, or, with op empty, the price of a key."""

    a: int = 0
    op: str = ""
    b: int = 0
    key: str = ""


def make_question(dice: Dice, *, is_price: bool) -> tuple[str, Question]:
    """What the user says, and what is meant. A calculation has its result in 0 .. 999, modulo or not."""
    if is_price:
        key = dice.choice(KEYS)
        return dice.choice(_PRICES).format(key), Question(key=key)
    op = dice.choice("+-*")
    if op == "*":
        a = dice.between(2, 99)
        b = dice.between(2, min(99, (MODULUS - 1) // a))
    else:
        a = dice.between(1, MODULUS - 1)
        b = dice.between(0, a if op == "-" else MODULUS - 1 - a)
    sign = dice.choice((f" {op} ", op, f" {_WORDS[op]} "))
    return dice.choice(_CALCULATIONS).format(f"{a}{sign}{b}"), Question(a, op, b)


def read_question(text: str) -> Question | None:
    """The question in a user's text, None if there is none."""
    if match := _CALCULATION.search(text):
        a, sign, b = match.groups()
        return Question(int(a), _SIGNS[sign], int(b))
    words = re.findall("[a-z]+", text)
    return next((Question(key=key) for key in KEYS if key in words), None)


def first_message(question: Question, number: int) -> Message:
    """The call that the question asks for. number: of that call."""
    if not question.op:
        return thought_message(None, f"price of {question.key}", lookup_call(number, question.key))
    a, op, b = question.a, question.op, question.b
    thought = f"{a}{op}{b}=..{last_digit(a, op, b)}"
    return thought_message(None, thought, calc_call(number, str(a), op, str(b)))


def next_message(question: Question, last: Message, result: str) -> Message:
    """The answer, or the call again if its result cannot be. last: the message with the call."""
    call, thought = last.tool_calls[0], (last.reasoning_content or "").rpartition("\n")[2]
    verdict, fine = judge(
        call.name, result, thought[-1:] if question.op else "", rejected_digit(last)
    )
    if fine:
        return answer_message(verdict, int(result))
    return thought_message(verdict, thought, again(call, call_number(call) + 1))


def think_alone(question: Question) -> Message:
    """The calculation in the reasoning; a product of two-digit numbers as the sum of its tens and ones.

    Raises ValueError for a price, which only a tool knows.
    """
    a, op, b = question.a, question.op, question.b
    if not op:
        raise ValueError(f"expert: the price of {question.key} needs a tool (got none)")
    result = operate(a, op, b)
    tens, ones = b // 10 * 10, b % 10
    if op != "*" or not tens or not ones:
        return answer_message(f"{a}{op}{b}={result}", result)
    steps = f"{a}*{tens}={a * tens} {a}*{ones}={a * ones} {a * tens}+{a * ones}={result}"
    return answer_message(steps, result)
