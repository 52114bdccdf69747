"""Problems of kimi-nano: their texts mean what the generator says, and the splits do not meet."""

from __future__ import annotations

import re
from itertools import pairwise

import pytest

from kimi_native.nano import problems
from kimi_native.nano.dice import Dice
from kimi_native.nano.problems import (
    KINDS,
    LABELS,
    MAX_STEPS,
    held_out_compositions,
    make_problem,
    read_sheet,
)
from kimi_native.nano.world import KEYS

SPLITS = ["train", "held-out"]


def solve_text(text, prices):
    """An independent solver: works on the user's words alone, one line after the other."""
    opening, *lines = text.split("\n")
    value, notes, labels = int(re.search(r"\d+", opening)[0]), {}, []
    for line in lines:
        if " is " in line:
            for fact in line.rstrip(".").split(", "):
                key, _, price = fact.split(" ")
                assert prices[key] == int(price)
            continue
        label, _, words = line.partition(": ")
        labels.append((ord(label[0]) - 97) * 26 + ord(label[1]) - 97)
        *verb, last = words.split(" ")
        if words == "report the value":
            assert labels == list(range(labels[0], labels[0] + len(labels)))
            return value
        if verb[:2] == ["save", "as"]:
            notes[last] = value
            continue
        number = notes[last] if "note" in verb else prices[last] if "price" in verb else int(last)
        if verb[0] in ("add", "plus"):
            value = (value + number) % 1000
        elif verb[0] in ("subtract", "minus"):
            value = (value - number + 1000) % 1000
        else:
            assert verb[0] in ("times", "multiply")
            value = value * number % 1000
    raise AssertionError("no report")


def some_problems(split, count=300, longest=14):
    for index in range(count):
        dice = Dice("test", split, index)
        yield make_problem(dice, dice.between(1, longest), split)


@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("shows_prices", [False, True])
def test_problems_text_means_the_values(split, shows_prices):
    for problem in some_problems(split):
        text = problem.text(shows_prices=shows_prices)
        assert solve_text(text, problem.prices) == problem.values()[-1]
        assert len(problem.values()) == len(problem.steps) + 1


@pytest.mark.parametrize("split", SPLITS)
def test_problems_text_is_read_back(split):
    for problem in some_problems(split):
        sheet = read_sheet(problem.text(shows_prices=True))
        assert (sheet.start, sheet.first_label) == (problem.start, problem.first_label)
        assert sheet.prices == dict(problem.prices)
        labels = range(problem.first_label, problem.first_label + len(problem.steps) + 1)
        assert sheet.steps == dict(zip(labels, (*problem.steps, None), strict=True))
        lines = problem.text().split("\n")[1:]
        assert [f"{LABELS[label]}: {line}" for label, line in sheet.lines.items()] == lines


@pytest.mark.parametrize(
    "text",
    ["", "Hello", "Start with 12.", "dk: add 5", "start with 1.\nab: x", "Start with 1.\nqa: x"],
)
def test_problems_other_texts_are_none(text):
    assert read_sheet(text) is None


def test_problems_training_has_no_held_out_composition_and_held_out_has_one():
    for problem in some_problems("train"):
        assert list(held_out_compositions(problem.steps)) == []
    for problem in some_problems("held-out"):
        assert list(held_out_compositions(problem.steps)) != []


def test_problems_held_out_compositions_are_about_a_tenth_of_all():
    pairs = [(a, b) for a in KINDS for b in KINDS if problems.is_held_out_pair(a, b)]
    keys = [(k, op) for k in KEYS for op in "+-*" if problems.is_held_out_key(k, op)]
    assert len(pairs) == len(KINDS)
    assert {a for a, _ in pairs} == {b for _, b in pairs} == set(KINDS)
    assert len(keys) == 9
    assert len({k for k, _ in keys}) == 9  # no key is held out with more than one operation


def test_problems_every_other_composition_is_in_training():
    """What training never shows is what was held out, and nothing else."""
    pairs, keys = set(), set()
    for problem in some_problems("train", 2000):
        kinds = [step.kind for step in problem.steps]
        pairs.update(pairwise(kinds))
        keys.update((s.argument, s.op) for s in problem.steps if s.source == "price")
    assert pairs == {(a, b) for a in KINDS for b in KINDS if not problems.is_held_out_pair(a, b)}
    assert keys == {(k, op) for k in KEYS for op in "+-*" if not problems.is_held_out_key(k, op)}


@pytest.mark.parametrize("split", SPLITS)
def test_problems_notes_are_saved_before_they_are_used(split):
    for problem in some_problems(split):
        saved = set()
        for before, step in pairwise((None, *problem.steps)):
            if step.op == "save":
                saved.add(step.argument)
                assert before is None or before != step
            elif step.source == "note":
                assert step.argument in saved


def test_problems_factors_can_be_undone():
    """A wrong value times a factor is a wrong value."""
    for problem in some_problems("train"):
        for step in problem.steps:
            if step.op == "*":
                factor = int(problem.prices.get(step.argument, 0) or step.argument)
                assert len({value * factor % 1000 for value in range(1000)}) == 1000


@pytest.mark.parametrize("num_steps", [1, 2, 200, 415])
@pytest.mark.parametrize("split", SPLITS)
def test_problems_of_any_length(split, num_steps):
    problem = make_problem(Dice(num_steps), num_steps, split)
    assert len(problem.steps) == num_steps
    assert 0 <= problem.first_label <= MAX_STEPS - num_steps
    assert solve_text(problem.text(), problem.prices) == problem.values()[-1]


@pytest.mark.parametrize("num_steps", [0, -1, 416])
def test_problems_of_impossible_length_are_refused(num_steps):
    with pytest.raises(ValueError, match=rf"in 1 \.\. 415 \(got {num_steps}\)"):
        make_problem(Dice(0), num_steps, "train")


def test_problems_are_the_same_for_the_same_seed():
    assert make_problem(Dice(1, 2), 9, "train") == make_problem(Dice(1, 2), 9, "train")
    assert make_problem(Dice(1, 2), 9, "train") != make_problem(Dice(1, 3), 9, "train")
