"""Evaluation: the expert scores 100 %, assistants broken on purpose score what their fault predicts."""

from __future__ import annotations

import math
from dataclasses import replace
from types import SimpleNamespace

import pytest

from kimi_native import load
from kimi_native.chat.types import Message, ToolCall
from kimi_native.errors import RequestError
from kimi_native.make_checkpoint import make_checkpoint
from kimi_native.nano import expert
from kimi_native.nano.dice import Dice
from kimi_native.nano.episode import Episode, with_results
from kimi_native.nano.evaluate import Share, evaluate, evaluate_all, make_episodes
from kimi_native.nano.modes import MODES, declared_tools
from kimi_native.nano.player import played_by
from kimi_native.nano.problems import make_problem
from kimi_native.nano.vocabulary import write_vocabulary
from kimi_native.nano.world import Failures, World


def the_expert(messages, tools):
    return expert.answer(messages)


def trusting(messages, tools):
    """Takes every number for a right one: what it cannot compute with, it makes again."""
    last = messages[-1]
    if last.role == "tool" and last.content.isdecimal():
        digit = last.content[-1]
        before = messages[-2]
        head, found, _ = (before.reasoning_content or "").rpartition("=..")
        if found:
            before = replace(before, reasoning_content=f"{head}=..{digit}")
        return expert.answer([*messages[:-2], before, last])
    return expert.answer(messages)


class Slipping:
    """Adds one to a number of its call with the given probability."""

    def __init__(self, probability):
        self.probability, self.dice = probability, Dice("slips")

    def __call__(self, messages, tools):
        message = expert.answer(messages)
        calls = message.tool_calls
        if calls and calls[0].name == "calc" and self.dice.chance(self.probability):
            a = calls[0].arguments
            wrong = f'{{"a":1{a[5:]}' if a[5] != "1" else f'{{"a":2{a[5:]}'
            return replace(message, tool_calls=(replace(calls[0], arguments=wrong),))
        return message


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("num_steps", [1, 10])
def test_evaluate_gives_the_expert_full_marks(mode, num_steps):
    score = evaluate(the_expert, mode=mode, num_steps=num_steps, count=40)
    assert score.solved == score.exact == Share(40, 40)
    assert score.steps == Share(40 * num_steps, 40 * num_steps)
    assert score.catches == Share(0, 0)
    assert score.false_alarms.count == 0
    assert score.outcomes == {"solved": 40}


def test_evaluate_expert_retries_where_its_plan_breaks():
    """The first claim in small: the same failures, thinking between the calls against planning blind."""
    arguments = {"num_steps": 20, "failures": Failures(0.1, wrong=0), "count": 60}
    between = evaluate(the_expert, mode="interleaved", **arguments)
    planned = evaluate(the_expert, mode="plan-first", **arguments)
    assert between.solved.rate == between.catches.rate == 1
    assert planned.solved.rate < 0.2


def test_evaluate_catch_rate_is_the_share_that_can_be_told():
    """The expert misses the wrong numbers that end right: 99 of the 999 wrong ones."""
    failures = Failures(0.25, error=1, garbled=1, wrong=8)
    caught = evaluate(the_expert, num_steps=20, failures=failures, count=60).catches
    low, high = caught.interval(z=5)
    # A call other than calc has no wrong numbers, so this is between all calls being calc and none.
    assert low < 1 - 0.3 * 99 / 999
    assert high > 1 - 0.8 * 99 / 999
    assert caught.count < caught.trials


def test_evaluate_finds_the_trusting_assistant_out():
    """It catches what is no number and no wrong number at all, and is worse for it."""
    played = []

    def answer_all(episodes):
        played.extend(e for e in episodes if e not in played)
        return [trusting(e.messages, e.tools) for e in episodes]

    failures = Failures(0.2, garbled=0)
    arguments = {"num_steps": 5, "failures": failures, "count": 60}
    trusts, careful = evaluate_all(answer_all, **arguments), evaluate(the_expert, **arguments)
    kinds = [call.failure for e in played for call in e.world.log if call.failure]
    assert trusts.catches == Share(kinds.count("error"), len(kinds))
    assert trusts.catches_of["error"] == Share(kinds.count("error"), kinds.count("error"))
    assert trusts.catches_of["wrong"] == Share(0, kinds.count("wrong"))
    assert kinds.count("wrong") > 10
    assert trusts.solved.rate < careful.solved.rate
    assert trusts.exact.count <= trusts.solved.count


@pytest.mark.parametrize("at_once", [1, 7, 60, 1000])
def test_evaluate_plays_so_many_at_once_and_gets_the_same_score(at_once):
    asked = []

    def answer_all(episodes):
        asked.append(len(episodes))
        return [trusting(e.messages, e.tools) for e in episodes]

    arguments = {"num_steps": 5, "failures": Failures(0.2), "count": 60}
    score = evaluate_all(answer_all, at_once=at_once, **arguments)
    assert score == evaluate(trusting, **arguments)
    assert max(asked) == min(at_once, 60)
    assert sum(asked) >= 5 * 60
    with pytest.raises(ValueError, match=r"at_once must be at least 1 \(got 0\)"):
        evaluate_all(answer_all, at_once=0, **arguments)


def test_evaluate_accuracy_of_a_step_is_the_assistants():
    """It slips at 5 % of the calculations, which are nearly 9 of 10 steps."""
    score = evaluate(Slipping(0.05), num_steps=10, count=200, split="train")
    low, high = score.steps.interval(z=4)
    assert low < 1 - 0.85 * 0.05
    assert 1 - 0.95 * 0.05 < high < 1
    assert score.exact.count <= score.solved.count < 200


def test_evaluate_ends_an_episode_that_runs_in_circles():
    def stubborn(messages, tools):
        call = ToolCall("functions.lookup:0", "lookup", '{"key":"gold"}')
        return Message("assistant", tool_calls=(call,))

    score = evaluate(stubborn, num_steps=3, count=2)
    assert score.outcomes == {"stuck": 2}
    assert score.solved == Share(0, 2)
    assert score.steps == Share(0, 2)


@pytest.mark.parametrize("mode", ["plan-first", "no-tools"])
def test_evaluate_allows_no_call_that_the_mode_forbids(mode):
    def calls_on(messages, tools):
        assert bool(tools) == (mode == "plan-first")
        call = ToolCall("functions.calc:0", "calc", '{"a":1,"op":"+","b":2}')
        return Message("assistant", tool_calls=(call,))

    assert evaluate(calls_on, mode=mode, num_steps=3, count=2).outcomes == {"calls": 2}


@pytest.mark.parametrize(
    ("content", "outcome"),
    [("{}", "solved"), ("The value is {}.", "solved"), ("{} or 5", "wrong"), ("", "wrong")],
)
def test_evaluate_takes_one_number_for_an_answer(content, outcome):
    problem = make_problem(Dice(0), 3, "train")
    episode = Episode(problem, "interleaved", World(problem.prices, Dice(1)))
    episode.push(Message("assistant", content.format(problem.values()[-1])))
    assert episode.outcome == outcome
    with pytest.raises(RuntimeError, match="must be open"):
        episode.push(Message("assistant", "5"))


def test_evaluate_right_answer_by_wrong_steps_is_not_exact():
    problem = make_problem(Dice(0), 3, "train")
    truth = problem.values()[-1]
    score = evaluate_all(
        lambda episodes: [Message("assistant", str(e.problem.values()[-1])) for e in episodes],
        num_steps=3,
        count=5,
    )
    assert truth in range(1000)
    assert (score.solved, score.exact) == (Share(5, 5), Share(0, 5))


def test_evaluate_poses_the_same_problems_in_every_mode():
    arguments = {"num_steps": 5, "failures": Failures(0.1), "count": 10, "split": "held-out"}
    texts = [[e.problem for e in make_episodes(mode=mode, seed=3, **arguments)] for mode in MODES]
    assert texts[0] == texts[1] == texts[2]
    assert texts[0] != [e.problem for e in make_episodes(mode=MODES[0], seed=4, **arguments)]


def test_evaluate_all_asks_for_open_episodes_only():
    asked = []

    def answer_all(episodes):
        asked.append(len(episodes))
        return [expert.answer(e.messages) for e in episodes]

    score = evaluate_all(answer_all, num_steps=4, count=10, failures=Failures(0.2, wrong=0))
    assert score.solved.rate == 1
    assert asked[0] == 10
    assert asked == sorted(asked, reverse=True)


class RecordedModel:
    """model.generate with the expert inside."""

    def __init__(self):
        self.options, self.prefixes, self.forgotten = [], [], []

    def forget(self, prefix):
        self.forgotten.append(prefix)

    def generate(self, prompts, *, tools, prefixes, **options):
        assert len(prompts) == len(prefixes)
        self.prefixes.append(list(prefixes))
        self.options.append((tuple(tools or ()), options))
        answers = [expert.answer(messages) for messages in prompts]
        return [
            SimpleNamespace(
                text=a.content or "", reasoning=a.reasoning_content, tool_calls=a.tool_calls
            )
            for a in answers
        ]


@pytest.mark.parametrize("mode", MODES)
def test_evaluate_plays_with_a_model(mode):
    model = RecordedModel()
    answer_all = played_by(model, max_tokens=99, min_p=0.1)
    assert evaluate_all(answer_all, mode=mode, num_steps=4, count=5).solved == Share(5, 5)
    options = {"temperature": 0.0, "max_tokens": 99, "min_p": 0.1}
    assert set(map(str, model.options)) == {str((declared_tools(mode), options))}


def test_evaluate_gives_each_conversation_a_place_in_the_cache():
    """The same handle in every turn of an episode; what has ended is given back."""
    model = RecordedModel()
    evaluate_all(played_by(model), num_steps=4, count=3, failures=Failures(0.3))
    first, *later = model.prefixes
    assert len(set(map(id, first))) == 3
    for turn in later:
        assert [p for p in first if p in turn] == turn
    ended = [p for p in first if p not in model.prefixes[-1]]
    assert set(map(id, model.forgotten)) == set(map(id, ended))


class SmallModel(RecordedModel):
    """Has room for so many messages in a conversation."""

    def __init__(self, room):
        super().__init__()
        self.room = room

    def prompt_ids(self, messages, *, tools):
        assert {tool.name for tool in tools} == {
            tool.name for tool in declared_tools("interleaved")
        }
        if len(messages) > self.room:
            raise RequestError("engine: prompt and at least one new token must fit")
        return [0] * len(messages)

    def generate(self, prompts, *, tools, prefixes, **options):
        for messages in prompts:
            self.prompt_ids(messages, tools=tools)
        return super().generate(prompts, tools=tools, prefixes=prefixes, **options)


def test_evaluate_goes_on_without_a_conversation_that_outgrows_the_context():
    """It is lost, with what it had done right; the others, shorter by luck of the tools, are played to their end."""
    arguments = {"num_steps": 4, "count": 20, "failures": Failures(0.3, wrong=0)}
    plenty = evaluate_all(played_by(SmallModel(999)), **arguments)
    assert plenty.solved == Share(20, 20)
    tight = evaluate_all(played_by(SmallModel(14)), **arguments)
    assert 0 < tight.solved.count < 20
    assert tight.outcomes == {"solved": tight.solved.count, "wrong": 20 - tight.solved.count}
    assert evaluate_all(played_by(SmallModel(1)), **arguments).outcomes == {"wrong": 20}


def test_evaluate_raises_what_is_not_a_matter_of_room():
    model = SmallModel(999)
    model.generate = lambda *_, **__: (_ for _ in ()).throw(RequestError("min_p must be"))
    with pytest.raises(RequestError, match="min_p must be"):
        evaluate_all(played_by(model), num_steps=4, count=2)


@pytest.mark.parametrize("mode", MODES)
def test_evaluate_plays_with_the_package(mode, tmp_path):
    """Random weights and kimi-nano's vocabulary: every problem ends, none is solved."""
    make_checkpoint(tmp_path, vocab=1392)
    write_vocabulary(tmp_path)
    model = load(tmp_path, max_context=1024, max_batch=2)
    score = evaluate_all(played_by(model, max_tokens=8), mode=mode, num_steps=2, count=2)
    assert score.solved == Share(0, 2)
    assert score.outcomes == {"wrong": 2}


def test_evaluate_declares_what_a_plan_writes():
    """A schema of its own for plans: "#n" is a string where a number is asked for; elsewhere it is not."""
    plan = {tool.name: tool.parameters["properties"] for tool in declared_tools("plan-first")}
    between = {tool.name: tool.parameters["properties"] for tool in declared_tools("interleaved")}
    assert plan["calc"]["a"] == plan["note_set"]["value"] == {"type": ["integer", "string"]}
    assert between["calc"]["a"] == {"type": "integer"}
    assert plan["calc"]["op"] == between["calc"]["op"]
    assert plan["lookup"] == between["lookup"]


def test_evaluate_puts_results_where_a_plan_asks_for_them():
    results = {"0": "17", "1": "error: busy", "12": "5"}
    assert with_results('{"a":"#0","op":"*","b":"#12"}', results) == '{"a":17,"op":"*","b":5}'
    assert with_results('{"a":"#1","b":"#7"}', results) == '{"a":"#1","b":"#7"}'


@pytest.mark.parametrize("trials", [1, 10, 263])
def test_evaluate_wilson_interval_of_none_and_all(trials):
    z2 = 1.959964**2
    bound = z2 / (trials + z2)  # the formula at p = 0
    assert Share(0, trials).interval() == pytest.approx((0, bound))
    assert Share(trials, trials).interval() == pytest.approx((1 - bound, 1))
    assert Share(0, 0).interval() == (0, 1)


def test_evaluate_wilson_interval_solves_its_equation():
    """Its ends are where the truth would be z standard deviations from what was seen."""
    for count, trials in [(1, 7), (50, 60), (3, 1000)]:
        p = count / trials
        for end in Share(count, trials).interval():
            assert abs(p - end) == pytest.approx(1.959964 * math.sqrt(end * (1 - end) / trials))


def test_evaluate_share_prints():
    assert str(Share(5, 10)) == "50.0 % [23.7, 76.3]"


@pytest.mark.parametrize("arguments", [{"count": 0}, {"num_steps": 0}, {"mode": "dream"}])
def test_evaluate_bad_arguments_are_named(arguments):
    with pytest.raises(ValueError, match="got"):
        evaluate(the_expert, **{"num_steps": 3, "count": 1, **arguments})
