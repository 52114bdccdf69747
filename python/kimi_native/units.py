"""Numbers as a person reads them, in decimal units."""

from __future__ import annotations


def bytes_text(size: int) -> str:
    """11.20 GB, 419.43 MB, 640 B."""
    for unit, scale in (("GB", 10**9), ("MB", 10**6), ("kB", 10**3)):
        if abs(size) >= scale:
            return f"{size / scale:.2f} {unit}"
    return f"{size} B"


def count_text(count: int) -> str:
    """1.03 T, 15.96 B, 6.92 M, 640."""
    for unit, scale in (("T", 10**12), ("B", 10**9), ("M", 10**6)):
        if count >= scale:
            return f"{count / scale:.2f} {unit}"
    return f"{count:,}"
