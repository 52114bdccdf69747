"""What a GPU's mla_decode has to know of a step's lengths: made once, used by every layer."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from kimi_native.checks import check_integer, check_tensor, check_type, require
from kimi_native.contents import SPLIT_TOKENS, check_splits
from kimi_native.native import call_with_room, is_synchronous, pointer, uses_cuda


@dataclass(frozen=True)
class MlaSchedule:
    """Splits of up to 512 tokens; see mla_schedule.

    splits  uint8, on the GPU: the kernels' own form
    """

    splits: Tensor
    batch: int
    max_tokens: int
    max_splits: int


def mla_schedule(seq_lens: Tensor, *, max_tokens: int, max_splits: int = 0) -> MlaSchedule:
    """The schedule that mla_decode makes of seq_lens if it is given none, for calls with the same lengths.

    seq_lens    [batch] int32, on a GPU
    max_tokens  max_pages * page_size of those calls
    max_splits  splits there is room for, in the schedule and in the scratch of those calls; 0: those of any lengths.
                Fewer are enough for sequences that share no page (splits_of_pages)

    Lengths that need more splits stop the kernel. Raises ValueError on a shape or number, TypeError on a dtype,
    RuntimeError for a tensor that is not on a GPU.
    """
    op = "mla_schedule"
    check_integer(op, max_tokens=max_tokens, max_splits=max_splits)
    check_tensor(op, "seq_lens", seq_lens, (None,), torch.int32)
    if not uses_cuda(seq_lens.device):
        raise RuntimeError(f"{op}: seq_lens must be on a GPU (got {seq_lens.device})")
    batch = seq_lens.shape[0]
    splits = call_with_room(op, (seq_lens,), batch, max_tokens, max_splits)
    return MlaSchedule(splits, batch, max_tokens, max_splits)


def splits_of_pages(batch: int, cache_tokens: int) -> int:
    """At most so many splits have sequences that share no page of a cache with room for so many tokens."""
    return batch + cache_tokens // SPLIT_TOKENS


def schedule_arguments(
    op: str, schedule: MlaSchedule | None, seq_lens: Tensor, *, max_tokens: int
) -> tuple[int, int]:
    """Its address and max_splits. Raises ValueError unless it is for such a call, RuntimeError on another device."""
    if schedule is None:
        return 0, 0
    check_type(op, "schedule", schedule, MlaSchedule)
    batch, splits = seq_lens.shape[0], schedule.splits
    require(
        (schedule.batch, schedule.max_tokens) == (batch, max_tokens),
        f"{op}: schedule must be of {batch} sequences of at most {max_tokens} tokens "
        f"(got {schedule.batch} of {schedule.max_tokens})",
    )
    if splits.device != seq_lens.device:
        raise RuntimeError(
            f"{op}: schedule must be on the device of seq_lens, {seq_lens.device} (got {splits.device})"
        )
    if is_synchronous() and uses_cuda(splits.device):
        check_splits(op, splits, seq_lens)
    return pointer(splits), schedule.max_splits
