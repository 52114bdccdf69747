"""mla_decode of the GPU in the shim against float64, on the CPU tests' cases: what must not be read is poisoned."""

from __future__ import annotations

import math

import pytest
import torch

from op_args import args_type
from oracle_dense import TINY, U, assert_close, assert_same_bits, randn
from simt import SCHEDULES, Fault, Schedule, simt_only
from simt_ops import run_op, workspace_bytes
from test_mla_decode import Case

BF16 = torch.bfloat16
LATENT, ROPE = 512, 64
TILE, SPLIT = 32, 512
schedules = pytest.mark.parametrize("schedule", SCHEDULES, ids=str)


def make(seq_lens, **options):
    return Case(seq_lens, latent=LATENT, rope=ROPE, **({"scale": 0.05} | options))


def fields_of(case, out):
    return {
        "q": case.q,
        "cache": case.cache,
        "page_table": case.page_table,
        "seq_lens": case.seq_lens,
        "out": out,
        "q_dtype": case.q.dtype,
        "cache_dtype": case.cache.dtype,
        "batch": case.q.shape[0],
        "heads": case.q.shape[1],
        "kv_lora_rank": case.latent,
        "qk_rope_head_dim": case.q.shape[2] - case.latent,
        "pages": case.cache.shape[0],
        "page_size": case.cache.shape[1],
        "max_pages": case.page_table.shape[1],
        "softmax_scale": case.scale,
    }


def mla_decode(case, **options):
    out = torch.full((*case.q.shape[:2], case.latent), math.nan, dtype=case.q.dtype)
    run_op("mla_decode", **fields_of(case, out), **options)
    return out


def expect(case):
    """float64 result and bound.

    A score: one chain of the whole width (on Hopper; two of half of it elsewhere), at most 2 U an addition (a tensor
    core may truncate), two roundings of the scale. exp: 2 ulp (4 U), and U of the difference that it is taken of. A
    weight is then rounded to bf16 (2^-8); the sum that divides is of the rounded weights. Each of a split's tiles may
    bring a new maximum: a factor with 4 U and U of the step, and a product; so may the splits of its group, up to four,
    and the groups. Values: at most 512 additions in a split, 2 U each; splits: a multiply-add each; the division.
    """
    batch, heads, width = case.q.shape
    out = torch.zeros(batch, heads, case.latent, dtype=torch.float64)
    bound = torch.zeros_like(out)
    for b, length in enumerate(case.seq_lens.tolist()):
        if length == 0:
            continue
        keys = torch.stack([case.row(b, i) for i in range(length)]).double()
        values, q = keys[:, : case.latent], case.q[b].double()
        scores = q @ keys.T * case.scale
        weight = torch.exp(scores - scores.amax(dim=-1, keepdim=True))
        p = weight / weight.sum(dim=-1, keepdim=True)
        out[b] = p @ values
        absolute = q.abs() @ keys.abs().T * abs(case.scale)
        spread = scores.amax(dim=-1, keepdim=True) - scores
        widest = spread.amax(dim=-1, keepdim=True)
        off = (2 * width + 4) * U * absolute + 3 * U * (spread + widest) + 12 * U + 2.0**-8
        off = off + 6 * (SPLIT // TILE + 5) * U
        sums = (2 * min(length, SPLIT) + 3 * math.ceil(length / SPLIT) + 8) * U
        bound[b] = (p * off) @ values.abs() + (p * off).sum(dim=-1, keepdim=True) * out[b].abs()
        bound[b] += sums * (p @ values.abs() + out[b].abs())
    bound = 1.01 * bound
    return out, bound + 2.0**-8 * (out.abs() + bound) + TINY


# ---- values ---------------------------------------------------------------------------------------------------------


@schedules
@pytest.mark.parametrize(
    ("seq_lens", "heads"),
    [([1], 16), ([33, 0, 64], 16), ([65, 31], 17), ([545], 32), ([7, 70], 64)],
)
def test_cuda_mla_decode_matches_float64(seq_lens, heads, schedule):
    case = make(seq_lens, heads=heads)
    assert_close(mla_decode(case, schedule=schedule), *expect(case))


@pytest.mark.parametrize("length", [2, 7, 8, 9, 31, 32, 63, 64, 127, 129, 511, 512, 513, 1025])
def test_cuda_mla_decode_matches_float64_at_any_length(length):
    case = make([length], heads=3)
    assert_close(mla_decode(case), *expect(case))


@pytest.mark.parametrize("heads", [1, 8, 15, 31, 33, 128])
def test_cuda_mla_decode_matches_float64_at_any_number_of_heads(heads):
    case = make([40], heads=heads)
    assert_close(mla_decode(case), *expect(case))


@pytest.mark.parametrize("page_size", [32, 96, 1024])
def test_cuda_mla_decode_matches_float64_at_any_page_size(page_size):
    case = make([1, 100, 97], heads=5, page_size=page_size, max_pages=5)
    assert_close(mla_decode(case), *expect(case))


@pytest.mark.parametrize("scale", [-0.05, 0.5])
def test_cuda_mla_decode_matches_float64_when_the_maximum_moves(scale):
    case = make([600], heads=4, scale=scale)
    assert_close(mla_decode(case), *expect(case))


def test_cuda_mla_decode_matches_float64_over_many_sequences():
    case = make([1, 0, 64, 65, 3, 200, 7, 513, 0, 128, 31, 2], heads=2, max_pages=20)
    assert_close(mla_decode(case, schedule=Schedule(seed=4, resident=2)), *expect(case))


def test_cuda_mla_decode_with_equal_weights_is_the_mean():
    # Sums of small integers are exact: a token or a column that is lost or taken twice shows.
    case = make([1, 33, 512], heads=17, scale=0.0)
    for b, length in enumerate(case.seq_lens.tolist()):
        for i in range(length):
            case.row(b, i).copy_((randn(576, dtype=BF16, seed=i) * 4).round())
    out = mla_decode(case)
    for b, length in enumerate(case.seq_lens.tolist()):
        mean = torch.stack([case.row(b, i)[:LATENT] for i in range(length)]).float().sum(0) / length
        assert_same_bits(out[b], mean.to(BF16).expand(17, LATENT))


@pytest.mark.parametrize("position", [0, 31, 32, 63, 64, 511, 512, 599])
def test_cuda_mla_decode_finds_the_token_that_takes_all_the_weight(position):
    case = make([600], heads=18)
    case.row(0, position)[LATENT:] = 30.0
    case.q[..., LATENT:] = 30.0
    out = mla_decode(case)
    assert_same_bits(out[0], case.row(0, position)[:LATENT].expand(18, LATENT))


def test_cuda_mla_decode_of_empty_sequences_is_zero():
    assert (mla_decode(make([0, 0], heads=3)) == 0).all()
    assert mla_decode(make([], heads=3)).shape == (0, 3, LATENT)


# ---- one order of sums ----------------------------------------------------------------------------------------------


def test_cuda_mla_decode_row_depends_on_its_own_sequence_and_head_only():
    case = make([70, 1, 530, 0], heads=20)
    together = mla_decode(case)
    for b in range(4):
        for heads in (slice(0, 20), slice(3, 12)):
            part = make([1], heads=1)
            part.cache = case.cache
            part.q = case.q[b : b + 1, heads].contiguous()
            part.page_table = case.page_table[b : b + 1].contiguous()
            part.seq_lens = case.seq_lens[b : b + 1].contiguous()
            assert_same_bits(mla_decode(part), together[b : b + 1, heads])


@pytest.mark.parametrize("place", [5, 540])
def test_cuda_mla_decode_passes_on_nan_in_its_own_sequence_only(place):
    case = make([20, 560, 9], heads=2)
    case.row(1, place)[7 if place == 5 else 570] = math.nan
    out = mla_decode(case)
    assert out[[0, 2]].isfinite().all()
    assert out[1].isnan().any(dim=-1).all()


# ---- the schedule ---------------------------------------------------------------------------------------------------


def make_schedule(case, max_splits=0):
    """The fields that a call with a schedule of its own has."""
    sizes = {
        "seq_lens": case.seq_lens,
        "batch": case.q.shape[0],
        "max_tokens": case.page_table.shape[1] * case.cache.shape[1],
        "max_splits": max_splits,
    }
    args = args_type("mla_schedule")(**(sizes | {"seq_lens": None}))
    splits = torch.full((workspace_bytes("mla_schedule", args),), 255, dtype=torch.uint8)
    run_op("mla_schedule", workspace=splits, workspace_bytes=splits.numel(), **sizes)
    return {"splits": splits, "max_splits": max_splits}


def attend(case, **fields):
    out = torch.full((*case.q.shape[:2], case.latent), math.nan, dtype=case.q.dtype)
    run_op("mla_decode", **(fields_of(case, out) | fields))
    return out


@pytest.mark.parametrize("max_splits", [0, 3, 1000])
def test_cuda_mla_decode_takes_a_schedule_made_before(max_splits):
    case = make([70, 0, 600], heads=4)
    expected = mla_decode(case)
    fields = make_schedule(case, max_splits)
    for _ in range(2):  # as two layers would
        assert_same_bits(attend(case, **fields), expected)


def test_cuda_mla_decode_needs_less_scratch_with_fewer_splits():
    case = make([70, 0, 600], heads=4, max_pages=100)
    args = args_type("mla_decode")()
    out = torch.empty(3, 4, LATENT, dtype=BF16)
    for name, value in fields_of(case, out).items():
        if isinstance(value, int | float):
            setattr(args, name, value)
    args.splits = 64
    every = workspace_bytes("mla_decode", args)
    args.max_splits = 3
    assert every == 3 * -(-100 * case.cache.shape[1] // SPLIT) * 4 * (LATENT * 4 + 8)
    assert workspace_bytes("mla_decode", args) == 3 * 4 * (LATENT * 4 + 8)


def test_cuda_mla_decode_of_shared_pages():
    # Eight sequences of the same two pages have more splits than those pages have.
    case = make([1100], heads=1, page_size=1088, max_pages=2)
    alone = mla_decode(case)
    case.q, case.seq_lens = case.q.expand(8, 1, 576).contiguous(), case.seq_lens.expand(8).clone()
    case.page_table = case.page_table.expand(8, 2).contiguous()
    case.cache = case.cache[sorted(set(case.page_table[0].tolist()))].contiguous()
    case.page_table = case.page_table - case.page_table.min()
    assert_same_bits(mla_decode(case), alone.expand(8, 1, LATENT))


@pytest.mark.parametrize("splits", [9, 512, 515])
def test_cuda_mla_decode_combines_any_number_of_splits(splits):
    """Splits written here instead: the last two tokens and the last one in turn, all with the same weight."""
    length = splits * SPLIT  # of pages that are all the same
    case = make([64], heads=1, scale=0.0, page_size=64)
    for i in (62, 63):
        case.row(0, i).copy_((randn(576, dtype=BF16, seed=i) * 4).round())
    case.page_table = case.page_table[:, :1].expand(1, length // 64).contiguous()
    case.seq_lens[0] = length
    words = torch.zeros(4 + 2 * splits, dtype=torch.int32)
    words[1] = splits
    words[5::2] = length - 2 + torch.arange(splits) % 2
    out = attend(case, splits=words)
    pairs, (x, y) = (splits + 1) // 2, (case.row(0, i)[:LATENT].float() for i in (62, 63))
    assert_same_bits(out[0, 0], ((pairs * x + splits * y) / (pairs + splits)).to(BF16))


@simt_only
@pytest.mark.parametrize(
    ("seq_lens", "place", "page", "message"),
    [
        ([65], 1, -1, "mla_decode: used page ids must be 0 to pages - 1"),
        ([65], 1, 5, "mla_decode: used page ids must be 0 to pages - 1"),
        ([129], None, None, r"mla_schedule: seq_lens must be 0 to max_pages \* page_size"),
        ([-1], None, None, r"mla_schedule: seq_lens must be 0 to max_pages \* page_size"),
    ],
)
def test_cuda_mla_decode_stops_at_what_is_out_of_range(seq_lens, place, page, message):
    case = make([65], heads=1)
    case.seq_lens[0] = seq_lens[0]
    if place is not None:
        case.page_table[0, place] = page
    with pytest.raises(Fault, match=message):
        mla_decode(case)


@simt_only
def test_cuda_mla_schedule_stops_when_there_are_more_splits_than_room():
    with pytest.raises(Fault, match="mla_schedule: all splits must be at most max_splits"):
        make_schedule(make([1100, 1], heads=1), max_splits=3)


@simt_only
@pytest.mark.parametrize("hopper", [False, True])
@pytest.mark.parametrize("lengths", [[600, 64], [70, 600], [0, 600], [1025, 1025]])
def test_cuda_mla_decode_stops_at_a_schedule_of_other_lengths(lengths, hopper):
    case = make([1100, 600], heads=33, page_size=1088)
    fields = make_schedule(case)
    case.seq_lens = torch.tensor(lengths, dtype=torch.int32)
    with pytest.raises(Fault, match="mla_decode: the schedule must be of these seq_lens"):
        attend(case, schedule=Schedule(hopper=hopper), **fields)


# ---- bad input ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"batch": -1}, "need batch, qk_rope_head_dim >= 0"),
        ({"q_dtype": 1}, r"q must be bf16 \(0\) and cache bf16 or fp8 .* on a GPU \(got 1, 0"),
        ({"cache_dtype": 1}, r"q must be bf16 \(0\) and cache bf16 or fp8 .* on a GPU \(got 0, 1"),
        ({"cache_dtype": 7}, "cache must be bf16"),
        ({"kv_lora_rank": 256}, "must be 512 and 64 on a GPU"),
        ({"qk_rope_head_dim": 32}, "must be 512 and 64 on a GPU"),
        ({"page_size": 48}, "page_size must be a multiple of 32"),
        ({"max_pages": 2**26}, r"below 2\^31 - 512"),
        ({"max_splits": -1}, "max_splits must be >= 0"),
        ({"splits": 72}, "splits must be 16-byte aligned"),
        ({"softmax_scale": math.inf}, "softmax_scale must be finite"),
        ({"seq_lens": None}, "seq_lens must not be null"),
        ({"workspace_bytes": 4}, "workspace must have 2088 bytes"),
        ({"workspace": 72}, "16-byte aligned"),
    ],
)
def test_cuda_mla_decode_refuses_what_does_not_fit(change, message):
    fields = {"batch": 1, "heads": 1, "kv_lora_rank": 512, "qk_rope_head_dim": 64}
    fields |= {"pages": 9, "page_size": 64, "max_pages": 2, "q": 64, "cache": 64, "out": 64}
    fields |= {"page_table": 64, "seq_lens": 64, "workspace": 64, "workspace_bytes": 100000}
    with pytest.raises(ValueError, match=f"mla_decode: .*{message}"):
        run_op("mla_decode", **(fields | change))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"batch": -1}, r"need batch, max_tokens >= 0 \(got batch=-1, max_tokens=128\)"),
        ({"max_tokens": -1}, "need batch, max_tokens >= 0"),
        ({"max_tokens": 2**31}, r"below 2\^31 - 512"),
        ({"max_splits": -2}, r"max_splits must be >= 0 \(got -2\)"),
        ({"seq_lens": None}, "seq_lens must not be null"),
        ({"workspace_bytes": 31}, "workspace must have 32 bytes, 16-byte aligned"),
        ({"workspace": 72}, "workspace must have 32 bytes, 16-byte aligned"),
    ],
)
def test_cuda_mla_schedule_refuses_what_does_not_fit(change, message):
    fields = {"seq_lens": 64, "batch": 1, "max_tokens": 128, "max_splits": 0}
    fields |= {"workspace": 64, "workspace_bytes": 32}
    with pytest.raises(ValueError, match=f"mla_schedule: .*{message}"):
        run_op("mla_schedule", **(fields | change))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"q": 72}, "q, cache and out must be 16-byte aligned on a GPU"),
        ({"cache": 66}, "q, cache and out must be 16-byte aligned on a GPU"),
        ({"out": None}, "q, cache and out must be"),
        ({"page_table": None}, "cache and page_table must not be null"),
    ],
)
def test_cuda_mla_decode_refuses_bad_buffers(change, message):
    fields = {"batch": 1, "heads": 1, "kv_lora_rank": 512, "qk_rope_head_dim": 64}
    fields |= {"pages": 9, "page_size": 64, "max_pages": 2, "q": 64, "cache": 64, "out": 64}
    fields |= {"page_table": 64, "seq_lens": 64, "workspace": 64, "workspace_bytes": 100000}
    with pytest.raises(ValueError, match=message):
        run_op("mla_decode", **(fields | change))
