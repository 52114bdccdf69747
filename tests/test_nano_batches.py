"""Packing, positions and datasets: what goes into a training step."""

from __future__ import annotations

import itertools
import json
import random

import pytest
import torch

from kimi_native.errors import RequestError
from kimi_native.nano.batches import Stretch, make_batch, random_positions, shuffled
from kimi_native.nano.dataset import Example
from kimi_native.nano.text_rows import read_rows
from kimi_native.nano.toy import CopyTask

TASK = CopyTask(40, 2, 6, examples=13)


class Listed:
    """A dataset of given examples."""

    def __init__(self, *examples: Example) -> None:
        self.examples = examples

    def __len__(self) -> int:
        return len(self.examples)

    def example(self, index: int) -> Example:
        return self.examples[index]


@pytest.mark.parametrize("length", [1, 2, 3, 4, 5, 16, 17, 1000])
def test_shuffled_is_a_permutation(length):
    assert sorted(shuffled(i, length, "a") for i in range(length)) == list(range(length))


def test_shuffled_depends_on_the_seed_and_mixes():
    order = [shuffled(i, 1000, "a") for i in range(1000)]
    assert order != [shuffled(i, 1000, "b") for i in range(1000)]
    near = sum(abs(a - b) < 10 for a, b in itertools.pairwise(order))
    assert near < 50  # 2 % of random neighbours are that near: 20 expected


def test_batches_go_through_every_example_once_an_epoch():
    counter, seen = 0, []
    while counter < len(TASK):
        batch = make_batch(TASK, counter, tokens=30, seed=1)
        assert sum(batch.documents.lengths) <= 30
        seen += [part.tolist() for part in batch.documents.ids.split(batch.documents.lengths)]
        counter = batch.counter
    expected = sorted(TASK.example(i).ids[:-1] for i in range(len(TASK)))
    assert sorted(seen[: len(TASK)]) == expected
    assert sorted(seen[: len(TASK)]) != seen[: len(TASK)]


def test_batch_predicts_what_the_examples_ask_for():
    batch = make_batch(TASK, 3, tokens=64, seed=0)
    start = 0
    found = dict(zip(batch.rows.tolist(), batch.targets.tolist(), strict=True))
    for i, length in enumerate(batch.documents.lengths):
        example = TASK.example(shuffled(3 + i, len(TASK), "0/0"))
        assert batch.documents.ids[start : start + length].tolist() == example.ids[:-1]
        for t in range(length):
            target = example.ids[t + 1] if example.loss[t + 1] else None
            assert found.pop(start + t, None) == target
        start += length
    assert found == {}


def test_batch_is_full_to_the_next_example():
    lone = Listed(Example([1, 2, 3], [False, True, True]))
    assert make_batch(lone, 0, tokens=7, seed=0).documents.lengths == [2, 2, 2]
    assert make_batch(lone, 5, tokens=2, seed=0).counter == 6


@pytest.mark.parametrize(
    ("dataset", "message"),
    [
        (Listed(), r"dataset must not be empty \(got 0"),
        (Listed(Example([1], [False])), r"example 0 must have 2 to 9 tokens \(got 1\)"),
        (Listed(Example([1] * 10, [False] * 10)), r"2 to 9 tokens \(got 10\)"),
        (Listed(Example([1] * 9, [False] * 9)), r"something must be predicted \(got 1 examples"),
    ],
)
def test_batch_refuses(dataset, message):
    with pytest.raises(ValueError, match=message):
        make_batch(dataset, 0, tokens=8, seed=0)


# ---- positions ------------------------------------------------------------------------------------------------------


def test_positions_without_stretch_are_plain():
    batch = make_batch(TASK, 0, tokens=64, seed=0)
    expected = [torch.arange(n) for n in batch.documents.lengths]
    assert torch.equal(batch.documents.positions, torch.cat(expected))


def test_random_positions_ascend_within_the_limit_and_reach_far():
    far, jumps = 0, 0
    for seed in range(300):
        positions = random_positions(20, random.Random(seed), Stretch(1.0, 1000, 3))
        gaps = [b - a for a, b in itertools.pairwise(positions)]
        assert positions[0] >= 0
        assert positions[-1] < 1000
        assert min(gaps) >= 1
        assert sum(gap > 1 for gap in gaps) <= 3
        far, jumps = max(far, positions[-1]), max(jumps, *gaps)
    assert far > 900
    assert jumps > 300


def test_random_positions_follow_the_chance():
    stretched = Stretch(0.25, 10_000, 2)
    plain = sum(
        random_positions(9, random.Random(s), stretched) == list(range(9)) for s in range(1000)
    )
    assert 700 < plain < 850  # 750, and a few whose shift is drawn as 0


@pytest.mark.parametrize("length", [1, 20])
def test_random_positions_without_room_are_plain(length):
    stretch = Stretch(1.0, length, 5)
    assert random_positions(length, random.Random(0), stretch) == list(range(length))


def test_stretched_batches_depend_on_the_counter_alone():
    stretch = Stretch(1.0, 5000, 4)
    first, again = (make_batch(TASK, 7, tokens=50, seed=2, stretch=stretch) for _ in range(2))
    assert torch.equal(first.documents.positions, again.documents.positions)
    other = make_batch(TASK, 7, tokens=50, seed=3, stretch=stretch)
    assert other.documents.positions.tolist() != first.documents.positions.tolist()


@pytest.mark.parametrize("args", [(-0.1, 1, 1), (1.1, 1, 1), (0.5, -1, 1), (0.5, 1, -1)])
def test_stretch_refuses(args):
    with pytest.raises(ValueError, match="stretch: chance must be 0 to 1"):
        Stretch(*args)


# ---- datasets -------------------------------------------------------------------------------------------------------


def test_copy_task_repeats_its_symbols():
    for index in range(len(TASK)):
        example = TASK.example(index)
        half = len(example.ids) // 2 - 1
        assert example.ids[half] == 0
        assert example.ids[half + 1 :] == [*example.ids[:half], 1]
        assert example.loss == [False] * (half + 1) + [True] * (half + 1)
    with pytest.raises(IndexError, match=r"must be 0 to 12 \(got 13\)"):
        TASK.example(13)


def letters(text: str) -> list[int]:
    return [ord(c) for c in text]


GOOD = ['{"text": "abc"}', '{"ids": [5, 6, 7], "loss": [false, false, true]}']
BAD = {
    "{": "Expecting property name",
    '["text"]': "must be",
    '{"text": "abc", "more": 1}': "must be",
    '{"text": 5}': "text must be a string",
    '{"messages": []}': "messages need a chat format that is known here (got none)",
    '{"tools": []}': "must be",
    '{"text": ""}': r"2 to 8 tokens (got 0)",
    '{"text": "a"}': r"2 to 8 tokens (got 1)",
    '{"text": "abcdefghi"}': "2 to 8 tokens (got 9)",
    '{"ids": [1, true], "loss": [false, true]}': "list of integers",
    '{"ids": [1, 2], "loss": [0, 1]}': "list of booleans",
    '{"ids": [1, 200], "loss": [false, true]}': "ids must be in [0, 128)",
    '{"ids": [1, 2, 3], "loss": [false, true]}': "same length (got 3 and 2)",
    '{"ids": [1, 2], "loss": [true, true]}': "first token",
    '{"ids": [1, 2], "loss": [false, false]}': "must have something to be predicted",
    '{"text": "\udce9t\udce9"}': "can't decode byte 0xe9",  # Latin-1
    "[" * 100_000: "recursion",
}


def read(path, lines):
    path.write_text("\n".join(lines), errors="surrogateescape")
    return read_rows(path, letters, vocab_size=128, max_tokens=8)


def test_text_rows_are_read(tmp_path):
    rows = read(tmp_path / "rows.jsonl", [GOOD[0], "", GOOD[1]])
    assert [rows.example(i).ids for i in range(len(rows))] == [[97, 98, 99], [5, 6, 7]]
    assert rows.example(0).loss == [False, True, True]
    assert rows.bad == []
    assert rows.report().endswith("2 rows used, 0 not")
    with pytest.raises(IndexError, match=r"must be 0 to 1 \(got -1\)"):
        rows.example(-1)


def test_text_rows_counts_and_names_every_bad_row(tmp_path):
    rows = read(tmp_path / "rows.jsonl", [GOOD[0], *BAD, GOOD[1]])
    assert len(rows) == 2
    assert [line for line, _ in rows.bad] == list(range(2, 2 + len(BAD)))
    for (_, reason), expected in zip(rows.bad, BAD.values(), strict=True):
        assert expected in reason
    assert f"2 rows used, {len(BAD)} not (line 2: Expecting" in rows.report()
    assert rows.report().endswith(f"; and {len(BAD) - 5} more: lines 7 to {len(BAD) + 1})")
    scattered = read(tmp_path / "rows.jsonl", [*[GOOD[0], "x"] * 7, "x", *[GOOD[0], "x"] * 30])
    assert "; and 33 more: lines 12, 14 to 15, 17, 19, 21," in scattered.report()
    assert scattered.report().endswith(", 51, ...)")


def test_text_rows_without_a_good_row_are_an_error(tmp_path):
    with pytest.raises(RequestError, match=r"must have a row that can be used.*line 1: must be"):
        read(tmp_path / "rows.jsonl", [json.dumps([1])])
    with pytest.raises(RequestError, match=r"must be a readable file .*No such file"):
        read_rows(tmp_path / "none.jsonl", letters, vocab_size=128, max_tokens=8)
    (tmp_path / "latin").write_bytes(b'{"text": "\xe9t\xe9"}')
    with pytest.raises(RequestError, match=r"0 rows used, 1 not .*line 1: 'utf-8' codec can't"):
        read_rows(tmp_path / "latin", letters, vocab_size=128, max_tokens=8)


def test_temperatures_are_drawn_for_each_example_and_change_nothing_else():
    plain = make_batch(TASK, 7, tokens=400, seed=2)
    assert plain.documents.temperatures is None
    first, again = (
        make_batch(TASK, 7, tokens=400, seed=2, highest_temperature=1.5) for _ in range(2)
    )
    drawn = first.documents.temperatures
    assert drawn == again.documents.temperatures
    assert len(drawn) == len(first.documents.lengths) == len(set(drawn))
    assert 1 <= min(drawn) < 1.25 < max(drawn) <= 1.5
    assert torch.equal(first.documents.ids, plain.documents.ids)
    assert torch.equal(first.documents.positions, plain.documents.positions)
    following = make_batch(TASK, 8, tokens=400, seed=2, highest_temperature=1.5)
    assert following.documents.temperatures[0] == drawn[1]
