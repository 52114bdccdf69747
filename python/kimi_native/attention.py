"""Causal attention of torch, with one result for any number of threads and any sharing of a prompt among calls.

torch shares the heads and query blocks of its attention among its threads, and the matrix products inside are planned
for their sizes and for the thread count that each thread has been told: the last bits change with both. So every call
here computes one head on one thread, and QUERY_BLOCK queries that start at a multiple of it: what a row is part of
depends on its position alone. A pool of threads shares out the heads.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from kimi_native import ops
from kimi_native.single_threads import single_threads

QUERY_BLOCK = 32  # the smallest that torch does not divide further


def attend_heads(query: Tensor, key: Tensor, value: Tensor, *, softmax_scale: float) -> Tensor:
    """Causal softmax(scale * query key^T) value of every head, on ops.num_threads() threads.

    query    [heads, queries, width]     float32; the last query sees every key, each one before it one less
    key      [heads, keys, width]        float32, at least as many keys as queries
    value    [heads, keys, value_width]  float32
    returns  [heads, queries, value_width]  float32; a row depends, to the last bit, on its position among the keys, the
             query there, and the keys and values up to there

    For inference: gradients do not pass, as through every native op.
    """
    if query.is_cuda:
        return _attend_on_gpu(query, key, value, softmax_scale)
    heads, queries, keys = *query.shape[:2], key.shape[1]
    value_width, start = value.shape[2], keys - queries
    if start < 0 or key.shape[2] != query.shape[2] or value.shape[1] != keys:
        raise ValueError(
            "attend_heads: keys must be as wide as the queries, at least as many, and as many as the values "
            f"(got query {list(query.shape)}, key {list(key.shape)}, value {list(value.shape)})"
        )
    first, last = start // QUERY_BLOCK * QUERY_BLOCK, -(-keys // QUERY_BLOCK) * QUERY_BLOCK
    # Copies, so that strides and alignment are always the same; torch's attention needs values as wide as the keys.
    width = max(query.shape[2], value_width)
    query = _padded(query, start - first, last - first, width)
    key, value = _padded(key, 0, last, width), _padded(value, 0, last, width)
    mask = block_mask(last)
    out = torch.empty_like(query)

    @torch.no_grad()
    def head(h: int) -> None:
        for row in range(0, last - first, QUERY_BLOCK):
            seen = first + row + QUERY_BLOCK
            out[h, row : row + QUERY_BLOCK] = F.scaled_dot_product_attention(
                query[None, h, None, row : row + QUERY_BLOCK],
                key[None, h, None, :seen],
                value[None, h, None, :seen],
                attn_mask=mask[:, last - seen :],
                scale=softmax_scale,
            )[0, 0]

    pool = single_threads(ops.num_threads())
    for done in [pool.submit(head, h) for h in range(heads)]:
        done.result()
    return out[:, start - first : keys - first, :value_width]


def _attend_on_gpu(query: Tensor, key: Tensor, value: Tensor, softmax_scale: float) -> Tensor:
    """All heads in one call of torch's attention, which needs values as wide as the keys to be fast."""
    start, width = key.shape[1] - query.shape[1], max(query.shape[2], value.shape[2])
    positions = torch.arange(key.shape[1], device=query.device)
    padded = (F.pad(x, (0, width - x.shape[2]))[None] for x in (query, key, value))
    out = F.scaled_dot_product_attention(
        *padded,
        attn_mask=None if start == 0 else positions <= positions[start:, None],
        is_causal=start == 0,
        scale=softmax_scale,
    )[0]
    return out[..., : value.shape[2]]


def _padded(x: Tensor, before: int, rows: int, width: int) -> Tensor:
    """x [heads, some, up to width] in zeros of [heads, rows, width], its first row at `before`."""
    out = torch.zeros(x.shape[0], rows, width)
    out[:, before : before + x.shape[1], : x.shape[2]] = x
    return out


def block_mask(keys: int) -> Tensor:
    """[QUERY_BLOCK, keys] float32 to add to the scores of the last queries, 0 or -inf; its end masks fewer keys."""
    last_seen = torch.arange(keys - QUERY_BLOCK, keys)
    hidden = torch.arange(keys) > last_seen[:, None]
    return torch.zeros(QUERY_BLOCK, keys).masked_fill_(hidden, -torch.inf)
