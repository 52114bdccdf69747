"""rope_append: rotation against float64 and, to the bit, against the published order of roundings; the cache row."""

from __future__ import annotations

import functools
import math

import pytest
import torch

from kimi_native import _native, ops, reference
from oracle import OutputAt, misaligned, threads
from oracle_dense import U, assert_close, assert_same_bits
from oracle_dense import randn as typed_randn

randn = functools.partial(typed_randn, dtype=torch.float32)
BF16, FP32 = torch.bfloat16, torch.float32
CODE = {BF16: 0, FP32: 1}


def make(tokens, heads, rank, rope, *, dtype=BF16, cache_dtype=BF16, q_out_dtype=FP32, rows=64):
    """Arguments of rope_append; q, latent and k_rope are slices of wider NaN-padded buffers, as in the model."""
    q = torch.full((tokens, heads, rope + 5), math.nan, dtype=dtype)
    q[..., 5:] = randn(tokens, heads, rope, dtype=dtype)
    both = torch.full((tokens, rank + rope + 3), math.nan, dtype=dtype)
    both[:, : rank + rope] = randn(tokens, rank + rope, dtype=dtype, seed=1)
    angle = 100 * randn(tokens, rope // 2, seed=2)
    generator = torch.Generator().manual_seed(3)
    return {
        "q": q[..., 5:],
        "latent": both[:, :rank],
        "k_rope": both[:, rank : rank + rope],
        "cos": angle.cos(),
        "sin": angle.sin(),
        "slots": torch.randperm(rows, generator=generator)[:tokens],
        "cache": torch.full((rows // 4, 4, rank + rope), 7.0, dtype=cache_dtype),
        "q_out": torch.full((tokens, heads, rope + 2), 7.0, dtype=q_out_dtype)[..., 2:],
    }


def copies(arguments):
    """The arguments with cache and q_out of their own."""
    return arguments | {"cache": arguments["cache"].clone(), "q_out": arguments["q_out"].clone()}


@pytest.mark.parametrize("dtype", [BF16, FP32])
@pytest.mark.parametrize("cache_dtype", [BF16, FP32])
@pytest.mark.parametrize("q_out_dtype", [BF16, FP32])
@pytest.mark.parametrize(
    ("tokens", "heads", "rank", "rope"),
    [(1, 1, 1, 2), (3, 2, 15, 14), (9, 3, 17, 34), (17, 2, 33, 64), (2, 64, 512, 64)],
)
def test_rope_append_has_the_bits_of_the_reference(
    isa, tokens, heads, rank, rope, dtype, cache_dtype, q_out_dtype
):
    """Three fp32 roundings a pair and one to the dtype leave no freedom: torch's own operations give the same bits."""
    args = make(
        tokens, heads, rank, rope, dtype=dtype, cache_dtype=cache_dtype, q_out_dtype=q_out_dtype
    )
    expected = copies(args)
    reference.rope_append(**expected)
    ops.rope_append(**args)
    assert_same_bits(args["q_out"], expected["q_out"])
    assert_same_bits(args["cache"], expected["cache"])
    untouched = torch.ones(args["cache"].flatten(0, 1).shape[0], dtype=torch.bool)
    untouched[args["slots"]] = False
    assert (args["cache"].flatten(0, 1)[untouched] == 7).all()


@pytest.mark.parametrize("dtype", [BF16, FP32])
def test_rope_append_matches_float64(isa, dtype):
    args = make(11, 4, 32, 64, dtype=dtype, cache_dtype=dtype, q_out_dtype=FP32)
    wide = {n: t.double() if t.is_floating_point() else t for n, t in copies(args).items()}
    reference.rope_append(**wide)
    ops.rope_append(**args)
    rounding = 2.0**-8 if dtype == BF16 else 0.0
    for name in ("q", "k_rope"):
        x = wide[name]
        cos, sin = (wide[n].view(11, *[1] * (x.dim() - 2), 32) for n in ("cos", "sin"))
        even, odd = x[..., 0::2], x[..., 1::2]
        # Two products and their sum, each rounded to fp32, then the result to dtype.
        first = 2 * U * ((even * cos).abs() + (odd * sin).abs())
        second = 2 * U * ((even * sin).abs() + (odd * cos).abs())
        error = torch.stack([first, second], -1).flatten(-2)
        if name == "q":
            actual, expected = args["q_out"], wide["q_out"]
        else:
            actual = args["cache"].flatten(0, 1)[args["slots"]][:, 32:]
            expected = wide["cache"].flatten(0, 1)[args["slots"]][:, 32:]
        assert_close(actual, expected, error * 1.01 + rounding * (expected.abs() + error) + 1e-40)


@pytest.mark.parametrize("dtype", [BF16, FP32])
def test_rope_append_may_rotate_in_place(isa, dtype):
    args = make(5, 3, 20, 38, dtype=dtype, q_out_dtype=dtype)
    expected = copies(args)
    reference.rope_append(**expected)
    ops.rope_append(**(args | {"q_out": args["q"]}))
    assert_same_bits(args["q"], expected["q_out"])
    assert_same_bits(args["cache"], expected["cache"])


@pytest.mark.parametrize("dtype", [BF16, FP32])
@pytest.mark.parametrize("offset", [1, 2, 3])
def test_rope_append_reads_and_writes_misaligned_memory(isa, offset, dtype):
    tokens, heads, rank, rope, rows = 3, 2, 15, 14, 8
    args = make(
        tokens, heads, rank, rope, dtype=dtype, cache_dtype=dtype, q_out_dtype=dtype, rows=rows
    )
    args |= {name: args[name].contiguous() for name in ("q", "latent", "k_rope", "q_out")}
    there = [misaligned(args[name], offset) for name in ("q", "latent", "k_rope")]
    q_out = OutputAt(tokens, heads, rope, dtype=dtype, offset=offset)
    cache = OutputAt(rows, rank + rope, dtype=dtype, offset=offset)
    _native.cpu.rope_append(
        *[t.data_ptr() for t in there],
        *[args[name].data_ptr() for name in ("cos", "sin", "slots")],
        q_out.address,
        cache.address,
        *[CODE[dtype]] * 3,
        *(tokens, heads, rank, rope, rows),
        *(heads * rope, rope, heads * rope, rope, rank, rope),
    )
    ops.rope_append(**args)
    assert_same_bits(q_out.values(), args["q_out"])
    written = args["slots"]
    assert_same_bits(cache.values()[written], args["cache"].flatten(0, 1)[written])
    others = [r for r in range(rows) if r not in written.tolist()]
    assert cache.values()[others].isnan().all()


def test_rope_append_does_not_depend_on_threads(isa):
    results = []
    for n in (1, 2, 4):
        args = make(64, 16, 64, 64)
        with threads(n):
            ops.rope_append(**args)
        results.append((args["q_out"], args["cache"]))
    for q_out, cache in results[1:]:
        assert_same_bits(q_out, results[0][0])
        assert_same_bits(cache, results[0][1])


def test_rope_append_token_does_not_depend_on_the_others(isa):
    args = make(20, 3, 20, 64)
    alone = copies(args)
    ops.rope_append(**args)
    for t in range(20):
        names = ("q", "latent", "k_rope", "cos", "sin", "slots", "q_out")
        ops.rope_append(**{n: alone[n][t : t + 1] for n in names}, cache=alone["cache"])
    assert_same_bits(args["q_out"], alone["q_out"])
    assert_same_bits(args["cache"], alone["cache"])


def test_rope_append_keeps_nan_in_its_token(isa):
    args = make(4, 2, 16, 8)
    clean = copies(args)
    ops.rope_append(**clean)
    args["q"][1, 0, 3] = args["latent"][2, 5] = math.nan
    ops.rope_append(**args)
    assert args["q_out"].isnan().nonzero().tolist() == [[1, 0, 2], [1, 0, 3]]
    rows = args["cache"].flatten(0, 1)
    assert rows.isnan().nonzero().tolist() == [[int(args["slots"][2]), 5]]
    assert_same_bits(args["q_out"][[0, 2, 3]], clean["q_out"][[0, 2, 3]])


def test_rope_append_of_no_token_does_nothing(isa):
    args = make(0, 2, 16, 8)
    ops.rope_append(**args)
    assert (args["cache"] == 7).all()


@pytest.mark.parametrize("slot", [-1, 64, 2**40])
def test_rope_append_refuses_a_slot_outside_the_cache_before_writing(slot):
    args = make(3, 2, 16, 8)
    args["slots"][2] = slot
    with pytest.raises(
        ValueError, match=rf"rope_append: slots must be 0 to .* \(got slots\[2\]={slot}\)"
    ):
        ops.rope_append(**args)
    assert (args["cache"] == 7).all()
    assert (args["q_out"] == 7).all()


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"q": randn(3, 2, 8).half()}, TypeError, "q must be"),
        ({"q": randn(3, 16, dtype=BF16)}, ValueError, r"q must be \[tokens, heads, rope\]"),
        ({"latent": randn(3, 16)}, TypeError, "latent must be"),
        ({"latent": randn(3, 15, dtype=BF16)}, ValueError, "latent must be"),
        ({"latent": randn(16, 3, dtype=BF16).T}, ValueError, "latent must be"),
        ({"k_rope": randn(2, 8, dtype=BF16)}, ValueError, "k_rope must be"),
        ({"cos": randn(3, 8)}, ValueError, "cos must be"),
        ({"sin": randn(3, 4).double()}, TypeError, "sin must be"),
        ({"slots": torch.zeros(3, dtype=torch.int32)}, TypeError, "slots must be"),
        ({"cache": randn(4, 4, 24).half()}, TypeError, "cache must be"),
        ({"q_out": randn(3, 2, 9)}, ValueError, "q_out must be"),
        ({"q": randn(3, 2, 7, dtype=BF16)}, ValueError, "must be"),
    ],
)
def test_rope_append_refuses_what_does_not_fit(change, error, message):
    with pytest.raises(error, match=f"rope_append: .*{message}"):
        ops.rope_append(**(make(3, 2, 16, 8) | change))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tokens": -1}, "tokens, cache_rows >= 0"),
        ({"heads": 0}, "heads, kv_lora_rank >= 1"),
        ({"rope": 3}, "qk_rope_head_dim must be even"),
        ({"stride": -1}, "strides must not be negative"),
        ({"stride": 1 << 62}, "fit in 64 bits"),
        ({"rows": 1 << 62}, "fit in 64 bits"),
        ({}, "no pointer may be null"),
    ],
)
def test_rope_append_refuses_impossible_sizes(changes, message):
    sizes = {"tokens": 2, "heads": 2, "rank": 16, "rope": 8, "rows": 4, "stride": 8} | changes
    strides = [sizes.pop("stride")] + [8] * 5
    with pytest.raises(ValueError, match=f"rope_append: .*{message}"):
        _native.cpu.rope_append(*[0] * 8, 0, 0, 0, *sizes.values(), *strides)
