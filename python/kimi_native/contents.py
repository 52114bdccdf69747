"""Rules about what is in a tensor, which on a GPU only a kernel sees, and it can but stop. With KIMI_NATIVE_SYNC=1 they
are checked before it starts, as the CPU's ops do, and the process can go on.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from kimi_native.checks import require

SPLIT_TOKENS = 512  # kSplitTokens of csrc/cuda/mla_schedule.cuh

_Tensors = Sequence[Tensor | None]
_Sizes = Sequence[float]


def check_contents(op: str, tensors: _Tensors, sizes: _Sizes) -> None:
    """Raises ValueError naming op, rule and value. tensors, sizes: as ops.h has them; on any device, copied to look."""
    check = _CHECKS.get(op)
    if check is not None:
        check(op, tensors, sizes)


def check_splits(op: str, splits: Tensor, seq_lens: Tensor) -> None:
    """The same of a schedule, which starts with each sequence's first split and ends there (mla_schedule.cuh)."""
    first = splits[: 4 * (seq_lens.numel() + 1)].view(torch.int32)
    for b, (count, length) in enumerate(zip(first.diff().tolist(), seq_lens.tolist(), strict=True)):
        needed = -(-length // SPLIT_TOKENS)
        require(
            count == needed,
            f"{op}: schedule must be of these seq_lens, {needed} splits of sequence {b} (got {count})",
        )


def _check_range(op: str, name: str, values: Tensor, stop: int) -> None:
    values = values.flatten().cpu()
    wrong = ((values < 0) | (values >= stop)).nonzero().flatten().tolist()
    if wrong:
        i = wrong[0]
        require(False, f"{op}: {name} must be in [0, {stop}) (got {int(values[i])} at {i})")


def _moe_dispatch(op: str, tensors: _Tensors, sizes: _Sizes) -> None:
    _, _, experts = sizes
    _check_range(op, "topk_ids", tensors[0], experts)


def _moe_combine(op: str, tensors: _Tensors, sizes: _Sizes) -> None:
    _, row_index, *_ = tensors
    _check_range(op, "row_index", row_index, row_index.numel())


def _grouped(op: str, tensors: _Tensors, sizes: _Sizes) -> None:
    _, x_index, expert_offsets, *_ = tensors
    _, _, x_rows, rows, *_ = sizes
    offsets = expert_offsets.tolist()
    require(
        offsets[0] == 0 and offsets[-1] == rows,
        f"{op}: expert_offsets must go from 0 to rows={rows} (got {offsets[0]} to {offsets[-1]})",
    )
    for e, (first, end) in enumerate(itertools.pairwise(offsets)):
        require(
            first <= end,
            f"{op}: expert_offsets must ascend (got {first}, {end} for expert {e})",
        )
    if x_index is not None:
        _check_range(op, "x_index", x_index, x_rows)


def _rope_append(op: str, tensors: _Tensors, sizes: _Sizes) -> None:
    _, _, _, _, _, slots, *_ = tensors
    _, _, _, _, _, _, _, cache_rows, *_ = sizes
    _check_range(op, "slots", slots, cache_rows)


def _mla_schedule(op: str, tensors: _Tensors, sizes: _Sizes) -> None:
    _, max_tokens, max_splits = sizes
    (seq_lens,) = tensors
    _check_range(op, "seq_lens", seq_lens, max_tokens + 1)
    splits = sum(-(-length // SPLIT_TOKENS) for length in seq_lens.tolist())
    require(
        max_splits == 0 or splits <= max_splits,
        f"{op}: all splits must be at most max_splits={max_splits} (got {splits})",
    )


def _mla_decode(op: str, tensors: _Tensors, sizes: _Sizes) -> None:
    _, _, page_table, seq_lens, *_ = tensors
    _, _, _, _, _, _, pages, page_size, max_pages, *_ = sizes
    _check_range(op, "seq_lens", seq_lens, max_pages * page_size + 1)
    table = page_table.cpu()
    for b, length in enumerate(seq_lens.tolist()):
        used = table[b, : -(-length // page_size)]
        _check_range(op, f"used page ids of sequence {b}", used, pages)


_CHECKS: dict[str, Callable[[str, Any, Any], None]] = {
    "moe_dispatch": _moe_dispatch,
    "moe_combine": _moe_combine,
    "int4_grouped_gemm": _grouped,
    "int4_grouped_swiglu": _grouped,
    "rope_append": _rope_append,
    "mla_schedule": _mla_schedule,
    "mla_decode": _mla_decode,
}
