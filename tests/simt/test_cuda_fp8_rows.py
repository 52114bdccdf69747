"""FP8 cache rows on the GPU's kernels: the bytes of rope_append, and mla_decode with the bits of a bf16 cache."""

from __future__ import annotations

import math

import pytest
import torch

from kimi_native import fp8_rows, reference
from oracle_dense import assert_close, assert_same_bits
from simt import SCHEDULES, Schedule
from test_cuda_mla_decode import expect, mla_decode
from test_cuda_ops import rope_append
from test_fp8_rows import Fp8Case, latents
from test_fp8_rows import make as make_rope
from test_rope_append import copies

BF16, FP32 = torch.bfloat16, torch.float32
schedules = pytest.mark.parametrize("schedule", SCHEDULES, ids=str)


# ---- rope_append ----------------------------------------------------------------------------------------------------


@schedules
@pytest.mark.parametrize("dtype", [BF16, FP32])
@pytest.mark.parametrize(("rank", "rope"), [(1, 2), (63, 14), (129, 6), (512, 64)])
def test_cuda_rope_append_to_fp8_rows_has_the_bits_of_the_reference(rank, rope, dtype, schedule):
    args = make_rope(9, 2, rank, rope, dtype=dtype)
    args["latent"][:8] = latents(rank).to(dtype)
    args["latent"][8, rank // 2] = math.nan
    # latent and k_rope are views of one buffer; here each has a buffer of its own.
    args |= {"k_rope": args["k_rope"].clone()}
    expected = copies(args)
    reference.rope_append(**expected)
    rope_append(args, schedule=schedule)
    assert torch.equal(args["cache"], expected["cache"])
    assert_same_bits(args["q_out"], expected["q_out"])


# ---- mla_decode -----------------------------------------------------------------------------------------------------


class Case(Fp8Case):
    def __init__(self, seq_lens, **options):
        usual = {"latent": 512, "rope": 64, "scale": 0.05, "q_dtype": BF16}
        super().__init__(seq_lens, **(usual | options))

    def row(self, b: int, position: int) -> torch.Tensor:
        """The values of a row, for `expect`."""
        page_size = self.wide.shape[1]
        return self.wide[int(self.page_table[b, position // page_size]), position % page_size]

    def check(self, **options) -> torch.Tensor:
        """Against float64, and to the bit against a bf16 cache of the same values, which are exact in bf16."""
        out = mla_decode(self, **options)
        assert_close(out, *expect(self))
        rows, self.cache = self.cache, self.wide.to(BF16)
        assert_same_bits(out, mla_decode(self))
        self.cache = rows
        return out


@schedules
@pytest.mark.parametrize(("seq_lens", "heads"), [([33, 0, 64], 16), ([65, 31], 17), ([545], 32)])
def test_cuda_mla_decode_of_fp8_rows_matches_float64(seq_lens, heads, schedule):
    Case(seq_lens, heads=heads).check(schedule=schedule)


@pytest.mark.parametrize("length", [1, 7, 31, 32, 63, 511, 513])
def test_cuda_mla_decode_of_fp8_rows_matches_float64_at_any_length(length):
    Case([length], heads=3).check()


@pytest.mark.parametrize("page_size", [32, 96])
def test_cuda_mla_decode_of_fp8_rows_matches_float64_at_any_page_size(page_size):
    Case([130, 20], heads=5, page_size=page_size).check()


def test_cuda_mla_decode_of_fp8_rows_takes_any_scale():
    """A latent is then rounded to bf16 once more."""
    case = Case([70], heads=5)
    scales = case.cache[..., 512:528].clone().view(FP32) * 1.37
    case.cache[..., 512:528] = scales.view(torch.uint8)
    values = fp8_rows.dequantize(case.cache.flatten(0, 1), 512, 64)
    case.wide = values.to(BF16).float().view(case.wide.shape)
    case.check()


@pytest.mark.parametrize("column", [0, 511])
def test_cuda_mla_decode_shows_a_nan_in_fp8_rows(column):
    case = Case([70, 70], heads=5)
    clean = mla_decode(case)
    case.exact_row(0, 40)[column] = math.nan
    case.encode()
    out = mla_decode(case)
    assert out[0].isnan().all()
    assert_same_bits(out[1], clean[1])


# rope_append's smallest scale, others of its form, the largest, and two that it never writes: a bf16 number, and none.
SCALES = [2.0**-110, 2.0**-9, 1.0, 2.0**100, 2.0**119, 1.5 * 2.0**-20, 1 / 3]


@pytest.mark.parametrize(
    ("heads", "schedule"), [(3, Schedule()), (64, Schedule(hopper=True))], ids=str
)
@pytest.mark.parametrize("scale", SCALES)
def test_cuda_mla_decode_of_one_fp8_row_is_the_row(scale, heads, schedule):
    """Every e4m3 byte but NaN, rounded to bf16 once."""
    case = Case([1], heads=heads)
    case.q.zero_()
    codes = torch.arange(512) % 256
    codes[codes & 0x7F == 0x7F] = 0
    page = int(case.page_table[0, 0])
    case.cache[page, 0, :512] = codes.to(torch.uint8)
    case.cache[page, 0, 512:528] = torch.full((4,), scale).view(torch.uint8)
    values = fp8_rows.dequantize(case.cache[page, :1], 512, 64)[0, :512]
    assert_same_bits(mla_decode(case, schedule=schedule)[0], values.to(BF16).expand(heads, 512))
