"""What the tests of the benchmarks share: limits of a made-up machine, and what every row must hold."""

from __future__ import annotations

import math

import pytest

from kimi_native.bench.rows import FIELDS, Limits

PEAKS = {
    "fp32": 100.0,
    "int8_dot": 400.0,
    "bf16_dot": 160.0,
    "amx_bf16": 1000.0,
    "amx_int8": 2001.0,
}
LIMITS = Limits(threads=1, read_gb_per_s=10.0, gflop_per_s=PEAKS)


def assert_row(row: dict) -> None:
    """Every field, of its type, and the derived ones follow from the others."""
    assert set(FIELDS) <= set(row)
    assert row["time_us"] > 0
    assert 0 <= row["spread"] < math.inf
    assert row["samples"] >= 1
    assert row["gb_per_s"] == pytest.approx(row["bytes"] / row["time_us"] / 1e3, rel=2e-3, abs=1e-3)
    for name in ("op", "shape", "limit", "compute"):
        assert isinstance(row[name], str)
        assert row[name]
    for name in ("threads", "tokens"):
        assert isinstance(row[name], int)
