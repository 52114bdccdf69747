"""The expert: it solves every problem, from the text alone, and each of its messages follows from the one before."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest

from kimi_native.chat.types import Message
from kimi_native.nano import expert, texts
from kimi_native.nano.dice import Dice
from kimi_native.nano.episode import Episode
from kimi_native.nano.modes import MODES
from kimi_native.nano.problems import LABELS, Problem, Step, make_problem
from kimi_native.nano.texts import call_number
from kimi_native.nano.world import Failures, World


def play(problem, mode, failures=None, seed=0):
    episode = Episode(problem, mode, World(problem.prices, Dice(seed), failures or Failures()))
    while episode.outcome == "open":
        episode.push(expert.answer(episode.messages))
    return episode


def thoughts(episode):
    return [m.reasoning_content for m in episode.messages if m.role == "assistant"]


EXAMPLE = Problem(
    "Start with",
    12,
    LABELS.index("dk"),
    (
        Step("+", "number", "5"),
        Step("*", "price", "fig"),
        Step("save", "note", "red"),
        Step("-", "note", "red"),
    ),
    ("add", "times", "save as", "minus"),
    {"fig": 23},
)


def test_expert_thinks_between_calls():
    assert thoughts(play(EXAMPLE, "interleaved")) == [
        "dk: add 5: 12+5=..7",
        "7 ok\ndl: times price of fig: 17",
        "fits\ndl: times price of fig: 17*23=..1",
        "1 ok\ndm: save as red: 391",
        "ok\ndn: minus note red: 391",
        "fits\ndn: minus note red: 391-391=..0",
        "0 ok\ndo: report the value: 0",
    ]


def test_expert_plans_first():
    episode = play(EXAMPLE, "plan-first")
    assert thoughts(episode) == [
        "dk: add 5: #0=12+5\ndl: times price of fig: #1=fig #2=#0*#1\ndm: save as red: #3=#2\n"
        "dn: minus note red: #4=red #5=#2-#4\ndo: report the value: #5",
        "#5 is 0",
    ]
    calls = episode.messages[2].tool_calls
    assert [(c.id, c.arguments) for c in calls] == [
        ("functions.calc:0", '{"a":12,"op":"+","b":5}'),
        ("functions.lookup:1", '{"key":"fig"}'),
        ("functions.calc:2", '{"a":"#0","op":"*","b":"#1"}'),
        ("functions.note_set:3", '{"name":"red","value":"#2"}'),
        ("functions.note_get:4", '{"name":"red"}'),
        ("functions.calc:5", '{"a":"#2","op":"-","b":"#4"}'),
    ]


def test_expert_thinks_alone():
    assert thoughts(play(EXAMPLE, "no-tools")) == [
        "dk: add 5: 12+5=17\ndl: times price of fig: 17*23=391\ndm: save as red: 391\n"
        "dn: minus note red: 391-391=0\ndo: report the value: 0"
    ]


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("num_steps", [1, 2, 12, 50])
def test_expert_solves_every_problem_with_tools_that_work(mode, num_steps):
    for index in range(20):
        episode = play(make_problem(Dice(num_steps, index), num_steps, "held-out"), mode)
        assert episode.outcome == "solved"
        assert episode.num_right_steps == num_steps


@pytest.mark.parametrize(
    ("result", "expected"),
    [
        ("391", ("1 ok", True)),
        ("401", ("1 ok", True)),  # wrong, but it cannot tell
        ("404", ("4 not 1", False)),
        ("1391", ("impossible", False)),
        ("-391", ("impossible", False)),
        ("0391", ("impossible", False)),
        ("nan", ("impossible", False)),
        ("", ("impossible", False)),
        ("error: busy", ("error", False)),
    ],
)
def test_expert_judges_a_calculation_by_its_last_digit(result, expected):
    assert texts.judge("calc", result, "1") == expected


@pytest.mark.parametrize(
    ("name", "result", "fine"),
    [
        *(("lookup", r, True) for r in ("2", "17", "99")),
        *(("lookup", r, False) for r in ("0", "1", "100", "-5", "null", "error: busy", "17.0")),
        *(("note_get", r, True) for r in ("0", "17", "999")),
        *(("note_get", r, False) for r in ("1000", "-1", "none", "error: timeout")),
        *(("note_set", r, r == "saved") for r in ("saved", "17", "?", "error: timeout")),
    ],
)
def test_expert_judges_by_range(name, result, fine):
    assert texts.judge(name, result, "")[1] is fine


def test_expert_makes_a_failed_call_again():
    """Against tools that fail half of the time: every failure it can tell is followed by the same call."""
    for index in range(30):
        problem = make_problem(Dice(index), 8, "held-out")
        episode = play(problem, "interleaved", Failures(0.5, wrong=0), seed=index)
        assert episode.outcome == "solved"
        assert episode.failures
        assert all(caught == failed > 0 for caught, failed in episode.failures.values())
        assert episode.num_false_alarms == 0


def test_expert_takes_a_result_that_comes_twice():
    """Then its own digit was wrong; but an error in between is no second result."""
    assert texts.judge("calc", "404", "1") == ("4 not 1", False)
    assert texts.judge("calc", "404", "1", rejected="4") == ("4 twice", True)
    assert texts.judge("calc", "391", "1", rejected="4") == ("1 ok", True)
    assert texts.judge("calc", "407", "1", rejected="4") == ("7 not 1", False)
    assert texts.judge("calc", "error: busy", "1", rejected="4") == ("error", False)
    user = Message("user", "Start with 17.\ndk: times 23\ndl: report the value")
    slip = expert.answer([user])
    messages = [user, replace(slip, reasoning_content="dk: times 23: 17*23=..5")]
    for _ in range(2):
        messages.append(Message("tool", "391", tool_call_id=messages[-1].tool_calls[0].id))
        messages.append(expert.answer(messages))
    assert [m.reasoning_content for m in messages[1::2]] == [
        "dk: times 23: 17*23=..5",
        "1 not 5\ndk: times 23: 17*23=..5",
        "1 twice\ndl: report the value: 391",
    ]


def test_expert_misses_only_wrong_numbers_that_end_right_or_alike():
    for index in range(30):
        problem = make_problem(Dice(index), 8, "held-out")
        episode = play(problem, "interleaved", Failures(0.4, wrong=8), seed=index)
        said = [m for m in episode.messages if m.role == "assistant"][:-1]
        for call, after, message in zip(
            episode.world.log, [*episode.world.log[1:], None], said, strict=True
        ):
            digit = re.search(r"=\.\.(\d)", message.reasoning_content)
            rejected = texts.rejected_digit(message)
            retried = after is not None and (call.name, call.arguments) == (
                after.name,
                after.arguments,
            )
            ends_right = digit is not None and call.result.endswith(digit[1])
            missed = call.failure == "wrong" and (ends_right or call.result[-1] == rejected)
            assert retried == (call.failure is not None and not missed)


def test_expert_depends_on_the_list_and_the_last_message_alone():
    """A thousand messages earlier or none: the same next message. So chains of any length are as easy as short ones."""
    for index in range(20):
        problem = make_problem(Dice(index), 20, "train")
        episode = play(problem, "interleaved", Failures(0.3), seed=index)
        for end in range(3, len(episode.messages) - 1, 2):
            whole = expert.answer(episode.messages[:end])
            assert whole == episode.messages[end]
            assert expert.answer([episode.messages[0], *episode.messages[end - 2 : end]]) == whole


def test_expert_copies_every_line_and_number_it_writes():
    """What a small model can do: the label is the last one or the next, its line is the list's, word by word, and each
    number is one digit or stands where it just looked."""

    def numbers(text):
        return {int(digits) for digits in re.findall(r"[0-9]+", text)}

    for index in range(30):
        problem = make_problem(Dice(index), 12, "train")
        episode = play(problem, "interleaved", Failures(0.25), seed=index)
        lines = {line[:2]: line for line in problem.text().split("\n")[1:]}
        for end in range(3, len(episode.messages), 2):
            last, result, message = episode.messages[end - 2 : end + 1]
            thought = message.reasoning_content.rpartition("\n")[2]
            looked_at = numbers(last.reasoning_content) | numbers(result.content)
            before = LABELS.index(last.reasoning_content.rpartition("\n")[2][:2])
            assert thought[:2] in LABELS[before : before + 2]
            assert thought.startswith(f"{lines[thought[:2]]}: ")
            written = numbers(message.reasoning_content)
            for call in message.tool_calls:
                written |= numbers(call.arguments)
                assert call_number(call) == call_number(last.tool_calls[0]) + 1
            assert {n for n in written if n > 9} <= looked_at | numbers(lines[thought[:2]])


def test_expert_numbers_its_calls_on():
    messages = play(EXAMPLE, "interleaved").messages
    again = expert.answer([*messages, messages[0]])
    assert again.tool_calls[0].id == "functions.calc:6"
    assert expert.answer(messages[:1], first_call=40).tool_calls[0].id == "functions.calc:40"


def test_expert_says_that_a_tool_failed_when_its_plan_broke():
    broken = Failures(1.0, wrong=0)
    episode = play(EXAMPLE, "plan-first", broken)
    assert episode.messages[-1].content == "A tool failed."
    assert episode.outcome == "wrong"


def test_expert_writes_short_thoughts():
    """What a small model has to write at once: at most 52 characters, whatever the length of the list."""
    for index in range(20):
        episode = play(make_problem(Dice(index), 50, "held-out"), "interleaved", Failures(0.2))
        assert max(len(t) for t in thoughts(episode)) <= 52


def test_expert_needs_a_problem():
    with pytest.raises(ValueError, match=r"pose a problem or question \(got 'Hello'\)"):
        expert.answer([Message("user", "Hello")])
    messages = play(EXAMPLE, "interleaved").messages[:3]
    messages[1] = Message("assistant", reasoning_content="hm", tool_calls=messages[1].tool_calls)
    with pytest.raises(ValueError, match=r"must end with a state \(got 'hm'\)"):
        expert.answer(messages)
    messages[1] = replace(messages[1], reasoning_content="dk: report the value: 5")
    messages[1:] = [replace(messages[1], tool_calls=(texts.lookup_call(0, "fig"),)), messages[2]]
    with pytest.raises(ValueError, match="a result must be for a step"):
        expert.answer(messages)
