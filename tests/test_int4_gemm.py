"""int4_gemm against float64, and its promise that a row's bits depend on nothing but the row and the weights."""

from __future__ import annotations

import functools
import math

import pytest
import torch

from kimi_native import _native, ops, reference
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
    make_int4,
    make_x,
    misaligned,
    threads,
)

BF16, FP32 = torch.bfloat16, torch.float32
ROW_COUNTS = [1, 2, 3, 4, 5, 7, 8, 9, 15, 16, 17, 64, 65]


def expected_gemm(x: torch.Tensor, w: Quantized) -> torch.Tensor:
    packed = w.int4()
    return reference.int4_gemm(
        x.double(), packed.weight_packed, packed.weight_scale.double(), out_dtype=torch.float64
    )


def check(x: torch.Tensor, w: Quantized, out_dtype: torch.dtype) -> None:
    expected = expected_gemm(x, w)
    actual = ops.int4_gemm(x, w.int4(), out_dtype=out_dtype)
    assert actual.dtype == out_dtype
    assert_within(actual, expected, bound_limb_gemm(x, w.dequantized(), expected, out_dtype))


@functools.cache  # the same for every tier
def case(tokens: int, out: int, in_: int, x_dtype: torch.dtype, out_dtype: torch.dtype):
    x, w = make_x(tokens, in_, x_dtype), make_int4(out, in_)
    expected = expected_gemm(x, w)
    return x, w.int4(), expected, bound_limb_gemm(x, w.dequantized(), expected, out_dtype)


@pytest.mark.parametrize("dtypes", [(BF16, BF16), (FP32, FP32), (BF16, FP32), (FP32, BF16)])
@pytest.mark.parametrize(
    ("out", "in_"), [(1, 32), (3, 64), (4, 96), (5, 128), (63, 160), (65, 544), (17, 1056)]
)
def test_int4_gemm_matches_reference(isa, out, in_, dtypes):
    x, w, expected, bound = case(max(ROW_COUNTS), out, in_, *dtypes)
    for tokens in ROW_COUNTS:
        actual = ops.int4_gemm(x[:tokens], w, out_dtype=dtypes[1])
        assert actual.dtype == dtypes[1]
        assert_within(actual, expected[:tokens], bound[:tokens])


@pytest.mark.parametrize(("out", "in_"), [(2048, 7168), (7168, 2048)])
def test_int4_gemm_matches_reference_at_the_model_shapes(isa, out, in_):
    x, w, expected, bound = case(3, out, in_, BF16, BF16)
    assert_within(ops.int4_gemm(x, w), expected, bound)
    assert_within(ops.int4_gemm(x[:1], w), expected[:1], bound[:1])


def test_int4_gemm_of_zero_tokens_is_empty(isa):
    y = ops.int4_gemm(make_x(0, 64), make_int4(5, 64).int4())
    assert y.shape == (0, 5)


@pytest.mark.parametrize("dtype", [BF16, FP32])
@pytest.mark.parametrize("ratio", [1e1, 1e3, 1e5, 1e8])
def test_int4_gemm_with_one_outlier_in_each_group(isa, dtype, ratio):
    """31 entries near 1 beside one of `ratio`: the small ones keep an absolute error of ratio / 32639."""
    x = torch.rand(5, 160, generator=torch.Generator().manual_seed(7)) + 0.5
    x[:, 3::GROUP] *= ratio
    check(x.to(dtype), make_int4(9, 160), FP32)


def test_int4_gemm_knows_all_16_levels_in_every_place(isa):
    """One-hot tokens pick single weights: the results are exact products."""
    w = make_int4(16, 160)
    q = (torch.arange(16)[:, None] + torch.arange(160)) % 16 - 8
    w = Quantized(q, w.scale)
    y = ops.int4_gemm(3 * torch.eye(160), w.int4())
    assert torch.equal(y.double(), 3 * w.dequantized().T)


def test_int4_gemm_is_correctly_rounded_on_bf16_above_2_to_the_minus_7_of_its_group(isa):
    """Such inputs are taken exactly, one group has one rounding: the float32 nearest to the true value."""
    g = torch.Generator().manual_seed(5)
    x = (1.0 + torch.rand(64, GROUP, generator=g)) * 2.0 ** -torch.randint(
        0, 7, (64, GROUP), generator=g
    )
    x = (x * torch.where(torch.rand(64, GROUP, generator=g) < 0.5, -1, 1)).bfloat16()
    x[:, 0] = 1.9921875  # the largest bf16 below 2: it needs the doubled step
    x[:32, 0] = 1.984375  # and this one does not
    x[32:, 1:] *= 2  # entries of the doubled step must be multiples of it
    x[32:, 1:] = x[32:, 1:].clamp(-1.9921875, 1.9921875)
    w = make_int4(33, GROUP)
    assert torch.equal(ops.int4_gemm(x, w.int4(), out_dtype=FP32), expected_gemm(x, w).float())


def test_int4_gemm_takes_activations_as_documented(isa):
    """One group: the nearest float32 to the exact product with the documented fixed point, limits included."""
    g = torch.Generator().manual_seed(6)
    x = torch.randn(40, GROUP, generator=g) * 10.0 ** torch.randint(-6, 7, (40, 1), generator=g)
    x[0] = 0
    x[1, 0], x[2, 0] = 32639.49 / 16384 * 64, 32639.5 / 16384 * 64  # either side of the limit
    x[3, 0], x[4, 0] = -32639.49 / 16384 * 64, -1.99999 * 64
    x[5] = torch.arange(GROUP) + 0.5  # ties
    x[5, 0] = 16384
    x[6, 1:] = 1e-42  # subnormals beside a normal
    w = make_int4(33, GROUP)
    exact = fixed_point(x) @ w.dequantized().T
    assert torch.equal(ops.int4_gemm(x, w.int4()), exact.float())


@pytest.mark.parametrize("size", [3e38, 1e30, 1e-30, 1e-34, 1e-37, 1e-40, 1e-45])
def test_int4_gemm_near_the_ends_of_the_float_range(isa, size):
    x = torch.rand(3, 64, generator=torch.Generator().manual_seed(8)) * size
    w = make_int4(5, 64)
    w = Quantized(w.q, w.scale * 2**-7)  # 64 products of 3e38 must not overflow
    y = ops.int4_gemm(x, w.int4())
    assert bool(y.isfinite().all())
    check(x, w, FP32)


@pytest.mark.parametrize("tokens", [3, 20])
@pytest.mark.parametrize("poison", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("dtype", [BF16, FP32])
def test_int4_gemm_spoils_exactly_the_rows_with_a_non_finite_input(isa, tokens, poison, dtype):
    x = make_x(tokens, 544, dtype)
    clean = ops.int4_gemm(x, make_int4(35, 544).int4())
    for column in (0, 100, 543):
        spoiled = x.clone()
        spoiled[1, column] = poison
        y = ops.int4_gemm(spoiled, make_int4(35, 544).int4())
        assert bool(y[1].isnan().all())
        keep = [t for t in range(tokens) if t != 1]
        assert_same_bits(y[keep], clean[keep])


def test_int4_gemm_spoils_exactly_the_column_of_a_nan_scale(isa):
    w = make_int4(35, 544)
    w.scale[7, 16] = math.nan
    for tokens in (3, 20):
        y = ops.int4_gemm(make_x(tokens, 544), w.int4())
        assert y.isnan().any(dim=0).nonzero().flatten().tolist() == [7]
        assert bool(y[:, 7].isnan().all())


@pytest.mark.parametrize(("out", "in_"), [(37, 1056), (64, 512), (35, 2656)])
@pytest.mark.parametrize("dtype", [BF16, FP32])
def test_int4_gemm_of_a_row_alone_and_in_any_batch_has_the_same_bits(isa, out, in_, dtype):
    """Crosses every row count at which another kernel takes over, and 80 groups, from which on matrix
    tiles take those of a partial sum in several spans."""
    x, w = make_x(300, in_, dtype), make_int4(out, in_).int4()
    alone = torch.cat([ops.int4_gemm(x[t : t + 1], w, out_dtype=FP32) for t in range(70)])
    for tokens in [*range(2, 27), 63, 64, 65, 70, 129, 300]:
        batch = ops.int4_gemm(x[:tokens], w, out_dtype=FP32)
        assert_same_bits(batch[:70], alone[:tokens])
    assert_same_bits(ops.int4_gemm(x[230:], w, out_dtype=FP32), batch[230:])


@pytest.mark.parametrize("dtype", [BF16, FP32])
@pytest.mark.parametrize("compute", ["exact", "int8"])
@pytest.mark.parametrize("scale", [2**-7, 2**-24])  # no sum overflows; scale * step is subnormal
def test_int4_gemm_of_rows_of_every_size_has_the_bits_of_each_alone(isa, dtype, compute, scale):
    """The ends of the float range, for which matrix tiles hold a block of 16 tokens in another form;
    and a single huge or tiny group among ordinary ones."""
    sizes = torch.tensor([1.0, 3e38, 1.2e38, 1e-19, 1e-25, 1e-36, 1e-40])
    x = torch.rand(128, 544, generator=torch.Generator().manual_seed(9)) * 2 - 1
    x[:112] *= sizes.repeat_interleave(16)[:, None]
    x[112, 40], x[120, 64:96], x[121, 64:96] = 2e38, 1e-22, 0.0
    w = make_int4(35, 544)
    w = Quantized(w.q, w.scale * scale).int4()
    x = x.to(dtype)
    alone = [ops.int4_gemm(x[t : t + 1], w, out_dtype=FP32, compute=compute) for t in range(128)]
    assert bool(torch.cat(alone).isfinite().all())
    for first, last in [(0, 128), (8, 30), (100, 128)]:
        batch = ops.int4_gemm(x[first:last], w, out_dtype=FP32, compute=compute)
        assert_same_bits(batch, torch.cat(alone[first:last]))


def test_int4_gemm_has_the_same_bits_on_any_number_of_threads(isa):
    for tokens in (1, 5, 70):
        x, w = make_x(tokens, 544), make_int4(200, 544).int4()
        with threads(1):
            one = ops.int4_gemm(x, w)
        for n in (2, 3):
            with threads(n):
                assert_same_bits(ops.int4_gemm(x, w), one)


def test_int4_gemm_has_the_same_bits_on_every_vector_tier(simd_isas):
    results = []
    for name in simd_isas:
        ops.force_isa(name)
        results.append(
            [
                ops.int4_gemm(make_x(t, 1056), make_int4(37, 1056).int4(), out_dtype=FP32)
                for t in (1, 3, 20)
            ]
        )
    for other in results[1:]:
        for a, b in zip(results[0], other, strict=True):
            assert_same_bits(a, b)


@pytest.mark.parametrize("tokens", [1, 3, 20])
@pytest.mark.parametrize("offset", [1, 2, 3])
def test_int4_gemm_reads_and_writes_misaligned_memory(isa, tokens, offset):
    out, in_ = 35, 544
    x, w = make_x(tokens, in_), make_int4(out, in_).int4()
    parts = [misaligned(p, offset) for p in (x, w.weight_packed, w.weight_scale)]
    y = misaligned(torch.zeros(tokens, out), offset)
    call_native(
        "int4_gemm", *[p.data_ptr() for p in parts], y.data_ptr(), 0, 1, tokens, out, in_, GROUP, 0
    )
    aligned = ops.int4_gemm(x, w, out_dtype=FP32)
    assert torch.equal(y, aligned.view(torch.uint8).flatten())


@pytest.mark.parametrize("tokens", [1, 7, 8, 20])
@pytest.mark.parametrize("out", [1, 15, 16, 17, 35])
@pytest.mark.parametrize("dtype", [BF16, FP32])
def test_int4_gemm_writes_every_output_and_nothing_else(isa, tokens, out, dtype):
    x, w = make_x(tokens, 96), make_int4(out, 96).int4()
    y = GuardedRows(tokens, out, dtype)
    pointers = [t.data_ptr() for t in (x, w.weight_packed, w.weight_scale, y.rows)]
    call_native("int4_gemm", *pointers, 0, DTYPES[dtype], tokens, out, 96, GROUP, 0)
    assert bool(y.rows.isfinite().all())
    y.assert_guards_untouched()


@pytest.mark.parametrize(
    ("x", "error", "message"),
    [
        (torch.zeros(2, 64, dtype=BF16), ValueError, r"int4_gemm: x must be \[\*, 96\]"),
        (torch.zeros(96, dtype=BF16), ValueError, r"int4_gemm: x must be \[\*, 96\]"),
        (torch.zeros(2, 96, dtype=torch.float16), TypeError, "int4_gemm: x must be torch.bfloat16"),
        (torch.zeros(2, 192, dtype=BF16)[:, ::2], ValueError, "int4_gemm: x must be contiguous"),
    ],
)
def test_int4_gemm_refuses_a_wrong_activation(x, error, message):
    with pytest.raises(error, match=message):
        ops.int4_gemm(x, make_int4(3, 96).int4())


def test_int4_gemm_refuses_a_wrong_output_dtype():
    with pytest.raises(TypeError, match="int4_gemm: out must be"):
        ops.int4_gemm(make_x(1, 96), make_int4(3, 96).int4(), out_dtype=torch.float16)


def test_int4_gemm_checks_every_size_again_in_the_kernel():
    buffer = torch.zeros(4096, dtype=torch.uint8)
    p = buffer.data_ptr() + -buffer.data_ptr() % 64

    def call(
        x=p,
        w=p,
        s=p,
        y=p,
        xd=0,
        yd=0,
        tokens=1,
        out=2,
        in_=64,
        group=32,
        compute=0,
        space=p,
        n=4000,
    ):
        _native.cpu.int4_gemm(x, w, s, y, xd, yd, tokens, out, in_, group, compute, space, n)

    call()
    for change, message in [
        ({"group": 64}, r"group_size must be 32 \(got 64\)"),
        ({"compute": 2}, r"compute must be exact \(0\) or int8 \(1\) \(got 2\)"),
        ({"in_": 48}, r"in must be a positive multiple of 32 \(got 48\)"),
        ({"in_": 0}, r"in must be a positive multiple of 32 \(got 0\)"),
        ({"tokens": -1}, "sizes must be non-negative"),
        ({"out": -1}, "sizes must be non-negative"),
        ({"tokens": 2**60}, "fit in 64 bits"),
        ({"out": 2**60}, "fit in 64 bits"),
        ({"in_": 2**62}, "fit in 64 bits"),
        ({"xd": 2}, r"x must be bf16 \(0\) or fp32 \(1\) \(got 2\)"),
        ({"yd": -1}, r"y must be bf16 \(0\) or fp32 \(1\) \(got -1\)"),
        ({"x": 0}, "must not be null"),
        ({"w": 0}, "must not be null"),
        ({"s": 0}, "must not be null"),
        ({"y": 0}, "must not be null"),
        ({"space": 0}, "workspace must be 64-byte aligned"),
        ({"space": p + 8}, "workspace must be 64-byte aligned"),
        ({"n": 10}, r"workspace must have \d+ bytes \(got 10\)"),
    ]:
        with pytest.raises(ValueError, match="int4_gemm: .*" + message):
            call(**change)
