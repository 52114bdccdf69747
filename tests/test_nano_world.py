"""The world of kimi-nano: what its tools return, how often and how they fail."""

from __future__ import annotations

import collections
import math
import re

import pytest

from kimi_native.chat.types import ToolCall
from kimi_native.nano.dice import Dice
from kimi_native.nano.world import ERRORS, KEYS, NOTES, TOOLS, Failures, World

ALWAYS = {
    "error": Failures(1.0, garbled=0, wrong=0),
    "garbled": Failures(1.0, error=0, wrong=0),
}


def make_world(failures=None, seed=0):
    return World({"fig": 17}, Dice(seed), failures or Failures())


def call(name, arguments):
    return ToolCall("functions.f:0", name, arguments)


def test_world_calc_counts_modulo_1000():
    world = make_world()
    for a, b in [(0, 0), (999, 999), (3, 7), (512, 88), (1000, 2001), (-5, 3)]:
        assert int(world.calc(a, "+", b)) == (a + b) - 1000 * math.floor((a + b) / 1000)
        assert int(world.calc(a, "-", b)) == (a - b) - 1000 * math.floor((a - b) / 1000)
        assert int(world.calc(a, "*", b)) == (a * b) - 1000 * math.floor((a * b) / 1000)


def test_world_last_digit_follows_from_last_digits():
    """What the model checks by: one digit of mental arithmetic."""
    world = make_world()
    for a in range(0, 1000, 7):
        for b in range(0, 1000, 13):
            for op in "+-*":
                short = world.calc(a % 10, op, b % 10)
                assert world.calc(a, op, b)[-1] == short[-1]


def test_world_notes_keep_the_last_number():
    world = make_world()
    assert world.note_get("red") == "error: no such note"
    assert [world.note_set("red", 5), world.note_set("red", 6)] == ["saved", "saved"]
    assert world.note_get("red") == "6"


def test_world_runs_calls_as_a_model_writes_them():
    world = make_world()
    assert world.run(call("calc", '{"a":12,"op":"*","b":4}')) == "48"
    assert world.run(call("lookup", '{"key":"fig"}')) == "17"
    assert [c.name for c in world.log] == ["calc", "lookup"]
    assert [tool.function(**{"key": "fig"}) for tool in world.tools() if tool.name == "lookup"] == [
        "17"
    ]


@pytest.mark.parametrize(
    ("name", "arguments", "expected"),
    [
        ("calc", '{"a":12,"op":"/","b":4}', "error: bad arguments"),
        ("calc", '{"a":"#1","op":"+","b":4}', "error: bad arguments"),
        ("calc", '{"a":12,"op":"+"}', "error: bad arguments"),
        ("calc", '{"a":12', "error: bad arguments"),
        ("calc", "[]", "error: bad arguments"),
        ("lookup", '{"key":"gold"}', "error: no such key"),
        ("note_get", '{"name":"red"}', "error: no such note"),
        ("add", "{}", "error: no such tool"),
    ],
)
def test_world_refuses_a_bad_call(name, arguments, expected):
    world = make_world(Failures(1.0))
    assert world.run(call(name, arguments)) == expected
    assert [(c.refused, c.failure) for c in world.log] == [(True, None)]


def test_world_fails_at_the_given_rate():
    """Within five standard deviations of the binomial."""
    world, count = make_world(Failures(0.2)), 20_000
    for _ in range(count):
        world.calc(1, "+", 1)
    failed = sum(c.failure is not None for c in world.log)
    assert abs(failed - 0.2 * count) < 5 * math.sqrt(count * 0.2 * 0.8)
    kinds = collections.Counter(c.failure for c in world.log if c.failure)
    assert set(kinds) == {"error", "garbled", "wrong"}
    for count_of_kind in kinds.values():
        assert abs(count_of_kind - failed / 3) < 5 * math.sqrt(failed * 2 / 9)


def test_world_wrong_numbers_are_wrong_and_one_in_ten_ends_right():
    world, count = make_world(Failures(1.0, error=1e-9, garbled=0, wrong=1)), 20_000
    results = [int(world.calc(123, "*", 4)) for _ in range(count)]
    assert all(0 <= r <= 999 and r != 492 for r in results)
    same_end = sum(r % 10 == 2 for r in results)
    share = 99 / 999  # of the numbers other than 492
    assert abs(same_end - share * count) < 5 * math.sqrt(count * share * (1 - share))


@pytest.mark.parametrize(("name", "lowest", "highest"), [("calc", 0, 999), ("lookup", 2, 99)])
def test_world_garbled_results_cannot_be_results(name, lowest, highest):
    world = make_world(ALWAYS["garbled"])
    for _ in range(500):
        result = world.calc(1, "+", 1) if name == "calc" else world.lookup("fig")
        assert not re.fullmatch("[0-9]+", result) or not lowest <= int(result) <= highest


def test_world_failed_note_keeps_nothing():
    world = make_world(ALWAYS["error"])
    assert world.note_set("red", 5) in ERRORS
    assert world.notes == {}


def test_world_is_the_same_for_the_same_seed():
    def results(seed):
        world = make_world(Failures(0.5), seed)
        return [world.calc(i, "+", 1) for i in range(100)]

    assert results(1) == results(1) != results(2)


def test_world_names_do_not_meet():
    assert len({*KEYS, *NOTES}) == len(KEYS) + len(NOTES)
    assert list(TOOLS) == ["calc", "lookup", "note_set", "note_get"]
    assert all(tool.function is None for tool in TOOLS.values())


@pytest.mark.parametrize("arguments", [{"rate": -0.1}, {"rate": 1.1}, {"error": 0, "garbled": 0}])
def test_world_failures_out_of_range_are_named(arguments):
    with pytest.raises(ValueError, match=r"failures: .*got"):
        Failures(**arguments)


def test_dice_give_every_item_its_share():
    dice, count = Dice("shares", 1), 30_000
    drawn = collections.Counter(dice.weighted("abcd", [1, 0, 2, 3]) for _ in range(count))
    assert drawn["b"] == 0
    for item, share in [("a", 1 / 6), ("c", 2 / 6), ("d", 3 / 6)]:
        assert abs(drawn[item] - share * count) < 5 * math.sqrt(count * share * (1 - share))
    assert {dice.between(3, 5) for _ in range(200)} == {3, 4, 5}
    with pytest.raises(ValueError, match="must be positive"):
        dice.weighted("ab", [0, 0])
