"""Numbers as text."""

from __future__ import annotations

import pytest

from kimi_native.units import bytes_text, count_text


@pytest.mark.parametrize(
    ("size", "text"),
    [
        (0, "0 B"),
        (999, "999 B"),
        (1000, "1.00 kB"),
        (7_060_544, "7.06 MB"),
        (594_200_000_000, "594.20 GB"),
        (-2_000_000, "-2.00 MB"),
    ],
)
def test_bytes_text(size, text):
    assert bytes_text(size) == text


@pytest.mark.parametrize(
    ("count", "text"),
    [(0, "0"), (12_345, "12,345"), (6_921_136, "6.92 M"), (15_960_111_936, "15.96 B")],
)
def test_count_text(count, text):
    assert count_text(count) == text
    assert count_text(1_026_408_232_448) == "1.03 T"
