"""Modules with quantized weights, put in place of a built model's own by the loader."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from kimi_native import ops
from kimi_native.weights import Int4ExpertWeights, Int4Weight, Int8Weight, MoeDispatch


class Int4Linear(nn.Module):
    """y = x W^T with an INT4 weight as the checkpoint stores it."""

    def __init__(self, weight: Int4Weight) -> None:
        super().__init__()
        self.int4 = weight

    def forward(self, x: Tensor, out_dtype: torch.dtype | None = None) -> Tensor:
        return ops.int4_gemm(x, self.int4, out_dtype=out_dtype)


class Int8Linear(nn.Module):
    """y = x W^T with an INT8 weight made while loading."""

    def __init__(self, weight: Int8Weight) -> None:
        super().__init__()
        self.int8 = weight

    def forward(self, x: Tensor, out_dtype: torch.dtype | None = None) -> Tensor:
        return ops.int8_gemm(x, self.int8, out_dtype=out_dtype)


class Int4Experts(nn.Module):
    """The routed experts in INT4, all of a layer's hit experts in two native calls."""

    def __init__(
        self, gate: Int4ExpertWeights, up: Int4ExpertWeights, down: Int4ExpertWeights
    ) -> None:
        super().__init__()
        self.gate, self.up, self.down = gate, up, down

    def forward(self, x: Tensor, dispatch: MoeDispatch) -> Tensor:
        """x [tokens, hidden] to the outputs of all dispatched rows, [tokens * topk, hidden] float32."""
        inner = ops.int4_grouped_swiglu(x, dispatch, self.gate, self.up)
        return ops.int4_grouped_gemm(inner, dispatch, self.down, out_dtype=torch.float32)
