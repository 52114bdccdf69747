"""Conversations to train on: the expert at work in every mode, with tools of every reliability, and small talk."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from kimi_native.chat.tool import Tool
from kimi_native.chat.types import Message, ToolCall
from kimi_native.nano import drills, expert, questions
from kimi_native.nano.dice import Dice
from kimi_native.nano.modes import MODES, Mode, declared_tools, opening_messages
from kimi_native.nano.planner import look_back, make_plan, think_alone
from kimi_native.nano.problems import (
    FACTORS,
    MAX_STEPS,
    Problem,
    Sheet,
    Split,
    make_problem,
    read_sheet,
)
from kimi_native.nano.small_talk import make_exchange
from kimi_native.nano.world import MODULUS, Failures, World

_LONG_DRILLS = 1 / 3


@dataclass(frozen=True)
class Recipe:
    """What conversations are made, by weight, and how long and hard they are.

    steps         fewest and most steps carried out in one conversation
    plan_steps    the same for those that plan first: longer, so that a plan fails by its tools and not by its length
    reliable      share of conversations whose tools never fail; the others fail at a rate even in 0 .. highest_failure
    history       share of conversations with something before: small talk, or a problem of 1 or 2 steps
    later_calls   share of conversations whose calls are numbered from 1 .. last_call on, as after earlier ones cut off
    slips         share of calculations before which the expert expects a wrong digit, as a model will now and then; the
                  digit is not to be learned, but what to do then is
    windows       share of interleaved conversations that are a piece of a longer one: of longer_lists steps (fewest,
                  most) in the list, no more are carried out than window_calls calls allow. A model that had never more
                  than 12 lines or 20 calls in view would be lost among 200
    drills        weight of nano/drills.py's lists, of at most steps[1] or, one in three, longer_lists steps

    Raises ValueError naming the field that is out of range.
    """

    interleaved: float = 80
    plan_first: float = 20
    no_tools: float = 8
    questions: float = 6
    small_talk: float = 40
    drills: float = 80
    steps: tuple[int, int] = (1, 12)
    plan_steps: tuple[int, int] = (1, 20)
    reliable: float = 0.3
    highest_failure: float = 0.25
    history: float = 0.1
    later_calls: float = 0.4
    last_call: int = 499
    slips: float = 0.02
    windows: float = 0.4
    window_calls: tuple[int, int] = (2, 160)
    longer_lists: tuple[int, int] = (13, 200)

    def __post_init__(self) -> None:
        if min(self.weights) < 0 or sum(self.weights) <= 0:
            raise ValueError(
                f"recipe: weights must not be negative, one positive (got {self.weights})"
            )
        for name in (
            "reliable",
            "highest_failure",
            "history",
            "later_calls",
            "slips",
            "windows",
        ):
            if not 0 <= (share := getattr(self, name)) <= 1:
                raise ValueError(f"recipe: {name} must be in 0 .. 1 (got {share})")
        for name in ("steps", "plan_steps", "window_calls", "longer_lists"):
            fewest, most = getattr(self, name)
            lowest = 1 if "steps" in name else 2  # a window begins with a step that is not learned
            if not lowest <= fewest <= most <= MAX_STEPS:
                raise ValueError(
                    f"recipe: {name} must be two numbers, ascending, in {lowest} .. {MAX_STEPS} "
                    f"(got {fewest} and {most})"
                )
        if self.last_call < 1:
            raise ValueError(f"recipe: last_call must be at least 1 (got {self.last_call})")

    @property
    def weights(self) -> tuple[float, ...]:
        """Of small talk, questions, problems in each of MODES, and drills."""
        modes = (self.interleaved, self.plan_first, self.no_tools)
        return self.small_talk, self.questions, *modes, self.drills


@dataclass(frozen=True)
class Conversation:
    """Messages to learn from.

    first_learned   index of the first message of the assistant that is to be learned; all after it are
    number_is_open  nothing in the conversation tells the number of the first call to be learned
    hidden          spans of characters of the last message's reasoning that are not to be learned, for the same reason
    """

    messages: tuple[Message, ...]
    tools: tuple[Tool, ...]
    first_learned: int
    number_is_open: bool = False
    hidden: tuple[tuple[int, int], ...] = ()


def make_conversation(dice: Dice, split: Split, recipe: Recipe) -> Conversation:
    """A conversation of the recipe's kinds."""
    kind = dice.weighted(("small talk", "question", *MODES, "drill"), recipe.weights)
    if kind == "small talk":
        return _small_talk(dice, split, recipe)
    if kind == "question":
        return _question(dice, split, recipe)
    if kind == "drill":
        steps = recipe.longer_lists if dice.chance(_LONG_DRILLS) else (1, recipe.steps[1])
        messages, hidden = drills.make_drill(dice, split, steps)
        return Conversation(messages, (), len(messages) - 1, hidden=hidden)
    if kind == "interleaved" and recipe.windows and dice.chance(recipe.windows):
        return _window(dice, split, recipe)
    return _problem(dice, split, recipe, kind)


def _problem(dice: Dice, split: Split, recipe: Recipe, mode: Mode) -> Conversation:
    lengths = recipe.plan_steps if mode == "plan-first" else recipe.steps
    problem = make_problem(dice, dice.between(*lengths), split)
    world = World(problem.prices, dice, _failures(dice, recipe))
    opening = opening_messages(problem, mode)
    history = _history(dice, split, recipe, mode)
    number = sum(len(message.tool_calls) for message in history)
    is_cut = mode == "interleaved" and not number and dice.chance(recipe.later_calls)
    if is_cut:
        number = dice.between(1, recipe.last_call)
    turn = _solve(problem, mode, world, number, recipe.slips)
    messages = (*opening[:-1], *history, opening[-1], *turn)
    tools = _tools(dice, messages, mode)
    return Conversation(messages, tools, len(messages) - len(turn), is_cut)


def _failures(dice: Dice, recipe: Recipe) -> Failures:
    if dice.chance(recipe.reliable):
        return Failures()
    return Failures(dice.random() * recipe.highest_failure)


def _history(dice: Dice, split: Split, recipe: Recipe, mode: Mode) -> list[Message]:
    """What came before, its thoughts no longer shown."""
    if not dice.chance(recipe.history):
        return []
    if mode != "interleaved" or dice.chance(0.5):
        exchange = make_exchange(dice)
        return [Message("user", exchange.question), Message("assistant", exchange.answer)]
    problem = make_problem(dice, dice.between(1, 2), split)
    world = World(problem.prices, dice, _failures(dice, recipe))
    turn = _solve(problem, mode, world, 0, 0.0)
    return [Message("user", problem.text()), *(replace(m, reasoning_content=None) for m in turn)]


def _small_talk(dice: Dice, split: Split, recipe: Recipe) -> Conversation:
    exchange = make_exchange(dice)
    history = _history(dice, split, recipe, "interleaved")
    messages = (
        *history,
        Message("user", exchange.question),
        Message("assistant", exchange.answer, reasoning_content=exchange.thought),
    )
    has_tools = bool(history) or dice.chance(0.5)
    return Conversation(messages, _tools(dice, messages) if has_tools else (), len(messages) - 1)


def _question(dice: Dice, split: Split, recipe: Recipe) -> Conversation:
    """One calculation, with or without tools, or one price."""
    history = _history(dice, split, recipe, "interleaved")
    text, question = questions.make_question(dice, is_price=dice.chance(0.3))
    before = [*history, Message("user", text)]
    has_calls = any(message.tool_calls for message in history)
    if question.op and not has_calls and dice.chance(0.5):
        return Conversation((*before, questions.think_alone(question)), (), len(before))
    prices = {question.key: dice.choice(FACTORS)}
    world = World(prices, dice, _failures(dice, recipe))
    message = questions.first_message(question, sum(len(m.tool_calls) for m in history))
    turn = [_with_slip(message, dice, recipe.slips)]
    while turn[-1].tool_calls:
        last = turn[-1]
        turn.append(_result(world, last.tool_calls[0]))
        turn.append(questions.next_message(question, last, turn[-1].content))
    messages = (*before, *turn)
    return Conversation(messages, _tools(dice, messages), len(before))


def _tools(dice: Dice, messages: Sequence[Message], mode: Mode = "interleaved") -> tuple[Tool, ...]:
    """The tools that are used, and each of the others half of the time."""
    used = {call.name for message in messages for call in message.tool_calls}
    return tuple(t for t in declared_tools(mode) if t.name in used or dice.chance(0.5))


# ---- the expert at work --------------------------------------------------------------------------------------------


def _solve(problem: Problem, mode: Mode, world: World, number: int, slips: float) -> list[Message]:
    """The expert's messages and the tools' from the user's message on. number: of the first call."""
    sheet = _read(problem, shows_prices=mode == "no-tools")
    if mode == "no-tools":
        return [think_alone(sheet)]
    if mode == "interleaved":
        first = expert.start_at(sheet, sheet.first_label, sheet.start, number)
        return _work(sheet, world, slips, first)
    plan = make_plan(sheet, number)
    results: dict[str, str] = {}
    turn = [plan]
    for call in plan.tool_calls:
        arguments = {
            name: _substituted(value, results) for name, value in json.loads(call.arguments).items()
        }
        result = _run(world, call.name, arguments)
        results[call.id.rpartition(":")[2]] = result
        turn.append(Message("tool", result, tool_call_id=call.id))
    return [*turn, look_back(turn)]


def _read(problem: Problem, *, shows_prices: bool = False) -> Sheet:
    sheet = read_sheet(problem.text(shows_prices=shows_prices))
    assert sheet is not None  # the generator's own text
    return sheet


def _substituted(value: int | str, results: dict[str, str]) -> int | str:
    """As episode.with_results does it to the text."""
    if isinstance(value, str) and value.startswith("#"):
        result = results[value[1:]]
        return int(result) if result.isdecimal() else value
    return value


def _run(world: World, name: str, arguments: dict) -> str:
    if any(isinstance(value, str) and value.startswith("#") for value in arguments.values()):
        return "error: bad arguments"
    return getattr(world, name)(**arguments)


def _result(world: World, call: ToolCall) -> Message:
    result = getattr(world, call.name)(**json.loads(call.arguments))
    return Message("tool", result, tool_call_id=call.id)


def _work(
    sheet: Sheet, world: World, slips: float, first: Message, most_calls: float = math.inf
) -> list[Message]:
    """The expert between the calls, from its first message on, until it answers or has made so many calls."""
    turn = [_with_slip(first, world.dice, slips)]
    while turn[-1].tool_calls and len(turn) < 2 * most_calls - 1:
        last = turn[-1]
        result = _result(world, last.tool_calls[0])
        message = expert.follow(sheet, last, result.content)
        turn.append(result)
        is_new = _thought(message) != _thought(last)
        turn.append(_with_slip(message, world.dice, slips) if is_new else message)
    return turn


def _with_slip(message: Message, dice: Dice, slips: float) -> Message:
    """The message, or, in that share of calculations, the same with a wrong digit expected."""
    thought = message.reasoning_content or ""
    if "=.." not in thought or not dice.chance(slips):
        return message
    wrong = (int(thought[-1]) + dice.between(1, 9)) % 10
    return replace(message, reasoning_content=f"{thought[:-1]}{wrong}")


def _thought(message: Message) -> str:
    """The line of the reasoning that says where the expert is."""
    return (message.reasoning_content or "").rpartition("\n")[2]


# ---- windows -------------------------------------------------------------------------------------------------------


def _window(dice: Dice, split: Split, recipe: Recipe) -> Conversation:
    """A piece of a long conversation, cut out after the user's message.

    Its first message is not to be learned: the value and the number of the call are out of the air. The next are,
    because the expert reads its own last message and no more.
    """
    problem = make_problem(dice, dice.between(*recipe.longer_lists), split)
    start = dice.between(0, len(problem.steps) - 2)
    world = World(problem.prices, dice, _failures(dice, recipe))
    for step in problem.steps[:start]:
        if step.op == "save":
            world.notes[step.argument] = dice.between(0, MODULUS - 1)
    sheet, first = _read(problem), problem.first_label + start
    number = dice.between(start, 3 * start + 1)
    opening = expert.start_at(sheet, first, dice.between(0, MODULUS - 1), number)
    turn = _work(sheet, world, recipe.slips, opening, dice.between(*recipe.window_calls))
    messages = (Message("user", problem.text()), *turn)
    return Conversation(messages, _tools(dice, messages), 3)
