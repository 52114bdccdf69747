"""Drills: every line follows from the list, and only what follows is to be learned."""

from __future__ import annotations

import re

import pytest

from kimi_native.nano import drills
from kimi_native.nano.conversations import Recipe
from kimi_native.nano.dice import Dice
from kimi_native.nano.problems import LABELS, held_out_compositions, read_sheet
from kimi_native.nano.transcripts import TranscriptDataset, answer_spans, encode
from kimi_native.nano.vocabulary import nano_tokenizer
from kimi_native.nano.world import MODULUS, operate

ONLY_DRILLS = Recipe(interleaved=0, plan_first=0, no_tools=0, questions=0, small_talk=0, drills=1)
LINE = re.compile(r"([a-z]{2}): ([^:]+): ([0-9]{1,3})(?:([-+*])([0-9]+)=\.\.([0-9]))?")


@pytest.fixture(scope="module")
def dataset():
    return TranscriptDataset(nano_tokenizer(), 300, recipe=ONLY_DRILLS)


def test_drill_lines_say_what_the_list_says(dataset):
    in_order, kinds = 0, set()
    for index in range(300):
        system, user, assistant = dataset.conversation(index).messages
        if system.content == drills.LABELS_TEXT:
            continue
        assert system.content == drills.LINES_TEXT
        sheet = read_sheet(user.content)
        lines = assistant.reasoning_content.split("\n")
        assert min(drills.FEWEST_LINES, len(sheet.steps)) <= len(lines) <= drills.MOST_LINES
        assert len({line[:2] for line in lines}) == len(lines)  # none twice
        in_order += lines == sorted(lines)
        for line in lines:
            label, words, a, op, b, digit = LINE.fullmatch(line).groups()
            step = sheet.steps[LABELS.index(label)]
            assert words == sheet.lines[LABELS.index(label)]
            assert 0 <= int(a) < MODULUS
            if op is None:
                assert step is None or step.source != "number"
            else:
                assert op == step.op
                assert step.source != "number" or b == step.argument
                assert int(digit) == operate(int(a), op, int(b)) % 10
            kinds.add((step and step.kind, op is None))
    assert in_order < 50
    assert len(kinds) == 1 + 3 + 1 + 2 * 5  # report; numbers; save; prices and notes in two forms


def test_drill_says_the_lists_labels(dataset):
    """All of them, in order, and all to be learned."""
    said = 0
    for index in range(300):
        conversation = dataset.conversation(index)
        system, user, assistant = conversation.messages
        if system.content == drills.LABELS_TEXT:
            lines = user.content.split("\n")[1:]
            assert assistant.reasoning_content.split("\n") == [line[:2] for line in lines]
            assert conversation.hidden == ()
            said += 1
    assert 80 < said < 160


def test_drill_learns_what_is_not_hidden(dataset):
    """The learned ids spell the reasoning without its hidden spans, then the answer."""
    tokenizer = nano_tokenizer()
    for index in range(100):
        conversation = dataset.conversation(index)
        example = encode(conversation, tokenizer)
        text = conversation.messages[-1].reasoning_content
        hidden = {i for start, stop in conversation.hidden for i in range(start, stop)}
        spoken = "".join(c for i, c in enumerate(text) if i not in hidden)
        is_of_labels = conversation.messages[0].content == drills.LABELS_TEXT
        assert is_of_labels or not re.search(r"\b[a-z]{2}:", spoken)
        learned = tokenizer.decode([i for i, x in zip(example.ids, example.loss, strict=True) if x])
        assert learned == f"<think>{spoken}</think>{drills.ANSWER}<|im_end|>"
        *_, (start, stop) = answer_spans(example.ids, tokenizer)
        assert not any(example.loss[:start])
        assert not any(example.loss[stop:])


def test_drill_training_lists_hold_nothing_held_out():
    for index in range(100):
        dice = Dice("drill", index)
        (_, user, _), _ = drills.make_drill(dice, "train", (3, 40))
        steps = [step for step in read_sheet(user.content).steps.values() if step]
        assert not list(held_out_compositions(tuple(steps)))
