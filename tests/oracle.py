"""What the op tests share: inputs with a packer of their own, derived error bounds, guarded outputs, comparisons."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from kimi_native import _native, ops
from kimi_native.weights import Int4Weight, Int8Weight

GROUP = 32
DTYPES = {torch.bfloat16: 0, torch.float32: 1}  # kn::DType
HALF_ULP = {torch.bfloat16: 2.0**-8, torch.float32: 2.0**-24}  # relative rounding error


def assert_within(actual: Tensor, expected: Tensor, bound: Tensor) -> None:
    """|actual - expected| <= bound element by element (float64); NaN never passes. Names the worst element."""
    assert actual.shape == expected.shape == bound.shape, (actual.shape, expected.shape)
    if actual.numel() == 0:
        return
    error = (actual.double() - expected.double()).abs()
    share = error / bound
    share[(error == 0) & (bound == 0)] = 0.0
    share = share.nan_to_num(nan=torch.inf)
    worst = int(share.flatten().argmax())
    at = tuple(int(i) for i in torch.unravel_index(torch.tensor(worst), share.shape))
    assert share.flatten()[worst] <= 1, (
        f"worst element {at}: {100 * share[at]:.3g} % of the bound (actual {actual[at].item():.9g}, "
        f"expected {expected[at].item():.9g}, bound {bound[at].item():.3g})"
    )


def assert_same_bits(a: Tensor, b: Tensor) -> None:
    """Equal bit for bit, NaN and the sign of zero included."""
    assert a.shape == b.shape
    assert a.dtype == b.dtype
    ints = {2: torch.int16, 4: torch.int32}[a.element_size()]
    different = (a.contiguous().view(ints) != b.contiguous().view(ints)).nonzero()
    assert len(different) == 0, (
        f"{len(different)} elements differ, first at {different[0].tolist()}"
    )


# ---- inputs ---------------------------------------------------------------------------------------------------------


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def make_x(tokens: int, in_: int, dtype: torch.dtype = torch.bfloat16, seed: int = 0) -> Tensor:
    """Normal entries with, in every token, a few that are 50 times larger, as in real activations."""
    g = generator(1000 + seed)
    x = torch.randn(tokens, in_, generator=g)
    x[torch.rand(tokens, in_, generator=g) < 0.01] *= 50
    return x.to(dtype)


def make_scale(out: int, groups: int, seed: int = 0) -> Tensor:
    """[out, groups] bf16 over two decades."""
    return (0.02 * torch.rand(out, groups, generator=generator(2000 + seed)) + 2e-4).bfloat16()


@dataclass(frozen=True)
class Quantized:
    """A matrix by its integers q [out, in] (int64) and scales [out, in / 32] (bf16)."""

    q: Tensor
    scale: Tensor

    def dequantized(self) -> Tensor:
        """[out, in] float64."""
        return self.q.double() * self.scale.double().repeat_interleave(GROUP, dim=1)

    def int4(self) -> Int4Weight:
        """Column 8 w + k in bits 4 k .. 4 k + 3 of word w, as q + 8."""
        words = torch.zeros(self.q.shape[0], self.q.shape[1] // 8, dtype=torch.int64)
        for k in range(8):
            words += (self.q[:, k::8] + 8) * 16**k
        words[words >= 2**31] -= 2**32
        return Int4Weight(words.to(torch.int32), self.scale)

    def int8(self) -> Int8Weight:
        return Int8Weight(self.q.to(torch.int8), self.scale)


def make_int4(out: int, in_: int, seed: int = 0) -> Quantized:
    q = torch.randint(-8, 8, (out, in_), generator=generator(3000 + seed))
    return Quantized(q, make_scale(out, in_ // GROUP, seed))


def make_int8(out: int, in_: int, seed: int = 0) -> Quantized:
    q = torch.randint(-127, 128, (out, in_), generator=generator(4000 + seed))
    return Quantized(q, make_scale(out, in_ // GROUP, seed))


# ---- 16-bit block fixed point (csrc/cpu/limbs.h) --------------------------------------------------------------------


def fixed_point(x: Tensor) -> Tensor:
    """The float64 values that the INT4 and INT8 ops multiply with, group by group and entry by entry."""
    values = x.double().clone()
    for token in values:
        for group in token.view(-1, GROUP):
            largest = float(group.abs().max())
            exponent = max(-112, torch.frexp(torch.tensor(largest).double()).exponent.item() - 1)
            step = 2.0 ** (exponent - 14)
            if round(largest / step) > 32639:  # Python rounds ties to even
                step *= 2
            for i in range(GROUP):
                group[i] = round(float(group[i]) / step) * step
    return values


def fixed_point_error(x: Tensor) -> Tensor:
    """Bound of |x - fixed_point(x)|, [tokens, in] float64.

    step = 2^(e - 14) with 2^e <= max|x| < 2^(e + 1) rounds by half a step, 2^(e - 15) <= max|x| / 32768. The doubled
    step is taken when max|x| >= 32639.5 * 2^(e - 14) and rounds by 2^(e - 14) <= max|x| / 32639. A bf16 entry above
    2^-7 of the maximum is a multiple of either step: no error. Below max|x| = 2^-112 the step is 2^-126.
    """
    groups = x.double().view(x.shape[0], x.shape[1] // GROUP, GROUP)
    largest = groups.abs().amax(dim=-1, keepdim=True)
    error = (largest / 32639).clamp(min=2.0**-127).expand_as(groups).clone()
    if x.dtype == torch.bfloat16:
        error[groups.abs() > 2.0**-7 * largest] = 0
    return error.reshape(x.shape)


def bound_limb_sum(x: Tensor, w: Tensor, *, conversion: int = 0) -> Tensor:
    """|error| of the fp32 sums of int4_gemm (conversion=0) or int8_gemm (1) before they are rounded to y's dtype.

    Fixed point: each entry's error times |w|. Sums: the dot product of a group is an exact integer and the product of
    its two scales is exact, so rounding happens when it is turned into a float (INT8 only: `conversion`), in its
    multiply-add into one of 16 partial sums (twice per group where the tier has no fused one) and in the four
    additions that join these: at most 2 ceil(groups / 16) + 4 + conversion roundings on any term's way, each 2^-24 of
    what was summed so far, which the sum of the groups' magnitudes bounds. Underflow: a scale product below 2^-126
    loses 2^-150, times |d| < 2^28 per group.
    """
    groups = x.shape[1] // GROUP
    fixed = fixed_point_error(x) @ w.abs().T
    magnitude = fixed.clone()
    for g in range(groups):
        columns = slice(g * GROUP, (g + 1) * GROUP)
        magnitude += (x[:, columns].double() @ w[:, columns].T).abs()
    roundings = 2 * -(-groups // 16) + 4 + conversion
    return fixed + 1.01 * roundings * 2.0**-24 * magnitude + groups * 2.0**-122


def bound_limb_gemm(
    x: Tensor, w: Tensor, y: Tensor, dtype: torch.dtype, *, conversion: int = 0
) -> Tensor:
    """bound_limb_sum, then one rounding of the result to `dtype` (y: the expected result in float64)."""
    sums = bound_limb_sum(x, w, conversion=conversion)
    return sums + HALF_ULP[dtype] * (y.abs() + sums)


# ---- buffers --------------------------------------------------------------------------------------------------------


class GuardedRows:
    """An output [rows, columns] full of NaN between two guard rows that must stay as they are."""

    def __init__(self, rows: int, columns: int, dtype: torch.dtype) -> None:
        self._all = torch.full((rows + 2, columns), 12345.0, dtype=dtype)
        self.rows = self._all[1:-1]
        self.rows.fill_(torch.nan)

    def assert_guards_untouched(self) -> None:
        assert bool((self._all[0] == 12345.0).all()), "wrote before the first row"
        assert bool((self._all[-1] == 12345.0).all()), "wrote past the last row"


def misaligned(x: Tensor, offset: int) -> Tensor:
    """The bytes of x in a uint8 buffer, at an address that is `offset` past a multiple of 64; keep it alive."""
    raw = x.contiguous().view(torch.uint8).flatten()
    buffer = torch.empty(raw.numel() + 128 + offset, dtype=torch.uint8)
    start = -buffer.data_ptr() % 64 + offset
    view = buffer[start : start + raw.numel()]
    view.copy_(raw)
    return view


class OutputAt:
    """An output full of NaN at an address `offset` past a multiple of 64, between guard bytes."""

    def __init__(self, *shape: int, dtype: torch.dtype, offset: int) -> None:
        self._shape, self._dtype = shape, dtype
        nbytes = math.prod(shape) * dtype.itemsize
        self._buffer = torch.full((nbytes + 256 + offset,), 0xFF, dtype=torch.uint8)
        self._start = 64 + -self._buffer.data_ptr() % 64 + offset
        self._stop = self._start + nbytes
        self.address = self._buffer.data_ptr() + self._start

    def values(self) -> Tensor:
        """What was written, once nothing was written around it."""
        assert bool((self._buffer[: self._start] == 0xFF).all()), "wrote before the output"
        assert bool((self._buffer[self._stop :] == 0xFF).all()), "wrote past the output"
        inside = self._buffer[self._start : self._stop].clone()
        return inside.view(self._dtype).view(self._shape)


def call_native(name: str, *arguments: int) -> None:
    """One op of _native.cpu with a workspace of exactly the asked size, followed by a guard."""
    nbytes = getattr(_native.cpu, name + "_workspace_bytes")(*arguments)
    buffer = torch.full((nbytes + 128,), 0xA5, dtype=torch.uint8)
    start = -buffer.data_ptr() % 64
    getattr(_native.cpu, name)(*arguments, buffer.data_ptr() + start, nbytes)
    assert bool((buffer[start + nbytes :] == 0xA5).all()), "wrote past the workspace"


class threads:
    """Run the with-block on n threads."""

    def __init__(self, n: int) -> None:
        self.n = n

    def __enter__(self) -> None:
        self.before = ops.num_threads()
        ops.set_num_threads(self.n)

    def __exit__(self, *_) -> None:
        ops.set_num_threads(self.before)
