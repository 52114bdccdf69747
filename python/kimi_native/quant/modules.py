"""Modules with quantized weights, put in place of a built model's own by the loader."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from kimi_native import ops
from kimi_native.quant.int8 import quantize_int8
from kimi_native.weights import (
    GROUP_SIZE,
    Int4ExpertWeights,
    Int4Weight,
    Int8Weight,
    MoeDispatch,
)

Part = tuple[tuple[int, ...], torch.dtype]  # shape and dtype of one of a weight's tensors
Empty = Callable[[tuple[int, ...], torch.dtype], Tensor]


class Int4Linear(nn.Module):
    """y = x W^T with an INT4 weight as the checkpoint stores it, or made while loading."""

    compute = "exact"  # as in ops.int4_gemm

    def __init__(self, weight: Int4Weight) -> None:
        super().__init__()
        self.int4 = weight

    def forward(self, x: Tensor, out_dtype: torch.dtype | None = None) -> Tensor:
        return ops.int4_gemm(x, self.int4, out_dtype=out_dtype, compute=self.compute)

    @staticmethod
    def parts(out_features: int, in_features: int) -> list[Part]:
        """The tensors of a weight."""
        scale = (out_features, in_features // GROUP_SIZE)
        return [((out_features, in_features // 8), torch.int32), (scale, torch.bfloat16)]

    @classmethod
    def quantized(cls, w: Tensor, empty: Empty) -> Int4Linear:
        """w [out, in] bf16 rounded to INT4, into tensors that `empty` gives. ValueError if w is not finite."""
        weight = Int4Weight(*(empty(*part) for part in cls.parts(*w.shape)))
        return cls(ops.int4_quantize(w, out=weight))


class Int8Linear(nn.Module):
    """y = x W^T with an INT8 weight made while loading."""

    def __init__(self, weight: Int8Weight) -> None:
        super().__init__()
        self.int8 = weight

    def forward(self, x: Tensor, out_dtype: torch.dtype | None = None) -> Tensor:
        return ops.int8_gemm(x, self.int8, out_dtype=out_dtype)

    @staticmethod
    def parts(out_features: int, in_features: int) -> list[Part]:
        """The tensors of a weight."""
        scale = (out_features, in_features // GROUP_SIZE)
        return [((out_features, in_features), torch.int8), (scale, torch.bfloat16)]

    @classmethod
    def quantized(cls, w: Tensor, empty: Empty) -> Int8Linear:
        """w [out, in] bf16 rounded to INT8, into tensors that `empty` gives. ValueError if w is not finite."""
        weight = Int8Weight(*(empty(*part) for part in cls.parts(*w.shape)))
        return cls(quantize_int8(w, out=weight))


class Int4Experts(nn.Module):
    """The routed experts in INT4, all of a layer's hit experts in two native calls."""

    compute = "exact"  # as in ops.int4_gemm

    def __init__(
        self, gate: Int4ExpertWeights, up: Int4ExpertWeights, down: Int4ExpertWeights
    ) -> None:
        super().__init__()
        self.gate, self.up, self.down = gate, up, down

    def forward(self, x: Tensor, dispatch: MoeDispatch) -> Tensor:
        """x [tokens, hidden] to the outputs of all dispatched rows, [tokens * topk, hidden] float32."""
        compute = self.compute
        inner = ops.int4_grouped_swiglu(x, dispatch, self.gate, self.up, compute=compute)
        return ops.int4_grouped_gemm(
            inner, dispatch, self.down, out_dtype=torch.float32, compute=compute
        )
