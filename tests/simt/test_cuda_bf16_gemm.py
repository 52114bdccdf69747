"""bf16_gemm of the GPU in the shim against float64: the kernel for few tokens (up to 32) and the one for many."""

from __future__ import annotations

import math

import pytest
import torch

from kimi_native import reference
from oracle_dense import TINY, U, assert_close, assert_same_bits, randn, seeded
from simt import SCHEDULES, Schedule, simt_only, stats
from simt_ops import run_op

BF16, FP32 = torch.bfloat16, torch.float32
HALF_ULP = {BF16: 2.0**-8, FP32: U}
schedules = pytest.mark.parametrize("schedule", SCHEDULES, ids=str)
dtypes = pytest.mark.parametrize(
    ("x_dtype", "y_dtype"), [(BF16, BF16), (BF16, FP32), (FP32, BF16), (FP32, FP32)]
)


def bf16_gemm(x, weight, y_dtype=FP32, *, y=None, **options):
    """x [tokens, heads, in], weight [heads, out, in], both with any stride but that of `in`."""
    tokens, heads, in_ = x.shape
    if y is None:
        y = torch.full((tokens, heads, weight.shape[1]), math.nan, dtype=y_dtype)
    run_op(
        "bf16_gemm",
        x=x,
        weight=weight,
        y=y,
        x_dtype=x.dtype,
        y_dtype=y.dtype,
        tokens=tokens,
        heads=heads,
        out=weight.shape[1],
        x_token_stride=x.stride(0),
        x_head_stride=x.stride(1),
        weight_head_stride=weight.stride(0),
        y_token_stride=y.stride(0),
        y_head_stride=y.stride(1),
        **{"in": in_},
        **options,
    )
    return y


def expect(x, weight, y_dtype):
    """float64 result and bound.

    A product passes at most as many additions as its segment has products (one of 8 segments of whole chunks of 32
    columns; three products a column for fp32, whose limbs have the signs and the sum of the value), then the 8
    segments. An addition in a tensor core may truncate: 2 U of the absolute sum.
    """
    y = reference.bf16_gemm(x.double(), weight.double(), out_dtype=torch.float64)
    absolute = reference.bf16_gemm(x.double().abs(), weight.double().abs(), out_dtype=torch.float64)
    segment = 32 * math.ceil(math.ceil(x.shape[-1] / 32) / 8)
    limbs = 3 if x.dtype == FP32 else 1
    error = 1.01 * (2 * limbs * segment + 8) * U * absolute
    return y, error + HALF_ULP[y_dtype] * (y.abs() + error) + TINY


def integers(*shape, dtype=BF16, seed=0):
    """Sums of a few thousand of their products are exact in fp32, in any order."""
    return torch.randint(-8, 9, shape, generator=seeded(seed)).to(dtype)


# ---- values ---------------------------------------------------------------------------------------------------------


@schedules
@dtypes
@pytest.mark.parametrize("tokens", [0, 1, 7, 8, 9, 32, 33])
@pytest.mark.parametrize(("out", "in_"), [(1, 8), (17, 264)])
def test_cuda_bf16_gemm_matches_float64(out, in_, tokens, x_dtype, y_dtype, schedule):
    x, w = randn(tokens, 1, in_, dtype=x_dtype), randn(1, out, in_, dtype=BF16, seed=1)
    assert_close(bf16_gemm(x, w, y_dtype, schedule=schedule), *expect(x, w, y_dtype))


@schedules
@pytest.mark.parametrize("x_dtype", [BF16, FP32])
@pytest.mark.parametrize(("tokens", "out", "in_"), [(127, 129, 40), (129, 127, 136)])
def test_cuda_bf16_gemm_of_many_tokens_matches_float64(tokens, out, in_, x_dtype, schedule):
    x, w = randn(tokens, 1, in_, dtype=x_dtype), randn(1, out, in_, dtype=BF16, seed=1)
    assert_close(bf16_gemm(x, w, schedule=schedule), *expect(x, w, FP32))


@pytest.mark.parametrize("tokens", [3, 20, 40])
@pytest.mark.parametrize("in_", [8, 24, 32, 40, 248, 256, 264, 512, 520, 1032])
def test_cuda_bf16_gemm_multiplies_every_column_once(in_, tokens):
    x, w = integers(tokens, 1, in_), integers(1, 18, in_, seed=1)
    exact = reference.bf16_gemm(x.double(), w.double(), out_dtype=torch.float64)
    assert torch.equal(bf16_gemm(x, w).double(), exact)


@pytest.mark.parametrize("out", [15, 16, 17, 32, 127, 128, 129])
def test_cuda_bf16_gemm_writes_every_row_once(out):
    for tokens in (2, 35):
        x, w = integers(tokens, 1, 16), integers(1, out, 16, seed=1)
        exact = reference.bf16_gemm(x.double(), w.double(), out_dtype=torch.float64)
        assert torch.equal(bf16_gemm(x, w).double(), exact)


@pytest.mark.parametrize("tokens", [2, 33])
def test_cuda_bf16_gemm_matches_float64_at_a_model_width(tokens):
    x, w = randn(tokens, 1, 7168, dtype=BF16), randn(1, 32, 7168, dtype=BF16, seed=1, scale=0.02)
    assert_close(bf16_gemm(x, w, BF16), *expect(x, w, BF16))


@pytest.mark.parametrize("tokens", [2, 40])
def test_cuda_bf16_gemm_keeps_every_bit_of_fp32(tokens):
    x = randn(tokens, 1, 64, dtype=FP32)
    w = torch.eye(64, dtype=BF16)[None] * 0.25
    assert_same_bits(bf16_gemm(x, w), x * 0.25)


# ---- heads, strides, alignment --------------------------------------------------------------------------------------


@pytest.mark.parametrize("x_dtype", [BF16, FP32])
@pytest.mark.parametrize("tokens", [3, 33])
def test_cuda_bf16_gemm_matches_float64_per_head(tokens, x_dtype):
    x, w = randn(tokens, 3, 128, dtype=x_dtype), randn(3, 40, 128, dtype=BF16, seed=1)
    assert_close(bf16_gemm(x, w), *expect(x, w, FP32))


@pytest.mark.parametrize("x_dtype", [BF16, FP32])
@pytest.mark.parametrize("tokens", [3, 33])
def test_cuda_bf16_gemm_reads_and_writes_strided_rows_only(tokens, x_dtype):
    # The halves of kv_b_proj viewed [heads, nope + v, in], q_nope of [tokens, heads, nope + rope], a part of y.
    x = randn(tokens, 2, 48, dtype=x_dtype)
    x[..., 32:] = math.nan
    kv_b = randn(2, 24 + 16, 32, dtype=BF16, seed=1)
    kv_b[:, :24] = math.nan
    y = torch.full((tokens, 2, 29), 7.0)
    bf16_gemm(x[..., :32], kv_b[:, 24:], y=y[..., 3:19])
    assert_close(y[..., 3:19], *expect(x[..., :32], kv_b[:, 24:], FP32))
    assert (y[..., :3] == 7).all()
    assert (y[..., 19:] == 7).all()


def test_cuda_bf16_gemm_takes_heads_that_share_x_or_weight():
    x, w = randn(5, 1, 64, dtype=BF16), randn(1, 24, 64, dtype=BF16, seed=1)
    many_x, many_w = randn(5, 3, 64, dtype=BF16), randn(3, 24, 64, dtype=BF16, seed=2)
    assert_close(bf16_gemm(x.expand(5, 3, 64), many_w), *expect(x.expand(5, 3, 64), many_w, FP32))
    assert_close(bf16_gemm(many_x, w.expand(3, 24, 64)), *expect(many_x, w.expand(3, 24, 64), FP32))


@pytest.mark.parametrize("x_dtype", [BF16, FP32])
def test_cuda_bf16_gemm_takes_any_stride_of_a_dimension_of_one(x_dtype):
    x, w = randn(1, 1, 64, dtype=x_dtype), randn(1, 24, 64, dtype=BF16, seed=1)
    odd_x, odd_w = x.as_strided(x.shape, (3, 5, 1)), w.as_strided(w.shape, (7, 64, 1))
    assert_same_bits(bf16_gemm(odd_x, odd_w), bf16_gemm(x, w))


# ---- one order of sums ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("x_dtype", [BF16, FP32])
def test_cuda_bf16_gemm_row_has_the_same_bits_in_every_kernel(x_dtype):
    x, w = randn(35, 1, 1320, dtype=x_dtype), randn(1, 20, 1320, dtype=BF16, seed=1)
    together = bf16_gemm(x, w)
    for first, last in [(0, 1), (3, 11), (2, 34)]:
        alone = bf16_gemm(x[first:last], w, schedule=Schedule(seed=5))
        assert_same_bits(alone, together[first:last])


@pytest.mark.parametrize("poison", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("x_dtype", [BF16, FP32])
@pytest.mark.parametrize("tokens", [6, 40])
def test_cuda_bf16_gemm_passes_on_what_is_not_finite(tokens, x_dtype, poison):
    x, w = randn(tokens, 1, 72, dtype=x_dtype), randn(1, 18, 72, dtype=BF16, seed=1)
    x[3, 0, 71] = poison
    y = bf16_gemm(x, w)
    expected = poison * w[0, :, 71].float()
    assert_same_bits(y[3, 0], expected)
    assert y[[0, 1, 2, 4, 5]].isfinite().all()


# ---- shared memory, bad input ---------------------------------------------------------------------------------------


@simt_only
def test_cuda_bf16_gemm_of_many_tokens_has_no_bank_conflicts():
    bf16_gemm(integers(128, 1, 64), integers(1, 128, 64))
    counts = stats()
    assert counts["wavefronts"] == counts["ideal_wavefronts"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tokens": -1}, "need tokens >= 0"),
        ({"in": 0}, "need tokens >= 0 and heads, out, in >= 1"),
        ({"x_dtype": 2}, r"x must be bf16 \(0\) or fp32 \(1\)"),
        ({"in": 36}, r"in and weight_head_stride must be multiples of 8 on a GPU \(got in=36"),
        ({"weight_head_stride": 60, "heads": 2}, "weight_head_stride must be multiples of 8"),
        ({"weight": 8}, "weight must be 16-byte aligned on a GPU"),
        ({"weight": None}, "weight must be 16-byte aligned on a GPU"),
        ({"x": 68}, "rows of bf16 x must be 16-byte aligned on a GPU"),
        ({"x_token_stride": 68}, r"16-byte aligned on a GPU \(got x=0x40, x_token_stride=68"),
        ({"x_dtype": 1, "x": 66}, "fp32 x must be 4-byte aligned"),
        ({"y_dtype": 1, "y": 66}, "y must be aligned to its elements"),
        ({"x_dtype": 1, "workspace_bytes": 10}, "workspace must have 768 bytes"),
        ({"x_token_stride": -8}, "strides must not be negative"),
        ({"out": 2**40}, "too large for one launch"),
    ],
)
def test_cuda_bf16_gemm_refuses_what_does_not_fit(change, message):
    fields = {"tokens": 2, "heads": 1, "out": 4, "in": 64, "weight": 64, "x": 64, "y": 64}
    fields |= {"x_token_stride": 64, "x_head_stride": 64, "weight_head_stride": 256}
    fields |= {"y_token_stride": 4, "y_head_stride": 4, "workspace": 64, "workspace_bytes": 10000}
    with pytest.raises(ValueError, match=message):
        run_op("bf16_gemm", **(fields | change))
