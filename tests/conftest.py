"""Shared fixtures: every CPU op test runs on every kernel tier this machine has."""

from __future__ import annotations

import signal

import pytest
import torch

from kimi_native import ops

# A job in the background ignores SIGINT, and so does whatever it starts: Ctrl-C would never reach a tested command.
signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(params=["generic", "avx2", "avx512", "avx512_bf16", "amx"])
def isa(request):
    """Forces one kernel tier for the test; skips, by name, the tiers this machine lacks."""
    if request.param not in ops.supported_isas():
        pytest.skip(f"this machine has no {request.param}")
    ops.force_isa(request.param)
    assert ops.active_isa() == request.param
    yield request.param
    ops.force_isa("")


@pytest.fixture
def simd_isas():
    """The vector tiers of this machine, whose integer ops must agree to the bit; skips if there is but one."""
    names = [n for n in ops.supported_isas() if n != "generic"]
    if len(names) < 2:
        pytest.skip(
            f"this machine has too few vector tiers to compare ({', '.join(names) or 'none'})"
        )
    yield names
    ops.force_isa("")


@pytest.fixture
def one_thread():
    """Torch on one thread: for small work faster than two, and by far where other processes want the cores too."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def thread_counts():
    """Leaves them as they were."""
    before = ops.num_threads(), torch.get_num_threads()
    yield
    ops.set_num_threads(before[0])
    torch.set_num_threads(before[1])
