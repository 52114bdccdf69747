"""int4_quantize against exact rational arithmetic and against quant.int4.quantize, on every tier."""

from __future__ import annotations

import math
from fractions import Fraction

import pytest
import torch

from kimi_native import _native, ops, reference
from kimi_native.quant import int4
from oracle import GROUP, OutputAt, misaligned, threads


def nearest_bf16(x: Fraction) -> Fraction:
    """x > 0 to 8 significant bits, halves to even; normal numbers only."""
    exponent = math.floor(math.log2(x)) - 7
    while x / Fraction(2) ** exponent >= 256:
        exponent += 1
    while x / Fraction(2) ** exponent < 128:
        exponent -= 1
    return round(x / Fraction(2) ** exponent) * Fraction(2) ** exponent


def exact(w: torch.Tensor) -> tuple[list[list[int]], list[list[float]]]:
    """q and scale, group by group in rational numbers; round() of a Fraction goes to the even neighbor."""
    q, scales = [], []
    for row in w.double().tolist():
        q.append([])
        scales.append([])
        for g in range(0, len(row), GROUP):
            group = [Fraction(v) for v in row[g : g + GROUP]]
            largest = max(abs(v) for v in group) / 7
            smallest = Fraction(2) ** -126
            scale = nearest_bf16(largest) if largest > smallest else smallest
            scales[-1].append(float(scale))
            q[-1] += [round(v / scale) for v in group]
    return q, scales


def assert_exact(w: torch.Tensor) -> None:
    q, scales = exact(w)
    weight = ops.int4_quantize(w)
    assert weight.weight_scale.double().tolist() == scales
    assert int4.unpack(weight.weight_packed).tolist() == q


def make_w(out: int, in_: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(out, in_, generator=torch.Generator().manual_seed(seed)).bfloat16()


def every_quotient() -> torch.Tensor:
    """Every significand of a group's largest with every smaller magnitude down to a quotient of 1/4: all halves too.

    The scale has one of 128 significands and depends on nothing but the largest, as do the quotients on exponents.
    """
    significands = torch.arange(128, 256).double()
    smaller = torch.cat([significands * 2.0**-k for k in range(6)])
    smaller = smaller.view(-1, 31 - 7).repeat(128, 1)  # 24 and 7 zeros beside the largest
    largest = significands.repeat_interleave(32)
    w = torch.zeros(len(smaller), GROUP, dtype=torch.float64)
    w[:, 1:25] = torch.where(smaller <= largest[:, None], smaller, smaller / 2)
    w[:, 2:25:2] *= -1
    w[:, 0] = largest
    return w.bfloat16()


def test_int4_quantize_is_exact_on_every_quotient(isa):
    assert_exact(every_quotient())


@pytest.mark.parametrize("exponent", [-133, -130, -126, -124, -60, 0, 60, 120])
def test_int4_quantize_is_exact_at_every_size(isa, exponent):
    """Down to subnormal numbers, whose scale stays 2**-126, and up to the largest."""
    w = make_w(3, 96, seed=exponent + 200).double().clamp(-3.9, 3.9) * 2.0**exponent
    assert_exact(w.bfloat16())


@pytest.mark.parametrize(
    ("out", "in_"), [(0, 32), (1, 32), (1, 480), (1, 512), (1, 544), (7, 96), (130, 1408)]
)
def test_int4_quantize_is_quant_int4_and_reference(isa, out, in_):
    w = make_w(out, in_)
    weight, expected = ops.int4_quantize(w), int4.quantize(w)
    for packed, scale in (
        (expected.weight_packed, expected.weight_scale),
        reference.int4_quantize(w),
    ):
        assert torch.equal(weight.weight_packed, packed)
        assert torch.equal(weight.weight_scale, scale)


def test_int4_quantize_of_zeros(isa):
    weight = ops.int4_quantize(torch.tensor([[0.0, -0.0] * 16]).bfloat16())
    assert weight.weight_scale.double().tolist() == [[2.0**-126]]
    assert weight.weight_packed.tolist() == [[0x88888888 - 2**32] * 4]


def test_int4_quantize_does_not_depend_on_threads(isa):
    w = make_w(300, 512)  # three runs of 2048 groups
    results = []
    for n in (1, 3):
        with threads(n):
            results.append(ops.int4_quantize(w))
    assert torch.equal(results[0].weight_packed, results[1].weight_packed)
    assert torch.equal(results[0].weight_scale, results[1].weight_scale)


def test_int4_quantize_writes_where_it_is_told():
    w = make_w(5, 64)
    out = ops.Int4Weight(
        torch.zeros(5, 8, dtype=torch.int32), torch.zeros(5, 2, dtype=torch.bfloat16)
    )
    assert ops.int4_quantize(w, out=out) is out
    assert torch.equal(out.weight_packed, int4.quantize(w).weight_packed)
    with ops.backend("reference"):
        again = ops.Int4Weight(out.weight_packed.clone().zero_(), out.weight_scale.clone().zero_())
        ops.int4_quantize(w, out=again)
    assert torch.equal(again.weight_packed, out.weight_packed)
    assert torch.equal(again.weight_scale, out.weight_scale)


@pytest.mark.parametrize("offset", [0, 1, 2, 3])
@pytest.mark.parametrize(("out", "in_"), [(1, 32), (3, 544), (5, 96)])
def test_int4_quantize_reads_and_writes_its_own_memory_only_wherever_it_is(isa, out, in_, offset):
    w = make_w(out, in_)
    packed = OutputAt(out, in_ // 8, dtype=torch.int32, offset=offset)
    scale = OutputAt(out, in_ // 32, dtype=torch.bfloat16, offset=offset)
    there = misaligned(w, offset)
    _native.cpu.int4_quantize(there.data_ptr(), packed.address, scale.address, out, in_, 32)
    expected = int4.quantize(w)
    assert torch.equal(packed.values(), expected.weight_packed)
    assert torch.equal(scale.values(), expected.weight_scale)


@pytest.mark.parametrize("bad", [math.nan, -math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("at", [0, 31, 32 * 17 + 5, 3 * 1024 - 1])
def test_int4_quantize_refuses_non_finite_weights(isa, bad, at):
    w = make_w(3, 1024)
    w.view(-1)[at] = bad
    message = r"int4_quantize: w must be finite \(got NaN or infinite values in 1 groups of 32\)"
    for name in ("native", "reference"):
        with ops.backend(name), pytest.raises(ValueError, match=message):
            ops.int4_quantize(w)


@pytest.mark.parametrize(
    ("out", "in_", "group", "message"),
    [(-1, 32, 32, "out must be at least 0"), (1, 48, 32, "in must be a positive multiple of 32"),
     (1, 0, 32, "in must be a positive"), (1, 32, 64, "group_size must be 32"),
     (2**40, 2**40, 32, "fit in 64 bits"), (1, 32, 32, "must not be null")],
)  # fmt: skip
def test_int4_quantize_refuses_impossible_sizes(out, in_, group, message):
    with pytest.raises(ValueError, match=f"int4_quantize: .*{message}"):
        _native.cpu.int4_quantize(0, 0, 0, out, in_, group)


def test_int4_quantize_refuses_bad_input():
    with pytest.raises(TypeError, match=r"int4_quantize: w must be torch\.bfloat16"):
        ops.int4_quantize(torch.ones(1, 32))
    with pytest.raises(ValueError, match=r"in must be a positive multiple of 32 \(got 48\)"):
        ops.int4_quantize(make_w(1, 48))
    with pytest.raises(ValueError, match="w must be contiguous"):
        ops.int4_quantize(make_w(32, 64).T)
    with pytest.raises(ValueError, match=r"out must be \[2, 32\] \(got \[1, 32\]\)"):
        ops.int4_quantize(make_w(2, 32), out=int4.quantize(make_w(1, 32)))
