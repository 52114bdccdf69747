"""int4_grouped_swiglu against float64: both projections, silu in fp32, rows gathered by token."""

from __future__ import annotations

import functools
import math

import pytest
import torch

from grouped import COUNTS, expert_of_row, in_order, make_dispatch, make_experts, pack
from kimi_native import _native, ops, reference
from kimi_native.weights import Int4ExpertWeights, MoeDispatch
from oracle import (
    DTYPES,
    GROUP,
    HALF_ULP,
    OutputAt,
    Quantized,
    assert_same_bits,
    assert_within,
    bound_limb_sum,
    call_native,
    make_x,
    misaligned,
    threads,
)

BF16, FP32 = torch.bfloat16, torch.float32
SILU_ROUNDINGS = (
    13  # two exp of 2 ulp = 4 * 2^-24 each, then sum, quotient and two products, one spare
)


def bound_swiglu(x, gate, up, dtype):
    """|error| of silu(g) * u for float64 x [rows, in], gate and up [out, in].

    g and u carry the error of an fp32 limb sum; |silu'| <= 1.1 carries it on. The epilogue adds SILU_ROUNDINGS of
    2^-24, and results below the normal range 2^-126. Then one rounding to dtype.
    """
    g, u = x.double() @ gate.T, x.double() @ up.T
    error_g, error_u = bound_limb_sum(x, gate), bound_limb_sum(x, up)
    silu = g * torch.sigmoid(g)
    error = 1.1 * error_g * (u.abs() + error_u) + silu.abs() * error_u
    error = error + SILU_ROUNDINGS * 2.0**-24 * ((silu * u).abs() + error) + 2.0**-126
    return error + HALF_ULP[dtype] * ((silu * u).abs() + error)


@functools.cache  # the same for every tier
def case(counts: tuple[int, ...], out: int, in_: int, x_dtype: torch.dtype, out_dtype: torch.dtype):
    gate, up = (make_experts(len(counts), out, in_, seed=s) for s in (1, 2))
    x, dispatch = make_x(11, in_, x_dtype), make_dispatch(counts, 11)
    expected = reference.int4_grouped_swiglu(
        x.double(),
        dispatch.token_index,
        dispatch.expert_offsets,
        *[[(w.int4().weight_packed, w.scale.double()) for w in part] for part in (gate, up)],
        out_dtype=torch.float64,
    )
    bound = torch.cat(
        [
            bound_swiglu(x[tokens.long()], g.dequantized(), u.dequantized(), out_dtype)
            for tokens, g, u in zip(dispatch.token_index.split(counts), gate, up, strict=True)
        ]
    )
    return x, dispatch, pack(gate, counts), pack(up, counts), expected, bound


@pytest.mark.parametrize("counts", COUNTS)
@pytest.mark.parametrize(("out", "in_"), [(5, 32), (35, 160), (64, 512)])
@pytest.mark.parametrize("dtypes", [(BF16, BF16), (FP32, FP32)])
def test_int4_grouped_swiglu_matches_reference(isa, counts, out, in_, dtypes):
    x, dispatch, gate, up, expected, bound = case(counts, out, in_, *dtypes)
    actual = ops.int4_grouped_swiglu(x, dispatch, gate, up, out_dtype=dtypes[1])
    assert actual.dtype == dtypes[1]
    assert_within(actual, expected, bound)


@functools.cache
def model_case():
    gate, up = (make_experts(1, 2048, 7168, seed=s)[0] for s in (1, 2))
    x, counts = make_x(1, 7168), [0, 1, 0]
    g, u = (x.double() @ w.dequantized().T for w in (gate, up))
    bound = bound_swiglu(x, gate.dequantized(), up.dequantized(), BF16)
    packed = pack([gate] * 3, counts), pack([up] * 3, counts)
    return x, make_dispatch(counts, 1), *packed, g * torch.sigmoid(g) * u, bound


def test_int4_grouped_swiglu_matches_reference_at_a_model_shape(isa):
    """K2's gate and up projections, one token in one of three experts."""
    x, dispatch, gate, up, expected, bound = model_case()
    assert_within(ops.int4_grouped_swiglu(x, dispatch, gate, up), expected, bound)


def one_hot_pair(values: torch.Tensor):
    """x, gate, up for which g is exactly `values` and u is 1: each has a group of its own."""
    x = torch.zeros(len(values), 2 * GROUP)
    x[:, 0], x[:, GROUP] = values, 1.0
    q = torch.zeros(2, 20, 2 * GROUP, dtype=torch.int64)
    q[0, :, 0] = q[1, :, GROUP] = 1
    ones = torch.ones(20, 2).bfloat16()
    return x, Quantized(q[0], ones), Quantized(q[1], ones)


def swiglu_of(x, gate, up):
    counts = [x.shape[0]]
    return ops.int4_grouped_swiglu(
        x, in_order(make_dispatch(counts, 1)), pack([gate], counts), pack([up], counts)
    )


def test_int4_grouped_swiglu_silu_is_accurate_to_its_roundings(isa):
    """g from -104 to 104 on a grid that the fixed point holds exactly, in every lane and in both row-count kernels."""
    values = torch.arange(-104 * 64, 104 * 64 + 1) / 64
    for block in (values, values[:3], values[5000:5001]):
        expected = (block.double() * torch.sigmoid(block.double()))[:, None].expand(-1, 20)
        bound = SILU_ROUNDINGS * 2.0**-24 * expected.abs() + 104 * 2.0**-126
        assert_within(swiglu_of(*one_hot_pair(block)), expected, bound)


@pytest.mark.parametrize(
    ("gate_value", "expected"),
    [(0.0, 0.0), (1000.0, 1000.0), (1e30, 1e30), (-1000.0, 0.0), (-1e30, 0.0)],
)
def test_int4_grouped_swiglu_silu_far_out(isa, gate_value, expected):
    """Beyond the range of exp: x on the right, 0 on the left, never NaN."""
    y = swiglu_of(*one_hot_pair(torch.full((3,), gate_value)))
    expected = torch.full((3, 20), expected, dtype=torch.float64)
    assert_within(y, expected, expected / 32639)


@pytest.mark.parametrize("counts", [[3, 0, 1, 17, 8], [70, 260]])
def test_int4_grouped_swiglu_rows_have_the_bits_of_each_row_alone(isa, counts):
    gate, up = (make_experts(len(counts), 37, 544, seed=s) for s in (1, 2))
    x, dispatch = make_x(9, 544), make_dispatch(counts, 9)
    batch = ops.int4_grouped_swiglu(
        x, dispatch, pack(gate, counts), pack(up, counts), out_dtype=FP32
    )
    packed = [[Int4ExpertWeights([w.int4()]) for w in part] for part in (gate, up)]
    one = in_order(make_dispatch([1], 1))
    for row, e in list(enumerate(expert_of_row(counts)))[:: max(1, sum(counts) // 40)]:
        token = int(dispatch.token_index[row])
        alone = ops.int4_grouped_swiglu(
            x[token : token + 1], one, packed[0][e], packed[1][e], out_dtype=FP32
        )
        assert_same_bits(batch[row : row + 1], alone)


def test_int4_grouped_swiglu_has_the_same_bits_on_any_number_of_threads(isa):
    counts = [3, 0, 70, 1]
    gate, up = (pack(make_experts(4, 200, 160, seed=s), counts) for s in (1, 2))
    x, dispatch = make_x(20, 160), make_dispatch(counts, 20)
    with threads(1):
        one = ops.int4_grouped_swiglu(x, dispatch, gate, up)
    for n in (2, 3):
        with threads(n):
            assert_same_bits(ops.int4_grouped_swiglu(x, dispatch, gate, up), one)


def test_int4_grouped_swiglu_has_the_same_bits_on_every_vector_tier(simd_isas):
    counts = [3, 0, 20]
    gate, up = (pack(make_experts(3, 37, 544, seed=s), counts) for s in (1, 2))
    grid = torch.arange(-120 * 8, 120 * 8 + 1) / 8
    results = []
    for name in simd_isas:
        ops.force_isa(name)
        y = ops.int4_grouped_swiglu(make_x(9, 544), make_dispatch(counts, 9), gate, up)
        results.append([y, swiglu_of(*one_hot_pair(grid))])
    for other in results[1:]:
        for a, b in zip(results[0], other, strict=True):
            assert_same_bits(a, b)


@pytest.mark.parametrize("poison", [math.nan, math.inf, -math.inf])
def test_int4_grouped_swiglu_spoils_exactly_the_rows_of_a_non_finite_token(isa, poison):
    counts = [3, 0, 20]
    gate, up = (pack(make_experts(3, 35, 160, seed=s), counts) for s in (1, 2))
    x, dispatch = make_x(7, 160), make_dispatch(counts, 7)
    clean = ops.int4_grouped_swiglu(x, dispatch, gate, up)
    x[4, 77] = poison
    y = ops.int4_grouped_swiglu(x, dispatch, gate, up)
    rows = dispatch.token_index == 4
    assert 0 < int(rows.sum()) < len(rows)
    assert bool(y[rows].isnan().all())
    assert_same_bits(y[~rows], clean[~rows])


@pytest.mark.parametrize("dtype", [BF16, FP32])
@pytest.mark.parametrize("out", [1, 15, 17, 35])
@pytest.mark.parametrize("offset", [1, 3])
def test_int4_grouped_swiglu_reads_and_writes_misaligned_memory_and_only_its_rows(
    isa, offset, out, dtype
):
    counts, in_ = [2, 0, 9], 160
    gate, up = (make_experts(3, out, in_, seed=s) for s in (1, 2))
    x, dispatch = make_x(4, in_), make_dispatch(counts, 4)
    memory = [
        [misaligned(p, offset) for p in parts]
        for part in (gate, up)
        for parts in ([w.int4().weight_packed for w in part], [w.scale for w in part])
    ]
    pointers = [torch.tensor([p.data_ptr() for p in parts]) for parts in memory]
    y = OutputAt(11, out, dtype=dtype, offset=offset)
    x_there = misaligned(x, offset)
    call_native(
        "int4_grouped_swiglu",
        x_there.data_ptr(),
        dispatch.token_index.data_ptr(),
        dispatch.expert_offsets.data_ptr(),
        *[p.data_ptr() for p in pointers],
        y.address,
        0,
        DTYPES[dtype],
        *(4, 11, 3, out, in_, GROUP, 0),
    )
    expected = ops.int4_grouped_swiglu(
        x, dispatch, pack(gate, counts), pack(up, counts), out_dtype=dtype
    )
    assert_same_bits(y.values(), expected)


def test_int4_grouped_swiglu_refuses_wrong_inputs():
    gate, up = (
        Int4ExpertWeights([w.int4() for w in make_experts(3, 5, 96, seed=s)]) for s in (1, 2)
    )
    dispatch = make_dispatch([2, 1, 1], 4)
    with pytest.raises(ValueError, match=r"int4_grouped_swiglu: x must be \[\*, 96\]"):
        ops.int4_grouped_swiglu(make_x(4, 64), dispatch, gate, up)
    with pytest.raises(TypeError, match="int4_grouped_swiglu: x must be"):
        ops.int4_grouped_swiglu(make_x(4, 96).half(), dispatch, gate, up)
    other = Int4ExpertWeights([w.int4() for w in make_experts(3, 6, 96)])
    with pytest.raises(ValueError, match="gate and up must have the same experts and shapes"):
        ops.int4_grouped_swiglu(make_x(4, 96), dispatch, gate, other)
    for bad in (4, -1):
        index = dispatch.token_index.clone()
        index[2] = bad
        broken = MoeDispatch(index, dispatch.row_index, dispatch.expert_offsets)
        message = rf"int4_grouped_swiglu: x_index must be in \[0, 4\) \(got {bad} at row 2\)"
        with pytest.raises(ValueError, match=message):
            ops.int4_grouped_swiglu(make_x(4, 96), broken, gate, up)


def test_int4_grouped_swiglu_checks_every_size_again_in_the_kernel():
    buffer = torch.zeros(8192, dtype=torch.uint8)
    p = buffer.data_ptr() + -buffer.data_ptr() % 64
    offsets = torch.tensor([0, 1, 1], dtype=torch.int32)
    index = torch.tensor([1, 1], dtype=torch.int32)
    experts, nulls = torch.tensor([p, 0]), torch.tensor([0, p])
    e, null = experts.data_ptr(), nulls.data_ptr()
    at, ids = offsets.data_ptr(), index.data_ptr()

    def call(x=p, i=ids, o=at, gp=e, gs=e, up=e, us=e, y=p, xd=0, yd=0,
             x_rows=2, rows=1, n=2, out=2, in_=64, group=32, compute=0, space=p, nbytes=8000):  # fmt: skip
        _native.cpu.int4_grouped_swiglu(
            x,
            i,
            o,
            gp,
            gs,
            up,
            us,
            y,
            xd,
            yd,
            x_rows,
            rows,
            n,
            out,
            in_,
            group,
            compute,
            space,
            nbytes,
        )

    call()
    for change, message in [
        ({"compute": -1}, r"compute must be exact \(0\) or int8 \(1\) \(got -1\)"),
        ({"group": 64}, r"group_size must be 32 \(got 64\)"),
        ({"in_": 48}, r"in must be a positive multiple of 32 \(got 48\)"),
        ({"rows": 2}, r"expert_offsets must go from 0 to rows=2 \(got 0 to 1\)"),
        ({"out": 2**60}, "fit in 64 bits"),
        ({"xd": 3}, r"x must be bf16 \(0\) or fp32 \(1\) \(got 3\)"),
        ({"gp": 0}, "weight pointers of an expert with rows must not be null"),
        ({"gs": null}, "weight pointers of an expert with rows must not be null"),
        ({"up": null}, "weight pointers of an expert with rows must not be null"),
        ({"us": 0}, "weight pointers of an expert with rows must not be null"),
        ({"space": p + 32}, "workspace must be 64-byte aligned"),
        ({"nbytes": 64}, r"workspace must have \d+ bytes \(got 64\)"),
    ]:
        with pytest.raises(ValueError, match="int4_grouped_swiglu: .*" + message):
            call(**change)
