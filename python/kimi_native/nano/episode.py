"""One problem played with an assistant: its calls are run in a world, until it answers or breaks the mode's rules."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import pairwise, zip_longest
from typing import Literal

from kimi_native.chat.tool import Tool
from kimi_native.chat.types import Message
from kimi_native.nano.modes import Mode, declared_tools, opening_messages
from kimi_native.nano.problems import Problem, Step
from kimi_native.nano.texts import answered_value
from kimi_native.nano.world import SAVED, Call, FailureKind, World

# solved and wrong: it answered; calls: it called where the mode allows no call; stuck: too many calls
Outcome = Literal["open", "solved", "wrong", "calls", "stuck"]


@dataclass
class Episode:
    """A problem in progress.

    world     whose prices are the problem's; its log is the record of all calls
    messages  the conversation so far, from the system message on
    outcome   "open" while the assistant's turn comes next
    """

    problem: Problem
    mode: Mode
    world: World
    messages: list[Message] = field(default_factory=list)
    outcome: Outcome = "open"

    def __post_init__(self) -> None:
        self.messages = opening_messages(self.problem, self.mode)

    @property
    def tools(self) -> tuple[Tool, ...]:
        """What is declared to the assistant."""
        return declared_tools(self.mode)

    @property
    def max_calls(self) -> int:
        """Twice what two calls a step would take, and some: far beyond what an assistant that works needs."""
        return 20 + 4 * len(self.problem.steps)

    def push(self, message: Message) -> None:
        """The assistant's message; its calls are answered, or the episode ends. Raises RuntimeError if it has ended."""
        if self.outcome != "open":
            raise RuntimeError(f"episode: must be open (got outcome={self.outcome})")
        called_before = any(m.role == "tool" for m in self.messages)
        self.messages.append(message)
        if not message.tool_calls:
            right = answered_value(message) == self.problem.values()[-1]
            self.outcome = "solved" if right else "wrong"
        elif self.mode == "no-tools" or (self.mode == "plan-first" and called_before):
            self.outcome = "calls"
        elif len(self.world.log) + len(message.tool_calls) > self.max_calls:
            self.outcome = "stuck"
        else:
            self._run_calls(message)

    def _run_calls(self, message: Message) -> None:
        results: dict[str, str] = {}  # number of a call of this message -> result
        for call in message.tool_calls:
            arguments = call.arguments
            if self.mode == "plan-first":
                arguments = with_results(arguments, results)
            result = self.world.run(type(call)(call.id, call.name, arguments))
            results[call.id.rpartition(":")[2]] = result
            self.messages.append(Message("tool", result, tool_call_id=call.id))

    # ---- what the record says ----

    @property
    def num_right_steps(self) -> int:
        """How many steps were taken right, from the first on, until one was not."""
        if self.mode == "no-tools":
            return _num_right_lines(self.problem, self.messages[-1].reasoning_content or "")
        values, right = self.problem.values(), 0
        for call in self.world.log:
            if right < len(self.problem.steps) and _takes(
                call, self.problem.steps[right], values[right], values[right + 1]
            ):
                right += 1
        return right

    @property
    def failures(self) -> dict[FailureKind, tuple[int, int]]:
        """Kind of failure -> (caught, all): failed calls that were made again at once, and all failed calls."""
        log, counts = self.world.log, {}
        for call, after in zip_longest(log, log[1:]):
            if call.failure is not None:
                caught, failed = counts.get(call.failure, (0, 0))
                counts[call.failure] = (caught + _is_same(call, after), failed + 1)
        return counts

    @property
    def num_false_alarms(self) -> int:
        """Calls made again although nothing was wrong with the result."""
        return sum(
            a.failure is None and not a.refused and _is_same(a, b)
            for a, b in pairwise(self.world.log)
        )


def with_results(arguments: str, results: Mapping[str, str]) -> str:
    """The arguments with every "#n" that has a whole number for a result replaced by it; others stay as they are."""

    def result_of(match: re.Match[str]) -> str:
        result = results.get(match[1], "")
        return result if result.isdecimal() else match[0]

    return re.sub(r'"#([0-9]+)"', result_of, arguments)


def _is_same(a: Call, b: Call | None) -> bool:
    return b is not None and (a.name, a.arguments) == (b.name, b.arguments)


def _takes(call: Call, step: Step, before: int, after: int) -> bool:
    """Whether the call takes the step from the value before it to the value after it."""
    if step.op == "save":
        arguments = {"name": step.argument, "value": before}
        return (call.name, call.arguments, call.result) == ("note_set", arguments, SAVED)
    return (
        call.name == "calc"
        and (call.arguments.get("a"), call.arguments.get("op")) == (before, step.op)
        and call.result == str(after)
    )


def _num_right_lines(problem: Problem, reasoning: str) -> int:
    """Steps of a calculation without tools whose line ends in the right value, from the first on."""
    lines = reasoning.split("\n")
    for index, (step, value) in enumerate(zip(problem.steps, problem.values()[1:], strict=True)):
        end = f": {value}" if step.op == "save" else f"={value}"
        if index >= len(lines) or not lines[index].endswith(end):
            return index
    return len(problem.steps)
