"""A rival to round-to-nearest: INT4 codes chosen so that a layer's outputs, not its weights, stay what they were.

GPTQ (Frantar et al., arXiv 2210.17323) inside the published format. With G = X^T X of the layer's inputs, a row's error
d costs |X d|^2 = d G d. Columns are rounded in order, each error is spread over the columns still to come along
U[i, i:] / U[i, i], where inverse(G) = U^T U; what it then costs is (w - q s)^2 / U[i, i]^2. A group's scale is chosen
when the columns before it are done: amax / 7 (or 7.5) as round-to-nearest has it, or the best of a few below it.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from kimi_native.checks import check_dtype, require
from kimi_native.quant.groups import SMALLEST_SCALE, check_group_matrix, finite_float32
from kimi_native.quant.int4 import LEVELS, dequantize, pack, quantize
from kimi_native.weights import GROUP_SIZE, Int4Weight

DAMPING = 0.01  # of the mean diagonal, as in the paper
# Searching scales down to 0.8 halves the calibration rows' error in `down`, yet on other text the logits are farther
# off (docs/quantization-aware-training.md), so by default nothing is searched.
SHRINKS = (1.0,)


def gptq(
    w: Tensor,
    gram: Tensor,
    *,
    levels: int = 15,
    damping: float = DAMPING,
    shrinks: Sequence[float] = SHRINKS,
) -> Int4Weight:
    """INT4 weights for inputs of a given Gram matrix.

    w        [out, in]  bf16, fp16, fp32 or fp64, finite, in a multiple of 32
    gram     [in, in]   fp64, X^T X of the inputs; its scale does not matter
    damping  added to the diagonal, in units of its mean
    shrinks  factors tried for each scale; with (1.0,) and a diagonal gram the result is quantize(w)'s

    Raises ValueError on a shape, a range, NaN or infinity, or a gram whose diagonal is zero; TypeError on a dtype.
    """
    check_group_matrix("gptq", w)
    _check_options(w, gram, levels, damping, shrinks)
    out_features, in_features = w.shape
    left = finite_float32("gptq", w).double()  # becomes what is still to be rounded
    factor = _inverse_factor(gram, damping)
    q = torch.empty(out_features, in_features, dtype=torch.int8, device=w.device)
    scales = torch.empty(
        out_features, in_features // GROUP_SIZE, dtype=torch.bfloat16, device=w.device
    )
    for index, start in enumerate(range(0, in_features, GROUP_SIZE)):
        stop = start + GROUP_SIZE
        group, within = left[:, start:stop], factor[start:stop, start:stop]
        scales[:, index] = scale = _scale(group, within.diagonal(), levels, shrinks)
        q[:, start:stop], error = _round_group(group, within, scale, LEVELS[levels][1])
        left[:, stop:] -= error @ factor[start:stop, stop:]
    return Int4Weight(pack(q), scales)


def gptq_or_nearest(
    w: Tensor,
    gram: Tensor,
    *,
    levels: int = 15,
    damping: float = DAMPING,
    shrinks: Sequence[float] = SHRINKS,
) -> tuple[Int4Weight, Tensor, Tensor]:
    """gptq(...), but row by row quantize(w)'s where that is better; (weight, its errors, quantize's), [out] each.

    Errors are |X d|^2 of the rows, so the first are never above the second.
    """
    found = gptq(w, gram, levels=levels, damping=damping, shrinks=shrinks)
    nearest = quantize(w, levels=levels)
    error, rounded = row_errors(w, found, gram), row_errors(w, nearest, gram)
    better = (error <= rounded)[:, None]
    weight = Int4Weight(
        torch.where(better, found.weight_packed, nearest.weight_packed),
        torch.where(better, found.weight_scale, nearest.weight_scale),
    )
    return weight, torch.minimum(error, rounded), rounded


def row_errors(w: Tensor, weight: Int4Weight, gram: Tensor) -> Tensor:
    """|X d|^2 of each row's error d, [out] fp64, from the Gram matrix alone."""
    difference = w.double() - dequantize(weight, torch.float64)
    return ((difference @ gram) * difference).sum(1)


def _check_options(
    w: Tensor, gram: Tensor, levels: int, damping: float, shrinks: Sequence[float]
) -> None:
    size = w.shape[1]
    check_dtype("gptq", "gram", gram, torch.float64)
    require(
        tuple(gram.shape) == (size, size),
        f"gptq: gram must be [{size}, {size}] (got {list(gram.shape)})",
    )
    require(levels in LEVELS, f"gptq: levels must be 15 or 16 (got {levels})")
    require(0 < damping < 1, f"gptq: damping must be in (0, 1) (got {damping})")
    require(
        len(shrinks) > 0 and all(0 < s <= 1 for s in shrinks),
        f"gptq: shrinks must be in (0, 1] (got {list(shrinks)})",
    )
    mean = gram.diagonal().mean()
    require(
        bool(torch.isfinite(gram).all()) and (size == 0 or bool(mean > 0)),
        f"gptq: gram must be finite and its diagonal not all zero (got a mean of {float(mean):g})",
    )


def _inverse_factor(gram: Tensor, damping: float) -> Tensor:
    """U [in, in] fp64, upper: inverse(gram + damping) = U^T U."""
    damped = gram.clone()
    damped.diagonal().add_(damping * gram.diagonal().mean())
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(damped))
    return torch.linalg.cholesky(inverse, upper=True)


def _codes(values: Tensor, scale: Tensor, q_min: int) -> Tensor:
    """As quantize rounds: the quotient in float32, halves to even."""
    return (values.float() / scale.float()).round_().clamp_(q_min, 7)


def _scale(group: Tensor, diagonal: Tensor, levels: int, shrinks: Sequence[float]) -> Tensor:
    """[out] bf16: of the shrunken scales the one whose rounding costs least, errors not yet spread."""
    divisor, q_min = LEVELS[levels]
    full = group.float().abs().amax(1) / divisor
    best = least = None
    for shrink in shrinks:
        scale = (full * shrink).clamp_min(SMALLEST_SCALE).to(torch.bfloat16)
        rounded = _codes(group, scale[:, None], q_min).double() * scale[:, None].double()
        cost = ((group - rounded) / diagonal).square().sum(1)
        if best is None:
            best, least = scale, cost
            continue
        best = torch.where(cost < least, scale, best)
        least = torch.minimum(cost, least)
    return best


def _round_group(group: Tensor, factor: Tensor, scale: Tensor, q_min: int) -> tuple[Tensor, Tensor]:
    """Codes [out, 32] and errors [out, 32] in units of the factor's diagonal; changes `group`."""
    codes = torch.empty(group.shape, dtype=torch.int8, device=group.device)
    error = torch.empty_like(group)
    step = scale.double()
    for i in range(group.shape[1]):
        q = _codes(group[:, i], scale, q_min)
        codes[:, i] = q.to(torch.int8)
        error[:, i] = (group[:, i] - q.double() * step) / factor[i, i]
        group[:, i + 1 :] -= error[:, i, None] * factor[i, i + 1 :]
    return codes, error
