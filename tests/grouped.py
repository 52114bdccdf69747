"""Experts and dispatches for the tests of the grouped ops."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from kimi_native.weights import Int4ExpertWeights, MoeDispatch
from oracle import Quantized, make_int4

# Rows per expert: none at the ends and inside, one, a register tile and around it, several of the few-token blocks.
COUNTS = [
    (1,),
    (3, 0, 1, 17, 0),
    (0, 0, 5, 4, 8),
    (0, 40, 0),
    (1, 1, 1, 1, 1, 1, 1, 1),
    (0, 0),
    (300, 2),
]


def make_experts(n: int, out: int, in_: int, seed: int = 0) -> list[Quantized]:
    return [make_int4(out, in_, seed=100 * seed + e) for e in range(n)]


def pack(
    experts: list[Quantized], counts: Sequence[int], poison: int = 0xDEAD
) -> Int4ExpertWeights:
    """The experts without rows get pointers that must never be followed."""
    packed = {id(w): w.int4() for w in experts}
    weights = Int4ExpertWeights([packed[id(w)] for w in experts])
    for e, n in enumerate(counts):
        if n == 0:
            weights.packed_pointers[e] = weights.scale_pointers[e] = poison * (e % 2)
    return weights


def make_dispatch(counts: Sequence[int], x_rows: int, seed: int = 0) -> MoeDispatch:
    """Rows in any order and with repeats, the last row of x included if there are rows at all."""
    rows = sum(counts)
    g = torch.Generator().manual_seed(seed)
    token_index = torch.randint(0, x_rows, (rows,), generator=g).to(torch.int32)
    if rows:
        token_index[-1] = x_rows - 1
    offsets = torch.tensor([0, *counts]).cumsum(0).to(torch.int32)
    return MoeDispatch(token_index, torch.zeros(0, 0, dtype=torch.int32), offsets)


def in_order(dispatch: MoeDispatch) -> MoeDispatch:
    """The same rows per expert when x is already sorted: row r reads x[r]."""
    rows = dispatch.token_index.shape[0]
    return MoeDispatch(
        torch.arange(rows, dtype=torch.int32), dispatch.row_index, dispatch.expert_offsets
    )


def expert_of_row(counts: Sequence[int]) -> list[int]:
    return [e for e, n in enumerate(counts) for _ in range(n)]
