"""swiglu against float64, on every tier."""

from __future__ import annotations

import math

import pytest
import torch

from kimi_native import _native, ops, reference
from oracle import DTYPES, OutputAt, assert_same_bits, misaligned


def bound(gate: torch.Tensor, up: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """exp within 2 ulp, one add, one division, one product: 8 ulp of fp32; then rounding to dtype.

    Below the smallest normal number of fp32 an absolute 2**-126 * |up| replaces the relative terms.
    """
    exact = reference.swiglu(gate.double(), up.double()).abs()
    out = 2**-8 if dtype == torch.bfloat16 else 2**-24
    return exact * (8 * 2**-23 + out) + 2**-126 * (1 + up.double().abs())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("tokens", [0, 1, 3])
@pytest.mark.parametrize("width", [1, 15, 16, 17, 2048, 18432])
def test_swiglu_matches_reference(isa, tokens, width, dtype):
    g = torch.Generator().manual_seed(width)
    gate = (8 * torch.randn(tokens, width, generator=g)).to(dtype)
    up = torch.randn(tokens, width, generator=g).to(dtype)
    actual = ops.swiglu(gate, up).double()
    error = (actual - reference.swiglu(gate.double(), up.double())).abs()
    assert actual.shape == gate.shape
    assert (error <= bound(gate, up, dtype)).all()


def test_swiglu_extremes(isa):
    gate = torch.tensor([[0.0, 88.0, -88.0, 1e30, -1e30, math.nan, 1.0, -20.0]])
    up = torch.tensor([[3.0, 1.0, 1.0, 1.0, 1.0, 1.0, math.nan, 1.0]])
    y = ops.swiglu(gate, up)[0]
    assert y[0] == 0
    assert y[1] == 88
    assert y[2].abs() < 1e-35
    assert y[3] == torch.tensor(1e30)
    assert y[4] == 0
    assert y[5].isnan()
    assert y[6].isnan()
    assert y[7] == pytest.approx(-20 / (1 + math.exp(20)), rel=1e-6)


def test_swiglu_does_not_depend_on_position_or_threads(isa):
    """The same pair of numbers anywhere in the tensor, in a vector or a tail, gives the same bits."""
    values = torch.linspace(-9, 9, 37)
    before = ops.num_threads()
    seen = set()
    for threads in (1, 2):
        ops.set_num_threads(threads)
        for shift in range(17):
            gate = torch.zeros(1, 40000 + shift)
            gate[0, shift : shift + 37] = values
            gate[0, -37:] = values
            y = ops.swiglu(gate, torch.ones_like(gate))[0]
            seen |= {tuple(y[shift : shift + 37].tolist()), tuple(y[-37:].tolist())}
    ops.set_num_threads(before)
    assert len(seen) == 1


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("offset", [0, 1, 2, 3])
@pytest.mark.parametrize(("tokens", "width"), [(1, 1), (3, 17), (2, 9000)])
def test_swiglu_reads_and_writes_its_own_memory_only_wherever_it_is(
    isa, tokens, width, offset, dtype
):
    g = torch.Generator().manual_seed(width)
    gate, up = (torch.randn(tokens, width, generator=g).to(dtype) for _ in range(2))
    y = OutputAt(tokens, width, dtype=dtype, offset=offset)
    there = [misaligned(t, offset) for t in (gate, up)]
    pointers = [t.data_ptr() for t in there]
    _native.cpu.swiglu(*pointers, y.address, DTYPES[dtype], tokens, width)
    assert_same_bits(y.values(), ops.swiglu(gate, up))


@pytest.mark.parametrize(
    ("tokens", "width", "message"),
    [(-1, 8, "tokens >= 0"), (1, 0, "width >= 1"), (2**40, 2**40, "fit in 64 bits")],
)
def test_swiglu_refuses_impossible_sizes(tokens, width, message):
    with pytest.raises(ValueError, match=f"swiglu: .*{message}"):
        _native.cpu.swiglu(0, 0, 0, 0, tokens, width)


def test_swiglu_refuses_bad_input():
    x = torch.zeros(2, 4)
    with pytest.raises(ValueError, match=r"swiglu: up must be \[2, 4\] \(got \[2, 5\]\)"):
        ops.swiglu(x, torch.zeros(2, 5))
    with pytest.raises(TypeError, match=r"swiglu: up must be torch\.float32"):
        ops.swiglu(x, x.bfloat16())
    with pytest.raises(TypeError, match="swiglu: gate"):
        ops.swiglu(x.double(), x.double())
