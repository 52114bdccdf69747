"""moe_combine on every kernel tier against the float64 reference, with order and rounding shown by hand cases."""

from __future__ import annotations

import math

import pytest
import torch

from kimi_native import _native, ops, reference
from oracle import DTYPES as CODES
from oracle import OutputAt, assert_same_bits, misaligned

DTYPES = [torch.bfloat16, torch.float32]


def make_case(tokens, topk, hidden, rows_dtype, shared_dtype, seed=0):
    """Rows in a shuffled order: (rows, dispatch, topk_weights, shared)."""
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randn(tokens * topk, hidden, generator=generator).to(rows_dtype)
    row_index = torch.randperm(tokens * topk, generator=generator).to(torch.int32)
    weights = torch.rand(tokens, topk, generator=generator)
    shared = torch.randn(tokens, hidden, generator=generator).to(shared_dtype)
    empty = torch.empty(0, dtype=torch.int32)
    return rows, ops.MoeDispatch(empty, row_index.view(tokens, topk), empty), weights, shared


def bound_combine(rows, row_index, weights, shared, out_dtype, expected):
    """|error| of the sum: topk multiply-adds of two roundings each and one addition, 2**-24 of the absolute sum each;
    then one rounding to bf16 (2**-8 of the value at most), with the last bit of a subnormal."""
    magnitude = (weights.double().abs()[..., None] * rows.double().abs()[row_index.long()]).sum(1)
    if shared is not None:
        magnitude = magnitude + shared.double().abs()
    rounding = 2**-8 * expected.abs() if out_dtype == torch.bfloat16 else 0.0
    return (2 * weights.shape[1] + 1) * 2**-24 * magnitude + rounding + 2**-133


def assert_combines_alike(rows, dispatch, weights, shared, out_dtype):
    actual = ops.moe_combine(rows, dispatch, weights, shared, out_dtype=out_dtype)
    expected = reference.moe_combine(
        rows.double(),
        dispatch.row_index,
        weights.double(),
        None if shared is None else shared.double(),
        out_dtype=torch.float64,
    )
    assert actual.dtype == out_dtype
    bound = bound_combine(rows, dispatch.row_index, weights, shared, out_dtype, expected)
    error = (actual.double() - expected).abs()
    assert (error <= bound).all(), f"worst {(error / bound).max():.2f} of the bound"


@pytest.mark.parametrize("hidden", [1, 15, 16, 17, 63, 64, 65, 97, 7168])
@pytest.mark.parametrize("rows_dtype", DTYPES)
@pytest.mark.parametrize("out_dtype", DTYPES)
def test_moe_combine_matches_reference(isa, hidden, rows_dtype, out_dtype):
    assert_combines_alike(*make_case(5, 8, hidden, rows_dtype, out_dtype), out_dtype)


@pytest.mark.parametrize(("tokens", "topk"), [(1, 1), (1, 8), (3, 6), (64, 8), (200, 2)])
def test_moe_combine_without_a_shared_expert(isa, tokens, topk):
    rows, dispatch, weights, _ = make_case(tokens, topk, 160, torch.bfloat16, torch.bfloat16)
    assert_combines_alike(rows, dispatch, weights, None, torch.bfloat16)


def one_token(*rows):
    """Dispatch and rows of one token whose slot j reads row j."""
    index = torch.arange(len(rows), dtype=torch.int32)[None]
    return torch.tensor(rows)[:, None].repeat(1, 20), ops.MoeDispatch(index[0], index, index[0])


def test_moe_combine_adds_in_slot_order_and_shared_last(isa):
    # 2**24 + 1 rounds to 2**24: the one that comes after the cancellation survives, the one before is lost.
    big = 2.0**24
    ones = torch.ones(1, 3)
    rows, dispatch = one_token(big, 1.0, -big)
    assert (ops.moe_combine(rows, dispatch, ones) == 0).all()
    rows, dispatch = one_token(big, -big, 1.0)
    assert (ops.moe_combine(rows, dispatch, ones) == 1).all()
    rows, dispatch = one_token(1.0, big)
    shared = torch.full((1, 20), -big)
    assert (ops.moe_combine(rows, dispatch, ones[:, :2], shared) == 0).all()


@pytest.mark.parametrize("hidden", [64, 77])
def test_moe_combine_rounds_once(isa, hidden):
    rows, dispatch, weights, shared = make_case(6, 8, hidden, torch.bfloat16, torch.bfloat16)
    wide = ops.moe_combine(rows, dispatch, weights, shared.float(), out_dtype=torch.float32)
    narrow = ops.moe_combine(rows, dispatch, weights, shared, out_dtype=torch.bfloat16)
    assert torch.equal(narrow, wide.bfloat16())


def test_moe_combine_nan_stays_in_its_token(isa):
    rows, dispatch, weights, shared = make_case(7, 4, 80, torch.bfloat16, torch.bfloat16)
    clean = ops.moe_combine(rows, dispatch, weights, shared)
    weights[2] = math.nan
    rows[dispatch.row_index[5, 3].item()] = math.nan
    spoiled = ops.moe_combine(rows, dispatch, weights, shared)
    assert spoiled[[2, 5]].isnan().all()
    others = [0, 1, 3, 4, 6]
    assert torch.equal(spoiled[others], clean[others])


def test_moe_combine_row_depends_on_itself_only(isa):
    rows, dispatch, weights, shared = make_case(70, 8, 208, torch.bfloat16, torch.bfloat16)
    before = ops.num_threads()
    try:
        results = []
        for threads in (1, 2, 5):
            ops.set_num_threads(threads)
            results.append(ops.moe_combine(rows, dispatch, weights, shared))
    finally:
        ops.set_num_threads(before)
    for t in range(70):
        index = torch.arange(8, dtype=torch.int32)[None]
        alone = ops.moe_combine(
            rows[dispatch.row_index[t].long()],
            ops.MoeDispatch(index[0], index, index[0]),
            weights[t : t + 1],
            shared[t : t + 1],
        )
        assert torch.equal(alone[0], results[0][t])
    assert all(torch.equal(r, results[0]) for r in results)


def test_moe_combine_undoes_dispatch(isa):
    """Rows that are copies of their token, and weights that sum to one, give the tokens back."""
    generator = torch.Generator().manual_seed(0)
    topk_ids = torch.rand(30, 16, generator=generator).argsort(-1)[:, :4].to(torch.int32)
    dispatch = ops.moe_dispatch(topk_ids.contiguous(), 16)
    x = torch.randn(30, 48, generator=generator)
    rows = x[dispatch.token_index.long()]
    assert torch.equal(ops.moe_combine(rows, dispatch, torch.full((30, 4), 0.25)), x)


def test_moe_combine_default_dtype_is_that_of_shared_else_of_rows():
    rows, dispatch, weights, shared = make_case(2, 2, 8, torch.bfloat16, torch.float32)
    assert ops.moe_combine(rows, dispatch, weights, shared).dtype == torch.float32
    assert ops.moe_combine(rows, dispatch, weights).dtype == torch.bfloat16


def test_moe_combine_no_tokens(isa):
    rows, dispatch, weights, shared = make_case(0, 8, 64, torch.bfloat16, torch.bfloat16)
    assert ops.moe_combine(rows, dispatch, weights, shared).shape == (0, 64)


def native_combine(rows, row_index, weights, out, tokens, topk, hidden, rows_dtype=1, out_dtype=1):
    _native.cpu.moe_combine(
        rows.data_ptr(),
        row_index.data_ptr(),
        weights.data_ptr(),
        0,
        out.data_ptr(),
        rows_dtype,
        out_dtype,
        tokens,
        topk,
        hidden,
    )


@pytest.mark.parametrize("hidden", [1, 17, 64, 79])
def test_moe_combine_reads_and_writes_its_own_rows_only(isa, hidden):
    rows, dispatch, weights, _ = make_case(3, 2, hidden, torch.float32, torch.float32)
    poisoned = torch.full((8, hidden), math.nan)
    poisoned[1:7] = rows
    out = torch.full((5, hidden), math.nan)
    native_combine(poisoned[1:], dispatch.row_index, weights, out[1:], 3, 2, hidden)
    assert out[[0, 4]].isnan().all()
    assert torch.equal(out[1:4], ops.moe_combine(rows, dispatch, weights))
    assert out[1:4].isfinite().all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("offset", [1, 2, 3])
def test_moe_combine_reads_and_writes_misaligned_memory(isa, offset, dtype):
    rows, dispatch, weights, shared = make_case(3, 4, 77, dtype, dtype)
    out = OutputAt(3, 77, dtype=dtype, offset=offset)
    rows_there, shared_there = misaligned(rows, offset), misaligned(shared, offset)
    _native.cpu.moe_combine(
        rows_there.data_ptr(),
        dispatch.row_index.data_ptr(),
        weights.data_ptr(),
        shared_there.data_ptr(),
        out.address,
        CODES[dtype],
        CODES[dtype],
        *(3, 4, 77),
    )
    assert_same_bits(out.values(), ops.moe_combine(rows, dispatch, weights, shared))


@pytest.mark.parametrize("bad", [-1, 6, 2**31 - 1])
def test_moe_combine_refuses_a_row_index_before_writing(bad):
    rows, dispatch, weights, _ = make_case(3, 2, 8, torch.float32, torch.float32)
    dispatch.row_index[2, 1] = bad
    out = torch.full((3, 8), math.nan)
    with pytest.raises(ValueError, match=r"row_index must be in \[0, 6\)") as error:
        native_combine(rows, dispatch.row_index, weights, out, 3, 2, 8)
    assert f"(got {bad} for token 2, slot 1)" in str(error.value)
    assert out.isnan().all()


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ((-1, 1, 8), "need tokens >= 0"),
        ((1, 0, 8), "topk >= 1"),
        ((1, 1, 0), "hidden >= 1"),
        ((2**30, 2, 8), "tokens \\* topk must fit in 32 bits"),
        ((2**62, 4, 8), "fit in 64 bits"),
        ((1, 4, 2**60), "fit in 64 bits"),
        ((1, 1, 8, 2, 1), "dtype must be 0 or 1"),
        ((1, 1, 8, 1, -1), "dtype must be 0 or 1"),
    ],
)
def test_moe_combine_refuses_bad_sizes(sizes, message):
    nothing = torch.zeros(8, dtype=torch.int32)
    with pytest.raises(ValueError, match=message):
        native_combine(nothing, nothing, nothing, nothing, *sizes)


def test_moe_combine_refuses_bad_tensors():
    rows, dispatch, weights, shared = make_case(3, 2, 8, torch.float32, torch.float32)
    with pytest.raises(TypeError, match="rows must be"):
        ops.moe_combine(rows.double(), dispatch, weights, shared)
    with pytest.raises(TypeError, match="topk_weights must be"):
        ops.moe_combine(rows, dispatch, weights.double(), shared)
    with pytest.raises(TypeError, match="shared must be"):
        ops.moe_combine(rows, dispatch, weights, shared, out_dtype=torch.bfloat16)
    with pytest.raises(ValueError, match="rows must be"):
        ops.moe_combine(rows[:5], dispatch, weights, shared)
    with pytest.raises(ValueError, match="row_index must be"):
        ops.moe_combine(rows, ops.MoeDispatch(*[dispatch.row_index[:2]] * 3), weights, shared)
