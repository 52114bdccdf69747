"""Causal attention of torch, with one result for any number of threads.

torch shares the heads and query blocks of its attention among its threads, and the matrix products inside are planned
for the thread count that each of them has been told: the last bits of a block of few queries change with it. Here every
call computes one head on one thread, and a pool of such threads shares out the heads.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from kimi_native import ops
from kimi_native.single_threads import single_threads


def attend_heads(
    query: Tensor, key: Tensor, value: Tensor, *, mask: Tensor | None, softmax_scale: float
) -> Tensor:
    """softmax(scale * query key^T + mask) value of every head, on ops.num_threads() threads.

    query    [heads, queries, width]  float32
    key      [heads, keys, width]     float32
    value    [heads, keys, width]     float32
    mask     [queries, keys] float32, 0 or -inf; None: causal, with as many keys as queries
    returns  [heads, queries, width]  float32; a head depends on its own rows only, to the last bit

    For inference: gradients do not pass, as through every native op.
    """
    out = torch.empty_like(query)

    @torch.no_grad()
    def head(h: int) -> None:
        out[h] = F.scaled_dot_product_attention(
            query[None, h, None],
            key[None, h, None],
            value[None, h, None],
            attn_mask=mask,
            is_causal=mask is None,
            scale=softmax_scale,
        )[0, 0]

    pool = single_threads(ops.num_threads())
    for done in [pool.submit(head, h) for h in range(len(query))]:
        done.result()
    return out


def causal_mask(queries: int, keys: int) -> Tensor:
    """[queries, keys] float32 to add to scores: the last query sees every key, each one before it one less."""
    visible = torch.ones(queries, keys, dtype=torch.bool).tril(keys - queries)
    return torch.zeros(queries, keys).masked_fill_(visible.logical_not_(), -torch.inf)
