"""add_rms_norm: the sum as torch adds, the norm as rms_norm norms, to the bit, on every tier."""

from __future__ import annotations

import functools
import math

import pytest
import torch

from kimi_native import _native, ops, reference
from oracle import OutputAt, misaligned, threads
from oracle_dense import Guarded, assert_close, assert_same_bits, bound_rms_norm
from oracle_dense import randn as typed_randn

randn = functools.partial(typed_randn, dtype=torch.float32)
BF16, FP32 = torch.bfloat16, torch.float32
CODE = {BF16: 0, FP32: 1}
EPS = 1e-6


@pytest.mark.parametrize("dtype", [BF16, FP32])
@pytest.mark.parametrize("tokens", [0, 1, 15, 16, 17, 40])
@pytest.mark.parametrize("hidden", [1, 15, 16, 33, 512, 7168])
def test_add_rms_norm_is_torch_add_then_rms_norm(isa, tokens, hidden, dtype):
    x, residual = randn(tokens, hidden, dtype=dtype), randn(tokens, hidden, dtype=dtype, seed=1)
    weight = randn(hidden, dtype=BF16, seed=2)
    y, total = ops.add_rms_norm(x, residual, weight, eps=EPS)
    assert_same_bits(total, x + residual)
    assert_same_bits(y, ops.rms_norm(total, weight, eps=EPS))
    expected = reference.rms_norm(total.double(), weight, eps=EPS)
    assert_close(y, expected, bound_rms_norm(expected, hidden, dtype))


def test_add_rms_norm_row_does_not_depend_on_the_others(isa):
    x, residual, weight = randn(40, 100), randn(40, 100, seed=1), randn(100, dtype=BF16, seed=2)
    y, total = ops.add_rms_norm(x, residual, weight, eps=EPS)
    for t in (0, 15, 16, 39):
        one = ops.add_rms_norm(x[t : t + 1], residual[t : t + 1], weight, eps=EPS)
        assert_same_bits(one[0], y[t : t + 1])
        assert_same_bits(one[1], total[t : t + 1])


def test_add_rms_norm_keeps_nan_in_its_row(isa):
    x, residual, weight = randn(3, 50), randn(3, 50, seed=1), randn(50, dtype=BF16, seed=2)
    clean, _ = ops.add_rms_norm(x, residual, weight, eps=EPS)
    residual[1, 49] = math.nan
    y, total = ops.add_rms_norm(x, residual, weight, eps=EPS)
    assert y[1].isnan().all()
    assert total.isnan().nonzero().tolist() == [[1, 49]]
    assert_same_bits(y[[0, 2]], clean[[0, 2]])


@pytest.mark.parametrize("dtype", [BF16, FP32])
@pytest.mark.parametrize(("tokens", "hidden"), [(1, 1), (3, 17), (20, 48)])
def test_add_rms_norm_writes_only_its_outputs(isa, tokens, hidden, dtype):
    x, residual = randn(tokens, hidden, dtype=dtype), randn(tokens, hidden, dtype=dtype, seed=1)
    weight = randn(hidden, dtype=BF16, seed=2)
    y, total = Guarded(tokens, hidden, dtype=dtype), Guarded(tokens, hidden, dtype=dtype)
    addresses = (x.data_ptr(), residual.data_ptr(), weight.data_ptr(), y.address, total.address)
    _native.cpu.add_rms_norm(*addresses, CODE[dtype], tokens, hidden, EPS)
    y.assert_untouched_outside()
    total.assert_untouched_outside()
    expected = ops.add_rms_norm(x, residual, weight, eps=EPS)
    assert_same_bits(y.tensor, expected[0])
    assert_same_bits(total.tensor, expected[1])


@pytest.mark.parametrize("dtype", [BF16, FP32])
@pytest.mark.parametrize("offset", [1, 2, 3])
def test_add_rms_norm_reads_and_writes_misaligned_memory(isa, offset, dtype):
    x, residual = randn(3, 77, dtype=dtype), randn(3, 77, dtype=dtype, seed=1)
    weight = randn(77, dtype=BF16, seed=2)
    y, total = (OutputAt(3, 77, dtype=dtype, offset=offset) for _ in range(2))
    there = [misaligned(t, offset) for t in (x, residual, weight)]
    addresses = [t.data_ptr() for t in there]
    _native.cpu.add_rms_norm(*addresses, y.address, total.address, CODE[dtype], 3, 77, EPS)
    expected = ops.add_rms_norm(x, residual, weight, eps=EPS)
    assert_same_bits(y.values(), expected[0])
    assert_same_bits(total.values(), expected[1])


def test_add_rms_norm_does_not_depend_on_threads(isa):
    x, residual, weight = randn(200, 512), randn(200, 512, seed=1), randn(512, dtype=BF16, seed=2)
    results = []
    for n in (1, 2, 4):
        with threads(n):
            results.append(ops.add_rms_norm(x, residual, weight, eps=EPS))
    for y, total in results[1:]:
        assert_same_bits(y, results[0][0])
        assert_same_bits(total, results[0][1])


@pytest.mark.parametrize("dtype", [BF16, FP32])
def test_add_rms_norm_may_add_in_place(isa, dtype):
    x, residual = randn(3, 33, dtype=dtype), randn(3, 33, dtype=dtype, seed=1)
    weight, y = randn(33, dtype=BF16, seed=2), torch.empty(3, 33, dtype=dtype)
    expected = ops.add_rms_norm(x, residual, weight, eps=EPS)
    addresses = (x, residual, weight, y, residual)
    _native.cpu.add_rms_norm(*(t.data_ptr() for t in addresses), CODE[dtype], 3, 33, EPS)
    assert_same_bits(y, expected[0])
    assert_same_bits(residual, expected[1])


def test_add_rms_norm_refuses_what_does_not_fit():
    x, residual, weight = randn(2, 8), randn(2, 8), randn(8, dtype=BF16)
    with pytest.raises(ValueError, match="add_rms_norm: residual must be"):
        ops.add_rms_norm(x, residual[:1], weight, eps=EPS)
    with pytest.raises(TypeError, match="add_rms_norm: residual must be"):
        ops.add_rms_norm(x, residual.bfloat16(), weight, eps=EPS)
    with pytest.raises(ValueError, match="add_rms_norm: weight must be"):
        ops.add_rms_norm(x, residual, weight[:7], eps=EPS)
    with pytest.raises(ValueError, match="add_rms_norm: need tokens >= 0 and hidden >= 1"):
        _native.cpu.add_rms_norm(0, 0, 0, 0, 0, 0, 1, 0, EPS)
    with pytest.raises(ValueError, match=r"add_rms_norm: .*fit in 64 bits"):
        _native.cpu.add_rms_norm(0, 0, 0, 0, 0, 1, 1 << 40, 1 << 40, EPS)
    with pytest.raises(ValueError, match=r"add_rms_norm: .* must not be null"):
        _native.cpu.add_rms_norm(0, 0, 0, 0, 0, 1, 1, 8, EPS)


@pytest.mark.parametrize("eps", [math.nan, math.inf, -math.inf, -1e-6])
def test_add_rms_norm_refuses_an_eps_that_makes_no_norm(eps):
    x, weight = randn(2, 8, dtype=BF16), randn(8, dtype=BF16)
    with pytest.raises(ValueError, match=r"^add_rms_norm: eps must be finite and at least 0"):
        ops.add_rms_norm(x, x, weight, eps=eps)


def test_add_rms_norm_takes_an_eps_of_zero():
    x, weight, eps = torch.full((1, 8), 2.0), torch.ones(8, dtype=BF16), 0
    y = ops.add_rms_norm(x, x, weight, eps=eps)
    assert torch.equal(y[0], torch.ones(1, 8))
