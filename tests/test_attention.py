"""Prefill's attention: right, and the same to the last bit on any number of threads."""

from __future__ import annotations

import os
import threading

import pytest
import torch

from kimi_native import ops
from kimi_native.attention import attend_heads, causal_mask
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
    return query, key, value, causal_mask(queries, keys) if keys > queries else None


def run(query, key, value, mask):
    return attend_heads(query, key, value, mask=mask, softmax_scale=SCALE)


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
    assert_within(run(*case), *expected_attention(*case[:3]))


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
    query, key, value, mask = make_case(16, 5, 300, 192)
    together = run(query, key, value, mask)
    for h in (0, 7, 15):
        one = [t[h : h + 1].clone() for t in (query, key, value)]
        assert_same_bits(run(*one, mask)[0], together[h])


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


def test_attend_heads_passes_errors_on():
    query, key, value, mask = make_case(2, 3, 5, 8)
    with pytest.raises(RuntimeError):
        run(query, key[..., :7], value, mask)


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


def test_causal_mask_hand_case():
    inf = float("inf")
    assert causal_mask(2, 4).tolist() == [[0, 0, 0, -inf], [0, 0, 0, 0]]
