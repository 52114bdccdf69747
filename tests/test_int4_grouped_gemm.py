"""int4_grouped_gemm: every row is int4_gemm of that row with its expert's matrix, and nobody else is touched."""

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
    OutputAt,
    assert_same_bits,
    assert_within,
    bound_limb_gemm,
    call_native,
    make_x,
    misaligned,
    threads,
)

BF16, FP32 = torch.bfloat16, torch.float32


@functools.cache  # the same for every tier
def case(counts: tuple[int, ...], out: int, in_: int, x_dtype: torch.dtype, out_dtype: torch.dtype):
    experts = make_experts(len(counts), out, in_)
    x, dispatch = make_x(sum(counts), in_, x_dtype), in_order(make_dispatch(counts, 1))
    expected = reference.int4_grouped_gemm(
        x.double(),
        dispatch.expert_offsets,
        [(w.int4().weight_packed, w.scale.double()) for w in experts],
        out_dtype=torch.float64,
    )
    bound = torch.cat(
        [
            bound_limb_gemm(rows, w.dequantized(), y, out_dtype)
            for rows, y, w in zip(x.split(counts), expected.split(counts), experts, strict=True)
        ]
    )
    return x, dispatch, pack(experts, counts), expected, bound


@pytest.mark.parametrize("counts", COUNTS)
@pytest.mark.parametrize(("out", "in_"), [(5, 32), (35, 160), (64, 512)])
@pytest.mark.parametrize("dtypes", [(BF16, BF16), (FP32, FP32)])
def test_int4_grouped_gemm_matches_reference(isa, counts, out, in_, dtypes):
    x, dispatch, experts, expected, bound = case(counts, out, in_, *dtypes)
    actual = ops.int4_grouped_gemm(x, dispatch, experts, out_dtype=dtypes[1])
    assert actual.dtype == dtypes[1]
    assert_within(actual, expected, bound)


@functools.cache
def model_case():
    w, x = make_experts(1, 7168, 2048)[0], make_x(3, 2048)
    expected = x.double() @ w.dequantized().T
    counts = [0, 2, 0, 1]
    bound = bound_limb_gemm(x, w.dequantized(), expected, BF16)
    return x, in_order(make_dispatch(counts, 1)), pack([w] * 4, counts), expected, bound


def test_int4_grouped_gemm_matches_reference_at_a_model_shape(isa):
    """K2's down projection, three rows over two of four experts that share a matrix."""
    x, dispatch, experts, expected, bound = model_case()
    assert_within(ops.int4_grouped_gemm(x, dispatch, experts), expected, bound)


@pytest.mark.parametrize("counts", [[3, 0, 1, 17, 8], [64, 1, 2, 30], [40, 30, 1, 25], [70, 260]])
@pytest.mark.parametrize("dtype", [BF16, FP32])
def test_int4_grouped_gemm_rows_have_the_bits_of_int4_gemm_on_that_row_alone(isa, counts, dtype):
    experts = make_experts(len(counts), 37, 544)
    dispatch = in_order(make_dispatch(counts, 1))
    x = make_x(sum(counts), 544, dtype)
    grouped = ops.int4_grouped_gemm(x, dispatch, pack(experts, counts), out_dtype=FP32)
    packed = [w.int4() for w in experts]
    for row, e in list(enumerate(expert_of_row(counts)))[:: max(1, sum(counts) // 40)]:
        alone = ops.int4_gemm(x[row : row + 1], packed[e], out_dtype=FP32)
        assert_same_bits(grouped[row : row + 1], alone)


def test_int4_grouped_gemm_has_the_same_bits_on_any_number_of_threads(isa):
    counts = [3, 0, 70, 1]
    experts = pack(make_experts(4, 200, 160), counts)
    dispatch, x = in_order(make_dispatch(counts, 1)), make_x(74, 160)
    with threads(1):
        one = ops.int4_grouped_gemm(x, dispatch, experts)
    for n in (2, 3):
        with threads(n):
            assert_same_bits(ops.int4_grouped_gemm(x, dispatch, experts), one)


@pytest.mark.parametrize("poison", [math.nan, math.inf])
def test_int4_grouped_gemm_spoils_exactly_the_rows_with_a_non_finite_input(isa, poison):
    counts = [3, 0, 20]
    experts = pack(make_experts(3, 35, 160), counts)
    dispatch, x = in_order(make_dispatch(counts, 1)), make_x(23, 160)
    clean = ops.int4_grouped_gemm(x, dispatch, experts)
    for row in (1, 3, 22):
        spoiled = x.clone()
        spoiled[row, 77] = poison
        y = ops.int4_grouped_gemm(spoiled, dispatch, experts)
        assert bool(y[row].isnan().all())
        keep = [r for r in range(23) if r != row]
        assert_same_bits(y[keep], clean[keep])


@pytest.mark.parametrize("use_index", [False, True])
@pytest.mark.parametrize("offset", [1, 2, 3])
def test_int4_grouped_gemm_reads_and_writes_misaligned_memory_and_only_its_rows(
    isa, offset, use_index
):
    counts, out, in_ = [2, 0, 9], 35, 160
    experts = make_experts(3, out, in_)
    x = make_x(11, in_)
    dispatch = in_order(make_dispatch(counts, 1))
    packed = [misaligned(w.int4().weight_packed, offset) for w in experts]
    scales = [misaligned(w.scale, offset) for w in experts]
    pointers = [torch.tensor([p.data_ptr() for p in parts]) for parts in (packed, scales)]
    y = OutputAt(11, out, dtype=FP32, offset=offset)
    x_there = misaligned(x, offset)
    call_native(
        "int4_grouped_gemm",
        x_there.data_ptr(),
        dispatch.token_index.data_ptr() if use_index else 0,
        dispatch.expert_offsets.data_ptr(),
        *[p.data_ptr() for p in pointers],
        y.address,
        0,
        DTYPES[FP32],
        *(11, 11, 3, out, in_, GROUP, 0),
    )
    expected = ops.int4_grouped_gemm(x, dispatch, pack(experts, counts), out_dtype=FP32)
    assert_same_bits(y.values(), expected)


def test_int4_grouped_gemm_refuses_wrong_inputs():
    experts = Int4ExpertWeights([w.int4() for w in make_experts(3, 5, 96)])
    dispatch = in_order(make_dispatch([2, 1, 1], 1))
    with pytest.raises(ValueError, match=r"int4_grouped_gemm: x must be \[\*, 96\]"):
        ops.int4_grouped_gemm(make_x(4, 64), dispatch, experts)
    with pytest.raises(ValueError, match=r"int4_grouped_gemm: x must have 4 rows \(got 5\)"):
        ops.int4_grouped_gemm(make_x(5, 96), dispatch, experts)
    with pytest.raises(TypeError, match="int4_grouped_gemm: x must be"):
        ops.int4_grouped_gemm(make_x(4, 96).half(), dispatch, experts)
    with pytest.raises(ValueError, match="int4_grouped_gemm: expert_offsets must be"):
        ops.int4_grouped_gemm(make_x(4, 96), in_order(make_dispatch([2, 2], 1)), experts)


@pytest.mark.parametrize(
    ("offsets", "message"),
    [
        ([1, 2, 3, 4], r"expert_offsets must go from 0 to rows=4 \(got 1 to 4\)"),
        ([0, 2, 3, 5], r"expert_offsets must go from 0 to rows=4 \(got 0 to 5\)"),
        ([0, 3, 2, 4], r"expert_offsets must ascend \(got 3, 2 for expert 1\)"),
        ([0, 900, 4, 4], r"expert_offsets must ascend \(got 900, 4 for expert 1\)"),
        ([0, -1, 4, 4], r"expert_offsets must ascend \(got 0, -1 for expert 0\)"),
    ],
)
def test_int4_grouped_gemm_refuses_wrong_offsets(isa, offsets, message):
    experts = Int4ExpertWeights([w.int4() for w in make_experts(3, 5, 96)])
    dispatch = MoeDispatch(
        torch.arange(4, dtype=torch.int32),
        torch.zeros(0, 0, dtype=torch.int32),
        torch.tensor(offsets, dtype=torch.int32),
    )
    with pytest.raises(ValueError, match="int4_grouped_gemm: " + message):
        ops.int4_grouped_gemm(make_x(4, 96), dispatch, experts)


def test_int4_grouped_gemm_checks_every_size_again_in_the_kernel():
    buffer = torch.zeros(8192, dtype=torch.uint8)
    p = buffer.data_ptr() + -buffer.data_ptr() % 64
    offsets = torch.tensor([0, 1, 1], dtype=torch.int32)
    index = torch.tensor([1], dtype=torch.int32)
    experts = torch.tensor([p, 0])
    nulls = torch.tensor([0, p])
    e, null = experts.data_ptr(), nulls.data_ptr()
    at, ids = offsets.data_ptr(), index.data_ptr()

    def call(x=p, i=ids, o=at, w=e, s=e, y=p, xd=0, yd=0, x_rows=2,
             rows=1, n=2, out=2, in_=64, group=32, compute=0, space=p, nbytes=8000):  # fmt: skip
        _native.cpu.int4_grouped_gemm(
            x, i, o, w, s, y, xd, yd, x_rows, rows, n, out, in_, group, compute, space, nbytes
        )

    call()
    for change, message in [
        ({"compute": -1}, r"compute must be exact \(0\) or int8 \(1\) \(got -1\)"),
        ({"group": 128}, r"group_size must be 32 \(got 128\)"),
        ({"in_": 48}, r"in must be a positive multiple of 32 \(got 48\)"),
        ({"rows": -1}, "sizes must be non-negative"),
        ({"n": -1}, "sizes must be non-negative"),
        ({"out": 2**60}, "fit in 64 bits"),
        ({"x_rows": 2**60}, "fit in 64 bits"),
        ({"yd": 5}, r"y must be bf16 \(0\) or fp32 \(1\) \(got 5\)"),
        ({"x_rows": 1}, r"x_index must be in \[0, 1\) \(got 1 at row 0\)"),
        ({"i": 0}, r"without x_index, x must have rows=1 rows \(got 2\)"),
        ({"o": 0}, "expert_offsets must not be null"),
        ({"x": 0}, "x and y must not be null"),
        ({"y": 0}, "x and y must not be null"),
        ({"w": 0}, "weight pointers of an expert with rows must not be null"),
        ({"s": null}, r"weight pointers .* \(got null for expert 0\)"),
        ({"space": p + 32}, "workspace must be 64-byte aligned"),
        ({"nbytes": 64}, r"workspace must have \d+ bytes \(got 64\)"),
    ]:
        with pytest.raises(ValueError, match="int4_grouped_gemm: .*" + message):
            call(**change)
    index[0] = -1
    with pytest.raises(ValueError, match=r"x_index must be in \[0, 2\) \(got -1 at row 0\)"):
        call()
