#!/usr/bin/env python3
"""Prints the rows of a run (JSON lines of kn_cuda_bench --json and peers.py --json) as one table.

bench/cuda/table.py ROWS.jsonl
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import Any

from kimi_native.bench.rows import read_rows


def lines(rows: list[dict[str, Any]]) -> Iterator[str]:
    limits = {}
    for row in rows:
        if row["op"] == "limits":
            rate = row.get("gb_per_s") or row.get("gflop_per_s", 0) / 1e3 or row.get("time_us")
            limits.setdefault((row["device"], row["limit"]), []).append(rate)
    units = {"read": "GB/s", "copy": "GB/s", "bf16": "TFLOP/s", "launch": "us"}
    for (device, limit), rates in limits.items():
        yield f"# {device}: {limit} {min(rates):.4g} to {max(rates):.4g} {units[limit]}"
    for row in rows:
        if row["op"] != "limits":
            yield line(row)


def line(row: dict[str, Any]) -> str:
    who = row["op"] if row.get("peer") is None else f"  {row['peer']}"
    share = row["percent_of_limit"]
    text = (
        f"{who:<20} {row['tokens']:>5}  {row['shape']:<40} {row['time_us']:>11.2f} us ±{100 * row['spread']:4.1f}% "
        f"{row['gb_per_s']:>7.0f} GB/s {row['gflop_per_s'] / 1e3:>6.1f} TFLOP/s  "
    )
    text += "in cache" if share is None else f"{share:3.0f} % of {row['limit']}"
    if row.get("tokens_per_s"):
        text += f", {row['tokens_per_s']:.1f} tokens/s of {row['limit_tokens_per_s']:.0f}"
    return text if row.get("ratio") is None else f"{text}, {row['ratio']:.2f} x our time"


if __name__ == "__main__":
    print("\n".join(lines(read_rows(sys.argv[1]))))
