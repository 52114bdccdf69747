"""Checks at an op's door: "op: what must hold (got ...)"."""

from __future__ import annotations

import math
from numbers import Integral, Real

import torch
from torch import Tensor

from kimi_native import fp8_rows


def require(condition: bool, message: str) -> None:
    if not condition:
        raise ValueError(message)


def check_type(op: str, name: str, value: object, *kinds: type) -> None:
    if not isinstance(value, kinds):
        must = " or ".join(kind.__name__ for kind in kinds)
        raise TypeError(f"{op}: {name} must be of type {must} (got {type(value).__name__})")


def check_integer(op: str, **values: object) -> None:
    for name, value in values.items():
        if type(value) is not int and not isinstance(value, Integral):
            raise TypeError(f"{op}: {name} must be an integer (got {type(value).__name__})")


def check_number(op: str, **values: object) -> None:
    for name, value in values.items():
        if type(value) is not float and not isinstance(value, Real):
            raise TypeError(f"{op}: {name} must be a number (got {type(value).__name__})")


def check_dtype(op: str, name: str, x: Tensor, *dtypes: torch.dtype) -> None:
    check_type(op, name, x, Tensor)
    if x.dtype not in dtypes:
        raise TypeError(f"{op}: {name} must be {' or '.join(map(str, dtypes))} (got {x.dtype})")


def check_device(op: str, x: Tensor) -> None:
    if x.device.type not in ("cpu", "cuda"):
        raise RuntimeError(f"{op}: no kernel for device {x.device} (supported: cpu, cuda)")


def check_contiguous(op: str, name: str, x: Tensor) -> None:
    require(x.is_contiguous(), f"{op}: {name} must be contiguous (got strides {x.stride()})")


def check_tensor(
    op: str, name: str, x: Tensor, shape: tuple[int | None, ...], *dtypes: torch.dtype
) -> None:
    """dtype, shape (None: any size), contiguity and device of one tensor."""
    check_dtype(op, name, x, *dtypes)
    require(
        x.dim() == len(shape)
        and all(s is None or s == d for s, d in zip(shape, x.shape, strict=True)),
        f"{op}: {name} must be [{', '.join('*' if s is None else str(s) for s in shape)}] (got {list(x.shape)})",
    )
    check_contiguous(op, name, x)
    check_device(op, x)


def check_rows(op: str, name: str, x: Tensor, shape: tuple[int, ...], *dtypes: torch.dtype) -> None:
    """dtype, shape and device of a tensor whose rows are contiguous and whose other strides are free."""
    check_dtype(op, name, x, *dtypes)
    require(
        tuple(x.shape) == shape and x.stride(-1) == 1,
        f"{op}: {name} must be {list(shape)} with contiguous rows (got {list(x.shape)}, strides {x.stride()})",
    )
    check_device(op, x)


def checked_out_dtype(op: str, name: str, x: Tensor, out_dtype: torch.dtype | None) -> torch.dtype:
    """What is asked for, else that of a tensor."""
    check_type(op, name, x, Tensor)
    if out_dtype not in (None, torch.bfloat16, torch.float32):
        raise TypeError(f"{op}: out must be torch.bfloat16 or torch.float32 (got {out_dtype})")
    return out_dtype or x.dtype


def check_eps(op: str, eps: float) -> None:
    check_number(op, eps=eps)
    require(0 <= eps < math.inf, f"{op}: eps must be finite and at least 0 (got {eps})")


def check_activation(op: str, name: str, x: Tensor, shape: tuple[int | None, ...]) -> None:
    check_tensor(op, name, x, shape, torch.bfloat16, torch.float32)


def check_cache(op: str, cache: Tensor, kv_lora_rank: int, qk_rope_head_dim: int) -> None:
    """The latent cache: pages of rows in bf16, float32 or, as bytes, FP8."""
    check_dtype(op, "cache", cache, torch.bfloat16, torch.float32, fp8_rows.DTYPE)
    items = fp8_rows.cache_row_items(cache.dtype, kv_lora_rank, qk_rope_head_dim)
    check_tensor(op, "cache", cache, (None, None, items), cache.dtype)


def checked_rank(op: str, cache: Tensor, latent: Tensor, qk_rope_head_dim: int) -> int:
    """kv_lora_rank: what the rows of a checked cache have beside the key; of FP8 rows, what is to go into them."""
    check_tensor(op, "cache", cache, (None,) * 3, torch.bfloat16, torch.float32, fp8_rows.DTYPE)
    check_type(op, "latent", latent, Tensor)
    rank = cache.shape[2] - qk_rope_head_dim
    if cache.dtype == fp8_rows.DTYPE:
        require(
            latent.dim() == 2,
            f"{op}: latent must be [tokens, kv_lora_rank] (got {list(latent.shape)})",
        )
        rank = latent.shape[1]
    check_cache(op, cache, rank, qk_rope_head_dim)
    return rank


def check_matrices(op: str, x: Tensor, weight: Tensor) -> None:
    """Of bf16_gemm."""
    check_dtype(op, "x", x, torch.bfloat16, torch.float32)
    check_dtype(op, "weight", weight, torch.bfloat16)
    require(
        x.dim() == weight.dim() and x.dim() in (2, 3) and x.shape[1:-1] == weight.shape[:-2],
        f"{op}: x and weight must be [tokens, in] and [out, in], or [tokens, heads, in] and [heads, out, in] "
        f"(got {list(x.shape)} and {list(weight.shape)})",
    )
    require(
        x.shape[-1] == weight.shape[-1],
        f"{op}: the last sizes of x and weight must be equal (got {x.shape[-1]} and {weight.shape[-1]})",
    )
    require(
        x.stride(-1) == 1 and weight.stride(-1) == 1 and weight.stride(-2) == weight.shape[-1],
        f"{op}: rows of x and matrices of weight must be contiguous (got strides {x.stride()} and {weight.stride()})",
    )
    check_device(op, x)
