"""The paged latent cache: pages belong to one sequence at a time, and a failed request takes nothing."""

from __future__ import annotations

import random

import pytest
import torch

from kimi_native.cache import CachedSequence, LatentCache
from kimi_native.config import KimiConfig
from kimi_native.errors import RequestError
from tiny_checkpoint import TINY

CONFIG = KimiConfig.from_dict(TINY)


def make_cache(max_tokens=40, page_size=4, **options) -> LatentCache:
    return LatentCache(CONFIG, max_tokens=max_tokens, page_size=page_size, **options)


@pytest.mark.parametrize(("tokens", "pages"), [(1, 1), (4, 1), (5, 2), (40, 10)])
def test_cache_holds_whole_pages_for_its_tokens(tokens, pages):
    cache = make_cache(max_tokens=tokens)
    assert cache.data.shape == (3, pages, 4, 32 + 8)  # layers, pages, page, latent and rope part
    assert cache.free_tokens == 4 * pages
    assert cache.dtype == torch.bfloat16


@pytest.mark.parametrize("options", [{"max_tokens": 0}, {"page_size": 0}, {"max_tokens": -4}])
def test_cache_refuses_sizes_below_one(options):
    with pytest.raises(ValueError, match="cache: max_tokens and page_size must be at least 1"):
        make_cache(**options)


def test_cache_reserves_a_page_when_the_last_is_full():
    cache, seq = make_cache(), CachedSequence()
    for length in range(12):
        seq.length = length
        cache.reserve(seq, 1)
        assert len(seq.pages) == length // 4 + 1
    assert cache.free_tokens == 40 - 12


def test_cache_without_room_says_what_helps_and_takes_nothing():
    cache, seq, other = make_cache(), CachedSequence(), CachedSequence()
    cache.reserve(other, 30)
    before = list(seq.pages)
    message = (
        r"cache: 9 more tokens need 3 pages of 4 tokens \(got 2 free of 10\); raise max_context"
    )
    with pytest.raises(RequestError, match=message):
        cache.reserve(seq, 9)
    assert seq.pages == before
    assert cache.free_tokens == 8
    cache.reserve(seq, 8)


def test_cache_rows_of_different_tokens_never_meet():
    """Random growth and release: every token's row is its own, at the place that slots and the page table tell."""
    rng = random.Random(1)
    cache = make_cache(dtype=torch.float32)
    seqs: list[CachedSequence] = []
    written: dict[int, list[float]] = {}
    value = 0.0
    for _ in range(600):
        if seqs and rng.random() < 0.2:
            gone = seqs.pop(rng.randrange(len(seqs)))
            del written[id(gone)]
            cache.free(gone)
            assert (gone.pages, gone.length) == ([], 0)
        if len(seqs) < 4 and rng.random() < 0.5:
            seqs.append(cache.new_sequence())
            written[id(seqs[-1])] = []
        if seqs and rng.random() < 0.2:
            cut = rng.choice(seqs)
            length = rng.randint(0, cut.length + 2)
            cache.truncate(cut, length)
            del written[id(cut)][length:]
            assert cut.length == len(written[id(cut)])
            assert len(cut.pages) == -(-cut.length // 4)
        for seq in seqs:
            tokens = rng.randint(0, 3)
            try:
                cache.reserve(seq, tokens)
            except RequestError:
                continue
            slots = cache.slots(seq, seq.length, seq.length + tokens)
            for slot in slots.tolist():
                value += 1
                cache.data.view(3, -1, 40)[:, slot] = value
                written[id(seq)].append(value)
            seq.length += tokens
        for seq in seqs:
            rows = cache.read(2, cache.slots(seq, 0, seq.length))
            assert rows[:, 0].tolist() == written[id(seq)]
    owned = [p for seq in seqs for p in seq.pages]
    assert len(owned) == len(set(owned))
    assert cache.free_tokens == 40 - 4 * len(owned)


def test_cache_slots_are_page_times_size_plus_place():
    cache = make_cache()
    first, second = cache.new_sequence(), cache.new_sequence()
    for seq in (first, second, first):  # pages of the two alternate
        seq.length += 4 * bool(seq.pages)
        cache.reserve(seq, 4)
    assert len(first.pages) == 2
    expected = [page * 4 + i for page in first.pages for i in range(4)]
    assert cache.slots(first, 0, 8).tolist() == expected
    assert cache.slots(first, 3, 6).tolist() == expected[3:6]


def test_cache_page_table_is_as_wide_as_the_longest():
    cache = make_cache()
    short, long, none = (cache.new_sequence() for _ in range(3))
    cache.reserve(short, 3)
    cache.reserve(long, 9)
    table = cache.page_table([short, long, none])
    unused = 2**31 - 1
    assert table.dtype == torch.int32
    assert table.tolist() == [[*short.pages, unused, unused], long.pages, [unused] * 3]


def test_cache_lies_on_huge_pages():
    """Where the system has them: it begins at one, and asks for more of them."""
    data = make_cache().data
    assert data.data_ptr() % (2 << 20) == 0
    assert not data.any()
