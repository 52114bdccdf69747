"""Checks at an op's door: "op: what must hold (got ...)"."""

from __future__ import annotations

import torch
from torch import Tensor


def require(condition: bool, message: str) -> None:
    if not condition:
        raise ValueError(message)


def check_dtype(op: str, name: str, x: Tensor, *dtypes: torch.dtype) -> None:
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


def check_activation(op: str, name: str, x: Tensor, shape: tuple[int | None, ...]) -> None:
    check_tensor(op, name, x, shape, torch.bfloat16, torch.float32)
