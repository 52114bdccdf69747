"""quant.fp8: block quantization against plain loops, on sizes that are not multiples of the block."""

from __future__ import annotations

import pytest
import torch

from kimi_native.quant import groups
from kimi_native.quant.fp8 import dequantize_block, quantize_block

# One block, one element, truncated edges on either side, the shape of kv_a_proj (576 rows) in small.
SHAPES = [(128, 128), (1, 1), (127, 129), (128, 300), (300, 128), (576, 192), (576, 1), (0, 128)]


def e4m3_values() -> torch.Tensor:
    """Every finite e4m3 value in float64, from the format's definition: 1-4-3 bits, bias 7, 0x7F is NaN."""
    values = []
    for code in range(0x7F):
        exponent, mantissa = code >> 3, code & 7
        values.append(
            mantissa / 8 * 2**-6 if exponent == 0 else (1 + mantissa / 8) * 2.0 ** (exponent - 7)
        )
    positive = torch.tensor(values, dtype=torch.float64)
    return torch.cat([-positive.flip(0), positive])


def ceil_blocks(n: int) -> int:
    return (n + 127) // 128


def random_weight(out: int, in_: int, seed: int = 0) -> torch.Tensor:
    g = torch.Generator().manual_seed(seed)
    rows = torch.logspace(-3, 3, max(out, 1))[:out].unsqueeze(1)
    return torch.randn(out, in_, generator=g) * rows


@pytest.mark.parametrize(("out", "in_"), SHAPES)
def test_dequantize_block_matches_a_naive_loop(out, in_):
    g = torch.Generator().manual_seed(1)
    w8 = (torch.randn(out, in_, generator=g) * 100).clamp(-448, 448).to(torch.float8_e4m3fn)
    scale_inv = torch.rand(ceil_blocks(out), ceil_blocks(in_), generator=g) + 1e-3
    expected = torch.empty(out, in_)
    wide = w8.float()
    for bi in range(ceil_blocks(out)):
        for bj in range(ceil_blocks(in_)):
            block = (slice(128 * bi, 128 * bi + 128), slice(128 * bj, 128 * bj + 128))
            expected[block] = wide[block] * scale_inv[bi, bj]
    values = dequantize_block(w8, scale_inv)
    assert values.dtype == torch.bfloat16
    assert torch.equal(values, expected.to(torch.bfloat16))


@pytest.mark.parametrize(("out", "in_"), SHAPES)
def test_quantize_block_picks_the_nearest_value_of_each_block_grid(out, in_):
    """scale_inv = amax / 448 per block; no e4m3 value is closer than the one chosen, up to the quotient's rounding."""
    w = random_weight(out, in_)
    w8, scale_inv = quantize_block(w)
    assert w8.dtype == torch.float8_e4m3fn
    assert scale_inv.dtype == torch.float32
    assert w8.shape == w.shape
    assert list(scale_inv.shape) == [ceil_blocks(out), ceil_blocks(in_)]
    grid = e4m3_values()
    for bi in range(ceil_blocks(out)):
        for bj in range(ceil_blocks(in_)):
            block = (slice(128 * bi, 128 * bi + 128), slice(128 * bj, 128 * bj + 128))
            scale = float(scale_inv[bi, bj])
            assert scale == float(w[block].abs().max() / 448)
            quotient = w[block].double() / scale
            at = torch.searchsorted(grid, quotient.contiguous()).clamp(1, len(grid) - 1)
            best = torch.minimum((quotient - grid[at - 1]).abs(), (quotient - grid[at]).abs())
            chosen = (quotient - w8[block].double()).abs()
            # 448 and above: amax / scale may exceed 448 by the two roundings of the quotient
            assert (chosen <= best + 2**-23 * quotient.abs()).all()


def test_quantize_block_error_is_within_the_derived_bound():
    w = random_weight(300, 333)
    w8, scale_inv = quantize_block(w)
    scale = scale_inv.double().repeat_interleave(128, 0)[:300].repeat_interleave(128, 1)[:, :333]
    error = (w.double() - w8.double() * scale).abs()
    bound = scale * (2**-4 * w8.double().abs()).clamp_min(2**-10) * (1 + 2**-18)
    worst = (error / bound).max().item()
    assert worst <= 1, f"worst error is {100 * worst:.1f} % of the bound"
    assert worst > 0.5  # the bound is not vacuous


def test_quantize_block_of_zeros_is_finite_and_zero():
    w = torch.zeros(200, 200)
    w[150, 150] = -2.0
    w8, scale_inv = quantize_block(w)
    assert torch.isfinite(scale_inv).all()
    assert (scale_inv > 0).all()
    values = dequantize_block(w8, scale_inv)
    assert values.count_nonzero() == 1
    assert values[150, 150] == -2.0


def test_quantize_block_returns_what_it_made():
    """Weights that are already w8 * scale with a power-of-two scale come back to the bit."""
    g = torch.Generator().manual_seed(4)
    w8 = (torch.randn(130, 140, generator=g) * 60).clamp(-448, 448).to(torch.float8_e4m3fn)
    w8[::128, ::128] = 448.0
    scale_inv = 2.0 ** torch.randint(-9, 3, (2, 2), generator=g).float()
    again8, again = quantize_block(dequantize_block(w8, scale_inv))
    assert torch.equal(again, scale_inv)
    assert torch.equal(again8.float(), w8.float())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_quantize_block_takes_every_float_dtype(dtype):
    w = random_weight(130, 40).to(dtype)
    w8, scale_inv = quantize_block(w)
    expected8, expected_scale = quantize_block(w.float())
    assert torch.equal(w8.float(), expected8.float())
    assert torch.equal(scale_inv, expected_scale)


@pytest.mark.parametrize("chunk", [1, 128 * 200, 1 << 20])
def test_chunk_size_changes_nothing(monkeypatch, chunk):
    w = random_weight(500, 200)
    w8, scale_inv = quantize_block(w)
    values = dequantize_block(w8, scale_inv)
    monkeypatch.setattr(groups, "CHUNK_ELEMENTS", chunk)
    chunked8, chunked = quantize_block(w)
    assert torch.equal(chunked8.float(), w8.float())
    assert torch.equal(chunked, scale_inv)
    assert torch.equal(dequantize_block(w8, scale_inv), values)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_quantize_block_refuses_non_finite_weights(bad):
    w = torch.ones(3, 5)
    w[1, 2] = bad
    with pytest.raises(ValueError, match=r"quantize_block: w must be finite .*\(got 1 NaN"):
        quantize_block(w)


def test_wrong_shapes_and_dtypes_are_refused():
    w8, scale_inv = quantize_block(torch.ones(130, 20))
    with pytest.raises(ValueError, match=r"scale_inv must be \[2, 1\] \(got \[1, 1\]\)"):
        dequantize_block(w8, scale_inv[:1])
    with pytest.raises(ValueError, match=r"weight must be \[out, in\]"):
        dequantize_block(w8[0], scale_inv)
    with pytest.raises(TypeError, match=r"weight must be torch\.float8_e4m3fn"):
        dequantize_block(w8.float(), scale_inv)
    with pytest.raises(TypeError, match=r"scale_inv must be torch\.float32"):
        dequantize_block(w8, scale_inv.bfloat16())
    with pytest.raises(TypeError, match="quantize_block: w must be"):
        quantize_block(torch.ones(2, 2, dtype=torch.int8))
    with pytest.raises(ValueError, match=r"quantize_block: w must be \[out, in\]"):
        quantize_block(torch.ones(2))
