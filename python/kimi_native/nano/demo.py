"""`kimi-native demo`: kimi-nano at work on a held-out problem, with tools that fail now and then."""

from __future__ import annotations

import argparse
import json
import sys
from typing import TYPE_CHECKING

from kimi_native.chat.types import ContentDelta, ReasoningDelta
from kimi_native.conversation import ChatFinish
from kimi_native.model_arguments import add_machine, add_model, import_torch, load_model
from kimi_native.nano.dice import Dice
from kimi_native.nano.episode import Episode
from kimi_native.nano.problems import Problem, make_problem
from kimi_native.nano.texts import answered_value
from kimi_native.nano.world import Failures, World
from kimi_native.terminal import event_dict, note, print_json, shown
from kimi_native.tool_runner import ToolResult

if TYPE_CHECKING:
    from kimi_native.conversation import Chat, ChatEvent
    from kimi_native.generate import Model

MAX_TOKENS = 256  # of one message: a thought and a call take some 50
_DIM, _RED, _PLAIN = "\x1b[2m", "\x1b[31m", "\x1b[0m"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_model(parser)
    parser.add_argument(
        "--steps", type=int, default=8, metavar="N", help="of the problem (default: 8)"
    )
    parser.add_argument(
        "--failure-rate",
        type=float,
        default=0.15,
        metavar="X",
        help="share of the calls that fail, 0 to 1 (default: 0.15)",
    )
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="same seed, same problem")
    parser.add_argument("--json", action="store_true", help="print the events as JSON lines")
    add_machine(parser)


def run(args: argparse.Namespace) -> int:
    """Plays one problem and says whether the answer is right: exit code 0 if it is, else 1."""
    problem, world = pose(args.steps, args.failure_rate, args.seed)
    import_torch()
    model = load_model(args)
    if not args.json:
        print(problem.text(), end="\n\n", flush=True)
    lines = Lines(world)
    with play(model, problem, world) as chat:
        for event in chat.stream(problem.text()):
            if args.json:
                print_json(event_dict(event))
                sys.stdout.flush()
            else:
                lines.show(event)
        answer = answered_value(chat.messages[-1])
    right = problem.values()[-1]
    failed = sum(call.failure is not None for call in world.log)
    verdict = "right" if answer == right else f"wrong: it is {right}"
    note(f"{verdict}; {len(world.log)} calls, of which {failed} failed")
    return 0 if answer == right else 1


def play(model: Model, problem: Problem, world: World) -> Chat:
    """A chat in which the model has the world's tools, with as many calls as a problem may take."""
    return model.chat(
        tools=world.tools(),
        run_tools=[tool.name for tool in world.tools()],
        max_tool_calls=Episode(problem, "interleaved", world).max_calls,
        max_tokens=MAX_TOKENS,
        temperature=0.0,
    )


def pose(num_steps: int, failure_rate: float, seed: int) -> tuple[Problem, World]:
    """A problem as in no training data, and the world it is about.

    Raises ValueError on a number of steps that no problem has, or a rate outside 0 .. 1.
    """
    dice = Dice("demo", seed)
    problem = make_problem(dice, num_steps, "held-out")
    return problem, World(problem.prices, dice, Failures(failure_rate))


class Lines:
    """One line for each thought: what is written down, the call, what the tool said, and whether it failed."""

    def __init__(self, world: World) -> None:
        self._world = world
        self._thought: list[str] = []
        self._is_terminal = sys.stdout.isatty()

    def show(self, event: ChatEvent) -> None:
        if isinstance(event, ReasoningDelta):
            self._thought.append(event.text)
        elif isinstance(event, ToolResult):
            failed = any(call.failure is not None for call in self._world.log[-1:])
            call = f"{event.call.name}({_arguments_text(event.call.arguments)})"
            line = f"{self._said():<44} {call:<24} {event.content}"
            self._print(line + ("   <- the tool failed" * failed), _RED if failed else _DIM)
        elif isinstance(event, ContentDelta):
            if self._thought:
                self._print(self._said(), _DIM)
            sys.stdout.write(shown(event.text))
        elif isinstance(event, ChatFinish):
            self._print("", _DIM)

    def _said(self) -> str:
        text, self._thought = "".join(self._thought), []
        return ", ".join(text.split("\n"))

    def _print(self, text: str, style: str) -> None:
        text = shown(text)
        print(f"{style}{text}{_PLAIN}" if self._is_terminal and text else text, flush=True)


def _arguments_text(arguments: str) -> str:
    """The values of a call's arguments; what is no JSON object as it is."""
    try:
        values = json.loads(arguments)
    except (ValueError, RecursionError):
        return arguments
    return ", ".join(map(str, values.values())) if isinstance(values, dict) else arguments
