"""int4_grouped_gemm and int4_grouped_swiglu of the GPU against float64, with the CPU tests' cases and bounds."""

from __future__ import annotations

import functools
import math

import pytest
import torch

from grouped import COUNTS, expert_of_row, in_order, make_dispatch, make_experts
from kimi_native import reference
from oracle import assert_same_bits, assert_within, bound_limb_gemm, make_x
from simt import SCHEDULES, Fault, simt_only, stats
from simt_ops import run_op
from test_cuda_int4_gemm import int4_gemm, int4_pack
from test_int4_grouped_swiglu import bound_swiglu

BF16, FP32 = torch.bfloat16, torch.float32
POISON = 0xDEAD0  # an address that must never be followed
schedules = pytest.mark.parametrize("schedule", SCHEDULES, ids=str)
counts_of_experts = pytest.mark.parametrize("counts", COUNTS, ids=str)


def pointers(packed, counts):
    """Tiles and scales by expert; those of experts without rows are poison or null."""
    pairs = [
        p if n else (POISON * (e % 2),) * 2
        for e, (p, n) in enumerate(zip(packed, counts, strict=True))
    ]
    return [tiles for tiles, _ in pairs], [scales for _, scales in pairs]


def run_grouped(name, x, dispatch, weights, out, *, y_dtype, indexed=True, **options):
    y = torch.full((dispatch.token_index.shape[0], out), math.nan, dtype=y_dtype)
    run_op(
        name,
        x=x,
        x_index=dispatch.token_index if indexed else None,
        expert_offsets=dispatch.expert_offsets,
        y=y,
        x_dtype=x.dtype,
        y_dtype=y_dtype,
        x_rows=x.shape[0],
        rows=y.shape[0],
        experts=dispatch.expert_offsets.shape[0] - 1,
        out=out,
        group_size=32,
        **{"in": x.shape[1]},
        **weights,
        **options,
    )
    return y


@functools.cache  # the same in every schedule
def down_case(counts, out, in_, dtype):
    experts = make_experts(len(counts), out, in_)
    x, dispatch = make_x(11, in_, dtype), make_dispatch(counts, 11)
    rows = x[dispatch.token_index.long()]
    expected = reference.int4_grouped_gemm(
        rows.double(),
        dispatch.expert_offsets,
        [(w.int4().weight_packed, w.scale.double()) for w in experts],
        out_dtype=torch.float64,
    )
    parts = zip(rows.split(counts), expected.split(counts), experts, strict=True)
    bound = torch.cat([bound_limb_gemm(r, w.dequantized(), y, dtype) for r, y, w in parts])
    return x, dispatch, [int4_pack(w) for w in experts], expected, bound


@schedules
@counts_of_experts
@pytest.mark.parametrize("dtype", [BF16, FP32], ids=["bf16", "fp32"])
@pytest.mark.parametrize(("out", "in_"), [(5, 32), (35, 160)])
def test_cuda_int4_grouped_gemm_matches_float64(out, in_, dtype, counts, schedule):
    x, dispatch, packed, expected, bound = down_case(counts, out, in_, dtype)
    tiles, scales = pointers(packed, counts)
    weights = {"weight_packed": tiles, "weight_scale": scales}
    y = run_grouped(
        "int4_grouped_gemm", x, dispatch, weights, out, y_dtype=dtype, schedule=schedule
    )
    assert_within(y, expected, bound)


# Eleven segments of which a block of 1300 rows, on a device as small as the shim's, gets every fifth.
MANY_SEGMENTS = (3, 0, 17, 1, 16, 20, 0, 5, 32, 2)


@schedules
def test_cuda_int4_grouped_gemm_goes_from_segment_to_segment(schedule):
    x, dispatch, packed, expected, bound = down_case(MANY_SEGMENTS, 1300, 96, BF16)
    tiles, scales = pointers(packed, MANY_SEGMENTS)
    weights = {"weight_packed": tiles, "weight_scale": scales}
    y = run_grouped(
        "int4_grouped_gemm", x, dispatch, weights, 1300, y_dtype=BF16, schedule=schedule
    )
    assert_within(y, expected, bound)


# Experts with segments alone, a tile alone, and a tile with segments behind it.
MIXED = (3, 0, 1, 17, 40, 150, 0)


def test_cuda_int4_grouped_gemm_has_the_bits_of_int4_gemm():
    out, in_ = 150, 544
    experts, x = make_experts(len(MIXED), out, in_), make_x(sum(MIXED), in_)
    packed = [int4_pack(w) for w in experts]
    tiles, scales = pointers(packed, MIXED)
    dispatch = in_order(make_dispatch(MIXED, 1))
    weights = {"weight_packed": tiles, "weight_scale": scales}
    y = run_grouped("int4_grouped_gemm", x, dispatch, weights, out, y_dtype=FP32, indexed=False)
    expert = expert_of_row(MIXED)
    for row in (*range(25), 35, 60, 61, 100, 188, 189, 204, 210):
        alone = int4_gemm(x[row : row + 1].contiguous(), packed[expert[row]], out, y_dtype=FP32)
        assert_same_bits(y[row : row + 1], alone)


def test_cuda_int4_grouped_swiglu_row_has_the_same_bits_in_every_kernel():
    out, in_ = 70, 544
    parts = [make_experts(len(MIXED), out, in_, seed=s) for s in (1, 2)]
    gate, up = [[int4_pack(w) for w in part] for part in parts]
    x, expert = make_x(11, in_), expert_of_row(MIXED)

    def run(dispatch, counts):
        weights = {}
        for name, packed in (("gate", gate), ("up", up)):
            weights[f"{name}_packed"], weights[f"{name}_scale"] = pointers(packed, counts)
        return run_grouped("int4_grouped_swiglu", x, dispatch, weights, out, y_dtype=FP32)

    dispatch = make_dispatch(MIXED, 11)
    y = run(dispatch, MIXED)
    for row in (0, 3, 4, 20, 21, 60, 61, 100, 188, 189, 204, 210):
        counts = [int(e == expert[row]) for e in range(len(MIXED))]
        alone = make_dispatch(counts, 11)
        alone.token_index[:] = dispatch.token_index[row]
        assert_same_bits(y[row : row + 1], run(alone, counts))


@functools.cache
def swiglu_case(counts, out, in_, dtype):
    gate, up = (make_experts(len(counts), out, in_, seed=s) for s in (1, 2))
    x, dispatch = make_x(11, in_, dtype), make_dispatch(counts, 11)
    expected = reference.int4_grouped_swiglu(
        x.double(),
        dispatch.token_index,
        dispatch.expert_offsets,
        *[[(w.int4().weight_packed, w.scale.double()) for w in part] for part in (gate, up)],
        out_dtype=torch.float64,
    )
    rows = x[dispatch.token_index.long()]
    bound = torch.cat(
        [
            bound_swiglu(r, g.dequantized(), u.dequantized(), dtype)
            for r, g, u in zip(rows.split(counts), gate, up, strict=True)
        ]
    )
    packed = [[int4_pack(w) for w in part] for part in (gate, up)]
    return x, dispatch, packed, expected, bound


@schedules
@counts_of_experts
@pytest.mark.parametrize("dtype", [BF16, FP32], ids=["bf16", "fp32"])
@pytest.mark.parametrize(("out", "in_"), [(5, 32), (35, 160)])
def test_cuda_int4_grouped_swiglu_matches_float64(out, in_, dtype, counts, schedule):
    x, dispatch, (gate, up), expected, bound = swiglu_case(counts, out, in_, dtype)
    weights = {}
    for part, packed in (("gate", gate), ("up", up)):
        weights[f"{part}_packed"], weights[f"{part}_scale"] = pointers(packed, counts)
    y = run_grouped(
        "int4_grouped_swiglu", x, dispatch, weights, out, y_dtype=dtype, schedule=schedule
    )
    assert_within(y, expected, bound)


@simt_only
@pytest.mark.parametrize(
    ("offsets", "index", "message"),
    [
        ([0, 2, 1, 4], None, "expert_offsets must ascend"),
        ([1, 2, 3, 4], None, "expert_offsets must go from 0 to rows"),
        ([0, 2, 3, 5], None, "expert_offsets must go from 0 to rows"),
        ([0, 2, 3, 4], -1, r"x_index must be in \[0, x_rows\)"),
        ([0, 2, 3, 4], 11, r"x_index must be in \[0, x_rows\)"),
    ],
)
def test_cuda_int4_grouped_gemm_stops_at_a_bad_index(offsets, index, message):
    x, dispatch, packed, _, _ = down_case((2, 1, 1), 5, 32, BF16)
    dispatch = make_dispatch((2, 1, 1), 11)
    dispatch.expert_offsets[:] = torch.tensor(offsets)
    if index is not None:
        dispatch.token_index[2] = index
    tiles, scales = pointers(packed, (2, 1, 1))
    weights = {"weight_packed": tiles, "weight_scale": scales}
    with pytest.raises(Fault, match=message):
        run_grouped("int4_grouped_gemm", x, dispatch, weights, 5, y_dtype=BF16)


@simt_only
@pytest.mark.parametrize("index", [-1, 11])
def test_cuda_int4_grouped_gemm_stops_at_a_bad_index_in_a_tile(index):
    x, dispatch, packed, _, _ = down_case((2, 40), 5, 32, BF16)
    dispatch = make_dispatch((2, 40), 11)
    dispatch.token_index[30] = index
    tiles, scales = pointers(packed, (2, 40))
    weights = {"weight_packed": tiles, "weight_scale": scales}
    with pytest.raises(Fault, match=r"x_index must be in \[0, x_rows\)"):
        run_grouped("int4_grouped_gemm", x, dispatch, weights, 5, y_dtype=BF16)


@simt_only
def test_cuda_int4_grouped_swiglu_of_many_tokens_has_no_bank_conflicts():
    x, dispatch, (gate, up), _, _ = swiglu_case((128,), 64, 544, BF16)
    weights = {}
    for part, packed in (("gate", gate), ("up", up)):
        weights[f"{part}_packed"], weights[f"{part}_scale"] = pointers(packed, (128,))
    run_grouped("int4_grouped_swiglu", x, dispatch, weights, 64, y_dtype=BF16)
    counts = stats()
    assert counts["wavefronts"] == counts["ideal_wavefronts"]


@simt_only
@pytest.mark.parametrize("rows", [1, 40])
def test_cuda_int4_grouped_gemm_stops_at_a_null_pointer_of_an_expert_with_rows(rows):
    x, dispatch, packed, _, _ = down_case((2, rows, 1), 5, 32, BF16)
    tiles, scales = pointers(packed, (2, 0, 1))
    weights = {"weight_packed": tiles, "weight_scale": [*scales[:1], 0, *scales[2:]]}
    weights["weight_packed"][1] = 0
    with pytest.raises(Fault, match="weight pointers of an expert with rows must not be null"):
        run_grouped("int4_grouped_gemm", x, dispatch, weights, 5, y_dtype=BF16)


@pytest.mark.parametrize("op", ["int4_grouped_gemm", "int4_grouped_swiglu"])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"group_size": 64}, "group_size must be 32"),
        ({"compute": 1}, r"compute must be exact \(0\) on a GPU \(got 1\)"),
        ({"in": 48}, "in must be a positive multiple of 32"),
        ({"experts": 0}, r"experts and x_rows must be at least 1 for rows=2 \(got 0 and 2\)"),
        ({"x_rows": 0}, r"experts and x_rows must be at least 1 for rows=2 \(got 1 and 0\)"),
        ({"x_index": 0, "x_rows": 3}, r"without x_index, x must have rows=2 rows \(got 3\)"),
        ({"x": 0}, "x and y must not be null"),
        ({"expert_offsets": 0}, "expert_offsets must not be null"),
        ({"workspace_bytes": 10}, "workspace must have"),
    ],
)
def test_cuda_int4_grouped_ops_refuse_what_does_not_fit(op, change, message):
    sizes = {"x_rows": 2, "rows": 2, "experts": 1, "out": 4, "in": 64, "group_size": 32}
    addresses = dict.fromkeys(("x", "x_index", "expert_offsets", "y", "workspace"), 64)
    with pytest.raises(ValueError, match=message):
        run_op(op, **(sizes | addresses | {"workspace_bytes": 1 << 20} | change))
