"""Bounds, buffers and inputs shared by the tests of the dense ops (bf16_gemm, mla_decode, rms_norm).

Bounds are per element, against a float64 result on the same (already rounded) inputs. U is the unit roundoff of fp32;
a fused multiply-add rounds once, a product and a sum (the generic tier) twice, so every term counts 2.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

U = 2.0**-24
TINY = 2.0**-133  # the smallest bf16: results may be subnormal
_OUTPUT_ROUNDING = {torch.bfloat16: 2.0**-8, torch.float32: U}


def assert_close(actual: Tensor, expected: Tensor, bound: Tensor) -> None:
    """Every element of actual is finite and within bound of expected; says the worst as % of its bound."""
    assert actual.shape == expected.shape
    assert actual.isfinite().all(), f"{int((~actual.isfinite()).sum())} elements are not finite"
    if actual.numel() == 0:
        return
    used = ((actual.double() - expected).abs() / bound).flatten()
    worst = int(used.argmax())
    print(f"worst error: {100 * float(used[worst]):.0f} % of its bound")
    assert used[worst] <= 1, (
        f"element {worst}: {float(actual.flatten()[worst])} for {float(expected.flatten()[worst])}, "
        f"{float(used[worst]):.3g} times the bound"
    )


def assert_same_bits(a: Tensor, b: Tensor) -> None:
    """Equal to the last bit (NaN of any payload equal to NaN)."""
    assert a.dtype == b.dtype
    assert torch.equal(a.isnan(), b.isnan())
    assert torch.equal(a.nan_to_num(), b.nan_to_num())


def dot_terms(length: int, isa: str = "generic") -> int:
    """Roundings on the way of one product into a sum of `length` products, as bf16_gemm orders them in a tier.

    Vector tiers: 16 lanes, then a tree of four and one to spare. A multiply-add rounds once, in the generic tier twice.
    Matrix tiles (amx): even and odd terms of 32 in chains of 16, the two added, then added to the tile; the three limbs
    of an fp32 activation are summed apart, their absolute values at most 1 + 2**-7 of it, and added in two steps.
    """
    if isa == "amx":
        return 16 + 1 + math.ceil(length / 32) + 2
    return (2 if isa == "generic" else 1) * math.ceil(length / 16) + 5


def bound_dot(
    absolute_sum: Tensor, length: int, y: Tensor, out_dtype: torch.dtype, isa: str = "generic"
) -> Tensor:
    """A dot of `length` products in fp32, rounded to out_dtype; absolute_sum is |x| . |w|."""
    error = 1.01 * dot_terms(length, isa) * U * absolute_sum
    return error + _OUTPUT_ROUNDING[out_dtype] * (y.abs() + error) + TINY


def bound_rms_norm(y: Tensor, hidden: int, dtype: torch.dtype) -> Tensor:
    """Sum of squares (half of its error after the root), division, root, two products; twice rounded to dtype."""
    relative = (dot_terms(hidden) / 2 + 6) * U + 2 * _OUTPUT_ROUNDING[dtype]
    return 1.01 * relative * y.abs() + TINY


def mla_terms(length: int, width: int, *, isa: str, cache_dtype: torch.dtype) -> tuple[int, int]:
    """Roundings (units of U) in a score, of its absolute sum, and in the sums over tokens, as mla_decode orders them.

    Vector tiers: four partial sums a score, by column mod 4, added up after every 288 columns (generic: 144); the
    scaled query. At most 512 tokens in sequence, a rescaling of two roundings per 64. A multiply-add rounds once, in
    the generic tier twice. Matrix tiles (amx, bf16 cache): a product of 32 columns or tokens sums its even and its odd
    terms in chains of 16, adds the two, then adds to the tile; high and low limb are added, and a score is scaled. The
    limbs are within 2**-17 of the query or the weight: 128 U. The sum of the weights is at most 512 additions. Dot
    instructions (avx512_bf16, bf16 cache): limbs as well; four partial sums a score, by pairs of columns mod 4, the low
    limb's sum and on top of it the high one's; two limbs a token in sequence, a rescaling per 128 tokens.
    """
    tokens = min(length, 512)
    if isa == "amx" and cache_dtype == torch.bfloat16:
        score = 16 + 1 + math.ceil(width / 32) + 2 + 128
        return score, max(16 + 1 + 16 + 1 + 128, tokens)
    if isa == "avx512_bf16" and cache_dtype == torch.bfloat16:
        score = 2 * 2 * math.ceil(width / 8) + 2 + 1 + 128
        return score, 2 * tokens + 2 * 4 + 128
    rounds, segment = (2, 144) if isa == "generic" else (1, 288)
    score = rounds * math.ceil(min(width, segment) / 4) + 2 + math.ceil(width / segment) - 1 + 1
    return score, rounds * tokens + 2 * 8


def mla_expected(
    q, cache, page_table, seq_lens, *, kv_lora_rank, softmax_scale, isa
) -> tuple[Tensor, Tensor]:
    """float64 result and error bound of mla_decode in a tier, one head and one full softmax at a time.

    An error d in a score is a factor exp(d) on its probability. Per token: the score (mla_terms), the subtraction of
    the maximum (U |s - max|) and exp itself (2 ulp = 4 U). Common factors (the maximum, rescaling) meet numerator and
    denominator alike. The sums over tokens: mla_terms within a chunk of 512, two roundings per chunk in the end.
    """
    batch, heads, width = q.shape
    page_size = cache.shape[1]
    out = torch.zeros(batch, heads, kv_lora_rank, dtype=torch.float64)
    bound = torch.zeros_like(out)
    for b, length in enumerate(seq_lens.tolist()):
        used = page_table[b, : math.ceil(length / page_size)].tolist()
        rows = [cache[page] for page in used]
        if not rows:
            continue
        keys = torch.cat(rows)[:length].double()
        values = keys[:, :kv_lora_rank]
        score_terms, sum_terms = mla_terms(length, width, isa=isa, cache_dtype=cache.dtype)
        for h in range(heads):
            query = q[b, h].double()
            scores = keys @ query * softmax_scale
            weight = torch.exp(scores - scores.max())
            p = weight / weight.sum()
            out[b, h] = p @ values
            absolute = keys.abs() @ query.abs() * abs(softmax_scale)
            off = score_terms * U * absolute + U * (scores.max() - scores) + 4 * U
            sums = (sum_terms + 2 * math.ceil(length / 512) + 6) * U
            spread = p @ values.abs() + out[b, h].abs()
            bound[b, h] = (p * off) @ values.abs() + (p @ off) * out[b, h].abs() + sums * spread
    bound = 1.01 * bound
    return out, bound + _OUTPUT_ROUNDING[q.dtype] * (out.abs() + bound) + TINY


class Guarded:
    """A tensor inside a larger buffer of sentinel bytes, for calls that get bare addresses."""

    def __init__(self, *shape: int, dtype: torch.dtype, guard: int = 256) -> None:
        nbytes = math.prod(shape) * dtype.itemsize
        self._bytes = torch.full((nbytes + 2 * guard,), 0xA5, dtype=torch.uint8)
        self._inside = slice(guard, guard + nbytes)
        self.tensor = self._bytes[self._inside].view(dtype).view(shape)
        self.tensor.fill_(math.nan)

    @property
    def address(self) -> int:
        return self.tensor.data_ptr()

    def assert_untouched_outside(self) -> None:
        outside = self._bytes.clone()
        outside[self._inside] = 0xA5
        assert (outside == 0xA5).all(), "written outside of the buffer"


class Workspace:
    """Exactly `nbytes` of 64-byte aligned scratch, full of NaN, between guards."""

    def __init__(self, nbytes: int, guard: int = 256) -> None:
        self._bytes = torch.full((nbytes + 2 * guard + 64,), 0xFF, dtype=torch.uint8)
        start = guard + (-(self._bytes.data_ptr() + guard)) % 64
        self._inside = slice(start, start + nbytes)
        self.address = self._bytes.data_ptr() + start
        self.nbytes = nbytes

    def assert_untouched_outside(self) -> None:
        outside = self._bytes.clone()
        outside[self._inside] = 0xFF
        assert (outside == 0xFF).all(), "written outside of the workspace"


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def randn(*shape: int, dtype: torch.dtype, seed: int = 0, scale: float = 1.0) -> Tensor:
    return (torch.randn(*shape, generator=seeded(seed)) * scale).to(dtype)
