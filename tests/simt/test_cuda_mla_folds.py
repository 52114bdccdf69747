"""Splits of mla_decode that one block adds up: the bits of splits in rows of their own, in fewer rows."""

from __future__ import annotations

import pytest
import torch

import gpu
from op_args import args_type
from oracle_dense import assert_close, assert_same_bits
from simt import SCHEDULES, Schedule, simt_only
from simt_ops import run_op, workspace_bytes
from test_cuda_fp8_rows import Case as Fp8Case
from test_cuda_mla_decode import LATENT, attend, expect, fields_of, make, make_schedule, mla_decode

LENGTHS = [2100, 600, 3000]  # 5, 2 and 6 splits


def one_of(case, b):
    part = make([1], heads=1)
    part.scale, part.cache, part.q = case.scale, case.cache, case.q[b : b + 1].contiguous()
    part.page_table = case.page_table[b : b + 1].contiguous()
    part.seq_lens = case.seq_lens[b : b + 1].contiguous()
    return part


@pytest.mark.parametrize(
    ("make_case", "heads", "hopper"),
    [
        (make, 1, False),
        (Fp8Case, 1, False),
        (make, 17, False),
        (make, 64, True),
        (Fp8Case, 64, True),
    ],
    ids=["16", "16 fp8", "32", "hopper", "hopper fp8"],
)
def test_cuda_mla_decode_has_the_same_bits_whoever_adds_up_its_splits(make_case, heads, hopper):
    case = make_case(LENGTHS, heads=heads, scale=0.2)  # maxima that move
    schedule = Schedule(hopper=hopper)
    alone = torch.cat([mla_decode(one_of(case, b), schedule=schedule) for b in range(3)])
    assert_close(alone, *expect(case))
    copies = 200 if gpu.ON_GPU else 1  # of few splits each multiprocessor has one
    case.q = case.q.repeat(copies, 1, 1)
    case.page_table, case.seq_lens = case.page_table.repeat(copies, 1), case.seq_lens.repeat(copies)
    assert_same_bits(mla_decode(case, schedule=schedule), alone.repeat(copies, 1, 1))


@pytest.mark.parametrize("schedule", SCHEDULES, ids=str)
@pytest.mark.parametrize("hopper", [False, True])
def test_cuda_mla_decode_adds_up_splits_in_any_order_of_threads(hopper, schedule):
    case = make([1100, 70], heads=64 if hopper else 2)
    expected = mla_decode(case, schedule=Schedule(hopper=hopper))
    schedule = Schedule(**(vars(schedule) | {"hopper": hopper}))
    assert_same_bits(mla_decode(case, schedule=schedule), expected)


@simt_only
@pytest.mark.parametrize(
    ("heads", "hopper", "rows"),
    [
        # Six workers of three splits each: 0 to 2, 3 to 5, ...
        (2, False, [0, 3, 4, 5, 6, 7, 9, 10, 11, 12]),
        # Three workers of five.
        (64, True, [0, 4, 5, 7, 10, 11]),
    ],
)
def test_cuda_mla_decode_writes_a_row_for_all_that_a_block_has_of_a_group(heads, hopper, rows):
    """Groups begin at splits 0 and 4, 5, 7 and 11."""
    case = make(LENGTHS, heads=heads)
    fields = make_schedule(case, max_splits=13)
    args = args_type("mla_decode")(max_splits=13, splits=64)
    for name, value in fields_of(case, case.q).items():
        if isinstance(value, int | float):
            setattr(args, name, value)
    workspace = torch.full((workspace_bytes("mla_decode", args),), 255, dtype=torch.uint8)
    out = torch.zeros(3, heads, LATENT, dtype=torch.bfloat16)
    options = {"schedule": Schedule(hopper=hopper), "workspace": workspace}
    run_op(
        "mla_decode",
        **(fields_of(case, out) | fields | options),
        workspace_bytes=workspace.numel(),
    )
    values = workspace[: 13 * heads * LATENT * 4].view(torch.float32).view(13, -1)
    assert values.isnan().any(-1).logical_not().nonzero().flatten().tolist() == rows
    assert values.isnan().all(-1).sum() == 13 - len(rows)
    assert_same_bits(out, attend(case, schedule=Schedule(hopper=hopper)))
