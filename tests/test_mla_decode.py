"""mla_decode: every tier against float64; only what a sequence owns is read; one order of summation for all."""

from __future__ import annotations

import math

import pytest
import torch

from kimi_native import _native, ops
from oracle import OutputAt, misaligned
from oracle_dense import (
    Guarded,
    Workspace,
    assert_close,
    assert_same_bits,
    mla_expected,
    randn,
    seeded,
)

BF16, FP32 = torch.bfloat16, torch.float32
CODE = {BF16: 0, FP32: 1, torch.uint8: 2}
UNUSED_PAGE = 2**31 - 1  # reading through it would leave the process


class Case:
    """Queries and a paged cache with everything that must not be read poisoned.

    Pages are dealt out in a shuffled order; slots past a sequence's end, and pages nobody owns, hold NaN; page table
    entries past the last used page hold UNUSED_PAGE.
    """

    def __init__(
        self,
        seq_lens,
        *,
        heads=3,
        latent=64,
        rope=16,
        page_size=64,
        max_pages=None,
        q_dtype=BF16,
        cache_dtype=BF16,
        scale=0.1,
        seed=0,
    ):
        self.latent, self.scale = latent, scale
        batch = len(seq_lens)
        used = [math.ceil(length / page_size) for length in seq_lens]
        max_pages = max_pages or max([1, *used])
        pages = sum(used) + 3
        order = torch.randperm(pages, generator=seeded(seed)).tolist()
        self.q = randn(batch, heads, latent + rope, dtype=q_dtype, seed=seed)
        self.cache = torch.full((pages, page_size, latent + rope), math.nan, dtype=cache_dtype)
        self.page_table = torch.full((batch, max_pages), UNUSED_PAGE, dtype=torch.int32)
        self.seq_lens = torch.tensor(seq_lens, dtype=torch.int32)
        rows = randn(sum(seq_lens), latent + rope, dtype=cache_dtype, seed=seed + 1)
        at = 0
        for b, length in enumerate(seq_lens):
            for i in range(used[b]):
                page = order.pop()
                self.page_table[b, i] = page
                count = min(page_size, length - i * page_size)
                self.cache[page, :count] = rows[at : at + count]
                at += count

    def row(self, b: int, position: int) -> torch.Tensor:
        """The cache row of one token, to be written to."""
        page_size = self.cache.shape[1]
        return self.cache[int(self.page_table[b, position // page_size]), position % page_size]

    def run(self, batch=slice(None), heads=slice(None)) -> torch.Tensor:
        return ops.mla_decode(
            self.q[batch, heads].contiguous(),
            self.cache,
            self.page_table[batch].contiguous(),
            self.seq_lens[batch].contiguous(),
            kv_lora_rank=self.latent,
            softmax_scale=self.scale,
        )

    def check(self) -> torch.Tensor:
        out = self.run()
        assert out.dtype == self.q.dtype
        assert_close(
            out,
            *mla_expected(
                self.q,
                self.cache,
                self.page_table,
                self.seq_lens,
                kv_lora_rank=self.latent,
                softmax_scale=self.scale,
                isa=ops.active_isa(),
            ),
        )
        return out


@pytest.fixture
def threads():
    """Sets the number of threads; restored afterwards."""
    before = ops.num_threads()
    yield ops.set_num_threads
    ops.set_num_threads(before)


# ---- values ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("length", [1, 2, 3, 4, 5, 63, 64, 65, 127, 128, 130, 511, 512, 513, 1100])
def test_mla_decode_matches_reference_at_any_length(isa, length):
    Case([length]).check()


# Rows of 96 columns may be used where they lie by matrix tiles, rows of 80 are copied.
@pytest.mark.parametrize("rope", [16, 32])
@pytest.mark.parametrize("page_size", [1, 3, 16, 40, 64, 100])
def test_mla_decode_matches_reference_at_any_page_size(isa, page_size, rope):
    Case([1, 17, 64, 150], page_size=page_size, rope=rope).check()


@pytest.mark.parametrize("heads", [1, 2, 3, 5, 6, 7, 8, 9, 12, 13, 16, 17, 20, 25, 64, 65, 128])
def test_mla_decode_matches_reference_at_any_number_of_heads(isa, heads):
    Case([70], heads=heads, latent=48, rope=8).check()
    Case([90], heads=heads, latent=64, rope=32, q_dtype=FP32).check()


@pytest.mark.parametrize(
    ("latent", "rope"),
    [(1, 0), (1, 1), (15, 3), (16, 0), (17, 15), (48, 16), (63, 1), (64, 64), (100, 7), (130, 2)],
)
def test_mla_decode_matches_reference_at_any_width(isa, latent, rope):
    Case([5, 70], heads=7, latent=latent, rope=rope).check()


@pytest.mark.parametrize("q_dtype", [BF16, FP32])
@pytest.mark.parametrize("cache_dtype", [BF16, FP32])
def test_mla_decode_matches_reference_in_every_dtype(isa, q_dtype, cache_dtype):
    Case([90, 3], heads=7, q_dtype=q_dtype, cache_dtype=cache_dtype).check()


def test_mla_decode_matches_reference_at_the_model_shape(isa):
    Case([600, 1], heads=64, latent=512, rope=64, q_dtype=FP32, scale=192**-0.5).check()


@pytest.mark.parametrize("scale", [0.0, -0.3, 3.0])
def test_mla_decode_matches_reference_at_any_scale(isa, scale):
    # 3.0: one token takes nearly all of the weight, the maximum moves between tiles and chunks.
    Case([1100], scale=scale, q_dtype=FP32).check()


def test_mla_decode_of_an_empty_sequence_is_zero(isa):
    case = Case([0, 5, 0, 64])
    out = case.check()
    assert (out[0] == 0).all()
    assert (out[2] == 0).all()
    assert (Case([0, 0]).run() == 0).all()


def test_mla_decode_of_no_sequences_is_empty(isa):
    assert Case([]).run().shape == (0, 3, 64)


def test_mla_decode_matches_reference_over_many_sequences(isa):
    Case([1, 0, 64, 65, 3, 200, 7, 513, 0, 128, 31, 2], heads=5, max_pages=40).check()


# ---- what is read ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("page_size", [1, 16, 64])
def test_mla_decode_reads_the_sequences_rows_only(isa, page_size):
    # Case poisons the rest with NaN and page ids far outside: finite and right means unread.
    for length in (1, 63, 65, 515):
        Case([length, 2], page_size=page_size, max_pages=length // page_size + 5).check()


def test_mla_decode_reads_the_rope_part_for_scores_only(isa):
    case = Case([40], latent=40, rope=24, q_dtype=FP32, cache_dtype=FP32)
    out = case.check()
    case.q[..., 40:] = 0
    case.cache[..., 40:] *= 1e30
    flat = case.check()
    assert not torch.equal(out, flat)


# ---- one order of summation -----------------------------------------------------------------------------------------


def test_mla_decode_row_does_not_depend_on_the_batch(isa):
    case = Case([70, 1, 600, 0, 64, 1030], heads=7, q_dtype=FP32)
    together = case.run()
    for b in range(6):
        assert_same_bits(case.run(slice(b, b + 1)), together[b : b + 1])


def test_mla_decode_row_does_not_depend_on_the_other_heads(isa):
    case = Case([70, 600], heads=20, latent=100, rope=20, q_dtype=FP32)
    together = case.run()
    for first, last in ((0, 1), (3, 5), (5, 12), (19, 20), (0, 8), (0, 9), (2, 20)):
        assert_same_bits(case.run(heads=slice(first, last)), together[:, first:last])


def test_mla_decode_does_not_depend_on_threads(isa, threads):
    # More threads also mean smaller blocks of heads.
    case = Case([70, 1, 1030], heads=20, q_dtype=FP32)
    results = []
    for n in (1, 2, 4):
        threads(n)
        results.append(case.run())
    assert_same_bits(results[0], results[1])
    assert_same_bits(results[0], results[2])


def test_mla_decode_does_not_depend_on_pages(isa):
    a, b = (Case([300], page_size=p, q_dtype=FP32) for p in (64, 7))
    assert_same_bits(a.run(), b.run())


def test_mla_decode_rounds_its_fp32_result_once(isa):
    case = Case([100, 3], heads=7)
    out = case.run()
    case.q = case.q.float()
    assert_same_bits(out, case.run().to(BF16))


def test_mla_decode_of_a_bf16_cache_equals_that_of_the_same_values_in_fp32(isa):
    # In some tiers a bf16 cache has a kernel of its own; both are then within their bounds.
    case = Case([100, 3], heads=7, q_dtype=FP32)
    out = case.check()
    case.cache = case.cache.float()
    widened = case.check()
    if isa not in ("avx512_bf16", "amx"):
        assert_same_bits(out, widened)


# ---- special values -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("position", [0, 15, 64, 511, 512, 599])
@pytest.mark.parametrize("column", [0, 63, 64, 79])
def test_mla_decode_shows_a_nan_in_the_cache(isa, position, column):
    case = Case([600, 600], heads=7, q_dtype=FP32)
    clean = case.run()
    case.row(0, position)[column] = math.nan
    out = case.run()
    assert out[0].isnan().all()
    assert_same_bits(out[1], clean[1])


def test_mla_decode_shows_a_nan_in_the_query(isa):
    case = Case([600, 3], heads=13, q_dtype=FP32)
    clean = case.run()
    case.q[0, 4, 77] = math.nan
    out = case.run()
    assert out[0, 4].isnan().all()
    others = [h for h in range(13) if h != 4]
    assert_same_bits(out[0, others], clean[0, others])
    assert_same_bits(out[1], clean[1])


@pytest.mark.parametrize("bits", [0x7F800001, 0x7FFFFFFF])
def test_mla_decode_shows_a_nan_of_any_payload(isa, bits):
    case = Case([40], heads=2, q_dtype=FP32)
    case.q.view(torch.int32)[0, 1, 5] = bits
    out = case.run()
    assert out[0, 1].isnan().all()
    assert out[0, 0].isfinite().all()


def test_mla_decode_takes_queries_up_to_the_largest_number(isa):
    # Rounded to bf16, these would be infinite.
    case = Case([40], heads=2, q_dtype=FP32)
    case.q[0, 0, 3] = torch.finfo(FP32).max
    case.cache[..., 3] *= 2.0**-120 / case.cache[..., 3].abs()
    case.check()


def test_mla_decode_gives_tokens_of_minus_infinity_no_weight(isa):
    # q . row overflows to -inf over whole tiles and chunks: those tokens weigh nothing, the others keep theirs.
    case = Case([600], heads=1, latent=16, rope=1, q_dtype=FP32, cache_dtype=FP32)
    case.q[0, 0, 16] = 3e38
    for t in range(600):
        case.row(0, t)[16] = 0.0 if t >= 590 else -3e38
    out = case.run()
    tail = Case([10], heads=1, latent=16, rope=1, q_dtype=FP32, cache_dtype=FP32)
    tail.q[:] = case.q
    for t in range(10):
        tail.row(0, t)[:] = case.row(0, 590 + t)
    torch.testing.assert_close(out, tail.run(), rtol=1e-5, atol=1e-6)


# ---- the native door ------------------------------------------------------------------------------------------------


def run_native(case: Case, output: Guarded | OutputAt, *, workspace=None, **changes):
    """_native.cpu.mla_decode on addresses, with a workspace of exactly the size asked for."""
    batch, heads, width = case.q.shape
    arguments = {
        "q": case.q.data_ptr(),
        "cache": case.cache.data_ptr(),
        "page_table": case.page_table.data_ptr(),
        "seq_lens": case.seq_lens.data_ptr(),
        "out": output.address,
        "q_dtype": CODE[case.q.dtype],
        "cache_dtype": CODE[case.cache.dtype],
        "batch": batch,
        "heads": heads,
        "kv_lora_rank": case.latent,
        "qk_rope_head_dim": width - case.latent,
        "pages": case.cache.shape[0],
        "page_size": case.cache.shape[1],
        "max_pages": case.page_table.shape[1],
        "softmax_scale": case.scale,
        "splits": 0,  # these two are a GPU's
        "max_splits": 0,
    } | changes
    values = list(arguments.values())
    if workspace is None:
        workspace = Workspace(_native.cpu.mla_decode_workspace_bytes(*values))
    _native.cpu.mla_decode(*values, workspace.address, workspace.nbytes)
    workspace.assert_untouched_outside()
    if isinstance(output, Guarded):
        output.assert_untouched_outside()


@pytest.mark.parametrize("dtype", [BF16, FP32])
@pytest.mark.parametrize(("heads", "latent", "rope"), [(1, 1, 0), (7, 33, 5), (13, 64, 16)])
def test_mla_decode_writes_only_its_output(isa, threads, heads, latent, rope, dtype):
    for n in (1, 3):
        threads(n)
        case = Case([0, 70, 513], heads=heads, latent=latent, rope=rope, q_dtype=dtype)
        out = Guarded(3, heads, latent, dtype=dtype)
        run_native(case, out)
        assert_same_bits(out.tensor, case.run())


@pytest.mark.parametrize(("q_dtype", "cache_dtype"), [(BF16, BF16), (FP32, BF16), (FP32, FP32)])
@pytest.mark.parametrize("offset", [1, 2, 3])
def test_mla_decode_reads_and_writes_misaligned_memory(isa, offset, q_dtype, cache_dtype):
    case = Case([3, 70, 0], heads=7, latent=33, rope=5, q_dtype=q_dtype, cache_dtype=cache_dtype)
    out = OutputAt(3, 7, 33, dtype=q_dtype, offset=offset)
    q, cache = misaligned(case.q, offset), misaligned(case.cache, offset)
    run_native(case, out, q=q.data_ptr(), cache=cache.data_ptr())
    assert_same_bits(out.values(), case.run())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"batch": -1}, "batch, qk_rope_head_dim >= 0"),
        ({"heads": 0}, "heads, kv_lora_rank >= 1"),
        ({"kv_lora_rank": 0}, "heads, kv_lora_rank >= 1"),
        ({"qk_rope_head_dim": -1}, "qk_rope_head_dim >= 0"),
        ({"page_size": 0}, "page_size >= 1"),
        ({"pages": -1}, "pages, max_pages >= 0"),
        ({"max_pages": -1}, "pages, max_pages >= 0"),
        ({"max_pages": 0}, r"seq_lens must be 0 to .* = 0 \(got seq_lens\[0\]=70\)"),
        ({"softmax_scale": math.inf}, "softmax_scale must be finite"),
        ({"softmax_scale": math.nan}, "softmax_scale must be finite"),
        ({"heads": 1 << 60}, "fit in 64 bits"),
        ({"pages": 1 << 58}, "fit in 64 bits"),
        ({"max_pages": 1 << 58}, "fit in 64 bits"),
        ({"q": 0}, "q and out must not be null"),
        ({"out": 0}, "q and out must not be null"),
        ({"cache": 0}, "cache and page_table must not be null"),
        ({"page_table": 0}, "cache and page_table must not be null"),
        ({"seq_lens": 0}, "seq_lens must not be null"),
        ({"pages": 1}, r"used page ids must be 0 to pages - 1 = 0 \(got page_table"),
    ],
)
def test_mla_decode_refuses_impossible_arguments(changes, message):
    case = Case([70, 3])
    with pytest.raises(ValueError, match=f"mla_decode: .*{message}"):
        run_native(case, Guarded(2, 3, 64, dtype=BF16), **changes)


def test_mla_decode_refuses_a_bad_workspace():
    case, out = Case([70]), Guarded(1, 3, 64, dtype=BF16)
    good, small, shifted, null = (Workspace(n) for n in (1 << 20, 64, 1 << 20, 1 << 20))
    shifted.address += 8
    null.address = 0
    run_native(case, out, workspace=good)
    for bad in (small, shifted, null):
        with pytest.raises(
            ValueError, match="mla_decode: workspace must be 64-byte aligned and hold"
        ):
            run_native(case, out, workspace=bad)


@pytest.mark.parametrize("length", [-1, 65, 2**31 - 1])
def test_mla_decode_refuses_a_length_beyond_the_page_table(length):
    case = Case([64])
    case.seq_lens[0] = length
    with pytest.raises(ValueError, match=rf"mla_decode: seq_lens must be .*seq_lens\[0\]={length}"):
        case.run()


@pytest.mark.parametrize("page", [-1, 7, UNUSED_PAGE])
def test_mla_decode_refuses_a_used_page_outside_of_the_cache(page):
    case = Case([64, 200])  # 5 pages and 3 that nobody owns: ids 0 to 7
    case.cache = case.cache[:7]
    case.page_table[case.page_table == 7] = 0
    case.page_table[1, 3] = page
    message = r"mla_decode: used page ids must be 0 to pages - 1 = 6 \(got page_table\[1\]\[3\]"
    with pytest.raises(ValueError, match=message):
        case.run()


def test_mla_decode_refuses_shapes_and_dtypes_that_do_not_fit():
    case = Case([64])
    q, cache, table, lens = case.q, case.cache, case.page_table, case.seq_lens
    arguments = {"kv_lora_rank": 64, "softmax_scale": 0.1}
    with pytest.raises(ValueError, match="mla_decode: cache must be"):
        ops.mla_decode(q, cache[..., :79], table, lens, **arguments)
    with pytest.raises(ValueError, match="mla_decode: page_table must be"):
        ops.mla_decode(q, cache, table[0], lens, **arguments)
    with pytest.raises(ValueError, match="mla_decode: seq_lens must be"):
        ops.mla_decode(q, cache, table, lens.repeat(2), **arguments)
    with pytest.raises(ValueError, match="mla_decode: kv_lora_rank must be"):
        ops.mla_decode(q, cache, table, lens, kv_lora_rank=81, softmax_scale=0.1)
    with pytest.raises(ValueError, match="mla_decode: q must be contiguous"):
        ops.mla_decode(
            q.transpose(1, 2).contiguous().transpose(1, 2), cache, table, lens, **arguments
        )
    with pytest.raises(TypeError, match="mla_decode: seq_lens must be"):
        ops.mla_decode(q, cache, table, lens.long(), **arguments)
    with pytest.raises(TypeError, match="mla_decode: cache must be"):
        ops.mla_decode(q, cache.half(), table, lens, **arguments)
