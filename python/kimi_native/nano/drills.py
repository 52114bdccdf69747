"""Drills: what is hard in a problem, many times over and without all the rest.

A problem's conversation asks for one line of the list, and one last digit, in a hundred ids. A drill asks ten times as
often: the user's list as ever, then line after line as the expert would begin a step, for labels in random order and
values out of the air. Neither of these is to be learned; what the list says there and the last digit are.

In another drill the list's labels are said, one after the other: a label is rare, and which one comes first and which
next is asked once a step.
"""

from __future__ import annotations

from kimi_native.chat.types import Message
from kimi_native.nano.dice import Dice
from kimi_native.nano.problems import (
    FACTORS,
    LABELS,
    Sheet,
    Split,
    make_problem,
    read_sheet,
)
from kimi_native.nano.texts import last_digit
from kimi_native.nano.world import MODULUS

LINES_TEXT, LABELS_TEXT = "Drill: begin any steps.", "Drill: say the labels."
_SAYING_LABELS = 0.4
ANSWER = "Done."
FEWEST_LINES, MOST_LINES = 12, 32
LINE_END = "\n"


def make_drill(
    dice: Dice, split: Split, steps: tuple[int, int]
) -> tuple[tuple[Message, ...], tuple[tuple[int, int], ...]]:
    """A drill on a list of so many steps (fewest, most).

    returns  the messages, and the spans (start, stop) of characters of the reasoning that are not to be learned
    """
    text, hidden = "", []
    problem = make_problem(dice, dice.between(*steps), split)
    sheet = read_sheet(problem.text())
    assert sheet is not None  # the generator's own text
    if dice.chance(_SAYING_LABELS):
        text = LINE_END.join(LABELS[label] for label in sheet.steps)
        return _messages(LABELS_TEXT, problem.text(), text), ()
    labels = sorted(sheet.steps, key=lambda _: dice.random())[
        : dice.between(FEWEST_LINES, MOST_LINES)
    ]
    for label in labels:
        for piece, is_learned in _line(dice, sheet, label, is_first=label == labels[0]):
            if not is_learned:
                hidden.append((len(text), len(text) + len(piece)))
            text += piece
    return _messages(LINES_TEXT, problem.text(), text), tuple(hidden)


def _messages(system: str, user: str, reasoning: str) -> tuple[Message, ...]:
    answer = Message("assistant", ANSWER, reasoning_content=reasoning)
    return Message("system", system), Message("user", user), answer


def _line(dice: Dice, sheet: Sheet, label: int, *, is_first: bool) -> list[tuple[str, bool]]:
    """One line in pieces, and whether each is to be learned."""
    a, line, step = dice.between(0, MODULUS - 1), sheet.lines[label], sheet.steps[label]
    pieces = [(f"{'' if is_first else LINE_END}{LABELS[label]}:", False), (f" {line}:", True)]
    pieces.append((f" {a}", False))
    if step is None or step.op == "save":
        return pieces
    if step.source == "number":
        b = int(step.argument)
    elif dice.chance(0.5):
        return pieces  # as before the price or the note is got
    else:
        b = dice.choice(FACTORS)
    is_in_list = step.source == "number"
    digit = f"=..{last_digit(a, step.op, b)}"
    return [*pieces, (step.op, True), (str(b), is_in_list), (digit, True)]
