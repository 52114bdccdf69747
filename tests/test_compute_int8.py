"""compute="int8" of the INT4 ops: activations in 8 bits per 32 entries, against float64, on every tier."""

from __future__ import annotations

import functools
import math

import numpy as np
import pytest
import torch

import kimi_native as kn
from grouped import COUNTS, expert_of_row, in_order, make_dispatch, make_experts, pack
from kimi_native import ops, reference
from kimi_native.cache import LatentCache
from kimi_native.loader import load_model
from kimi_native.quant.modules import Int4Experts, Int4Linear
from made_checkpoints import make_tiny_folders
from oracle import (
    GROUP,
    HALF_ULP,
    Quantized,
    assert_same_bits,
    assert_within,
    make_int4,
    make_x,
    threads,
)

BF16, FP32 = torch.bfloat16, torch.float32
ROW_COUNTS = [1, 2, 3, 4, 5, 8, 17, 25, 65]
INT8 = {"compute": "int8"}


def in_bytes(x: torch.Tensor) -> torch.Tensor:
    """step * v in float64, v and step as documented: float32 throughout, group by group in numpy."""
    values = x.double().clone()
    f32 = np.float32
    for token in values:
        for group in token.view(-1, GROUP):
            entries = group.numpy().astype(f32)
            largest = max(np.abs(entries).max(), f32(2.0**-100))
            v = np.rint(entries * (f32(127) / largest))
            assert np.abs(v).max() <= 127
            group.copy_(torch.from_numpy(v.astype(np.float64) * float(largest / f32(127))))
    return values


def byte_error(x: torch.Tensor) -> torch.Tensor:
    """Bound of |x - in_bytes(x)|: half a step, m / 254, and the float32 roundings of reciprocal, product and step, each
    2^-24 of at most 127 steps."""
    groups = x.double().view(x.shape[0], -1, GROUP)
    step = groups.abs().amax(dim=-1, keepdim=True).clamp(min=2.0**-100) / 127
    return (step * (0.5 + 4 * 127 * 2.0**-24)).expand_as(groups).reshape(x.shape)


def bound_sum(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    """|error| of the sums for activations in_bytes(x) = step * v, before they are rounded to y's dtype.

    A group's dot product is an exact integer below 2^24. Rounded are the product of its two scales, its multiply-add
    (twice without a fused one) and the four additions that join the 16 partial sums, each by 2^-24 of what was summed
    so far. A scale product below 2^-126 loses 2^-150, times at most 2^15 per group.
    """
    groups = x.shape[1] // GROUP
    magnitude = torch.zeros(x.shape[0], w.shape[0], dtype=torch.float64)
    for g in range(groups):
        columns = slice(g * GROUP, (g + 1) * GROUP)
        magnitude += (x[:, columns] @ w[:, columns].T).abs()
    roundings = 2 * -(-groups // 16) + 5
    return 1.01 * roundings * 2.0**-24 * magnitude + groups * 2.0**-134


@functools.cache  # the same for every tier
def case(tokens: int, out: int, in_: int, x_dtype: torch.dtype, out_dtype: torch.dtype):
    x, w = make_x(tokens, in_, x_dtype), make_int4(out, in_)
    taken, values = in_bytes(x), w.dequantized()
    expected = taken @ values.T
    sums = bound_sum(taken, values)
    return x, w, expected, sums + HALF_ULP[out_dtype] * (expected.abs() + sums)


# ---- one matrix -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtypes", [(BF16, BF16), (FP32, FP32), (BF16, FP32)])
@pytest.mark.parametrize(
    ("out", "in_"), [(1, 32), (3, 64), (4, 96), (63, 160), (65, 544), (17, 1056)]
)
def test_int4_gemm_in_bytes_is_the_product_of_the_documented_activations(isa, out, in_, dtypes):
    x, w, expected, bound = case(max(ROW_COUNTS), out, in_, *dtypes)
    for tokens in ROW_COUNTS:
        actual = ops.int4_gemm(x[:tokens], w.int4(), out_dtype=dtypes[1], **INT8)
        assert actual.dtype == dtypes[1]
        assert_within(actual, expected[:tokens], bound[:tokens])


@pytest.mark.parametrize(("tokens", "out", "in_"), [(1, 2048, 7168), (3, 512, 2048)])
def test_int4_gemm_in_bytes_is_within_half_a_step_of_the_exact_product(isa, tokens, out, in_):
    """The bound a user may count on: the true product of x, and what rounding x to bytes may add."""
    x, w, _, _ = case(tokens, out, in_, BF16, FP32)
    values = w.dequantized()
    rounding = byte_error(x) @ values.abs().T
    sums = bound_sum(in_bytes(x), values)
    actual = ops.int4_gemm(x, w.int4(), out_dtype=FP32, **INT8)
    bound = rounding + sums + 2.0**-24 * (x.double() @ values.T).abs()
    assert_within(actual, x.double() @ values.T, bound)
    exact = ops.int4_gemm(x, w.int4(), out_dtype=FP32)
    assert (actual - exact).abs().max() > 100 * sums.max()  # it is not the exact op


def test_int4_gemm_in_bytes_of_whole_numbers_is_exact(isa):
    """The largest of every group is 127, so the step is 1."""
    g = torch.Generator().manual_seed(3)
    x = torch.randint(-127, 128, (9, 320), generator=g).float()
    x[:, ::GROUP] = 127
    q = torch.randint(-8, 8, (20, 320), generator=g)
    w = Quantized(q, torch.ones(20, 10).bfloat16())
    for tokens in (1, 2, 9):
        y = ops.int4_gemm(x[:tokens], w.int4(), **INT8)
        assert torch.equal(y.double(), x[:tokens].double() @ q.double().T)


def test_int4_gemm_in_bytes_of_zeros_tiny_and_huge_activations(isa):
    w = make_int4(5, 96)
    x = torch.zeros(4, 96)
    x[1, 7] = 1e-40  # below the smallest step: taken as zero
    x[2], x[3] = 2.0**-100, 3e38
    x[3, 1::2] = -3e38
    y = ops.int4_gemm(x, w.int4(), **INT8).double()
    assert not y[:2].any()
    taken = in_bytes(x)
    expected = taken @ w.dequantized().T
    assert_within(y, expected, bound_sum(taken, w.dequantized()) + 2.0**-24 * expected.abs())


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("tokens", [1, 2, 5])
def test_int4_gemm_in_bytes_passes_non_finite_activations_on(isa, tokens, bad):
    x = make_x(tokens, 160)
    x[-1, 37] = bad
    y = ops.int4_gemm(x, make_int4(19, 160).int4(), **INT8)
    assert y[-1].isnan().all()
    assert y[:-1].isfinite().all()


def test_int4_gemm_in_bytes_of_a_row_depends_on_nothing_else(isa):
    x, w = make_x(70, 1056), make_int4(67, 1056).int4()
    together = ops.int4_gemm(x, w, **INT8)
    for n in (1, 3):
        with threads(n):
            for rows in (slice(0, 1), slice(4, 6), slice(9, 12), slice(3, 70)):
                assert_same_bits(ops.int4_gemm(x[rows], w, **INT8), together[rows])


def test_int4_gemm_in_bytes_has_the_same_bits_on_every_vector_tier(simd_isas):
    x, w = make_x(17, 544, FP32), make_int4(35, 544).int4()
    results = []
    for name in simd_isas:
        ops.force_isa(name)
        results += [ops.int4_gemm(x, w, **INT8), ops.int4_gemm(x[:1], w, **INT8)]
    for i, y in enumerate(results):
        assert_same_bits(y, results[i % 2])


# ---- experts --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("counts", COUNTS)
def test_int4_grouped_gemm_in_bytes_is_int4_gemm_of_each_expert(isa, counts):
    rows, out, in_ = sum(counts), 35, 160
    experts = make_experts(len(counts), out, in_)
    x, dispatch = make_x(rows, in_), in_order(make_dispatch(counts, 1))
    y = ops.int4_grouped_gemm(x, dispatch, pack(experts, counts), out_dtype=FP32, **INT8)
    for row, e in enumerate(expert_of_row(counts)):
        alone = ops.int4_gemm(x[row : row + 1], experts[e].int4(), out_dtype=FP32, **INT8)
        assert_same_bits(y[row : row + 1], alone)


@pytest.mark.parametrize("counts", COUNTS)
def test_int4_grouped_swiglu_in_bytes_multiplies_the_documented_activations(isa, counts):
    """silu(g) u in fp32 of the two products: slope of silu below 1.1, exp and the products a few 2^-24."""
    out, in_, x_rows = 35, 160, 7
    gate, up = (make_experts(len(counts), out, in_, seed=s) for s in (1, 2))
    x, dispatch = make_x(x_rows, in_), make_dispatch(counts, x_rows)
    packed = pack(gate, counts), pack(up, counts)
    y = ops.int4_grouped_swiglu(x, dispatch, *packed, out_dtype=FP32, **INT8)
    taken = in_bytes(x)[dispatch.token_index.long()]
    for row, e in enumerate(expert_of_row(counts)):
        t = taken[row : row + 1]
        (g, g_error), (u, u_error) = (
            (t @ w.T, bound_sum(t, w)) for w in (gate[e].dequantized(), up[e].dequantized())
        )
        silu = g * torch.sigmoid(g)
        bound = 1.1 * g_error * u.abs() + silu.abs() * u_error + g_error * u_error
        bound += 16 * 2.0**-24 * (silu * u).abs() + 2.0**-120
        assert_within(y[row : row + 1], silu * u, bound)


# ---- around it ------------------------------------------------------------------------------------------------------


def test_reference_activations_are_the_documented_ones():
    x = make_x(3, 96)
    assert torch.equal(reference.activations(x, "exact"), x)
    taken = in_bytes(x)
    assert (reference.activations(x, "int8") - taken).abs().max() <= 2.0**-23 * taken.abs().max()
    assert ((x.double() - taken).abs() <= byte_error(x)).all()
    with pytest.raises(ValueError, match=r"compute must be exact or int8 \(got int4\)"):
        reference.activations(x, "int4")


def test_compute_is_recorded_and_refused_by_name():
    x, w = make_x(1, 96), make_int4(5, 96).int4()
    with ops.record() as recording:
        y = ops.int4_gemm(x, w, **INT8)
    x.copy_(make_x(1, 96, seed=4))
    recording.replay()
    assert_same_bits(y, ops.int4_gemm(x, w, **INT8))
    for name in ("native", "reference"):
        with (
            ops.backend(name),
            pytest.raises(ValueError, match=r"compute must be exact or int8 \(got fast\)"),
        ):
            ops.int4_gemm(x, w, compute="fast")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_tiny_folders(tmp_path_factory.mktemp("tiny"))["int4"]


def logits(folder, backend: str = "native", **options) -> torch.Tensor:
    model, _ = load_model(folder, max_context=64, dtype="float32", **options)
    cache = LatentCache(model.config, max_tokens=64, dtype=FP32)
    seq = cache.new_sequence()
    with ops.backend(backend):
        rows = [model.prefill(torch.arange(20), cache, seq)]
        return torch.stack([*rows, model.decode(torch.tensor([7]), cache, [seq])[0]])


@pytest.mark.parametrize("dense", ["bf16", "int4"])
def test_load_compute_int8_reaches_every_int4_matrix(folder, dense):
    model, _ = load_model(folder, dense=dense, **INT8)
    modules = [m for m in model.modules() if isinstance(m, Int4Linear | Int4Experts)]
    assert {m.compute for m in modules} == {"int8"}
    assert any(isinstance(m, Int4Linear) for m in modules) == (dense == "int4")
    exact, rounded = logits(folder, dense=dense), logits(folder, dense=dense, **INT8)
    spread = exact.std()
    # A random router changes its mind at little: single logits may move by more than their spread.
    assert 1e-4 * spread < (rounded - exact).square().mean().sqrt() < 0.5 * spread
    # Rounding to bytes turns the last bit of an activation into a whole step now and then.
    assert (rounded - logits(folder, "reference", dense=dense, **INT8)).abs().max() < 0.1 * spread


def test_load_compute_int8_generates_alone_as_in_a_batch(folder):
    model = kn.load(folder, max_context=128, max_batch=3, **INT8)
    options = {"raw_prompt": True, "max_tokens": 8, "seed": 5}
    prompts = ["Hello", "A", "Once upon a time"]
    together = model.generate(prompts, **options)
    assert [r.ids for r in together] == [model.generate(p, **options).ids for p in prompts]


def test_load_refuses_another_compute(folder):
    with pytest.raises(kn.RequestError, match=r"compute must be one of exact, int8 \(got fp8\)"):
        load_model(folder, compute="fp8")
