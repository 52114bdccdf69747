"""moe_dispatch against a stable argsort and the reference's walk over the experts."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kimi_native import _native, ops, reference


def make_ids(tokens, topk, experts, seed=0):
    """Distinct experts per token, as a router gives them."""
    generator = torch.Generator().manual_seed(seed)
    return (
        torch.rand(tokens, experts, generator=generator)
        .argsort(-1)[:, :topk]
        .to(torch.int32)
        .contiguous()
    )


def assert_sorted_by_expert(topk_ids, experts):
    """Compares with torch's stable sort, which shares no code with either implementation."""
    d = ops.moe_dispatch(topk_ids, experts)
    tokens, topk = topk_ids.shape
    order = topk_ids.flatten().long().argsort(stable=True)  # row -> (token, slot) pair
    counts = torch.bincount(topk_ids.flatten().long(), minlength=experts)
    assert torch.equal(d.token_index.long(), order // topk)
    assert torch.equal(d.row_index.flatten().long()[order], torch.arange(tokens * topk))
    assert d.expert_offsets.tolist() == [0, *counts.cumsum(0).tolist()]
    assert {t.dtype for t in (d.token_index, d.row_index, d.expert_offsets)} == {torch.int32}


@pytest.mark.parametrize("tokens", [1, 2, 3, 17, 256])
@pytest.mark.parametrize(("topk", "experts"), [(8, 384), (6, 64), (1, 1), (5, 5), (1, 1000)])
def test_moe_dispatch_is_a_stable_sort(tokens, topk, experts):
    assert_sorted_by_expert(make_ids(tokens, topk, experts), experts)


@settings(max_examples=100, deadline=None)
@given(
    st.integers(1, 6).flatmap(
        lambda topk: st.lists(
            st.lists(st.integers(0, 8), min_size=topk, max_size=topk), min_size=1, max_size=12
        )
    )
)
def test_moe_dispatch_matches_reference(rows):
    ids = torch.tensor(rows, dtype=torch.int32)  # a token may even name an expert twice
    d = ops.moe_dispatch(ids, 9)
    for actual, expected in zip(
        (d.token_index, d.row_index, d.expert_offsets), reference.moe_dispatch(ids, 9), strict=True
    ):
        assert torch.equal(actual, expected)


def test_moe_dispatch_hand_case():
    d = ops.moe_dispatch(torch.tensor([[2, 0], [0, 3], [2, 3]], dtype=torch.int32), 5)
    assert d.expert_offsets.tolist() == [0, 2, 2, 4, 6, 6]
    assert d.token_index.tolist() == [0, 1, 0, 2, 1, 2]
    assert d.row_index.tolist() == [[2, 0], [1, 4], [3, 5]]


@pytest.mark.parametrize("expert", [0, 7, 15])
def test_moe_dispatch_every_token_on_one_expert(expert):
    assert_sorted_by_expert(torch.full((33, 1), expert, dtype=torch.int32), 16)


def test_moe_dispatch_no_tokens():
    d = ops.moe_dispatch(torch.empty(0, 8, dtype=torch.int32), 384)
    assert d.token_index.shape == (0,)
    assert d.row_index.shape == (0, 8)
    assert d.expert_offsets.tolist() == [0] * 385


def native_dispatch(ids, token_index, row_index, offsets, tokens, topk, experts):
    _native.cpu.moe_dispatch(
        ids.data_ptr(),
        token_index.data_ptr(),
        row_index.data_ptr(),
        offsets.data_ptr(),
        tokens,
        topk,
        experts,
    )


def guarded(n):
    """A buffer of n entries between two guard entries, and a view of the n."""
    whole = torch.full((n + 2,), -7, dtype=torch.int32)
    return whole, whole[1 : n + 1]


def test_moe_dispatch_writes_its_own_rows_only():
    ids = make_ids(9, 3, 10)
    buffers = [guarded(27), guarded(27), guarded(11)]
    native_dispatch(ids, *(view for _, view in buffers), 9, 3, 10)
    for whole, view in buffers:
        assert whole[0] == -7
        assert whole[-1] == -7
        assert (view >= 0).all()


@pytest.mark.parametrize("bad", [-1, 10, 2**31 - 1, -(2**31)])
@pytest.mark.parametrize("place", [0, 13, 26])
def test_moe_dispatch_refuses_an_id_before_writing(bad, place):
    ids = make_ids(9, 3, 10)
    ids.view(-1)[place] = bad
    buffers = [guarded(27), guarded(27), guarded(11)]
    with pytest.raises(ValueError, match=r"topk_ids must be in \[0, 10\)") as error:
        native_dispatch(ids, *(view for _, view in buffers), 9, 3, 10)
    assert f"(got {bad} for token {place // 3}, slot {place % 3})" in str(error.value)
    assert all((whole == -7).all() for whole, _ in buffers)


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ((2**31, 1, 8), "tokens \\* topk must be at most"),
        ((2**30, 2, 8), "tokens \\* topk must be at most"),
        ((2**62, 4, 8), "fit in 64 bits"),
        ((-1, 1, 8), "need tokens >= 0"),
        ((1, 0, 8), "topk >= 1"),
        ((1, 1, 0), "experts must be 1 to"),
        ((1, 1, 2**31), "experts must be 1 to"),
    ],
)
def test_moe_dispatch_refuses_bad_sizes(sizes, message):
    nothing = torch.zeros(1, dtype=torch.int32)
    with pytest.raises(ValueError, match=message):
        native_dispatch(nothing, nothing, nothing, nothing, *sizes)


def test_moe_dispatch_refuses_bad_tensors():
    with pytest.raises(TypeError, match=r"topk_ids must be torch\.int32"):
        ops.moe_dispatch(torch.zeros(2, 2, dtype=torch.int64), 4)
    with pytest.raises(ValueError, match="topk_ids must be"):
        ops.moe_dispatch(torch.zeros(4, dtype=torch.int32), 4)
    with pytest.raises(ValueError, match="experts must be at least 1"):
        ops.moe_dispatch(torch.zeros(2, 2, dtype=torch.int32), 0)
