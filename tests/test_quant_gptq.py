"""GPTQ on matrices: against a textbook twin with explicit inverses, against its own theory, and against rounding."""

from __future__ import annotations

import pytest
import torch

from kimi_native.quant import int4
from kimi_native.quant.gptq import gptq, gptq_or_nearest, row_errors

SEARCHES = ((1.0, 0.95, 0.9, 0.85, 0.8), (1.0,))
pytestmark = pytest.mark.usefixtures("one_thread")


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def inputs(rows: int, columns: int, *, seed: int = 0, noise: float = 0.1) -> torch.Tensor:
    """Correlated: an eighth as many directions as columns, and a little of everything."""
    g = generator(seed)
    few = torch.randn(rows, max(columns // 8, 1), generator=g, dtype=torch.float64)
    mixing = torch.randn(few.shape[1], columns, generator=generator(99), dtype=torch.float64)
    return few @ mixing + noise * torch.randn(rows, columns, generator=g, dtype=torch.float64)


def weights(out: int, in_: int, seed: int = 1) -> torch.Tensor:
    return torch.randn(out, in_, generator=generator(seed)) / in_**0.5


def textbook(w: torch.Tensor, gram: torch.Tensor, levels: int, damping: float):
    """Optimal brain quantization in the order of the columns, the inverse taken anew for each: codes and scales."""
    divisor, lowest = int4.LEVELS[levels]
    size = w.shape[1]
    h = gram + damping * gram.diagonal().mean() * torch.eye(size, dtype=torch.float64)
    w = w.double()
    codes, scales = torch.empty(w.shape, dtype=torch.int64), []
    for i in range(size):
        if i % 32 == 0:
            largest = w[:, i : i + 32].float().abs().amax(1)
            scales.append((largest / divisor).to(torch.bfloat16))
        step = scales[-1].double()
        codes[:, i] = (w[:, i] / step).round().clamp(lowest, 7).long()
        error = w[:, i] - codes[:, i] * step
        inverse = torch.linalg.inv(h[i:, i:])
        w[:, i:] -= error[:, None] * inverse[0] / inverse[0, 0]
    return codes, torch.stack(scales, 1)


@pytest.mark.parametrize("levels", [15, 16])
@pytest.mark.parametrize(("out", "in_", "rows"), [(1, 32, 40), (17, 96, 200), (40, 64, 20)])
def test_gptq_is_the_textbook_method(out, in_, rows, levels):
    x, w = inputs(rows, in_), weights(out, in_)
    found = gptq(w, x.T @ x, levels=levels)
    codes, scales = textbook(w, x.T @ x, levels, 0.01)
    assert torch.equal(found.weight_scale, scales)
    assert torch.equal(int4.unpack(found.weight_packed).long(), codes)


@pytest.mark.parametrize("levels", [15, 16])
def test_gptq_of_uncorrelated_inputs_is_round_to_nearest(levels):
    w = weights(33, 160) * torch.logspace(-6, 6, 33)[:, None]
    w[5, 32:64] = 0.0
    w[4, :32] = torch.arange(32) * 0.5 - 8  # halves
    found = gptq(w, torch.eye(160, dtype=torch.float64), levels=levels)
    nearest = int4.quantize(w, levels=levels)
    assert torch.equal(found.weight_packed, nearest.weight_packed)
    assert torch.equal(found.weight_scale, nearest.weight_scale)


def test_gptq_error_is_what_theory_says():
    """Rounding errors are uniform: s^2 / 12 each. Rounding costs s^2 / 12 trace(G), GPTQ s^2 / 12 sum 1 / U[i, i]^2
    (it is Babai's nearest plane, arXiv 2507.18553). 256 x 128 of them: their mean is within 1 % of its expectation;
    what clamping and the scales of changed weights add is the rest of the tolerance.
    """
    x, w = inputs(1000, 128), weights(256, 128)
    gram = x.T @ x
    damped = gram + 0.01 * gram.diagonal().mean() * torch.eye(128, dtype=torch.float64)
    diagonal = torch.linalg.cholesky(torch.linalg.inv(damped), upper=True).diagonal()
    expected = float((1 / diagonal.square()).sum() / damped.trace())
    found = gptq(w, gram)
    error = row_errors(w, found, damped).sum() / row_errors(w, int4.quantize(w), damped).sum()
    print(f"error of round-to-nearest's: {error:.4f}, by theory {expected:.4f}")
    assert expected < 0.2
    assert 0.9 * expected < float(error) < 1.1 * expected


@pytest.mark.parametrize("levels", [15, 16])
def test_gptq_helps_on_inputs_that_it_has_not_seen(levels):
    """Learnt from 4 rows a column: below a third of the error, where the theory of the test above says 0.08."""
    seen, unseen, w = inputs(512, 128), inputs(512, 128, seed=7), weights(64, 128)
    found = gptq(w, seen.T @ seen, levels=levels)
    nearest = int4.quantize(w, levels=levels)
    outputs = unseen @ w.double().T
    errors = [
        (unseen @ int4.dequantize(q, torch.float64).T - outputs).square().sum()
        for q in (found, nearest)
    ]
    print(f"levels {levels}: {float(errors[0] / errors[1]):.3f} of round-to-nearest's error")
    assert errors[0] < errors[1] / 3


@pytest.mark.parametrize("rows", [1, 5, 300])
@pytest.mark.parametrize("noise", [0.0, 0.1, 30.0])
def test_gptq_or_nearest_never_loses_to_rounding(rows, noise):
    x, w = inputs(rows, 64, noise=noise), weights(50, 64)
    gram = x.T @ x
    weight, error, nearest = gptq_or_nearest(w, gram)
    assert (error <= nearest).all()
    outputs = x @ (w.double() - int4.dequantize(weight, torch.float64)).T
    torch.testing.assert_close(error, outputs.square().sum(0), rtol=1e-6, atol=1e-9)
    expected = row_errors(w, int4.quantize(w), gram)
    assert torch.equal(nearest, expected)


def test_gptq_search_of_the_scale_lowers_the_weighted_error():
    """With a diagonal gram nothing is spread, so what the search lowers is the error itself, row by row."""
    w = torch.distributions.Laplace(0.0, 1.0).icdf(
        torch.rand(64, 96, generator=generator(3)) * 0.98 + 0.01
    )
    gram = torch.diag(torch.linspace(0.5, 2, 96, dtype=torch.float64))
    searched, plain = (row_errors(w, gptq(w, gram, shrinks=s), gram) for s in SEARCHES)
    assert (searched <= plain).all()
    assert searched.sum() < 0.97 * plain.sum()


def test_gptq_ignores_the_scale_of_the_gram_and_of_idle_columns():
    x, w = inputs(100, 64), weights(8, 64)
    x[:, 40] = 0.0  # an input that never comes: the damping alone holds its weight
    gram = x.T @ x
    found, scaled = gptq(w, gram), gptq(w, 1024 * gram)
    assert torch.equal(found.weight_packed, scaled.weight_packed)
    assert torch.isfinite(int4.dequantize(found)).all()


def test_gptq_leaves_its_arguments_alone():
    x, w = inputs(100, 64), weights(8, 64).double()
    gram = x.T @ x
    before = w.clone(), gram.clone()
    gptq(w, gram)
    assert torch.equal(w, before[0])
    assert torch.equal(gram, before[1])


def test_gptq_refuses_what_it_cannot_use():
    w, gram = weights(4, 64), torch.eye(64, dtype=torch.float64)
    with pytest.raises(ValueError, match=r"gram must be \[64, 64\] \(got \[32, 32\]\)"):
        gptq(w, torch.eye(32, dtype=torch.float64))
    with pytest.raises(TypeError, match="gptq: gram must be"):
        gptq(w, gram.float())
    with pytest.raises(ValueError, match=r"in must be a multiple of 32 \(got \[4, 48\]\)"):
        gptq(w[:, :48], gram)
    with pytest.raises(ValueError, match=r"levels must be 15 or 16 \(got 8\)"):
        gptq(w, gram, levels=8)
    with pytest.raises(ValueError, match=r"damping must be in \(0, 1\) \(got 0\)"):
        gptq(w, gram, damping=0)
    for shrinks in ((), (1.5,), (0.0,)):
        with pytest.raises(ValueError, match=r"shrinks must be in \(0, 1\]"):
            gptq(w, gram, shrinks=shrinks)
    for bad in (gram * 0, gram * torch.nan):
        with pytest.raises(ValueError, match="gram must be finite and its diagonal not all zero"):
            gptq(w, bad)
    w[1, 2] = torch.inf
    with pytest.raises(ValueError, match=r"gptq: w must be finite in float32 \(got 1 NaN"):
        gptq(w, gram)
