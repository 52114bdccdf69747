"""Prefill's attention: right, and the same to the last bit on any number of threads, however it is cut."""

from __future__ import annotations

import os
import threading

import pytest
import torch

from kimi_native import ops
from kimi_native.attention import attend_heads, block_mask
from oracle import assert_same_bits, assert_within, threads

# (heads, queries, keys, width): blocks of few queries, lengths that fill no block, one head, a K2-like head
SHAPES = [
    (1, 1, 1, 24),
    (1, 1, 2000, 192),
    (1, 32, 1100, 48),
    (2, 5, 2000, 192),
    (3, 33, 33, 64),
    (5, 100, 300, 192),
    (16, 5, 300, 192),
    (4, 257, 513, 48),
]


SCALE = 0.1
U = 2.0**-24


def make_case(heads, queries, keys, width):
    g = torch.Generator().manual_seed(queries + keys)
    query, key, value = (torch.randn(heads, n, width, generator=g) for n in (queries, keys, keys))
    return query, key, value


def run(query, key, value):
    return attend_heads(query, key, value, softmax_scale=SCALE)


def expected_attention(query, key, value):
    """float64 result, one query of one head at a time over the keys it sees, and its error bound.

    A score carries at most 2 * width roundings of its absolute sum, exp 2 ulp and the rounding of its argument, so a
    softmax weight is within 2 * (error + 4 U + U * |score - max|) of itself, relatively; the sums over the keys add
    2 * (keys + 8) roundings. The output is a mean of values, so it inherits that times the largest of them.
    """
    heads, queries, width = query.shape
    out = torch.empty(query.shape, dtype=torch.float64)
    bound = torch.empty_like(out)
    for h in range(heads):
        for i in range(queries):
            seen = slice(0, key.shape[1] - queries + i + 1)
            q, k, v = query[h, i].double(), key[h, seen].double(), value[h, seen].double()
            scores = SCALE * (k @ q)
            out[h, i] = torch.softmax(scores, dim=0) @ v
            off = 2 * width * U * SCALE * (k.abs() @ q.abs()).max() + U * (
                4 + 2 * scores.abs().max()
            )
            bound[h, i] = (2 * off + 2 * (len(k) + 8) * U) * v.abs().max()
    return out, bound


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_attend_heads_matches_float64(shape):
    case = make_case(*shape)
    assert_within(run(*case), *expected_attention(*case))


@pytest.mark.parametrize("value_width", [16, 24, 40])
def test_attend_heads_takes_values_of_another_width(value_width):
    query, key, _ = make_case(3, 9, 70, 24)
    value = torch.randn(3, 70, value_width)
    padded = torch.zeros(3, 70, 24)
    padded[..., : min(24, value_width)] = value[..., :24]
    actual = run(query, key, value)
    assert actual.shape == (3, 9, value_width)
    expected, bound = expected_attention(query, key, padded)
    assert_within(actual[..., :24], expected[..., :value_width], bound[..., :value_width])


@pytest.mark.parametrize("keys", [1, 31, 32, 33, 64, 200, 700, 1111])
def test_attend_heads_row_does_not_depend_on_the_call_it_is_in(keys):
    query, key, value = make_case(2, keys, keys, 48)
    whole = run(query, key, value)
    for cut in {1, 16, 17, 31, 32, 33, 64, keys // 2, keys - 33, keys - 32, keys - 1}:
        if not 0 < cut < keys:
            continue
        first = run(query[:, :cut], key[:, :cut], value[:, :cut])
        # As the model passes them: heads between the rows.
        rest = [
            t.transpose(0, 1).contiguous().transpose(0, 1) for t in (query[:, cut:], key, value)
        ]
        assert_same_bits(torch.cat([first, run(*rest)], dim=1), whole)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_attend_heads_does_not_depend_on_threads(shape):
    case = make_case(*shape)
    results = []
    for n in (1, 2, 3, 5):
        with threads(n):
            results.append(run(*case))
    for result in results[1:]:
        assert_same_bits(result, results[0])


def test_attend_heads_head_does_not_depend_on_the_others():
    query, key, value = make_case(16, 5, 300, 192)
    together = run(query, key, value)
    for h in (0, 7, 15):
        one = [t[h : h + 1].clone() for t in (query, key, value)]
        assert_same_bits(run(*one)[0], together[h])


def test_attend_heads_leaves_the_number_of_torch_threads_alone():
    before = torch.get_num_threads()
    seen = []
    with threads(7):  # a number that no other test uses: the pool is made anew
        run(*make_case(2, 3, 3, 8))
    other = threading.Thread(target=lambda: seen.append(torch.get_num_threads()))
    other.start()
    other.join()
    assert torch.get_num_threads() == before
    assert seen == [before]


@pytest.mark.parametrize(
    ("queries", "keys", "values", "key_width"), [(6, 5, 5, 8), (3, 5, 5, 7), (3, 5, 4, 8)]
)
def test_attend_heads_refuses_shapes_that_do_not_fit(queries, keys, values, key_width):
    query, key, value = (torch.zeros(2, n, 8) for n in (queries, keys, values))
    with pytest.raises(ValueError, match="attend_heads: keys must be as wide"):
        run(query, key[..., :key_width], value)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_attend_heads_works_in_a_forked_child():
    case = make_case(3, 5, 9, 16)
    expected = run(*case)
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            ops.set_num_threads(1)
            code = 0 if torch.equal(run(*case), expected) else 2
        finally:
            os._exit(code)
    _, status = os.waitpid(pid, 0)
    assert os.waitstatus_to_exitcode(status) == 0


def test_block_mask_shows_each_query_itself_and_what_is_before():
    mask = block_mask(40)
    for row, column in [(0, 8), (0, 0), (5, 13), (31, 39)]:
        assert mask[row, column] == 0
    for row, column in [(0, 9), (5, 14), (30, 39)]:
        assert mask[row, column] == -torch.inf
    assert torch.equal(mask[:, 8:], block_mask(32))
