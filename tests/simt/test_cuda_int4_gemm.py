"""int4_pack and int4_gemm of the GPU in the shim, against their definition and float64."""

from __future__ import annotations

import math

import pytest
import torch

from kimi_native import reference
from oracle import (
    Quantized,
    assert_same_bits,
    assert_within,
    bound_limb_gemm,
    fixed_point,
    make_int4,
    make_x,
)
from simt import SCHEDULES, Schedule, simt_only, stats
from simt_ops import run_op

BF16, FP32 = torch.bfloat16, torch.float32
schedules = pytest.mark.parametrize("schedule", SCHEDULES, ids=str)


def int4_pack(w, **options):
    """(tiles, tile_scales) of a Quantized matrix, through the op."""
    packed = w.int4()
    out, in_ = w.q.shape
    count = -(-out // 16) * -(-in_ // 64)
    tiles = torch.full((count, 32, 16), 0xEE, dtype=torch.uint8)
    scales = torch.full((count, 16, 2), math.nan, dtype=BF16)
    run_op(
        "int4_pack",
        weight_packed=packed.weight_packed,
        weight_scale=packed.weight_scale,
        tiles=tiles,
        tile_scales=scales,
        out=out,
        group_size=32,
        **{"in": in_},
        **options,
    )
    return tiles, scales


def int4_gemm(x, packed, out, *, y_dtype=BF16, **options):
    tiles, scales = packed
    y = torch.full((x.shape[0], out), math.nan, dtype=y_dtype)
    run_op(
        "int4_gemm",
        x=x,
        weight_packed=tiles,
        weight_scale=scales,
        y=y,
        x_dtype=x.dtype,
        y_dtype=y_dtype,
        tokens=x.shape[0],
        out=out,
        group_size=32,
        **{"in": x.shape[1]},
        **options,
    )
    return y


@schedules
@pytest.mark.parametrize(("out", "in_"), [(1, 32), (16, 64), (17, 96), (40, 320)])
def test_cuda_int4_pack_puts_every_weight_in_its_place(out, in_, schedule):
    w = make_int4(out, in_)
    tiles, scales = int4_pack(w, schedule=schedule)
    nibbles = torch.zeros(-(-out // 16) * 16, -(-in_ // 64) * 64, dtype=torch.int64)
    nibbles[:out, :in_] = w.q + 8
    wanted_scales = torch.zeros(nibbles.shape[0], nibbles.shape[1] // 32, dtype=BF16)
    wanted_scales[:out, : in_ // 32] = w.scale
    row_tiles, column_tiles = nibbles.shape[0] // 16, nibbles.shape[1] // 64
    tiles = tiles.view(row_tiles, column_tiles, 8, 4, 4, 4)  # g, t, word, byte
    scales = scales.view(row_tiles, column_tiles, 8, 2, 2)  # g, group, half
    for g in range(8):
        for half in (0, 1):
            rows = nibbles[8 * half + g :: 16]
            for t in range(4):
                for word in range(4):
                    for byte in range(4):
                        column = 16 * word + 4 * t + byte
                        stored = tiles[:, :, g, t, word, byte].long() >> (4 * half) & 15
                        assert torch.equal(stored, rows[:, column::64])
            for group in (0, 1):
                expected = wanted_scales[8 * half + g :: 16, group::2]
                assert torch.equal(scales[:, :, g, group, half], expected)


def expected_gemm(x, w):
    packed = w.int4()
    return reference.int4_gemm(
        x.double(), packed.weight_packed, packed.weight_scale.double(), out_dtype=torch.float64
    )


@schedules
@pytest.mark.parametrize(("x_dtype", "y_dtype"), [(BF16, BF16), (FP32, FP32)])
@pytest.mark.parametrize("tokens", [0, 1, 4, 5, 8, 9, 16, 17, 33, 129])
@pytest.mark.parametrize(("out", "in_"), [(1, 32), (17, 96), (33, 1056)])
def test_cuda_int4_gemm_matches_float64(out, in_, tokens, x_dtype, y_dtype, schedule):
    """The CPU's bound holds: a term passes at most 2 ceil(tiles / 8) multiply-adds of its warp and min(7, tiles - 1)
    sums over warps, which is no more than the CPU's 2 ceil(groups / 4) + 2."""
    x, w = make_x(tokens, in_, x_dtype), make_int4(out, in_)
    y = int4_gemm(x, int4_pack(w), out, y_dtype=y_dtype, schedule=schedule)
    expected = expected_gemm(x, w)
    assert_within(y, expected, bound_limb_gemm(x, w.dequantized(), expected, y_dtype))


def test_cuda_int4_gemm_of_many_tokens_matches_float64_past_one_block():
    x, w = make_x(150, 288, FP32), make_int4(150, 288)
    expected = expected_gemm(x, w)
    y = int4_gemm(x, int4_pack(w), 150, y_dtype=FP32, schedule=SCHEDULES[-1])
    assert_within(y, expected, bound_limb_gemm(x, w.dequantized(), expected, FP32))


@pytest.mark.parametrize("tokens", [2, 33])
def test_cuda_int4_gemm_matches_float64_at_a_model_width(tokens):
    x, w = make_x(tokens, 7168), make_int4(32, 7168)
    expected = expected_gemm(x, w)
    y = int4_gemm(x, int4_pack(w), 32)
    assert_within(y, expected, bound_limb_gemm(x, w.dequantized(), expected, BF16))


def of_every_size(x):
    """fp32 tokens whose sizes go from below the smallest normal number to near the largest one."""
    exponents = torch.linspace(-146, 114, x.shape[0]).round()
    return (x.double() * 2.0 ** exponents[:, None].double()).float()


@pytest.mark.parametrize("tokens", [6, 40])
def test_cuda_int4_gemm_multiplies_with_the_same_fixed_point_as_the_cpu(tokens):
    # Products of one group are exact, so fp32 results of a single group tell the values that were multiplied.
    x, w = of_every_size(make_x(tokens, 32, FP32)), make_int4(16, 32)
    y = int4_gemm(x, int4_pack(w), 16, y_dtype=FP32)
    exact = fixed_point(x) @ w.dequantized().T
    assert torch.equal(y, exact.float())


def test_cuda_int4_gemm_is_exact_at_the_ends_of_both_ranges():
    # All weights -8 or 7, all limbs at their ends: the largest integers that a group can give, in both kernels.
    ends = torch.tensor([-32639.0, 32639.0, 32512.0, -32640.0, 127.0, -128.0])
    x = torch.cat([ends[:, None].expand(6, 32), make_x(30, 32, FP32)]).contiguous()
    w = Quantized(torch.tensor([[-8], [7]]).expand(2, 32), torch.tensor([[0.75], [1.5]]).bfloat16())
    exact = (fixed_point(x) @ w.dequantized().T).float()
    assert torch.equal(int4_gemm(x, int4_pack(w), 2, y_dtype=FP32), exact)
    assert torch.equal(int4_gemm(x[:6].contiguous(), int4_pack(w), 2, y_dtype=FP32), exact[:6])


@pytest.mark.parametrize("in_", [32, 96, 544, 1056])
def test_cuda_int4_gemm_row_has_the_same_bits_in_every_kernel(in_):
    x, w = make_x(140, in_, FP32), make_int4(150, in_)
    x[::3] = of_every_size(x[::3])
    packed = int4_pack(w)
    together = int4_gemm(x, packed, 150, y_dtype=FP32)
    for first, last in [(0, 1), (3, 4), (2, 7), (8, 25), (100, 132), (30, 70), (126, 140)]:
        alone = int4_gemm(
            x[first:last].contiguous(), packed, 150, y_dtype=FP32, schedule=Schedule(seed=5)
        )
        assert_same_bits(alone, together[first:last])


@pytest.mark.parametrize("tokens", [6, 40])
@pytest.mark.parametrize("poison", [math.nan, math.inf, -math.inf])
def test_cuda_int4_gemm_spoils_exactly_the_rows_with_a_non_finite_input(poison, tokens):
    x, w = make_x(tokens, 320), make_int4(18, 320)
    x[3, 319] = poison
    y = int4_gemm(x, int4_pack(w), 18)
    assert y[3].isnan().all()
    others = [t for t in range(tokens) if t != 3]
    assert y[others].isfinite().all()


@simt_only
@pytest.mark.parametrize(("tokens", "out"), [(4, 32), (128, 128)])
def test_cuda_int4_gemm_reads_shared_memory_without_bank_conflicts(tokens, out):
    x, w = make_x(tokens, 1024), make_int4(out, 1024)
    int4_gemm(x, int4_pack(w), out)
    counts = stats()
    assert counts["wavefronts"] == counts["ideal_wavefronts"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"group_size": 64}, "group_size must be 32"),
        ({"compute": 1}, r"compute must be exact \(0\) on a GPU \(got 1\)"),
        ({"in": 48}, "in must be a positive multiple of 32"),
        ({"x_dtype": 2}, r"x must be bf16 \(0\) or fp32 \(1\)"),
        ({"tokens": -1}, "non-negative"),
        ({"workspace": 64, "workspace_bytes": 10}, "workspace must have 272 bytes"),
        ({"weight_packed": 8}, "must be 16-byte aligned"),
        ({}, r"x and y must not be null"),
    ],
)
def test_cuda_int4_gemm_refuses_what_does_not_fit(change, message):
    fields = {"tokens": 2, "out": 4, "in": 64, "group_size": 32, "weight_packed": 64}
    fields |= {"weight_scale": 64, "workspace": 64, "workspace_bytes": 1000}
    with pytest.raises(ValueError, match=message):
        run_op("int4_gemm", **(fields | change))
