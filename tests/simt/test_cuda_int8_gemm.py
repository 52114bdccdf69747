"""int8_gemm of the GPU in the shim, against float64."""

from __future__ import annotations

import math

import pytest
import torch

from kimi_native import reference
from oracle import assert_same_bits, assert_within, bound_limb_gemm, fixed_point, make_int8, make_x
from simt import SCHEDULES, simt_only, stats
from simt_ops import run_op

BF16, FP32 = torch.bfloat16, torch.float32
schedules = pytest.mark.parametrize("schedule", SCHEDULES, ids=str)


def int8_gemm(x, w, *, y_dtype=BF16, **options):
    weight = w.int8()
    out, in_ = w.q.shape
    y = torch.full((x.shape[0], out), math.nan, dtype=y_dtype)
    run_op(
        "int8_gemm",
        x=x,
        weight=weight.weight,
        weight_scale=weight.weight_scale,
        y=y,
        x_dtype=x.dtype,
        y_dtype=y_dtype,
        tokens=x.shape[0],
        out=out,
        group_size=32,
        **{"in": in_},
        **options,
    )
    return y


def expect(x, w, y_dtype):
    """float64 result and bound: the CPU's, whose 16 partial sums are joined by 4 additions, here 8 by 7."""
    weight = w.int8()
    y = reference.int8_gemm(
        x.double(), weight.weight, weight.weight_scale.double(), out_dtype=torch.float64
    )
    return y, bound_limb_gemm(x, w.dequantized(), y, y_dtype, conversion=1 + 3)


@schedules
@pytest.mark.parametrize(("x_dtype", "y_dtype"), [(BF16, BF16), (FP32, FP32)])
@pytest.mark.parametrize("tokens", [0, 1, 4, 5, 16, 17])
@pytest.mark.parametrize(("out", "in_"), [(1, 32), (17, 96), (33, 1056)])
def test_cuda_int8_gemm_matches_float64(out, in_, tokens, x_dtype, y_dtype, schedule):
    x, w = make_x(tokens, in_, x_dtype), make_int8(out, in_)
    y = int8_gemm(x, w, y_dtype=y_dtype, schedule=schedule)
    assert_within(y, *expect(x, w, y_dtype))


def test_cuda_int8_gemm_matches_float64_at_a_model_width():
    x, w = make_x(2, 7168), make_int8(32, 7168)
    assert_within(int8_gemm(x, w), *expect(x, w, BF16))


def test_cuda_int8_gemm_multiplies_with_the_same_fixed_point_as_the_cpu():
    # One group whose products stay below 2^24: exact in fp32, so the values that were multiplied show.
    x, w = make_x(6, 32, FP32), make_int8(16, 32)
    w.q.clamp_(-8, 8)
    y = int8_gemm(x, w, y_dtype=FP32)
    assert torch.equal(y, (fixed_point(x) @ w.dequantized().T).float())


def test_cuda_int8_gemm_row_does_not_depend_on_the_others():
    x, w = make_x(17, 1056), make_int8(20, 1056)
    together = int8_gemm(x, w, y_dtype=FP32)
    for first, last in [(0, 1), (3, 4), (2, 7), (8, 17)]:
        alone = int8_gemm(x[first:last].contiguous(), w, y_dtype=FP32)
        assert_same_bits(alone, together[first:last])


@pytest.mark.parametrize("poison", [math.nan, math.inf, -math.inf])
def test_cuda_int8_gemm_spoils_exactly_the_rows_with_a_non_finite_input(poison):
    x, w = make_x(6, 320), make_int8(18, 320)
    x[3, 319] = poison
    y = int8_gemm(x, w)
    assert y[3].isnan().all()
    assert y[[0, 1, 2, 4, 5]].isfinite().all()


@simt_only
def test_cuda_int8_gemm_reads_shared_memory_without_bank_conflicts():
    int8_gemm(make_x(4, 1024), make_int8(32, 1024))
    counts = stats()
    assert counts["wavefronts"] == counts["ideal_wavefronts"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"group_size": 64}, "group_size must be 32"),
        ({"in": 48}, "in must be a positive multiple of 32"),
        ({"x_dtype": 2}, r"x must be bf16 \(0\) or fp32 \(1\)"),
        ({"tokens": -1}, "non-negative"),
        ({"workspace_bytes": 10}, "workspace must have 272 bytes"),
        ({"workspace": 72}, "16-byte aligned"),
        ({"weight": 8}, "weight must be 16-byte aligned on a GPU"),
        ({"weight_scale": 65}, r"aligned to their elements of 2 bytes on a GPU \(got 0x41\)"),
        ({"x": None}, "x, y and weight_scale must not be null"),
    ],
)
def test_cuda_int8_gemm_refuses_what_does_not_fit(change, message):
    fields = {"tokens": 2, "out": 4, "in": 64, "group_size": 32, "weight": 64, "x": 64, "y": 64}
    fields |= {"weight_scale": 64, "workspace": 64, "workspace_bytes": 1000}
    with pytest.raises(ValueError, match=message):
        run_op("int8_gemm", **(fields | change))
