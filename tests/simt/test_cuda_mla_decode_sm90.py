"""mla_decode's kernel for Hopper against float64, as the other one is; fp8 rows also against bf16 rows, bit by bit."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from kimi_native import fp8_rows
from oracle_dense import assert_close, assert_same_bits, randn
from simt import SCHEDULES, Fault, Schedule, simt_only
from test_cuda_fp8_rows import Case as Fp8Case
from test_cuda_mla_decode import LATENT, expect, make
from test_cuda_mla_decode import mla_decode as mla_decode_on

BF16, FP32 = torch.bfloat16, torch.float32
HOPPER = Schedule(hopper=True)
schedules = pytest.mark.parametrize(
    "schedule", [replace(s, hopper=True) for s in SCHEDULES], ids=str
)


def mla_decode(case, schedule=HOPPER):
    return mla_decode_on(case, schedule=schedule)


def check_fp8(case, schedule=HOPPER):
    """Against float64, and to the bit against a bf16 cache of the same values, which are exact in bf16."""
    out = mla_decode(case, schedule)
    assert_close(out, *expect(case))
    case.cache = case.wide.to(BF16)
    assert_same_bits(out, mla_decode(case))


@simt_only
@pytest.mark.parametrize(
    ("heads", "page_size", "own"),
    [(64, 64, True), (33, 64, True), (128, 192, True), (32, 64, False), (64, 96, False)],
)
def test_cuda_mla_decode_on_hopper_takes_its_own_kernel_where_it_suits(heads, page_size, own):
    """Its tiles of 64 tokens tell: others round the weights of the first 32 against another maximum."""
    case = make([64], heads=heads, page_size=page_size)
    same = mla_decode(case) == mla_decode_on(case)
    assert same.all() != own


# ---- values ---------------------------------------------------------------------------------------------------------


@schedules
@pytest.mark.parametrize(
    ("seq_lens", "heads"), [([1], 64), ([65, 0, 128], 64), ([63, 200], 128), ([577], 64)]
)
def test_cuda_mla_decode_on_hopper_matches_float64(seq_lens, heads, schedule):
    case = make(seq_lens, heads=heads)
    assert_close(mla_decode(case, schedule), *expect(case))


@schedules
@pytest.mark.parametrize(("seq_lens", "heads"), [([65, 0, 128], 64), ([33, 70], 128), ([577], 64)])
def test_cuda_mla_decode_of_fp8_rows_on_hopper_matches_float64(seq_lens, heads, schedule):
    check_fp8(Fp8Case(seq_lens, heads=heads), schedule)


@pytest.mark.parametrize("length", [2, 15, 17, 63, 64, 127, 129, 511, 512, 513, 1025])
def test_cuda_mla_decode_on_hopper_matches_float64_at_any_length(length):
    case = make([length], heads=64)
    assert_close(mla_decode(case), *expect(case))


@pytest.mark.parametrize("length", [1, 16, 63, 64, 127, 513])
def test_cuda_mla_decode_of_fp8_rows_on_hopper_matches_float64_at_any_length(length):
    check_fp8(Fp8Case([length], heads=64))


@pytest.mark.parametrize("make_case", [make, Fp8Case], ids=["bf16", "fp8"])
@pytest.mark.parametrize("heads", [33, 40, 63, 65, 96, 192])
def test_cuda_mla_decode_on_hopper_matches_float64_at_any_number_of_heads(heads, make_case):
    case = make_case([70, 9], heads=heads)
    assert_close(mla_decode(case), *expect(case))


@pytest.mark.parametrize("page_size", [128, 192, 1024])
def test_cuda_mla_decode_on_hopper_matches_float64_at_any_page_size(page_size):
    case = make([1, 200, 129], heads=64, page_size=page_size, max_pages=5)
    assert_close(mla_decode(case), *expect(case))


@pytest.mark.parametrize("scale", [-0.05, 0.5])
def test_cuda_mla_decode_on_hopper_matches_float64_when_the_maximum_moves(scale):
    case = make([600], heads=64, scale=scale)
    assert_close(mla_decode(case), *expect(case))


@pytest.mark.parametrize("make_case", [make, Fp8Case], ids=["bf16", "fp8"])
def test_cuda_mla_decode_on_hopper_matches_float64_over_many_sequences(make_case):
    """Fifteen splits for three multiprocessors: a block goes on to its next split with copies under way."""
    case = make_case([1, 0, 64, 65, 3, 200, 7, 513, 0, 128, 31, 2, 520], heads=64, max_pages=20)
    schedule = Schedule(seed=4, resident=2, hopper=True)
    assert_close(mla_decode(case, schedule), *expect(case))


def test_cuda_mla_decode_on_hopper_with_equal_weights_is_the_mean():
    # Sums of small integers are exact: a token or a column that is lost or taken twice shows.
    case = make([1, 33, 512], heads=64, scale=0.0)
    for b, length in enumerate(case.seq_lens.tolist()):
        for i in range(length):
            case.row(b, i).copy_((randn(576, dtype=BF16, seed=i) * 4).round())
    out = mla_decode(case)
    for b, length in enumerate(case.seq_lens.tolist()):
        mean = torch.stack([case.row(b, i)[:LATENT] for i in range(length)]).float().sum(0) / length
        assert_same_bits(out[b], mean.to(BF16).expand(64, LATENT))


@pytest.mark.parametrize("position", [0, 15, 63, 64, 511, 512, 599])
def test_cuda_mla_decode_on_hopper_finds_the_token_that_takes_all_the_weight(position):
    case = make([600], heads=64)
    case.row(0, position)[LATENT:] = 30.0
    case.q[..., LATENT:] = 30.0
    out = mla_decode(case)
    assert_same_bits(out[0], case.row(0, position)[:LATENT].expand(64, LATENT))


@pytest.mark.parametrize("make_case", [make, Fp8Case], ids=["bf16", "fp8"])
def test_cuda_mla_decode_on_hopper_of_empty_sequences_is_zero(make_case):
    case = make_case([0, 0], heads=64)
    assert (mla_decode(case) == 0).all()
    case.cache, case.page_table = case.cache[:0], case.page_table[:, :0]
    assert (mla_decode(case) == 0).all()


def test_cuda_mla_decode_of_fp8_rows_on_hopper_takes_any_scale():
    """A latent is then rounded to bf16 once more."""
    case = Fp8Case([70], heads=64)
    scales = case.cache[..., 512:528].clone().view(FP32) * 1.37
    case.cache[..., 512:528] = scales.view(torch.uint8)
    values = fp8_rows.dequantize(case.cache.flatten(0, 1), 512, 64)
    case.wide = values.to(BF16).float().view(case.wide.shape)
    check_fp8(case)


# ---- one order of sums ----------------------------------------------------------------------------------------------


def test_cuda_mla_decode_on_hopper_row_depends_on_its_own_sequence_and_head_only():
    case = make([70, 1, 530, 0], heads=128)
    together = mla_decode(case)
    for b in range(4):
        for heads in (slice(0, 128), slice(64, 128), slice(17, 50)):
            part = make([1], heads=1)
            part.cache = case.cache
            part.q = case.q[b : b + 1, heads].contiguous()
            part.page_table = case.page_table[b : b + 1].contiguous()
            part.seq_lens = case.seq_lens[b : b + 1].contiguous()
            assert_same_bits(mla_decode(part), together[b : b + 1, heads])


def test_cuda_mla_decode_on_hopper_row_does_not_depend_on_the_next_sequences_queries():
    """Which are in the block too, where heads end before it."""
    case = make([70, 9], heads=40)
    clean = mla_decode(case)
    case.q[1] = math.nan
    out = mla_decode(case)
    assert_same_bits(out[0], clean[0])
    assert out[1].isnan().all()


@pytest.mark.parametrize(("place", "column"), [(5, 7), (540, 570), (559, 511)])
def test_cuda_mla_decode_on_hopper_passes_on_nan_in_its_own_sequence_only(place, column):
    case = make([20, 560, 9], heads=64)
    case.row(1, place)[column] = math.nan
    out = mla_decode(case)
    assert out[[0, 2]].isfinite().all()
    assert out[1].isnan().all()


@pytest.mark.parametrize("column", [0, 511])
def test_cuda_mla_decode_on_hopper_shows_a_nan_in_fp8_rows(column):
    case = Fp8Case([70, 70], heads=64)
    clean = mla_decode(case)
    case.exact_row(0, 40)[column] = math.nan
    case.encode()
    out = mla_decode(case)
    assert out[0].isnan().all()
    assert_same_bits(out[1], clean[1])


@simt_only
@pytest.mark.parametrize("page", [-1, 5])
def test_cuda_mla_decode_on_hopper_stops_at_a_page_out_of_range(page):
    case = make([65], heads=64)
    case.page_table[0, 1] = page
    with pytest.raises(Fault, match="mla_decode: used page ids must be 0 to pages - 1"):
        mla_decode(case)
