"""rms_norm: every tier against float64, the published order of rounding, strided rows."""

from __future__ import annotations

import math

import pytest
import torch

from kimi_native import _native, ops, reference
from oracle import OutputAt, misaligned, threads
from oracle_dense import Guarded, assert_close, assert_same_bits, bound_rms_norm, randn

BF16, FP32 = torch.bfloat16, torch.float32
CODE = {BF16: 0, FP32: 1}
EPS = 1e-6


def check(x, weight, eps=EPS):
    y = ops.rms_norm(x, weight, eps=eps)
    assert y.dtype == x.dtype
    expected = reference.rms_norm(x.double(), weight, eps=eps)
    assert_close(y, expected, bound_rms_norm(expected, x.shape[1], x.dtype))
    return y


@pytest.mark.parametrize("dtype", [BF16, FP32])
@pytest.mark.parametrize("hidden", [1, 15, 16, 17, 31, 33, 512, 576, 1536, 7168])
def test_rms_norm_matches_reference_at_any_width(isa, hidden, dtype):
    check(randn(3, hidden, dtype=dtype), randn(hidden, dtype=BF16, seed=1))


@pytest.mark.parametrize("tokens", [0, 1, 15, 16, 17, 40])
def test_rms_norm_matches_reference_at_any_number_of_tokens(isa, tokens):
    check(randn(tokens, 50, dtype=BF16), randn(50, dtype=BF16, seed=1))


@pytest.mark.parametrize("dtype", [BF16, FP32])
@pytest.mark.parametrize("scale", [1e-10, 1e-3, 1e3, 1e15])
def test_rms_norm_matches_reference_at_any_magnitude(isa, scale, dtype):
    # Small rows are ruled by eps; squares of 1e15 still fit in fp32.
    check(randn(3, 100, dtype=dtype, scale=scale), randn(100, dtype=BF16, seed=1))


def test_rms_norm_of_zeros_is_zero(isa):
    assert (ops.rms_norm(torch.zeros(2, 33), randn(33, dtype=BF16), eps=EPS) == 0).all()


def test_rms_norm_rounds_before_the_weight(isa):
    # The published model casts to the activation dtype, then multiplies: other orders differ in many elements.
    x, weight = randn(8, 512, dtype=BF16), randn(512, dtype=BF16, seed=1)
    wide = x.double()
    normed = wide / torch.sqrt(wide.pow(2).mean(dim=1, keepdim=True) + EPS)
    published = (normed.to(BF16).double() * weight.double()).to(BF16)
    rounded_once = (normed * weight.double()).to(BF16)
    # fp32 may fall on the other side of a tie: leave out what is nearer to one than its error.
    error = 1e-5 * normed
    certain = (normed + error).to(BF16) == (normed - error).to(BF16)
    assert certain.double().mean() > 0.9
    y = ops.rms_norm(x, weight, eps=EPS)
    assert torch.equal(y[certain], published[certain])
    assert (rounded_once[certain] != published[certain]).double().mean() > 0.1


def test_rms_norm_reads_strided_rows_only(isa):
    x = randn(5, 80, dtype=BF16)
    x[:, 64:] = math.nan
    check(x[:, :64], randn(64, dtype=BF16, seed=1))


def test_rms_norm_row_does_not_depend_on_the_others(isa):
    x, weight = randn(40, 100, dtype=FP32), randn(100, dtype=BF16, seed=1)
    together = ops.rms_norm(x, weight, eps=EPS)
    for t in (0, 15, 16, 39):
        assert_same_bits(ops.rms_norm(x[t : t + 1], weight, eps=EPS), together[t : t + 1])


def test_rms_norm_keeps_nan_in_its_row(isa):
    x, weight = randn(3, 50, dtype=BF16), randn(50, dtype=BF16, seed=1)
    clean = ops.rms_norm(x, weight, eps=EPS)
    x[1, 49] = math.nan
    y = ops.rms_norm(x, weight, eps=EPS)
    assert y[1].isnan().all()
    assert_same_bits(y[[0, 2]], clean[[0, 2]])


@pytest.mark.parametrize("dtype", [BF16, FP32])
@pytest.mark.parametrize(("tokens", "hidden"), [(1, 1), (3, 17), (20, 48)])
def test_rms_norm_writes_only_its_output(isa, tokens, hidden, dtype):
    x, weight = randn(tokens, hidden, dtype=dtype), randn(hidden, dtype=BF16, seed=1)
    y = Guarded(tokens, hidden, dtype=dtype)
    _native.cpu.rms_norm(
        x.data_ptr(), weight.data_ptr(), y.address, CODE[dtype], tokens, hidden, hidden, EPS
    )
    y.assert_untouched_outside()
    assert_same_bits(y.tensor, ops.rms_norm(x, weight, eps=EPS))


@pytest.mark.parametrize("dtype", [BF16, FP32])
@pytest.mark.parametrize("offset", [1, 2, 3])
def test_rms_norm_reads_and_writes_misaligned_memory(isa, offset, dtype):
    x, weight = randn(3, 77, dtype=dtype), randn(77, dtype=BF16, seed=1)
    y = OutputAt(3, 77, dtype=dtype, offset=offset)
    x_there, weight_there = misaligned(x, offset), misaligned(weight, offset)
    pointers = (x_there.data_ptr(), weight_there.data_ptr(), y.address)
    _native.cpu.rms_norm(*pointers, CODE[dtype], 3, 77, 77, EPS)
    assert_same_bits(y.values(), ops.rms_norm(x, weight, eps=EPS))


def test_rms_norm_does_not_depend_on_threads(isa):
    x, weight = randn(200, 512, dtype=BF16), randn(512, dtype=BF16, seed=1)
    results = []
    for n in (1, 2, 4):
        with threads(n):
            results.append(ops.rms_norm(x, weight, eps=EPS))
    assert_same_bits(results[0], results[1])
    assert_same_bits(results[0], results[2])


@pytest.mark.parametrize(
    ("tokens", "hidden", "stride", "message"),
    [
        (-1, 8, 8, "tokens >= 0 and hidden >= 1"),
        (1, 0, 8, "tokens >= 0 and hidden >= 1"),
        (1, 8, 7, "x_token_stride must be at least hidden"),
        (1 << 40, 8, 1 << 40, "fit in 64 bits"),
    ],
)
def test_rms_norm_refuses_impossible_sizes(tokens, hidden, stride, message):
    with pytest.raises(ValueError, match=f"rms_norm: .*{message}"):
        _native.cpu.rms_norm(0, 0, 0, 0, tokens, hidden, stride, EPS)


def test_rms_norm_refuses_null_pointers():
    with pytest.raises(ValueError, match="rms_norm: x, weight and y must not be null"):
        _native.cpu.rms_norm(0, 0, 0, 0, 1, 8, 8, EPS)


def test_rms_norm_refuses_shapes_and_dtypes_that_do_not_fit():
    x, weight = randn(2, 8, dtype=BF16), randn(8, dtype=BF16)
    with pytest.raises(ValueError, match="rms_norm: weight must be"):
        ops.rms_norm(x, weight[:7], eps=EPS)
    with pytest.raises(ValueError, match="rms_norm: x must be"):
        ops.rms_norm(x[0], weight, eps=EPS)
    with pytest.raises(ValueError, match="rms_norm: x must be"):
        ops.rms_norm(randn(8, 8, dtype=BF16).T, weight, eps=EPS)
    with pytest.raises(ValueError, match="rms_norm: x_token_stride must be at least hidden"):
        ops.rms_norm(x[:1].expand(5, 8), weight, eps=EPS)
    with pytest.raises(TypeError, match="rms_norm: x must be"):
        ops.rms_norm(x.half(), weight, eps=EPS)
    with pytest.raises(TypeError, match="rms_norm: weight must be"):
        ops.rms_norm(x, weight.float(), eps=EPS)


@pytest.mark.parametrize("eps", [math.nan, math.inf, -math.inf, -1e-6])
def test_rms_norm_refuses_an_eps_that_makes_no_norm(eps):
    x, weight = randn(2, 8, dtype=BF16), randn(8, dtype=BF16)
    with pytest.raises(ValueError, match=r"^rms_norm: eps must be finite and at least 0"):
        ops.rms_norm(x, weight, eps=eps)


def test_rms_norm_takes_an_eps_of_zero():
    x, weight, eps = torch.full((1, 8), 2.0), torch.ones(8, dtype=BF16), 0
    y = ops.rms_norm(x, weight, eps=eps)
    assert torch.equal(y, torch.ones(1, 8))
