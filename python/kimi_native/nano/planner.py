"""The expert's two other ways: all calls planned before the first, and no calls at all.

Start with 12. dk: add 5, dl: times price of fig, dm: save as red, dn: minus note red, do: report the value

    plan-first                               calls
    dk: add 5: #0=12+5                       calc(12, "+", 5)
    dl: times price of fig: #1=fig #2=#0*#1  lookup("fig") calc("#0", "*", "#1")
    dm: save as red: #3=#2                   note_set("red", "#2")
    dn: minus note red: #4=red #5=#2-#4      note_get("red") calc("#2", "-", "#4")
    do: report the value: #5

    no-tools (fig is 23)
    dk: add 5: 12+5=17
    dl: times price of fig: 17*23=391
    dm: save as red: 391
    dn: minus note red: 391-391=0
    do: report the value: 0
"""

from __future__ import annotations

from collections.abc import Sequence

from kimi_native.chat.types import Message, ToolCall
from kimi_native.nano.problems import Sheet
from kimi_native.nano.texts import (
    answer_message,
    calc_call,
    call_number,
    lookup_call,
    note_get_call,
    note_set_call,
)
from kimi_native.nano.world import operate

FAILED = "A tool failed."


def make_plan(sheet: Sheet, number: int) -> Message:
    """Every call at once. number: of the first call."""
    lines: list[str] = []
    calls: list[ToolCall] = []
    value = str(sheet.start)  # a number, or "#n"
    for label, step in sheet.steps.items():
        n, where = number + len(calls), sheet.line(label)
        if step is None:
            lines.append(f"{where}: {value}")
        elif step.op == "save":
            calls.append(note_set_call(n, step.argument, value))
            lines.append(f"{where}: #{n}={value}")
        elif step.source == "number":
            calls.append(calc_call(n, value, step.op, step.argument))
            lines.append(f"{where}: #{n}={value}{step.op}{step.argument}")
            value = f"#{n}"
        else:
            get = lookup_call if step.source == "price" else note_get_call
            calls += [get(n, step.argument), calc_call(n + 1, value, step.op, f"#{n}")]
            lines.append(f"{where}: #{n}={step.argument} #{n + 1}={value}{step.op}#{n}")
            value = f"#{n + 1}"
    return Message("assistant", reasoning_content="\n".join(lines), tool_calls=tuple(calls))


def look_back(turn: Sequence[Message]) -> Message:
    """The answer to the results of a plan. turn: the message with the plan, then a tool message for each call."""
    plan = turn[0]
    value = (plan.reasoning_content or "").rpartition(": ")[2]
    if not value.startswith("#"):
        return answer_message(value, int(value))  # nothing but saving was asked for
    numbers = [call_number(call) for call in plan.tool_calls]
    result = turn[1 + numbers.index(int(value[1:]))].content or ""
    if not result.isdecimal():
        return Message("assistant", FAILED, reasoning_content=f"{value} failed")
    return answer_message(f"{value} is {result}", int(result))


def think_alone(sheet: Sheet) -> Message:
    """The whole calculation in the reasoning."""
    lines, notes, value = [], {}, sheet.start
    for label, step in sheet.steps.items():
        where = sheet.line(label)
        if step is None:
            lines.append(f"{where}: {value}")
        elif step.op == "save":
            notes[step.argument] = value
            lines.append(f"{where}: {value}")
        else:
            operand = _operand(sheet, notes, step.source, step.argument)
            result = operate(value, step.op, operand)
            lines.append(f"{where}: {value}{step.op}{operand}={result}")
            value = result
    return answer_message("\n".join(lines), value)


def _operand(sheet: Sheet, notes: dict[str, int], source: str, argument: str) -> int:
    if source == "number":
        return int(argument)
    known = sheet.prices if source == "price" else notes
    if argument not in known:
        raise ValueError(
            f"expert: without tools every price must be in the text (got {argument!r})"
        )
    return known[argument]
