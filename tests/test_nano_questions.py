"""Single questions: the expert's answers are right, with tools and without."""

from __future__ import annotations

import re

import pytest

from kimi_native.chat.types import Message
from kimi_native.nano import expert
from kimi_native.nano.dice import Dice
from kimi_native.nano.questions import Question, make_question, read_question
from kimi_native.nano.small_talk import all_exchanges
from kimi_native.nano.world import KEYS, Failures, World


def ask(text, world):
    messages = [Message("user", text)]
    while True:
        messages.append(expert.answer(messages))
        if not messages[-1].tool_calls:
            return messages[-1].content
        for call in messages[-1].tool_calls:
            messages.append(Message("tool", world.run(call), tool_call_id=call.id))


def truth(text, prices):
    """An independent reading: Python's own arithmetic on the text with its words made signs."""
    signs = {"plus": "+", "minus": "-", "times": "*"}
    for word, sign in signs.items():
        text = text.replace(word, sign)
    a, sign, b = (
        re.search(r"(\d+) *([-+*]) *(\d+)", text).groups() if re.search(r"\d", text) else (0, "", 0)
    )
    if not sign:
        return next(price for key, price in prices.items() if re.search(rf"\b{key}\b", text))
    return {"+": int(a) + int(b), "-": int(a) - int(b), "*": int(a) * int(b)}[sign]


PRICES = {key: 2 + 3 * number for number, key in enumerate(KEYS)}


@pytest.mark.parametrize("rate", [0, 0.3])
def test_questions_are_answered_with_tools(rate):
    for index in range(300):
        dice = Dice(index)
        text, _ = make_question(dice, is_price=dice.chance(0.3))
        world = World(PRICES, dice, Failures(rate, wrong=0))
        assert ask(text, world) == f"The value is {truth(text, PRICES)}."
        assert len(world.log) == 1 + sum(call.failure is not None for call in world.log)


def test_questions_are_answered_without_tools():
    for index in range(300):
        text, question = make_question(Dice(index), is_price=False)
        message = expert.answer([Message("user", text)], has_tools=False)
        assert message.content == f"The value is {truth(text, {})}."
        for a, sign, b, result in re.findall(r"(\d+)([-+*])(\d+)=(\d+)", message.reasoning_content):
            assert truth(a + sign + b, {}) == int(result)
        assert question == read_question(text)


def test_questions_show_how_a_product_is_counted():
    message = expert.answer([Message("user", "What is 17 * 23?")], has_tools=False)
    assert message.reasoning_content == "17*20=340 17*3=51 340+51=391"
    message = expert.answer([Message("user", "What is 17 * 23?")])
    assert message.reasoning_content == "17*23=..1"


def test_questions_without_tools_know_no_price():
    with pytest.raises(ValueError, match=r"price of fig needs a tool \(got none\)"):
        expert.answer([Message("user", "What does fig cost?")], has_tools=False)


def test_questions_are_read_back_and_small_talk_is_none():
    for index in range(300):
        text, question = make_question(Dice(index), is_price=index % 2 == 0)
        assert read_question(text) == question
    asked = [e.question for e in all_exchanges() if read_question(e.question)]
    assert asked == []
    assert read_question("") is None
    assert read_question("How much is tea?") == Question(key="tea")
