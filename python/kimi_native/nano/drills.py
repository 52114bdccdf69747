"""Drills: the two things that are hard in a problem, many times over and without all the rest.

A problem's conversation asks for one line of the list, and one last digit, in a hundred ids. A drill asks ten times as
often: the user's list as ever, then line after line as the expert would begin a step, for labels in random order and
values out of the air. Neither of these is to be learned; what the list says there and the last digit are.
"""

from __future__ import annotations

from kimi_native.chat.types import Message
from kimi_native.nano.dice import Dice
from kimi_native.nano.problems import FACTORS, Problem, Split, make_problem
from kimi_native.nano.texts import OPERATION_WORDS, last_digit
from kimi_native.nano.world import MODULUS

SYSTEM_TEXT = "Drill: begin any steps."
ANSWER = "Done."
FEWEST_LINES, MOST_LINES = 12, 32
LINE_END = "\n"


def make_drill(
    dice: Dice, split: Split, steps: tuple[int, int]
) -> tuple[tuple[Message, ...], tuple[tuple[int, int], ...]]:
    """A drill on a list of so many steps (fewest, most).

    returns  the messages, and the spans (start, stop) of characters of the reasoning that are not to be learned
    """
    problem = make_problem(dice, dice.between(*steps), split)
    text, hidden = "", []
    for index in range(dice.between(FEWEST_LINES, MOST_LINES)):
        for piece, is_learned in _line(dice, problem, is_first=index == 0):
            if not is_learned:
                hidden.append((len(text), len(text) + len(piece)))
            text += piece
    messages = (
        Message("system", SYSTEM_TEXT),
        Message("user", problem.text()),
        Message("assistant", ANSWER, reasoning_content=text),
    )
    return messages, tuple(hidden)


def _line(dice: Dice, problem: Problem, *, is_first: bool) -> list[tuple[str, bool]]:
    """One line in pieces, and whether each is to be learned."""
    index, a = dice.between(0, len(problem.steps)), dice.between(0, MODULUS - 1)
    opening = f"{'' if is_first else LINE_END}{problem.first_label + index}: {a}"
    if index == len(problem.steps):
        return [(opening, False)]
    step = problem.steps[index]
    if step.op == "save":
        return [(opening, False), (f" as {step.argument}", True)]
    if step.source == "number":
        b, is_in_list = int(step.argument), True
    elif dice.chance(0.5):
        return [(opening, False), (f" {OPERATION_WORDS[step.op]} {step.argument}", True)]
    else:  # as after the price or the note was got
        b, is_in_list = dice.choice(FACTORS), False
    digit = f"=..{last_digit(a, step.op, b)}"
    return [(opening, False), (step.op, True), (str(b), is_in_list), (digit, True)]
