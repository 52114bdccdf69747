"""The policy that kimi-nano learns, as a function of the conversation's text.

Made so that a small model can carry it out. Before every call it writes down where it is: the step's label and line,
the value, and of a calculation the last digit that must come. After the call it writes what it saw, and either the next
step or the same one again. So each message follows from the user's list, the message before and its result, however
long the conversation is. The list is asked for one thing a step, the line of a label, which is repeated word by word;
everything else stands a few words before, is the label that comes next, or one digit of mental arithmetic.

    dk: add 5: 12+5=..7                       calc(12, "+", 5)       -> 17
    7 ok, dl: times price of fig: 17          lookup("fig")          -> error: timeout
    error, dl: times price of fig: 17         lookup("fig")          -> 23
    fits, dl: times price of fig: 17*23=..1   calc(17, "*", 23)      -> 404
    4 not 1, dl: times price of fig: 17*23=..1  calc(17, "*", 23)    -> 391
    1 ok, dm: save as red: 391                note_set("red", 391)   -> saved
    ok, dn: report the value: 391             The value is 391.

(In the text the comma is a line break.) A result that comes twice is taken: "4 twice" instead of another "4 not 1".
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

from kimi_native.chat.types import Message
from kimi_native.nano import questions
from kimi_native.nano.modes import Mode, mode_of
from kimi_native.nano.planner import look_back, make_plan, think_alone
from kimi_native.nano.problems import LABEL_PATTERN, LABELS, Sheet, read_sheet, read_step
from kimi_native.nano.texts import (
    again,
    answer_message,
    calc_call,
    call_number,
    judge,
    last_digit,
    lookup_call,
    note_get_call,
    note_set_call,
    rejected_digit,
    thought_message,
)

_STATE = re.compile(rf"({LABEL_PATTERN}): ([^:\n]+): ([0-9]+)(?:[-+*][0-9]+=\.\.([0-9]))?\Z")


def answer(messages: Sequence[Message], *, first_call: int = 0, has_tools: bool = True) -> Message:
    """The expert's next message in a conversation whose last user message is a problem or a single question.

    first_call  number of the next call, if the conversation has none yet
    has_tools   whether any are declared; a problem says so in its system message

    Raises ValueError if there is neither, or the assistant's last message is not the expert's.
    """
    last_user = max(i for i, message in enumerate(messages) if message.role == "user")
    text = messages[last_user].content or ""
    turn = messages[last_user + 1 :]
    calls = (m.tool_calls[-1] for m in reversed(messages) if m.tool_calls)
    number = next((call_number(call) + 1 for call in calls), first_call)
    sheet = _sheet(text)
    if sheet is not None:
        return _work(sheet, mode_of(messages), turn, number)
    question = questions.read_question(text)
    if question is None:
        raise ValueError(f"expert: the user must pose a problem or question (got {text[:80]!r})")
    if not has_tools:
        return questions.think_alone(question)
    if not turn:
        return questions.first_message(question, number)
    return questions.next_message(question, turn[-2], turn[-1].content or "")


def _work(sheet: Sheet, mode: Mode, turn: Sequence[Message], number: int) -> Message:
    if mode == "no-tools":
        return think_alone(sheet)
    if mode == "plan-first":
        return look_back(turn) if turn else make_plan(sheet, number)
    if not turn:
        return start_at(sheet, sheet.first_label, sheet.start, number)
    return follow(sheet, turn[-2], turn[-1].content or "")


@lru_cache(maxsize=8)
def _sheet(text: str) -> Sheet | None:
    return read_sheet(text)


# ---- interleaved ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _State:
    """What the last reasoning says. digit: the last one that must come, empty where none is said."""

    label: int
    line: str
    value: int
    digit: str
    text: str


def start_at(sheet: Sheet, label: int, value: int, number: int) -> Message:
    """The message that starts the step of that label from that value, with no call before it."""
    return _step(sheet, None, label, value, number)


def follow(sheet: Sheet, last: Message, result: str) -> Message:
    """What comes after a message of the expert's and the result of its call."""
    state = _read_state(last.reasoning_content or "")
    call = last.tool_calls[0]
    number = call_number(call) + 1
    verdict, fine = judge(call.name, result, state.digit, rejected_digit(last))
    if not fine:
        return thought_message(verdict, state.text, again(call, number))
    if call.name in ("lookup", "note_get"):
        step = read_step(state.line)
        if step is None:
            raise ValueError(f"expert: a result must be for a step (got {state.text!r})")
        where = f"{LABELS[state.label]}: {state.line}"
        return _calculate(verdict, where, state.value, step.op, int(result), number)
    value = int(result) if call.name == "calc" else state.value
    return _step(sheet, verdict, state.label + 1, value, number)


def _read_state(reasoning: str) -> _State:
    match = _STATE.search(reasoning)
    if match is None:
        raise ValueError(f"expert: reasoning must end with a state (got {reasoning!r})")
    label, line, value, digit = match.groups()
    return _State(LABELS.index(label), line, int(value), digit or "", match.group())


def _step(sheet: Sheet, verdict: str | None, label: int, value: int, number: int) -> Message:
    """The first message of a step."""
    step, where = sheet.steps[label], sheet.line(label)
    thought = f"{where}: {value}"
    if step is None:
        return answer_message(thought if verdict is None else f"{verdict}\n{thought}", value)
    if step.source == "number":
        return _calculate(verdict, where, value, step.op, int(step.argument), number)
    name = step.argument
    if step.op == "save":
        call = note_set_call(number, name, str(value))
    elif step.source == "price":
        call = lookup_call(number, name)
    else:
        call = note_get_call(number, name)
    return thought_message(verdict, thought, call)


def _calculate(verdict: str | None, where: str, a: int, op: str, b: int, number: int) -> Message:
    thought = f"{where}: {a}{op}{b}=..{last_digit(a, op, b)}"
    return thought_message(verdict, thought, calc_call(number, str(a), op, str(b)))
