"""The world that kimi-nano acts in: a calculator, a table of prices that only a tool can see, and a note store.

The tools may be unreliable. Every call fails with probability Failures.rate, in one of three ways:

    error     "error: timeout": the tool says so itself
    garbled   what cannot be a result: out of range, or not a number
    wrong     calc alone: another number than the right one. One in ten has the right last digit

so a caller that knows the range and the last digit of what must come can tell nearly every failure, and call again.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from kimi_native.chat.tool import Tool
from kimi_native.chat.types import ToolCall
from kimi_native.errors import RequestError
from kimi_native.nano.dice import Dice

MODULUS = 1000
LOWEST_PRICE, HIGHEST_PRICE = 2, 99
KEYS = (
    *("fig", "plum", "pear", "lime", "kiwi", "date", "bean", "corn"),
    *("leek", "kale", "beet", "mint", "rice", "oats", "nuts", "milk"),
    *("eggs", "salt", "soap", "tea", "jam", "pie", "ham", "bun"),
)
NOTES = ("red", "blue", "pink", "gold", "gray", "teal", "navy", "rust")

SAVED = "saved"
ERRORS = ("error: timeout", "error: busy", "error: no answer", "error: try again")
NOT_NUMBERS = ("null", "nan", "none", "?")

FailureKind = Literal["error", "garbled", "wrong"]
_KINDS: dict[str, tuple[FailureKind, ...]] = {
    "calc": ("error", "garbled", "wrong"),
    "lookup": ("error", "garbled"),
    "note_set": ("error", "garbled"),
    "note_get": ("error", "garbled"),
}


@dataclass(frozen=True)
class Failures:
    """How often calls fail, and how: the kinds by weight, among those that the tool has.

    rate  probability that a call fails, 0 .. 1

    Raises ValueError on a rate or weight out of range.
    """

    rate: float = 0.0
    error: float = 1.0
    garbled: float = 1.0
    wrong: float = 1.0

    def __post_init__(self) -> None:
        if not 0 <= self.rate <= 1:
            raise ValueError(f"failures: rate must be in 0 .. 1 (got {self.rate})")
        weights = (self.error, self.garbled, self.wrong)
        if min(weights) < 0 or self.error + self.garbled <= 0:
            raise ValueError(
                f"failures: weights must not be negative, error or garbled positive (got {weights})"
            )


@dataclass(frozen=True)
class Call:
    """One call that the world has answered. failure: the kind if the tool failed; refused: the call itself was bad."""

    name: str
    arguments: Mapping[str, Any]
    result: str
    failure: FailureKind | None = None
    refused: bool = False


@dataclass
class World:
    """Tools with the state behind them. prices: of some of KEYS; log: every call answered, in order."""

    prices: Mapping[str, int]
    dice: Dice
    failures: Failures = Failures()
    notes: dict[str, int] = field(default_factory=dict)
    log: list[Call] = field(default_factory=list)

    def calc(self, a: int, op: Literal["+", "-", "*"], b: int) -> str:
        """a op b, modulo 1000"""
        return self._answer("calc", {"a": a, "op": op, "b": b}, lambda: str(operate(a, op, b)))

    def lookup(self, key: str) -> str:
        """price of a key, 2 to 99"""
        if key not in self.prices:
            return self._refuse("lookup", {"key": key}, "error: no such key")
        return self._answer("lookup", {"key": key}, lambda: str(self.prices[key]))

    def note_set(self, name: str, value: int) -> str:
        """keep a number"""

        def save() -> str:
            self.notes[name] = value
            return SAVED

        return self._answer("note_set", {"name": name, "value": value}, save)

    def note_get(self, name: str) -> str:
        """number kept, 0 to 999"""
        if name not in self.notes:
            return self._refuse("note_get", {"name": name}, "error: no such note")
        return self._answer("note_get", {"name": name}, lambda: str(self.notes[name]))

    def tools(self) -> tuple[Tool, ...]:
        """The four tools, bound to this world."""
        return tuple(replace(tool, function=getattr(self, tool.name)) for tool in TOOLS.values())

    def run(self, call: ToolCall) -> str:
        """The result of a call as a model wrote it; one that is bad gets an error for a result."""
        tool = TOOLS.get(call.name)
        if tool is None:
            return self._refuse(call.name, {}, "error: no such tool")
        try:
            arguments = replace(tool, function=getattr(self, call.name)).read_arguments(
                call.arguments
            )
        except RequestError:
            return self._refuse(call.name, {}, "error: bad arguments")
        return getattr(self, call.name)(**arguments)

    def _answer(self, name: str, arguments: dict[str, Any], right: Callable[[], str]) -> str:
        """What the tool returns; `right` is run only if it works, or gives a wrong number."""
        if not self.dice.chance(self.failures.rate):
            result, failure = right(), None
        else:
            kinds = _KINDS[name]
            failure = self.dice.weighted(kinds, [getattr(self.failures, kind) for kind in kinds])
            result = self._failed(name, failure, right)
        self.log.append(Call(name, arguments, result, failure))
        return result

    def _failed(self, name: str, failure: FailureKind, right: Callable[[], str]) -> str:
        if failure == "error":
            return self.dice.choice(ERRORS)
        if failure == "wrong":
            # any of the other 999 numbers
            return str((int(right()) + self.dice.between(1, MODULUS - 1)) % MODULUS)
        return _garbled(self.dice, HIGHEST_PRICE if name == "lookup" else MODULUS - 1)

    def _refuse(self, name: str, arguments: dict[str, Any], result: str) -> str:
        self.log.append(Call(name, arguments, result, refused=True))
        return result


def operate(a: int, op: str, b: int) -> int:
    """a op b modulo 1000, for op one of + - *."""
    return {"+": a + b, "-": a - b, "*": a * b}[op] % MODULUS


def _garbled(dice: Dice, highest: int) -> str:
    """Not a result: a word, a negative number, or one beyond the highest."""
    kind = dice.between(0, 2)
    if kind == 0:
        return dice.choice(NOT_NUMBERS)
    if kind == 1:
        return str(-dice.between(1, highest))
    return str(dice.between(highest + 1, 10 * highest + 9))


def _declared() -> dict[str, Tool]:
    world = World({}, Dice(0))
    functions = (world.calc, world.lookup, world.note_set, world.note_get)
    return {f.__name__: replace(Tool.from_function(f), function=None) for f in functions}


TOOLS = _declared()  # name -> Tool, bound to no world
