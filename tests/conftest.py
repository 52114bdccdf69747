"""Shared fixtures: every CPU op test runs on every kernel tier this machine has."""

from __future__ import annotations

import pytest

from kimi_native import ops


@pytest.fixture(params=["generic", "avx2", "avx512"])
def isa(request):
    """Forces one kernel tier for the test; skips, by name, the tiers this machine lacks."""
    if request.param not in ops.supported_isas():
        pytest.skip(f"this machine has no {request.param}")
    ops.force_isa(request.param)
    assert ops.active_isa() == request.param
    yield request.param
    ops.force_isa("")
