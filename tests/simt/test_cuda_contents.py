"""KIMI_NATIVE_SYNC=1: wrong contents are told with op, rule and value before a kernel starts."""

from __future__ import annotations

import pytest
import torch

from grouped import make_dispatch, make_experts
from kimi_native import native, ops
from kimi_native.mla_schedule import mla_schedule
from kimi_native.quant.tiles import tile_int4
from kimi_native.weights import Int4ExpertWeights, MoeDispatch
from oracle import make_x
from oracle_dense import assert_same_bits, randn
from simt import library_path, simt_only
from test_mla_decode import Case

pytestmark = simt_only
BF16 = torch.bfloat16


@pytest.fixture(autouse=True)
def _synchronous(monkeypatch):
    monkeypatch.setattr(native, "_synchronous", True)
    with native.cuda_on_host(library_path()):
        yield


def dispatch(ids=(0, 2)):
    return ops.moe_dispatch(torch.tensor([ids], dtype=torch.int32), 3)


def combine(row=None):
    d = dispatch()
    if row is not None:
        d.row_index[0, 1] = row
    return ops.moe_combine(randn(2, 8, dtype=BF16), d, torch.ones(1, 2))


def experts(offsets=(0, 2, 3, 4), index=(0, 1, 2, 3), *, swiglu=False):
    weights = Int4ExpertWeights([tile_int4(w.int4(), "cpu") for w in make_experts(3, 16, 32)])
    d = make_dispatch((2, 1, 1), 4)
    tensors = (torch.tensor(t, dtype=torch.int32) for t in (index, offsets))
    d = MoeDispatch(next(tensors), d.row_index, next(tensors))
    x = make_x(4, 32, BF16)
    if swiglu:
        return ops.int4_grouped_swiglu(x, d, weights, weights)
    return ops.int4_grouped_gemm(x, d, weights)


def append(slots=(0, 5)):
    cache = torch.zeros(2, 3, 16, dtype=BF16)
    parts = (randn(2, 1, 8, dtype=BF16), randn(2, 8, dtype=BF16), randn(2, 8, dtype=BF16))
    turns = (torch.ones(2, 4), torch.zeros(2, 4))
    return ops.rope_append(*parts, *turns, torch.tensor(slots), cache, parts[0].clone())


def attend(length=70, page=None):
    case = Case([1, 70], latent=512, rope=64, heads=1)
    case.seq_lens[1] = length
    if page is not None:
        case.page_table[1, 1] = page
    return case.run()


def attend_scheduled(lengths=(1, 70)):
    case = Case([1, 70], latent=512, rope=64, heads=1)
    max_tokens = case.page_table.shape[1] * case.cache.shape[1]
    made = mla_schedule(torch.tensor(lengths, dtype=torch.int32), max_tokens=max_tokens)
    tensors = (case.q, case.cache, case.page_table, case.seq_lens)
    return ops.mla_decode(*tensors, kv_lora_rank=512, softmax_scale=case.scale, schedule=made)


def schedule(lengths=(70, 513), **options):
    return mla_schedule(torch.tensor(lengths, dtype=torch.int32), max_tokens=640, **options).splits


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: dispatch((0, 3)), r"moe_dispatch: topk_ids must be in \[0, 3\) (got 3 at 1)"),
        (lambda: dispatch((-1, 2)), r"moe_dispatch: topk_ids must be in \[0, 3\) (got -1 at 0)"),
        (lambda: combine(2), r"moe_combine: row_index must be in \[0, 2\) (got 2 at 1)"),
        (
            lambda: experts((0, 2, 3, 5)),
            "int4_grouped_gemm: expert_offsets must go from 0 to rows=4 (got 0 to 5)",
        ),
        (
            lambda: experts((0, 3, 2, 4), swiglu=True),
            "int4_grouped_swiglu: expert_offsets must ascend (got 3, 2 for expert 1)",
        ),
        (
            lambda: experts(index=(0, 4, 2, 3), swiglu=True),
            r"int4_grouped_swiglu: x_index must be in \[0, 4\) (got 4 at 1)",
        ),
        (lambda: append((0, 6)), r"rope_append: slots must be in \[0, 6\) (got 6 at 1)"),
        (lambda: append((-3, 0)), r"rope_append: slots must be in \[0, 6\) (got -3 at 0)"),
        (lambda: attend(129), r"mla_decode: seq_lens must be in \[0, 129\) (got 129 at 1)"),
        (
            lambda: attend(page=6),
            r"mla_decode: used page ids of sequence 1 must be in \[0, 6\) (got 6 at 1)",
        ),
        (
            lambda: schedule((70, 641)),
            r"mla_schedule: seq_lens must be in \[0, 641\) (got 641 at 1)",
        ),
        (
            lambda: schedule(max_splits=2),
            "mla_schedule: all splits must be at most max_splits=2 (got 3)",
        ),
        (
            lambda: attend_scheduled((1, 0)),
            "mla_decode: schedule must be of these seq_lens, 1 splits of sequence 1 (got 0)",
        ),
    ],
)
def test_cuda_contents_that_are_wrong_are_told_with_their_value(call, message):
    message = message.replace("(got", r"\(got") + "$"
    with pytest.raises(ValueError, match=message.replace(")$", r"\)$")):
        call()


@pytest.mark.parametrize(
    "call",
    [
        lambda: dispatch().row_index,
        combine,
        experts,
        lambda: experts(swiglu=True),
        append,
        attend,
        lambda: attend(1, page=6),  # of a page that is not used
        attend_scheduled,
        lambda: torch.tensor(schedule().shape),  # between its parts nothing is written
        lambda: torch.tensor(schedule(max_splits=3).shape),
    ],
)
def test_cuda_contents_that_are_right_change_nothing(call, monkeypatch):
    looked_at = call()
    monkeypatch.setattr(native, "_synchronous", False)
    assert_same_bits(looked_at, call())
