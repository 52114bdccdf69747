"""int8_gemm against float64; it shares its tile with int4_gemm, so the bit-for-bit promises are checked briefly."""

from __future__ import annotations

import functools
import math

import pytest
import torch

from kimi_native import _native, ops, reference
from kimi_native.weights import Int8Weight
from oracle import (
    DTYPES,
    GROUP,
    GuardedRows,
    Quantized,
    assert_same_bits,
    assert_within,
    bound_limb_gemm,
    call_native,
    fixed_point,
    make_int8,
    make_x,
    misaligned,
    threads,
)

BF16, FP32 = torch.bfloat16, torch.float32
ROW_COUNTS = [1, 2, 3, 4, 5, 7, 8, 9, 15, 16, 17, 64, 65]


def expected_gemm(x: torch.Tensor, w: Quantized) -> torch.Tensor:
    int8 = w.int8()
    return reference.int8_gemm(
        x.double(), int8.weight, int8.weight_scale.double(), out_dtype=torch.float64
    )


@functools.cache  # the same for every tier
def case(tokens: int, out: int, in_: int, x_dtype: torch.dtype, out_dtype: torch.dtype):
    x, w = make_x(tokens, in_, x_dtype), make_int8(out, in_)
    expected = expected_gemm(x, w)
    bound = bound_limb_gemm(x, w.dequantized(), expected, out_dtype, conversion=1)
    return x, w.int8(), expected, bound


@pytest.mark.parametrize("dtypes", [(BF16, BF16), (FP32, FP32), (BF16, FP32), (FP32, BF16)])
@pytest.mark.parametrize(
    ("out", "in_"), [(1, 32), (3, 64), (4, 96), (5, 128), (63, 160), (65, 544), (17, 1056)]
)
def test_int8_gemm_matches_reference(isa, out, in_, dtypes):
    x, w, expected, bound = case(max(ROW_COUNTS), out, in_, *dtypes)
    for tokens in ROW_COUNTS:
        actual = ops.int8_gemm(x[:tokens], w, out_dtype=dtypes[1])
        assert actual.dtype == dtypes[1]
        assert_within(actual, expected[:tokens], bound[:tokens])


def test_int8_gemm_matches_reference_at_a_model_shape(isa):
    """K2's kv_a projection."""
    x, w, expected, bound = case(3, 576, 7168, BF16, BF16)
    assert_within(ops.int8_gemm(x, w), expected, bound)


def test_int8_gemm_of_zero_tokens_is_empty(isa):
    assert ops.int8_gemm(make_x(0, 64), make_int8(5, 64).int8()).shape == (0, 5)


@pytest.mark.parametrize("dtype", [BF16, FP32])
@pytest.mark.parametrize("ratio", [1e1, 1e3, 1e5, 1e8])
def test_int8_gemm_with_one_outlier_in_each_group(isa, dtype, ratio):
    x = torch.rand(5, 160, generator=torch.Generator().manual_seed(7)) + 0.5
    x[:, 3::GROUP] *= ratio
    x, w = x.to(dtype), make_int8(9, 160)
    expected = expected_gemm(x, w)
    bound = bound_limb_gemm(x, w.dequantized(), expected, FP32, conversion=1)
    assert_within(ops.int8_gemm(x, w.int8(), out_dtype=FP32), expected, bound)


def test_int8_gemm_knows_every_level_in_every_place(isa):
    """One-hot tokens pick single weights: the results are exact products."""
    w = make_int8(255, 160)
    q = (torch.arange(255)[:, None] + torch.arange(160)) % 255 - 127
    w = Quantized(q, w.scale)
    y = ops.int8_gemm(3 * torch.eye(160), w.int8())
    assert torch.equal(y.double(), 3 * w.dequantized().T)


def test_int8_gemm_holds_the_largest_integer_dot_products(isa):
    """All weights +-127 and all inputs at the limit of the fixed point: |d| is 1.3e8, exact but for two roundings."""
    for sign in (1, -1):
        w = Quantized(torch.full((3, GROUP), 127), torch.ones(3, 1).bfloat16())
        x = torch.full((9, GROUP), sign * 32639 / 16384)
        y = ops.int8_gemm(x, w.int8())
        exact = fixed_point(x) @ w.dequantized().T
        assert exact.abs().max() == 127 * 32 * 32639 / 16384
        assert_within(y, exact, 2 * 2.0**-24 * exact.abs())


@pytest.mark.parametrize("tokens", [3, 20])
@pytest.mark.parametrize("poison", [math.nan, math.inf])
def test_int8_gemm_spoils_exactly_the_rows_with_a_non_finite_input(isa, tokens, poison):
    x, w = make_x(tokens, 544), make_int8(35, 544).int8()
    clean = ops.int8_gemm(x, w)
    x[1, 100] = poison
    y = ops.int8_gemm(x, w)
    assert bool(y[1].isnan().all())
    keep = [t for t in range(tokens) if t != 1]
    assert_same_bits(y[keep], clean[keep])


def test_int8_gemm_of_a_row_alone_and_in_any_batch_has_the_same_bits(isa):
    """Crosses every row count at which another kernel takes over."""
    x, w = make_x(300, 1056), make_int8(37, 1056).int8()
    alone = torch.cat([ops.int8_gemm(x[t : t + 1], w, out_dtype=FP32) for t in range(70)])
    for tokens in [*range(2, 21), 63, 64, 65, 70, 300]:
        assert_same_bits(ops.int8_gemm(x[:tokens], w, out_dtype=FP32)[:70], alone[:tokens])


def test_int8_gemm_has_the_same_bits_on_any_number_of_threads(isa):
    for tokens in (1, 5, 70):
        x, w = make_x(tokens, 544), make_int8(200, 544).int8()
        with threads(1):
            one = ops.int8_gemm(x, w)
        with threads(2):
            assert_same_bits(ops.int8_gemm(x, w), one)


def test_int8_gemm_has_the_same_bits_on_every_vector_tier(simd_isas):
    results = []
    for name in simd_isas:
        ops.force_isa(name)
        w = make_int8(37, 1056).int8()
        results.append([ops.int8_gemm(make_x(t, 1056), w, out_dtype=FP32) for t in (1, 3, 20)])
    for other in results[1:]:
        for a, b in zip(results[0], other, strict=True):
            assert_same_bits(a, b)


@pytest.mark.parametrize("tokens", [1, 3, 20])
@pytest.mark.parametrize("offset", [1, 2, 3])
def test_int8_gemm_reads_and_writes_misaligned_memory(isa, tokens, offset):
    out, in_ = 35, 544
    x, w = make_x(tokens, in_), make_int8(out, in_).int8()
    parts = [misaligned(p, offset) for p in (x, w.weight, w.weight_scale)]
    y = misaligned(torch.zeros(tokens, out), offset)
    call_native(
        "int8_gemm", *[p.data_ptr() for p in parts], y.data_ptr(), 0, 1, tokens, out, in_, GROUP
    )
    aligned = ops.int8_gemm(x, w, out_dtype=FP32)
    assert torch.equal(y, aligned.view(torch.uint8).flatten())


@pytest.mark.parametrize("tokens", [1, 20])
@pytest.mark.parametrize("out", [1, 15, 17, 35])
def test_int8_gemm_writes_every_output_and_nothing_else(isa, tokens, out):
    x, w = make_x(tokens, 96), make_int8(out, 96).int8()
    y = GuardedRows(tokens, out, BF16)
    pointers = [t.data_ptr() for t in (x, w.weight, w.weight_scale, y.rows)]
    call_native("int8_gemm", *pointers, 0, DTYPES[BF16], tokens, out, 96, GROUP)
    assert bool(y.rows.isfinite().all())
    y.assert_guards_untouched()


def test_int8_gemm_refuses_wrong_inputs():
    w = make_int8(3, 96).int8()
    with pytest.raises(ValueError, match=r"int8_gemm: x must be \[\*, 96\]"):
        ops.int8_gemm(make_x(2, 64), w)
    with pytest.raises(TypeError, match="int8_gemm: x must be"):
        ops.int8_gemm(make_x(2, 96).half(), w)
    with pytest.raises(ValueError, match="Int8Weight: weight_scale must be"):
        Int8Weight(w.weight, w.weight_scale[:, :2].contiguous())


def test_int8_gemm_checks_every_size_again_in_the_kernel():
    buffer = torch.zeros(4096, dtype=torch.uint8)
    p = buffer.data_ptr() + -buffer.data_ptr() % 64

    def call(x=p, w=p, s=p, y=p, xd=0, yd=0, tokens=1, out=2, in_=64, group=32, space=p, n=4000):
        _native.cpu.int8_gemm(x, w, s, y, xd, yd, tokens, out, in_, group, space, n)

    call()
    for change, message in [
        ({"group": 64}, r"group_size must be 32 \(got 64\)"),
        ({"in_": 48}, r"in must be a positive multiple of 32 \(got 48\)"),
        ({"tokens": -1}, "sizes must be non-negative"),
        ({"out": 2**60}, "fit in 64 bits"),
        ({"xd": 2}, r"x must be bf16 \(0\) or fp32 \(1\) \(got 2\)"),
        ({"w": 0}, "must not be null"),
        ({"space": p + 8}, "workspace must be 64-byte aligned"),
        ({"n": 10}, r"workspace must have \d+ bytes \(got 10\)"),
    ]:
        with pytest.raises(ValueError, match="int8_gemm: .*" + message):
            call(**change)
