"""What the group-quantized formats share: bounded row chunks and BF16 scales of 32 weights each."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from kimi_native.checks import check_dtype, require
from kimi_native.weights import GROUP_SIZE

FLOAT_DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)

# Elements handled at once: the float32 temporaries of one chunk, 1 MB each, stay in a core's cache.
CHUNK_ELEMENTS = 1 << 18

# Smallest normal BF16. As a floor of the scale it keeps zero groups finite (q = 0) and, since a subnormal scale
# would be a coarse one, keeps |w / scale| within the levels for the tiniest weights too.
SMALLEST_SCALE = torch.finfo(torch.bfloat16).tiny


def row_chunks(rows: int, columns: int, multiple: int = 1) -> Iterator[slice]:
    """Slices that cover `rows`, each of about CHUNK_ELEMENTS elements and of a multiple of `multiple` rows."""
    step = max(CHUNK_ELEMENTS // max(columns, 1) // multiple, 1) * multiple
    for start in range(0, rows, step):
        yield slice(start, min(start + step, rows))


def check_float_matrix(op: str, w: Tensor) -> None:
    """w must be a floating-point matrix."""
    check_dtype(op, "w", w, *FLOAT_DTYPES)
    require(w.dim() == 2, f"{op}: w must be [out, in] (got {list(w.shape)})")


def check_group_matrix(op: str, w: Tensor) -> None:
    """w must be a floating-point matrix whose rows are whole groups."""
    check_float_matrix(op, w)
    require(
        w.shape[1] % GROUP_SIZE == 0,
        f"{op}: in must be a multiple of {GROUP_SIZE} (got {list(w.shape)})",
    )


def finite_float32(op: str, w: Tensor) -> Tensor:
    """w in float32; ValueError if a value is NaN or infinite there."""
    values = w.to(torch.float32)
    check_finite(op, values)
    return values


def check_finite(op: str, values: Tensor) -> None:
    """Raises ValueError with the number of NaN and infinite values, if there are any."""
    bad = values.numel() - int(torch.isfinite(values).sum())
    require(bad == 0, f"{op}: w must be finite in float32 (got {bad} NaN or infinite values)")


def quantize_groups(
    op: str, w: Tensor, divisor: float, q_min: int, q_max: int
) -> Iterator[tuple[slice, Tensor, Tensor]]:
    """Per row chunk: (rows, q [rows, in] int8, scale [rows, in / 32] bf16), scale = bf16(amax / divisor).

    q is taken against the scale as it is stored, so the rounding of the scale adds nothing to |w - q * scale|.
    """
    out_features, in_features = w.shape
    for rows in row_chunks(out_features, in_features):
        groups = w[rows].to(torch.float32).unflatten(1, (-1, GROUP_SIZE))
        scratch = groups.abs()
        amax = scratch.amax(dim=2)  # NaN if one of its group is, so these are enough to look at
        if not torch.isfinite(amax).all():
            check_finite(op, groups)
        scale = (amax / divisor).clamp_min(SMALLEST_SCALE).to(torch.bfloat16)
        quotient = torch.div(groups, scale.to(torch.float32).unsqueeze(2), out=scratch)
        q = quotient.round_().clamp_(q_min, q_max).to(torch.int8)  # round: half to even
        yield rows, q.flatten(1), scale
