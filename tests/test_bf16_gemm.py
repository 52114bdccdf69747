"""bf16_gemm: every tier against float64, any size, stride and alignment; one order of summation for all."""

from __future__ import annotations

import pytest
import torch

from kimi_native import _native, ops, reference
from oracle import OutputAt, misaligned
from oracle_dense import (
    Guarded,
    Workspace,
    assert_close,
    assert_same_bits,
    bound_dot,
    randn,
)

BF16, FP32 = torch.bfloat16, torch.float32
CODE = {BF16: 0, FP32: 1}


def expect(x, weight, out_dtype):
    """float64 result and bound of any of the op's forms."""
    x, weight = x.double(), weight.double()
    y = reference.bf16_gemm(x, weight, out_dtype=torch.float64)
    absolute = reference.bf16_gemm(x.abs(), weight.abs(), out_dtype=torch.float64)
    return y, bound_dot(absolute, x.shape[-1], y, out_dtype, ops.active_isa())


def check(x, weight, out_dtype=None):
    y = ops.bf16_gemm(x, weight, out_dtype=out_dtype)
    assert y.dtype == (out_dtype or x.dtype)
    assert_close(y, *expect(x, weight, y.dtype))
    return y


@pytest.fixture
def threads():
    """Sets the number of threads; restored afterwards."""
    before = ops.num_threads()
    yield ops.set_num_threads
    ops.set_num_threads(before)


# ---- values ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("in_", [1, 15, 16, 17, 96, 576])
@pytest.mark.parametrize("out", [1, 3, 4, 5, 15, 16, 17, 33])
def test_bf16_gemm_matches_reference_at_any_matrix_size(isa, out, in_):
    for tokens in (1, 7):
        check(randn(tokens, in_, dtype=BF16), randn(out, in_, dtype=BF16, seed=1))


@pytest.mark.parametrize(
    "tokens", [1, 2, 3, 4, 5, 6, 7, 11, 12, 13, 16, 17, 31, 33, 48, 64, 65, 270]
)
def test_bf16_gemm_matches_reference_at_any_number_of_tokens(isa, tokens):
    check(randn(tokens, 200, dtype=BF16), randn(37, 200, dtype=BF16, seed=1))


@pytest.mark.parametrize("x_dtype", [BF16, FP32])
@pytest.mark.parametrize("out_dtype", [BF16, FP32])
def test_bf16_gemm_matches_reference_in_every_dtype(isa, x_dtype, out_dtype):
    x = randn(9, 130, dtype=FP32).to(x_dtype)  # fp32 activations have all of their bits
    check(x, randn(21, 130, dtype=BF16, seed=1), out_dtype)


@pytest.mark.parametrize("tokens", [1, 40, 100])
def test_bf16_gemm_matches_reference_at_a_model_shape(isa, tokens):
    # Wide enough for two blocks of tokens (their fp32 copy outgrows half of L2) and, on tiles, two pieces of columns.
    check(randn(tokens, 7168, dtype=BF16), randn(96, 7168, dtype=BF16, seed=1, scale=0.02))


def test_bf16_gemm_of_no_tokens_is_empty(isa):
    assert ops.bf16_gemm(randn(0, 32, dtype=BF16), randn(5, 32, dtype=BF16)).shape == (0, 5)
    y = ops.bf16_gemm(randn(0, 3, 32, dtype=BF16), randn(3, 5, 32, dtype=BF16))
    assert y.shape == (0, 3, 5)


# ---- heads, strides, alignment --------------------------------------------------------------------------------------


@pytest.mark.parametrize("heads", [1, 3, 20])
@pytest.mark.parametrize("tokens", [1, 8])
def test_bf16_gemm_matches_reference_per_head(isa, tokens, heads):
    x = randn(tokens, heads, 128, dtype=BF16)
    check(x, randn(heads, 96, 128, dtype=BF16, seed=1))


def test_bf16_gemm_reads_strided_activations_only(isa):
    # q_nope of [tokens, heads, nope + rope]: what lies between the rows is never read.
    q = randn(5, 3, 48, dtype=BF16)
    q[..., 32:] = float("nan")
    check(q[..., :32], randn(3, 24, 32, dtype=BF16, seed=1))
    rows = randn(10, 32, dtype=FP32)
    rows[1::2] = float("nan")
    check(rows[::2], randn(24, 32, dtype=BF16, seed=1))


def test_bf16_gemm_reads_strided_heads_only(isa):
    # The value half of kv_b viewed [heads, nope + v, kv_lora_rank].
    kv_b = randn(3, 24 + 16, 64, dtype=BF16, seed=1)
    kv_b[:, :24] = float("nan")
    check(randn(5, 3, 64, dtype=BF16), kv_b[:, 24:])


def test_bf16_gemm_takes_heads_that_share_x_or_weight(isa):
    x, w = randn(5, 1, 64, dtype=BF16), randn(1, 24, 64, dtype=BF16, seed=1)
    check(x.expand(5, 3, 64), randn(3, 24, 64, dtype=BF16, seed=2))
    check(randn(5, 3, 64, dtype=BF16), w.expand(3, 24, 64))


@pytest.mark.parametrize("offset", [1, 2, 31, 63])
def test_bf16_gemm_takes_any_alignment(isa, offset):
    # A weight in a mapped file starts at any byte, odd ones included.
    w = randn(19, 80, dtype=BF16, seed=1)
    x = randn(3, 80, dtype=FP32)
    file = torch.zeros(w.numel() * 2 + 64, dtype=torch.uint8)
    file[offset : offset + w.numel() * 2] = w.flatten().view(torch.uint8)
    y = Guarded(3, 19, dtype=FP32)
    run_native(x, file.data_ptr() + offset, y, tokens=3, heads=1, out=19, in_=80)
    assert_close(y.tensor, *expect(x, w, FP32))


@pytest.mark.parametrize("dtype", [BF16, FP32])
@pytest.mark.parametrize("offset", [1, 2, 3])
def test_bf16_gemm_reads_and_writes_misaligned_memory(isa, offset, dtype):
    x, w = randn(9, 2, 77, dtype=dtype), randn(2, 19, 77, dtype=BF16, seed=1)
    y = OutputAt(9, 2, 19, dtype=dtype, offset=offset)
    x_there, w_there = misaligned(x, offset), misaligned(w, offset)
    sizes = (9, 2, 19, 77, 2 * 77, 77, 19 * 77, 2 * 19, 19)
    arguments = (x_there.data_ptr(), w_there.data_ptr(), y.address, CODE[dtype], CODE[dtype])
    workspace = Workspace(_native.cpu.bf16_gemm_workspace_bytes(*arguments, *sizes))
    _native.cpu.bf16_gemm(*arguments, *sizes, workspace.address, workspace.nbytes)
    assert_same_bits(y.values(), ops.bf16_gemm(x, w))


# ---- one order of summation -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [BF16, FP32])
def test_bf16_gemm_row_does_not_depend_on_the_other_tokens(isa, dtype):
    x, w = randn(40, 1100, dtype=dtype), randn(21, 1100, dtype=BF16, seed=1)
    together = ops.bf16_gemm(x, w, out_dtype=FP32)
    for count in (1, 2, 3, 5, 6, 7, 13):
        for first in (0, 17):
            some = ops.bf16_gemm(x[first : first + count], w, out_dtype=FP32)
            assert_same_bits(some, together[first : first + count])


@pytest.mark.parametrize("dtype", [BF16, FP32])
def test_bf16_gemm_row_keeps_its_bits_among_any_number_of_tokens(isa, dtype):
    # 100 tokens of 4001 columns: several groups and pieces of columns in every tier.
    x, w = randn(100, 4001, dtype=dtype), randn(35, 4001, dtype=BF16, seed=1)
    together = ops.bf16_gemm(x, w, out_dtype=FP32)
    for count in range(1, 41):
        first = 100 - count if count % 2 else 0
        some = ops.bf16_gemm(x[first : first + count], w, out_dtype=FP32)
        assert_same_bits(some, together[first : first + count])


def test_bf16_gemm_row_does_not_depend_on_the_other_outputs_or_heads(isa):
    x, w = randn(7, 3, 75, dtype=BF16), randn(3, 37, 75, dtype=BF16, seed=1)
    together = ops.bf16_gemm(x, w, out_dtype=FP32)
    for h in range(3):
        for first, last in ((0, 1), (5, 8), (30, 37)):
            alone = ops.bf16_gemm(x[:, h], w[h, first:last], out_dtype=FP32)
            assert_same_bits(alone, together[:, h, first:last])


def test_bf16_gemm_does_not_depend_on_threads(isa, threads):
    x, w = randn(17, 2, 300, dtype=BF16), randn(2, 333, 300, dtype=BF16, seed=1)
    results = []
    for n in (1, 2, 4):
        threads(n)
        results.append(ops.bf16_gemm(x, w, out_dtype=FP32))
    assert_same_bits(results[0], results[1])
    assert_same_bits(results[0], results[2])


def test_bf16_gemm_rounds_its_fp32_result_once(isa):
    x, w = randn(6, 512, dtype=BF16), randn(33, 512, dtype=BF16, seed=1)
    assert_same_bits(ops.bf16_gemm(x, w), ops.bf16_gemm(x, w, out_dtype=FP32).to(BF16))


def test_bf16_gemm_of_bf16_equals_that_of_the_same_values_in_fp32(isa):
    x, w = randn(6, 100, dtype=BF16), randn(33, 100, dtype=BF16, seed=1)
    assert_same_bits(
        ops.bf16_gemm(x, w, out_dtype=FP32), ops.bf16_gemm(x.float(), w, out_dtype=FP32)
    )


# ---- special values -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [BF16, FP32])
def test_bf16_gemm_keeps_nan_and_inf_in_their_rows(isa, dtype):
    x, w = randn(8, 50, dtype=dtype), randn(18, 50, dtype=BF16, seed=1)
    clean = ops.bf16_gemm(x, w)
    x[3, 49], x[5, 0] = float("nan"), float("inf")
    w[7, 20] = float("nan")
    y = ops.bf16_gemm(x, w)
    assert y[3].isnan().all()
    assert y[:, 7].isnan().all()
    others = [c for c in range(18) if c != 7]
    assert y[5, others].isinf().all()
    kept = [t for t in range(8) if t not in (3, 5)]
    assert_same_bits(y[kept][:, others], clean[kept][:, others])


def test_bf16_gemm_of_fp32_keeps_an_infinite_weight(isa):
    # Limbs of x of both signs times infinity must not meet as inf - inf.
    x, w = randn(8, 50, dtype=FP32), randn(18, 50, dtype=BF16, seed=1)
    w[7, 20] = float("inf")
    assert_same_bits(ops.bf16_gemm(x, w)[:, 7].float(), x[:, 20] * float("inf"))


def test_bf16_gemm_shows_a_nan_whose_upper_half_is_infinity(isa):
    x, w = randn(3, 50, dtype=FP32), randn(18, 50, dtype=BF16, seed=1)
    x[1, 30] = torch.tensor(0x7F800001, dtype=torch.int32).view(FP32)
    y = ops.bf16_gemm(x, w)
    assert y[1].isnan().all()
    assert y[[0, 2]].isfinite().all()


def test_bf16_gemm_loses_no_bit_of_fp32_activations(isa):
    """A product with the identity: huge values, whose upper half would round to infinity, and small ones."""
    x = randn(9, 70, dtype=FP32) * 2.0 ** torch.arange(-100, 110, 3)
    x[:, :4] = torch.tensor([3.4028234663852886e38, -3.4e38, 3.3961775292304957e38, 2.0**-100])
    assert_same_bits(ops.bf16_gemm(x, torch.eye(70, dtype=BF16)), x)


def test_bf16_gemm_of_huge_activations_stays_within_its_bound(isa):
    x, w = randn(9, 70, dtype=FP32), randn(21, 70, dtype=BF16, seed=1, scale=2.0**-12)
    check(x.sign() * 3.4028234663852886e38 * (1 - x.abs() / 64), w)


@pytest.mark.parametrize("tokens", [1, 5, 40])
def test_bf16_gemm_takes_subnormal_numbers_for_zero_on_tiles(isa, tokens):
    """So do dot instructions, which may keep some; other tiers keep all."""
    x = torch.full((tokens, 32), 2.0**-130, dtype=BF16)
    w = torch.full((3, 32), 2.0**100, dtype=BF16)
    allowed = {"amx": {0.0}, "avx512_bf16": {0.0, 2.0**-25}}.get(isa, {2.0**-25})
    assert set(ops.bf16_gemm(x, w).flatten().tolist()) <= allowed
    assert set(ops.bf16_gemm(w, x).flatten().tolist()) <= allowed


# ---- the native door ------------------------------------------------------------------------------------------------


def run_native(x, weight, y, *, tokens, heads, out, in_, strides=None, workspace=None):
    """_native.cpu.bf16_gemm on addresses, with a workspace of exactly the size asked for."""
    x_token, x_head, weight_head = strides or (heads * in_, in_, out * in_)
    y_token, y_head = (heads * out, out) if y.tensor.dim() == 3 else (out, 0)
    arguments = (
        x.data_ptr(),
        weight,
        y.address,
        CODE[x.dtype],
        CODE[y.tensor.dtype],
        tokens,
        heads,
        out,
        in_,
        x_token,
        x_head,
        weight_head,
        y_token,
        y_head,
    )
    if workspace is None:
        workspace = Workspace(_native.cpu.bf16_gemm_workspace_bytes(*arguments))
    _native.cpu.bf16_gemm(*arguments, workspace.address, workspace.nbytes)
    workspace.assert_untouched_outside()
    y.assert_untouched_outside()


@pytest.mark.parametrize("out_dtype", [BF16, FP32])
@pytest.mark.parametrize(
    ("tokens", "heads", "out", "in_"),
    [(1, 1, 1, 1), (7, 2, 19, 33), (13, 1, 5, 17), (4, 3, 48, 64)],
)
def test_bf16_gemm_writes_only_its_output(isa, tokens, heads, out, in_, out_dtype):
    x, w = randn(tokens, heads, in_, dtype=BF16), randn(heads, out, in_, dtype=BF16, seed=1)
    y = Guarded(tokens, heads, out, dtype=out_dtype)
    run_native(x, w.data_ptr(), y, tokens=tokens, heads=heads, out=out, in_=in_)
    assert_close(y.tensor, *expect(x, w, out_dtype))


@pytest.mark.parametrize("dtype", [BF16, FP32])
def test_bf16_gemm_writes_into_a_strided_output(isa, dtype):
    """As the absorbed query does: the front of a wider buffer, whose rest must stay as it is."""
    x, w = randn(5, 3, 40, dtype=BF16), randn(3, 24, 40, dtype=BF16, seed=1)
    wide = torch.full((5, 3, 32), 7.0, dtype=dtype)
    result = ops.bf16_gemm(x, w, out=wide[..., 4:28])
    assert result.data_ptr() == wide[..., 4:28].data_ptr()
    assert_same_bits(wide[..., 4:28], ops.bf16_gemm(x, w, out_dtype=dtype))
    assert (wide[..., :4] == 7).all()
    assert (wide[..., 28:] == 7).all()


def test_bf16_gemm_refuses_an_output_that_does_not_fit():
    x, w = randn(5, 40, dtype=BF16), randn(24, 40, dtype=BF16, seed=1)
    with pytest.raises(ValueError, match=r"bf16_gemm: out must be \[5, 24\]"):
        ops.bf16_gemm(x, w, out=torch.empty(5, 23))
    with pytest.raises(ValueError, match=r"bf16_gemm: out must be .* contiguous rows"):
        ops.bf16_gemm(x, w, out=torch.empty(24, 5).T)
    with pytest.raises(TypeError, match="bf16_gemm: out must be"):
        ops.bf16_gemm(x, w, out=torch.empty(5, 24, dtype=torch.float16))


def native_case(**changes):
    sizes = {"tokens": 2, "heads": 1, "out": 4, "in_": 8} | changes
    x, w, y = randn(2, 8, dtype=BF16), randn(4, 8, dtype=BF16), Guarded(2, 4, dtype=BF16)
    run_native(x, w.data_ptr(), y, **sizes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tokens": -1}, "tokens >= 0"),
        ({"heads": 0}, "heads, out, in >= 1"),
        ({"out": 0}, "heads, out, in >= 1"),
        ({"in_": 0}, "heads, out, in >= 1"),
        ({"strides": (-8, 8, 32)}, "strides must not be negative"),
        ({"strides": (8, 8, 1 << 60), "heads": 2}, "fit in 64 bits"),
        ({"tokens": 1 << 40, "out": 1 << 40}, "fit in 64 bits"),
        ({"in_": 1 << 60}, "fit in 64 bits"),
    ],
)
def test_bf16_gemm_refuses_impossible_sizes(changes, message):
    with pytest.raises(ValueError, match=message):
        native_case(**changes)


def test_bf16_gemm_refuses_a_bad_workspace():
    good = Workspace(1 << 20)
    small, shifted, null = Workspace(64), Workspace(1 << 20), Workspace(1 << 20)
    shifted.address += 4
    null.address = 0
    native_case(workspace=good)
    for bad in (small, shifted, null):
        with pytest.raises(
            ValueError, match="bf16_gemm: workspace must be 64-byte aligned and hold"
        ):
            native_case(workspace=bad)


def test_bf16_gemm_refuses_null_pointers():
    x, y = randn(2, 8, dtype=BF16), Guarded(2, 4, dtype=BF16)
    with pytest.raises(ValueError, match="bf16_gemm: x, weight and y must not be null"):
        run_native(x, 0, y, tokens=2, heads=1, out=4, in_=8)


@pytest.mark.parametrize(
    ("x_shape", "w_shape", "message"),
    [
        ((2, 8), (4, 9), "last sizes"),
        ((2, 8), (3, 4, 8), "must be"),
        ((2, 3, 8), (2, 4, 8), "must be"),
        ((8,), (4, 8), "must be"),
    ],
)
def test_bf16_gemm_refuses_shapes_that_do_not_fit(x_shape, w_shape, message):
    with pytest.raises(ValueError, match=f"bf16_gemm: .*{message}"):
        ops.bf16_gemm(randn(*x_shape, dtype=BF16), randn(*w_shape, dtype=BF16))


def test_bf16_gemm_refuses_other_layouts_and_dtypes():
    x, w = randn(2, 8, dtype=BF16), randn(4, 8, dtype=BF16)
    with pytest.raises(ValueError, match="contiguous"):
        ops.bf16_gemm(x, randn(8, 4, dtype=BF16).T)
    with pytest.raises(ValueError, match="contiguous"):
        ops.bf16_gemm(randn(8, 2, dtype=BF16).T, w)
    with pytest.raises(TypeError, match="bf16_gemm: x must be"):
        ops.bf16_gemm(x.half(), w)
    with pytest.raises(TypeError, match="bf16_gemm: weight must be"):
        ops.bf16_gemm(x, w.float())
    with pytest.raises(TypeError, match="bf16_gemm: out must be"):
        ops.bf16_gemm(x, w, out_dtype=torch.float16)
