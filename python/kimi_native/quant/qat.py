"""Quantization-aware training: a graph sees the weights it will have, and its gradients pass straight through.

Routed experts are rounded to INT4 as quant/int4.py stores them (groups of 32, 15 levels, the BF16 scale included), all
other weights to BF16. In float32 the forward pass then multiplies by exactly the numbers that the native kernels read
from the exported checkpoint; in a graph that multiplies in bfloat16, q * scale (up to 11 significant bits) is rounded
once more. Gradients pass as if rounding were the identity (Bengio et al., arXiv 1308.3432); with 15 levels nothing is
clamped, so no weight is cut off from its gradient.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from kimi_native.nano.graph import Experts, KimiGraph, Weighted
from kimi_native.quant.groups import quantize_groups
from kimi_native.quant.int4 import LEVELS
from kimi_native.weights import GROUP_SIZE

QAT_LEVELS = 15


def int4_values(w: Tensor) -> Tensor:
    """What dequantize(quantize(matrix)) gives for each matrix of w [..., out, in], in w's dtype (float32 or wider).

    Raises ValueError if a weight is NaN or infinite.
    """
    divisor, q_min = LEVELS[QAT_LEVELS]
    matrix = w.detach().reshape(-1, w.shape[-1])
    out = torch.empty_like(matrix)
    for rows, q, scale in quantize_groups("qat", matrix, divisor, q_min, 7):
        groups = out[rows].unflatten(1, (-1, GROUP_SIZE))
        torch.mul(q.unflatten(1, (-1, GROUP_SIZE)), scale.to(w.dtype).unsqueeze(2), out=groups)
    return out.view(w.shape)


def bf16_values(w: Tensor) -> Tensor:
    """w rounded to BF16, in w's dtype."""
    return w.detach().to(torch.bfloat16).to(w.dtype)


class _StraightThrough(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, w: Tensor, rounding: Callable[[Tensor], Tensor]) -> Tensor:
        return rounding(w)

    @staticmethod
    def backward(ctx: Any, grad: Tensor):  # type: ignore[override]
        return grad, None


def fake_int4(w: Tensor) -> Tensor:
    """int4_values(w) with the gradient of w."""
    return _StraightThrough.apply(w, int4_values)


def fake_bf16(w: Tensor) -> Tensor:
    """bf16_values(w) with the gradient of w."""
    return _StraightThrough.apply(w, bf16_values)


def apply_qat(graph: KimiGraph) -> None:
    """Round every weight of the graph in each forward pass, as an exported INT4 checkpoint stores it.

    Raises ValueError if the experts' rows are no whole groups of 32.
    """
    for name, module in graph.named_modules():
        if isinstance(module, Experts):
            for key, parameter in module.named_parameters():
                if parameter.shape[-1] % GROUP_SIZE:
                    raise ValueError(
                        f"qat: rows of {name}.{key} must be a multiple of {GROUP_SIZE} "
                        f"(got {parameter.shape[-1]})"
                    )
            module.rounding = fake_int4
        elif isinstance(module, Weighted):
            module.rounding = fake_bf16


def remove_qat(graph: KimiGraph) -> None:
    """Let the graph see its master weights again."""
    for module in graph.modules():
        if isinstance(module, Experts | Weighted):
            module.rounding = None
