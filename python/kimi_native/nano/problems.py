"""Problems for kimi-nano: a number and a list of labeled steps to take with it.

    Start with 12.
    dk: add 5
    dl: times price of fig
    dm: save as red
    dn: subtract note red
    do: report the value

Labels go from aa to pz, from a random place on, so that finding the next step is finding its label. Values count modulo
1000. Factors have no divisor in common with 1000: a wrong value must not become right by a multiplication.

Two splits. Some compositions (a kind of step right after another; a key with an operation) are in no training problem,
and at least one of them is in every held-out problem, so no problem can be in both.
"""

from __future__ import annotations

import re
import string
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

from kimi_native.nano.dice import Dice
from kimi_native.nano.world import HIGHEST_PRICE, KEYS, LOWEST_PRICE, NOTES, operate

Split = Literal["train", "held-out"]
# aa, ab, ... pz. Each is one id of the vocabulary: of three digits a small model took one label for its neighbor.
LABELS = tuple(a + b for a in string.ascii_lowercase[:16] for b in string.ascii_lowercase)
LABEL_PATTERN = "[a-p][a-z]"
MAX_STEPS = len(LABELS) - 1  # one more label is for the report
FACTORS = tuple(n for n in range(LOWEST_PRICE, HIGHEST_PRICE + 1) if n % 2 and n % 5)

# kind of step: operation or "save", with what; and how often it is drawn
_KIND_WEIGHTS = {
    ("+", "number"): 14,
    ("-", "number"): 14,
    ("*", "number"): 14,
    ("+", "price"): 10,
    ("-", "price"): 10,
    ("*", "price"): 10,
    ("+", "note"): 8,
    ("-", "note"): 8,
    ("save", "note"): 12,
}
KINDS = tuple(_KIND_WEIGHTS)
_WORDS = {
    "+": ("add", "plus"),
    "-": ("subtract", "minus"),
    "*": ("times", "multiply by"),
    "save": ("save as",),
}
_OPERATION = {word: op for op, words in _WORDS.items() for word in words}
_OPENINGS = ("Start with", "Begin with", "Start at")
REPORT = "report the value"
_STEP = re.compile(rf"({'|'.join(_OPERATION)}) (?:([0-9]+)|price of ([a-z]+)|(?:note )?([a-z]+))")
_LINE = re.compile(rf"^({LABEL_PATTERN}): (.*)$", re.MULTILINE)


@dataclass(frozen=True)
class Step:
    """One step. op: + - * or save; source: number, price or note; argument: the number, the key or the note's name."""

    op: str
    source: str
    argument: str

    @property
    def kind(self) -> tuple[str, str]:
        return self.op, self.source


@dataclass(frozen=True)
class Problem:
    """A start value, steps with the labels from LABELS[first_label] on, and what the keys in them cost.

    words: how each step's operation is called in the text
    """

    opening: str
    start: int
    first_label: int
    steps: tuple[Step, ...]
    words: tuple[str, ...]
    prices: Mapping[str, int]

    def text(self, *, shows_prices: bool = False) -> str:
        """What the user says. shows_prices: with the prices, for one who has no tool to look them up."""
        lines = [f"{self.opening} {self.start}."]
        if shows_prices and self.prices:
            lines.append(", ".join(f"{key} is {price}" for key, price in self.prices.items()) + ".")
        for label, (step, word) in enumerate(
            zip(self.steps, self.words, strict=True), self.first_label
        ):
            lines.append(f"{LABELS[label]}: {word} {_argument_text(step)}")
        lines.append(f"{LABELS[self.first_label + len(self.steps)]}: {REPORT}")
        return "\n".join(lines)

    def values(self) -> list[int]:
        """The value at the start and after each step, by tools that do not fail."""
        values, notes = [self.start], {}
        for step in self.steps:
            value = values[-1]
            if step.op == "save":
                notes[step.argument] = value
            else:
                value = operate(value, step.op, self._operand(step, notes))
            values.append(value)
        return values

    def _operand(self, step: Step, notes: Mapping[str, int]) -> int:
        if step.source == "number":
            return int(step.argument)
        return (self.prices if step.source == "price" else notes)[step.argument]


def _argument_text(step: Step) -> str:
    if step.op == "save" or step.source == "number":
        return step.argument
    return f"{step.source} {'of ' if step.source == 'price' else ''}{step.argument}"


@dataclass(frozen=True)
class Sheet:
    """What a text says: the start value, the prices shown, and for every label, by its index in LABELS, its line and
    step (None: report)."""

    start: int
    first_label: int
    lines: Mapping[int, str]
    steps: Mapping[int, Step | None]
    prices: Mapping[str, int]

    def line(self, label: int) -> str:
        """The line with its label, as the list has it."""
        return f"{LABELS[label]}: {self.lines[label]}"


def read_sheet(text: str) -> Sheet | None:
    """The problem in a user's text, None if there is none."""
    opening = re.match(rf"(?:{'|'.join(_OPENINGS)}) ([0-9]+)\.", text)
    lines = {LABELS.index(label): line for label, line in _LINE.findall(text)}
    if opening is None or not lines:
        return None
    steps = {label: read_step(line) for label, line in lines.items()}
    prices = {key: int(price) for key, price in re.findall(r"([a-z]+) is ([0-9]+)", text)}
    return Sheet(int(opening[1]), next(iter(lines)), lines, steps, prices)


def read_step(line: str) -> Step | None:
    """The step that a line without its label asks for, None if it asks for none."""
    match = _STEP.fullmatch(line)
    if match is None:
        return None
    word, number, key, note = match.groups()
    source = "number" if number else "price" if key else "note"
    return Step(_OPERATION[word], source, number or key or note)


# ---- the splits ----------------------------------------------------------------------------------------------------


def is_held_out_pair(first: tuple[str, str], second: tuple[str, str]) -> bool:
    """Whether a step of the second kind right after one of the first is held out: one pair in nine."""
    return (2 * KINDS.index(first) + KINDS.index(second)) % len(KINDS) == 4


def is_held_out_key(key: str, op: str) -> bool:
    """Whether the operation with that key's price is held out: one of eight, other keys for each operation."""
    return (KEYS.index(key) + 3 * "+-*".index(op)) % 8 == 5


def held_out_compositions(steps: tuple[Step, ...]) -> Iterator[tuple]:
    """Every held-out composition in the steps."""
    for step in steps:
        if step.source == "price" and is_held_out_key(step.argument, step.op):
            yield step.argument, step.op
    for first, second in pairwise(steps):
        if is_held_out_pair(first.kind, second.kind):
            yield first.kind, second.kind


# ---- the generator -------------------------------------------------------------------------------------------------


def make_problem(dice: Dice, num_steps: int, split: Split) -> Problem:
    """A problem of so many steps, without held-out compositions (train) or with at least one (held-out).

    Raises ValueError if num_steps is not in 1 .. MAX_STEPS.
    """
    if not 1 <= num_steps <= MAX_STEPS:
        raise ValueError(f"problem: num_steps must be in 1 .. {MAX_STEPS} (got {num_steps})")
    steps = _make_steps(dice, num_steps, split)
    while split == "held-out" and not any(held_out_compositions(steps)):
        steps = _make_steps(dice, num_steps, split)
    keys = {step.argument: None for step in steps if step.source == "price"}
    return Problem(
        opening=dice.choice(_OPENINGS),
        start=dice.between(0, 999),
        first_label=dice.between(0, MAX_STEPS - num_steps),
        steps=steps,
        words=tuple(dice.choice(_WORDS[step.op]) for step in steps),
        prices={key: dice.choice(FACTORS) for key in keys},
    )


def _make_steps(dice: Dice, num_steps: int, split: Split) -> tuple[Step, ...]:
    steps: list[Step] = []
    saved: dict[str, None] = {}
    for _ in range(num_steps):
        steps.append(_make_step(dice, steps[-1] if steps else None, tuple(saved), split))
        if steps[-1].op == "save":
            saved[steps[-1].argument] = None
    return tuple(steps)


def _make_step(dice: Dice, before: Step | None, saved: tuple[str, ...], split: Split) -> Step:
    op, source = dice.weighted(KINDS, _kind_weights(before, bool(saved), split))
    if op == "save":
        # The same name twice in a row would make a call that looks like a retry.
        names = NOTES if before is None or before.op != "save" else _without(NOTES, before.argument)
        return Step(op, source, dice.choice(names))
    if source == "note":
        return Step(op, source, dice.choice(saved))
    if source == "number":
        return Step(op, source, str(dice.choice(FACTORS) if op == "*" else dice.between(2, 99)))
    keys = KEYS if split == "held-out" else _TRAINING_KEYS[op]
    return Step(op, source, dice.choice(keys))


def _without(names: tuple[str, ...], name: str) -> tuple[str, ...]:
    return tuple(other for other in names if other != name)


_TRAINING_KEYS = {op: tuple(k for k in KEYS if not is_held_out_key(k, op)) for op in "+-*"}
_WEIGHTS: dict[tuple, tuple[float, ...]] = {}


def _kind_weights(before: Step | None, has_notes: bool, split: Split) -> tuple[float, ...]:
    """Weight of each kind after the step before; zero for one that may not follow."""
    case = (before and before.kind, has_notes, split)
    if case not in _WEIGHTS:
        _WEIGHTS[case] = tuple(
            0
            if (kind[1] == "note" and kind[0] != "save" and not has_notes)
            or (split == "train" and before is not None and is_held_out_pair(before.kind, kind))
            else weight
            for kind, weight in _KIND_WEIGHTS.items()
        )
    return _WEIGHTS[case]
