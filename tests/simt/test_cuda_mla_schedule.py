"""Schedules of mla_decode, from Python: the ops' results with and without them, and what is refused."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from kimi_native import native, ops
from kimi_native.mla_schedule import MlaSchedule, mla_schedule, splits_of_pages
from oracle_dense import assert_same_bits
from simt import library_path, simt_only
from test_mla_decode import Case

pytestmark = simt_only


@pytest.fixture(autouse=True)
def _on_the_shim():
    with native.cuda_on_host(library_path()):
        yield


def make(seq_lens, **options):
    return Case(seq_lens, latent=512, rope=64, scale=0.05, heads=2, **options)


def attend(case, schedule):
    tensors = (case.q, case.cache, case.page_table, case.seq_lens)
    return ops.mla_decode(*tensors, kv_lora_rank=512, softmax_scale=case.scale, schedule=schedule)


def schedule_of(case, **options):
    max_tokens = case.page_table.shape[1] * case.cache.shape[1]
    return mla_schedule(case.seq_lens, max_tokens=max_tokens, **options)


def room_of(case):
    pages, page_size = case.cache.shape[:2]
    return splits_of_pages(len(case.seq_lens), pages * page_size)


def test_cuda_mla_schedule_changes_no_bit():
    case = make([70, 0, 600, 1025])
    expected = attend(case, None)
    for max_splits in (0, 6, room_of(case)):
        assert_same_bits(attend(case, schedule_of(case, max_splits=max_splits)), expected)


@pytest.mark.parametrize("lengths", [[1] * 9, [513] * 5, [1088], [64, 640, 1, 1088]])
def test_cuda_mla_schedule_has_room_for_sequences_that_share_no_page(lengths):
    """A cache that holds nothing else, page for page."""
    case = make(lengths)
    case.cache = case.cache[sorted({int(p) for p in case.page_table.flatten() if p < 1000})]
    places = {page: i for i, page in enumerate(sorted(set(case.page_table.flatten().tolist())))}
    case.page_table.apply_(lambda page: places[page])
    schedule_of(case, max_splits=room_of(case))


def test_cuda_mla_schedule_of_more_splits_than_room_stops():
    with pytest.raises(RuntimeError, match="mla_schedule: all splits must be at most max_splits"):
        schedule_of(make([513]), max_splits=1)


@pytest.mark.parametrize(
    ("seq_lens", "options", "error", "message"),
    [
        ([[1]], {"max_tokens": 64}, ValueError, r"seq_lens must be \[\*\]"),
        ([1.0], {"max_tokens": 64}, TypeError, r"seq_lens must be torch.int32"),
        ([1], {"max_tokens": -1}, ValueError, "need batch, max_tokens >= 0"),
        (
            [1],
            {"max_tokens": 2**31},
            ValueError,
            r"max_pages \* page_size must be below 2\^31 - 512",
        ),
        ([1], {"max_tokens": 64, "max_splits": -1}, ValueError, "max_splits must be >= 0"),
        ([1], {"max_tokens": 1.5}, TypeError, "max_tokens must be an integer"),
    ],
)
def test_cuda_mla_schedule_refuses(seq_lens, options, error, message):
    seq_lens = torch.tensor(seq_lens)
    seq_lens = seq_lens if seq_lens.is_floating_point() else seq_lens.int()
    with pytest.raises(error, match=f"mla_schedule: {message}"):
        mla_schedule(seq_lens, **options)


def test_cuda_mla_schedule_is_a_gpus_alone():
    with native.cpu_kernels(), pytest.raises(RuntimeError, match=r"must be on a GPU \(got cpu\)"):
        mla_schedule(torch.tensor([1], dtype=torch.int32), max_tokens=64)


def test_cuda_mla_decode_takes_a_schedule_where_there_are_no_pages():
    case = make([0, 0])
    case.page_table = case.page_table[:, :0].contiguous()
    assert not attend(case, schedule_of(case)).any()


def test_cuda_mla_decode_refuses_a_schedule_on_another_device():
    case = make([70])
    made = schedule_of(case)
    other = dataclasses.replace(made, splits=made.splits.to("meta"))
    with pytest.raises(RuntimeError, match=r"schedule must be on the device .* cpu \(got meta\)"):
        attend(case, other)
    with pytest.raises(TypeError, match="mla_decode: schedule must be of type MlaSchedule"):
        attend(case, made.splits)


@pytest.mark.parametrize(("batch", "max_tokens"), [(1, 640), (2, 64)])
def test_cuda_mla_decode_refuses_a_schedule_for_other_sizes(batch, max_tokens):
    case = make([70, 600])
    other = MlaSchedule(torch.zeros(64, dtype=torch.uint8), batch, max_tokens, 0)
    with pytest.raises(ValueError, match=r"mla_decode: schedule must be of 2 sequences of at most"):
        attend(case, other)
