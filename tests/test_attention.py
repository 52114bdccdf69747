"""Attention of a GPU's prefill, here on the CPU: right, for any shape."""

from __future__ import annotations

import pytest
import torch

from kimi_native.attention import attend_heads
from oracle import assert_within

# (heads, queries, keys, width): all of a prompt, the end of one, one head, a K2-like head
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


@pytest.mark.parametrize(
    ("queries", "keys", "values", "key_width"), [(6, 5, 5, 8), (3, 5, 5, 7), (3, 5, 4, 8)]
)
def test_attend_heads_refuses_shapes_that_do_not_fit(queries, keys, values, key_width):
    query, key, value = (torch.zeros(2, n, 8) for n in (queries, keys, values))
    with pytest.raises(ValueError, match="attend_heads: keys must be as wide"):
        run(query, key[..., :key_width], value)
