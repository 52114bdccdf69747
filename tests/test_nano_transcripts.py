"""Transcripts: training shows, id for id, what the model will see, and the assistant's words alone carry loss."""

from __future__ import annotations

import collections
import itertools
from dataclasses import replace

import pytest

from kimi_native.chat.parser import parse
from kimi_native.chat.template import render
from kimi_native.chat.types import Message
from kimi_native.nano import expert
from kimi_native.nano.conversations import Conversation, Recipe, make_conversation
from kimi_native.nano.dataset import Example
from kimi_native.nano.dice import Dice
from kimi_native.nano.modes import mode_of
from kimi_native.nano.problems import LABELS, held_out_compositions, read_sheet
from kimi_native.nano.texts import expects_wrong_digit
from kimi_native.nano.transcripts import TranscriptDataset, encode
from kimi_native.nano.vocabulary import nano_tokenizer

PROBLEMS = Recipe(small_talk=0, questions=0, drills=0)
BETWEEN = replace(PROBLEMS, plan_first=0, no_tools=0)
WINDOWS = replace(BETWEEN, windows=1.0)
QUESTIONS = replace(PROBLEMS, interleaved=0, plan_first=0, no_tools=0, questions=1)
COUNT = 150


@pytest.fixture(scope="module")
def tokenizer():
    return nano_tokenizer()


def some(recipe, count=COUNT, split="train"):
    for index in range(count):
        yield make_conversation(Dice("test", index), split, recipe)


def learned(conversation):
    return [
        (index, message)
        for index, message in enumerate(conversation.messages)
        if message.role == "assistant" and index >= conversation.first_learned
    ]


def runs(loss):
    """(start, end) of every stretch that carries loss."""
    position, found = 0, []
    for value, group in itertools.groupby(loss):
        size = len(list(group))
        if value:
            found.append((position, position + size))
        position += size
    return found


@pytest.mark.parametrize(
    "recipe",
    [Recipe(later_calls=0, slips=0, drills=0), replace(WINDOWS, slips=0)],
    ids=["whole", "windows"],
)
def test_transcripts_show_what_the_model_will_see(tokenizer, recipe):
    """Before every learned message stands the prompt that generation would start from; in it, the message itself."""
    for conversation in some(recipe):
        example = encode(conversation, tokenizer)
        stretches = runs(example.loss)
        assert len(stretches) == len(learned(conversation))
        for (index, message), (start, end) in zip(learned(conversation), stretches, strict=True):
            prompt = render(
                conversation.messages[:index],
                format="k2-thinking",
                tokenizer=tokenizer,
                tools=conversation.tools,
            )
            assert example.ids[:start] == prompt
            output = parse(tokenizer, example.ids[start:end], format="k2-thinking")
            assert output.finish_reason in ("stop", "tool_calls")
            assert (output.reasoning, output.content) == (
                message.reasoning_content,
                message.content,
            )
            assert output.tool_calls == message.tool_calls


def test_transcripts_hide_a_number_that_nothing_tells(tokenizer):
    """Where the calls are numbered on from a cut, the first call's id carries no loss, all else does."""
    seen = 0
    for conversation in some(replace(BETWEEN, later_calls=1.0, slips=0)):
        example = encode(conversation, tokenizer)
        whole = encode(replace(conversation, number_is_open=False), tokenizer).loss
        hidden = [i for i, (a, b) in enumerate(zip(whole, example.loss, strict=True)) if a != b]
        first = learned(conversation)[0][1].tool_calls[0]
        if conversation.number_is_open:
            seen += 1
            assert hidden == list(range(hidden[0], hidden[-1] + 1))
            assert tokenizer.decode(example.ids[hidden[0] : hidden[-1] + 1]) == first.id
            assert int(first.id.rpartition(":")[2]) > 0
        else:
            assert hidden == []
    assert seen > COUNT / 2


def test_transcripts_are_the_experts_words():
    """Every learned message is what the expert says to the conversation so far."""
    for recipe in (PROBLEMS, WINDOWS, QUESTIONS):
        for conversation in some(recipe):
            for index, message in learned(conversation):
                before = conversation.messages[:index]
                first = message.tool_calls[0].id if message.tool_calls else ":0"
                said = expert.answer(
                    before,
                    first_call=int(first.rpartition(":")[2]),
                    has_tools=bool(conversation.tools),
                )
                if expects_wrong_digit(message) and not expects_wrong_digit(said):
                    slip = message.reasoning_content[:-1] + said.reasoning_content[-1]
                    message = replace(message, reasoning_content=slip)
                assert said == message


def test_transcripts_show_slips_and_teach_what_follows(tokenizer):
    """A wrong digit carries no loss; the right result comes twice and is taken, if no tool fails."""
    recipe = replace(BETWEEN, slips=1.0, reliable=1.0, windows=0)
    for conversation in some(recipe, 30):
        example = encode(conversation, tokenizer)
        without = encode(replace(conversation, first_learned=len(conversation.messages)), tokenizer)
        assert not any(without.loss)
        hidden = [
            tokenizer.decode(example.ids[i - 1 : i + 2])
            for start, end in itertools.pairwise(runs(example.loss))
            for i in range(start[1], end[0])
            if end[0] - start[1] == 1
        ]
        slipped = [m for _, m in learned(conversation) if expects_wrong_digit(m)]
        digits = [m.reasoning_content[-1] for m in slipped]
        assert hidden == [f"=..{digit}</think>" for digit in digits]
        assert len(slipped) % 2 == 0  # each is followed by the same once more
        thoughts = [m.reasoning_content for _, m in learned(conversation)]
        assert sum(" twice\n" in t for t in thoughts) == len(slipped) // 2
        *_, sheet_value = [m.content for m in conversation.messages]
        assert sheet_value == f"The value is {solve(conversation)}."


def solve(conversation):
    """The right answer, from the results that the transcript's own tools gave: the last calculation's."""
    results = [
        (before.tool_calls[0].name, message.content)
        for before, message in itertools.pairwise(conversation.messages)
        if message.role == "tool"
    ]
    start = read_sheet(conversation.messages[conversation.first_learned - 1].content).start
    return next((r for name, r in reversed(results) if name == "calc"), start)


def test_transcripts_come_in_the_recipes_shares():
    recipe, count = Recipe(windows=0, drills=0), 1500
    kinds = collections.Counter(
        mode_of(c.messages) if read_sheet(c.messages[c.first_learned - 1].content) else "other"
        for c in some(recipe, count)
    )
    total = sum(recipe.weights)
    for kind, weight in [
        ("interleaved", recipe.interleaved),
        ("plan-first", recipe.plan_first),
        ("no-tools", recipe.no_tools),
        ("other", recipe.small_talk + recipe.questions),
    ]:
        share = weight / total
        assert abs(kinds[kind] - share * count) < 5 * (count * share * (1 - share)) ** 0.5


@pytest.mark.parametrize("split", ["train", "held-out"])
def test_transcripts_keep_to_their_split(split):
    for conversation in some(replace(PROBLEMS, windows=0), split=split):
        user = conversation.messages[conversation.first_learned - 1]
        steps = tuple(step for step in read_sheet(user.content).steps.values() if step)
        assert bool(list(held_out_compositions(steps))) == (split == "held-out")


@pytest.mark.parametrize(
    "recipe", [Recipe(), Recipe(history=1.0), WINDOWS], ids=["all", "before", "long"]
)
def test_transcripts_for_training_show_no_held_out_composition(recipe):
    """Whatever the kind of conversation, and in what came before; a list that is learned in part counts as a whole."""
    lists = 0
    for conversation in some(recipe):
        for message in conversation.messages:
            if message.role == "user" and (sheet := read_sheet(message.content)) is not None:
                steps = tuple(step for step in sheet.steps.values() if step)
                assert list(held_out_compositions(steps)) == []
                lists += 1
    assert lists > COUNT / 2


def test_transcripts_windows_carry_out_some_steps_of_a_long_list():
    lengths, calls, reports = [], [], 0
    for conversation in some(WINDOWS):
        listed = list(read_sheet(conversation.messages[0].content).steps)
        carried_out = {
            LABELS.index(message.reasoning_content.rpartition("\n")[2][:2])
            for _, message in learned(conversation)
        }
        assert carried_out <= set(listed)
        assert sorted(carried_out) == list(range(min(carried_out), max(carried_out) + 1))
        assert conversation.first_learned == 3
        calls.append(sum(len(message.tool_calls) for message in conversation.messages))
        lengths.append(len(listed) - 1)
        reports += listed[-1] in carried_out
    assert min(lengths) >= 13
    assert 150 < max(lengths) <= 200
    assert min(calls) < 6
    assert 130 < max(calls) <= 160
    assert COUNT / 5 < reports < COUNT * 4 / 5


def test_transcripts_other_lists_are_no_longer_than_what_is_carried_out():
    for conversation in some(replace(PROBLEMS, windows=0)):
        user = conversation.messages[conversation.first_learned - 1]
        longest = 20 if mode_of(conversation.messages) == "plan-first" else 12
        assert len(read_sheet(user.content).steps) - 1 <= longest


def test_transcripts_declare_the_tools_they_use():
    for conversation in some(Recipe(drills=0)):
        declared = {tool.name for tool in conversation.tools}
        assert declared >= {c.name for m in conversation.messages for c in m.tool_calls}


def test_transcripts_dataset_is_a_function_of_seed_and_index(tokenizer):
    dataset = TranscriptDataset(tokenizer, 10, seed=3)
    assert len(dataset) == 10
    assert dataset.example(7) == TranscriptDataset(tokenizer, 1000, seed=3).example(7)
    assert dataset.example(7) != dataset.example(8)
    assert dataset.example(7) != TranscriptDataset(tokenizer, 10, seed=4).example(7)
    assert dataset.example(7) != TranscriptDataset(tokenizer, 10, 3, "held-out").example(7)


@pytest.mark.parametrize("index", [-1, 10])
def test_transcripts_dataset_ends_at_its_size(tokenizer, index):
    with pytest.raises(IndexError, match=rf"in 0 \.\. 9 \(got {index}\)"):
        TranscriptDataset(tokenizer, 10).example(index)
    with pytest.raises(ValueError, match=r"must not be negative \(got -1\)"):
        TranscriptDataset(tokenizer, -1)


def test_transcripts_cost_few_tokens_a_step(tokenizer):
    """A step with a lookup and a calculation: about 110 tokens, of which 75 are the model's."""
    user = Message("user", "Start with 512.\ndk: times price of fig\ndl: report the value")
    first = expert.answer([user], first_call=40)
    price = Message("tool", "23", tool_call_id=first.tool_calls[0].id)
    second = expert.answer([user, first, price])
    product = Message("tool", "776", tool_call_id=second.tool_calls[0].id)
    step = Conversation((user, first, price, second, product), (), 1)
    example = encode(step, tokenizer)
    without = encode(Conversation((user,), (), 1), tokenizer)
    assert len(example.ids) - len(without.ids) <= 112
    assert sum(example.loss) <= 75


def test_example_checks_its_fields():
    with pytest.raises(ValueError, match=r"same length \(got 2 and 1\)"):
        Example([1, 2], [False])
    with pytest.raises(ValueError, match="first token"):
        Example([1, 2], [True, True])


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("small_talk", -1),
        ("windows", 1.5),
        ("highest_failure", -0.1),
        ("steps", (0, 3)),
        ("plan_steps", (5, 3)),
        ("window_calls", (1, 3)),
        ("longer_lists", (1, 3)),
        ("longer_lists", (2, 416)),
        ("last_call", 0),
    ],
)
def test_transcripts_recipe_out_of_range_is_named(field, value):
    with pytest.raises(ValueError, match=rf"recipe: ({field}|weights) must .*got"):
        Recipe(**{field: value})
    with pytest.raises(ValueError, match="weights must not be negative, one positive"):
        Recipe(0, 0, 0, 0, 0, 0)
