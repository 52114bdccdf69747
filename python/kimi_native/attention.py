"""Causal attention of torch on a GPU, for prefill: many queries, keys and values expanded per head."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def attend_heads(query: Tensor, key: Tensor, value: Tensor, *, softmax_scale: float) -> Tensor:
    """Causal softmax(scale * query key^T) value of every head.

    query    [heads, queries, width]     float32; the last query sees every key, each one before it one less
    key      [heads, keys, width]        float32, at least as many keys as queries
    value    [heads, keys, value_width]  float32
    returns  [heads, queries, value_width]  float32

    For inference: gradients do not pass, as through every native op.
    """
    queries, keys = query.shape[1], key.shape[1]
    start = keys - queries
    if start < 0 or key.shape[2] != query.shape[2] or value.shape[1] != keys:
        raise ValueError(
            "attend_heads: keys must be as wide as the queries, at least as many, and as many as the values "
            f"(got query {list(query.shape)}, key {list(key.shape)}, value {list(value.shape)})"
        )
    # torch's attention needs values as wide as the keys to be fast.
    width = max(query.shape[2], value.shape[2])
    padded = (F.pad(x, (0, width - x.shape[2]))[None] for x in (query, key, value))
    positions = torch.arange(keys, device=query.device)
    with torch.no_grad():
        out = F.scaled_dot_product_attention(
            *padded,
            attn_mask=None if start == 0 else positions <= positions[start:, None],
            is_causal=start == 0,
            scale=softmax_scale,
        )[0]
    return out[..., : value.shape[2]]
