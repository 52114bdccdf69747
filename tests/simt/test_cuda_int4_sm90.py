"""The INT4 ops for many tokens on Hopper: against float64, and bit by bit against the kernels of every other device."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from grouped import in_order, make_dispatch
from oracle import (
    Quantized,
    assert_same_bits,
    assert_within,
    bound_limb_gemm,
    fixed_point,
    make_int4,
    make_x,
)
from simt import SCHEDULES, Fault, Schedule, simt_only, stats
from simt_ops import run_op
from test_cuda_int4_gemm import expected_gemm, int4_gemm, int4_pack, of_every_size
from test_cuda_int4_grouped import down_case, pointers, run_grouped, swiglu_case

BF16, FP32 = torch.bfloat16, torch.float32
HOPPER = Schedule(hopper=True)
schedules = pytest.mark.parametrize(
    "schedule", [replace(s, hopper=True) for s in SCHEDULES], ids=str
)
dtypes = pytest.mark.parametrize("dtype", [BF16, FP32], ids=["bf16", "fp32"])

# Tiles alone and with segments behind them, full and not; experts without rows, and with segments alone.
COUNTS = (0, 33, 3, 0, 130, 170, 0)


@schedules
@dtypes
@pytest.mark.parametrize(("tokens", "out", "in_"), [(33, 1, 32), (129, 17, 96), (64, 150, 608)])
def test_cuda_int4_gemm_on_hopper_matches_float64_and_the_bits_of_other_devices(
    tokens, out, in_, dtype, schedule
):
    x, w = make_x(tokens, in_, dtype), make_int4(out, in_)
    packed, expected = int4_pack(w), expected_gemm(x, w)
    y = int4_gemm(x, packed, out, y_dtype=dtype, schedule=schedule)
    assert_within(y, expected, bound_limb_gemm(x, w.dequantized(), expected, dtype))
    assert_same_bits(y, int4_gemm(x, packed, out, y_dtype=dtype))


@simt_only
def test_cuda_int4_gemm_on_hopper_takes_its_own_kernel_from_33_tokens_on():
    """Its workspace tells: bf16 tokens as they are, and nothing else."""
    fields = {"out": 4, "in": 96, "group_size": 32, "workspace": 64, "workspace_bytes": 1}
    for tokens, needed in ((32, 32 * 4 * 68), (33, 33 * 2 * 128)):
        with pytest.raises(ValueError, match=f"workspace must have {needed} bytes"):
            run_op("int4_gemm", schedule=HOPPER, tokens=tokens, x_dtype=BF16, **fields)
    with pytest.raises(ValueError, match=f"workspace must have {33 * 2 * 256} bytes"):
        run_op("int4_gemm", schedule=HOPPER, tokens=33, x_dtype=FP32, **fields)


@dtypes
def test_cuda_int4_gemm_on_hopper_has_the_bits_of_other_devices_at_every_size(dtype):
    """From steps whose limbs are subnormal bf16 to the largest numbers, in more than one run of column tiles."""
    x, w = make_x(40, 1120, FP32), make_int4(32, 1120)
    x, packed = of_every_size(x).to(dtype), int4_pack(w)
    y = int4_gemm(x, packed, 32, y_dtype=FP32, schedule=HOPPER)
    assert_same_bits(y, int4_gemm(x, packed, 32, y_dtype=FP32))


def test_cuda_int4_gemm_on_hopper_is_exact_at_the_ends_of_both_ranges():
    # All weights -8 or 7, all limbs at their ends: the largest integers that a group can give.
    ends = torch.tensor([-32639.0, 32639.0, 32512.0, -32640.0, 127.0, -128.0])
    x = torch.cat([ends[:, None].expand(6, 32), make_x(30, 32, FP32)]).contiguous()
    w = Quantized(torch.tensor([[-8], [7]]).expand(2, 32), torch.tensor([[0.75], [1.5]]).bfloat16())
    y = int4_gemm(x, int4_pack(w), 2, y_dtype=FP32, schedule=HOPPER)
    assert torch.equal(y, (fixed_point(x) @ w.dequantized().T).float())


@pytest.mark.parametrize("poison", [math.nan, math.inf, -math.inf])
def test_cuda_int4_gemm_on_hopper_spoils_exactly_the_rows_with_a_non_finite_input(poison):
    x, w = make_x(40, 320), make_int4(18, 320)
    x[3, 319] = poison
    y = int4_gemm(x, int4_pack(w), 18, schedule=HOPPER)
    assert y[3].isnan().all()
    assert y[[t for t in range(40) if t != 3]].isfinite().all()


@schedules
@dtypes
@pytest.mark.parametrize("indexed", [True, False], ids=["gathered", "in_order"])
def test_cuda_int4_grouped_gemm_on_hopper_matches_float64_and_the_bits_of_other_devices(
    indexed, dtype, schedule
):
    """Nine tiles for three multiprocessors: a block goes on to its next tile with a ring in use."""
    out, in_ = 300, 160
    x, dispatch, packed, expected, bound = down_case(COUNTS, out, in_, dtype)
    if not indexed:
        x = x[dispatch.token_index.long()].contiguous()
        dispatch = in_order(dispatch)
    tiles, scales = pointers(packed, COUNTS)
    weights = {"weight_packed": tiles, "weight_scale": scales}

    def run(schedule):
        return run_grouped(
            "int4_grouped_gemm",
            x,
            dispatch,
            weights,
            out,
            y_dtype=dtype,
            indexed=indexed,
            schedule=schedule,
        )

    y = run(schedule)
    assert_within(y, expected, bound)
    assert_same_bits(y, run(Schedule()))


def swiglu_weights(case, counts):
    weights = {}
    for part, packed in zip(("gate", "up"), case, strict=True):
        weights[f"{part}_packed"], weights[f"{part}_scale"] = pointers(packed, counts)
    return weights


@schedules
@dtypes
@pytest.mark.parametrize(("counts", "out", "in_"), [(COUNTS, 70, 96), ((40,), 5, 608)])
def test_cuda_int4_grouped_swiglu_on_hopper_matches_float64_and_the_bits_of_other_devices(
    counts, out, in_, dtype, schedule
):
    x, dispatch, parts, expected, bound = swiglu_case(counts, out, in_, dtype)
    weights = swiglu_weights(parts, counts)

    def run(schedule):
        return run_grouped(
            "int4_grouped_swiglu", x, dispatch, weights, out, y_dtype=dtype, schedule=schedule
        )

    y = run(schedule)
    assert_within(y, expected, bound)
    assert_same_bits(y, run(Schedule()))


@simt_only
@pytest.mark.parametrize("index", [-1, 11])
def test_cuda_int4_grouped_gemm_on_hopper_stops_at_a_bad_index(index):
    x, _, packed, _, _ = down_case((2, 40), 5, 32, BF16)
    dispatch = make_dispatch((2, 40), 11)
    dispatch.token_index[30] = index
    tiles, scales = pointers(packed, (2, 40))
    weights = {"weight_packed": tiles, "weight_scale": scales}
    with pytest.raises(Fault, match=r"x_index must be in \[0, x_rows\)"):
        run_grouped("int4_grouped_gemm", x, dispatch, weights, 5, y_dtype=BF16, schedule=HOPPER)


@simt_only
def test_cuda_int4_grouped_swiglu_on_hopper_stops_at_a_null_pointer_of_an_expert_with_rows():
    x, dispatch, parts, _, _ = swiglu_case((40,), 5, 32, BF16)
    weights = swiglu_weights(parts, (40,))
    weights["up_scale"] = [0]
    with pytest.raises(Fault, match="weight pointers of an expert with rows must not be null"):
        run_grouped("int4_grouped_swiglu", x, dispatch, weights, 5, y_dtype=BF16, schedule=HOPPER)


@simt_only
def test_cuda_int4_grouped_swiglu_on_hopper_has_no_bank_conflicts():
    x, dispatch, parts, _, _ = swiglu_case((128,), 64, 544, BF16)
    weights = swiglu_weights(parts, (128,))
    run_grouped("int4_grouped_swiglu", x, dispatch, weights, 64, y_dtype=BF16, schedule=HOPPER)
    counts = stats()
    assert counts["wavefronts"] == counts["ideal_wavefronts"]
