"""Rows of figures: one dict per timed case, with the keys that kn_bench prints, and the limits they are held against.

A row is one JSON object on one line. Rows with op "limits" say what the machine was measured to reach.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kimi_native.argument_files import read_text
from kimi_native.bench.load import OtherLoad
from kimi_native.bench.native import program_rows

# Every row of a timed case has at least these.
FIELDS = (
    "op",
    "isa",
    "threads",
    "tokens",
    "shape",
    "time_us",
    "spread",
    "bytes",
    "gb_per_s",
    "gflop_per_s",
    "percent_of_limit",
    "limit",
    "compute",
)
PEER_FIELDS = ("peer", "ratio")  # ratio: the peer's time over ours in the same run


@dataclass(frozen=True)
class Limits:
    """What this machine reaches with one number of threads.

    read_gb_per_s  streaming read, the best page size and pattern
    gflop_per_s    unit of arithmetic -> 1e9 operations per second, as kn_bench names them
    others         share of the cores' time that others took meanwhile: then the machine reaches more than this
    """

    threads: int
    read_gb_per_s: float
    gflop_per_s: dict[str, float]
    others: float | None = None

    def share(
        self,
        seconds: float,
        nbytes: float,
        flops: float,
        *,
        limbs: bool,
        dots: bool = False,
        isa: str,
        compute: str = "exact",
    ) -> tuple[str, float]:
        """The binding limit's name and the percentage of it reached; the rule is that of kn_bench (report.cpp).

        limbs  integer weights: exact products may be two int8 limbs
        dots   both factors are bf16
        isa    the kernel tier: AMX counts in a tier that has it
        compute  as in a row: activations in 8 bits ("int8", a peer's "w4a8") are one limb
        """
        units = {"fp32": self.gflop_per_s["fp32"]}
        suffix, num_limbs = ("", 1) if compute in ("int8", "w4a8") else ("/2", 2)
        if limbs:
            units[f"int8_dot{suffix}"] = self.gflop_per_s.get("int8_dot", 0.0) / num_limbs
        if dots and isa in ("avx512", "avx512_bf16", "amx"):
            units["bf16_dot"] = self.gflop_per_s.get("bf16_dot", 0.0)
        if isa == "amx":
            units["amx_bf16"] = self.gflop_per_s.get("amx_bf16", 0.0)
        if limbs and isa == "amx":
            units[f"amx_int8{suffix}"] = self.gflop_per_s.get("amx_int8", 0.0) / num_limbs
        unit = max(units, key=units.get)
        read, compute = nbytes / self.read_gb_per_s / 1e9, flops / units[unit] / 1e9
        limit, best = ("read", read) if read >= compute else (unit, compute)
        return limit, round(100 * best / seconds, 2)


def measure_limits(threads: int, *, quick: bool) -> Limits:
    """Runs the limits program. Raises RuntimeError if it is missing or fails."""
    options = ["limits", "--threads", str(threads), *(["--quick"] if quick else [])]
    load = OtherLoad()
    rows = list(program_rows(options))
    reads = [r["gb_per_s"] for r in rows if r["limit"] == "read"]
    peaks = {r["limit"]: r["gflop_per_s"] for r in rows if r["limit"] != "read"}
    return Limits(threads, max(reads), peaks, load.share())


def median_and_spread(seconds: Sequence[float]) -> tuple[float, float]:
    """The median, and half the distance between the quartiles as a fraction of it."""
    ordered = sorted(seconds)
    median = statistics.median(ordered)
    n = len(ordered)
    return median, 0.5 * (ordered[n * 3 // 4] - ordered[n // 4]) / median


def make_row(
    op: str,
    shape: str,
    tokens: int,
    seconds: Sequence[float],
    *,
    limits: Limits,
    nbytes: float,
    flops: float,
    limbs: bool = False,
    isa: str,
    compute: str = "exact",
    **more: Any,
) -> dict[str, Any]:
    """A row of FIELDS, `samples` and whatever else is given; nbytes and flops are what the problem needs.

    isa  the kernel tier in use, which decides the limit; a peer's row has null there
    """
    median, spread = median_and_spread(seconds)
    dots = op == "bf16_gemm"
    limit, percent = limits.share(
        median, nbytes, flops, limbs=limbs, dots=dots, isa=isa, compute=compute
    )
    return {
        "op": op,
        "isa": isa if more.get("peer") is None else None,
        "threads": limits.threads,
        "tokens": tokens,
        "shape": shape,
        "time_us": _digits(median * 1e6),
        "spread": round(spread, 4),
        "samples": len(seconds),
        "bytes": round(nbytes),
        "gb_per_s": _digits(nbytes / median / 1e9),
        "gflop_per_s": _digits(flops / median / 1e9),
        "limit": limit,
        "percent_of_limit": percent,
        "compute": compute,
        **more,
    }


def _digits(value: float) -> float:
    """Six of them: times reach from microseconds to minutes."""
    return float(f"{value:.6g}")


def row_line(row: dict[str, Any]) -> str:
    """One row as a line for people."""
    form = "" if row["compute"] == "exact" else f" ({row['compute']})"
    who = f"{row['op']}{form}"
    if row.get("peer") is not None:
        who = f"  {row['peer']} ({row['compute']})"
    text = (
        f"{who:<28} threads={row['threads']:<2} tokens={row['tokens']:<4} {row['shape']:<32} | "
        f"{row['time_us']:11.1f} us ±{100 * row['spread']:4.1f}% | {row['gb_per_s']:6.1f} GB/s | "
        f"{row['gflop_per_s']:7.1f} GFLOP/s | {row['percent_of_limit']:3.0f} % of {row['limit']} limit"
    )
    if row["samples"] < 20:
        text += f" | {row['samples']} samples"
    text += _others(row.get("others"))
    return text if row.get("ratio") is None else f"{text} | {row['ratio']:.2f} x our time"


def _others(share: float | None) -> str:
    """A tick of the clock is 10 % of a tenth of a second: less is not worth a word."""
    return f" | others {100 * share:.0f} %" if (share or 0) > 0.1 else ""


def limits_line(limits: Limits) -> str:
    peaks = ", ".join(f"{unit} {rate:.0f}" for unit, rate in limits.gflop_per_s.items())
    read = f"read {limits.read_gb_per_s:.1f} GB/s"
    return f"# limits, threads={limits.threads}: {read}, {peaks} G/s{_others(limits.others)}"


# What a row of a timed case is drawn by.
_DRAWN = {"shape": str, "threads": int, "tokens": int, "percent_of_limit": (int, float)}


def read_rows(path: str | Path) -> list[dict[str, Any]]:
    """The rows of a file, - for standard input: one JSON object a line.

    Raises ValueError on a line that is none, RequestError on a file that is no text, OSError on the file.
    """
    rows = []
    for number, line in enumerate(read_text(str(path)).splitlines(), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(f"{path}: line {number} must be a JSON object ({error})") from None
        if not isinstance(row, dict) or not isinstance(row.get("op"), str):
            raise ValueError(f"{path}: line {number} must be a row with an op (got {line[:60]})")
        for field, kind in _DRAWN.items() if timed_rows([row]) else ():
            if not isinstance(row.get(field), kind):
                got = row.get(field)
                raise ValueError(f"{path}: line {number} must have a right {field} (got {got!r})")
        rows.append(row)
    return rows


def timed_rows(rows: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows of timed cases with a share of a limit: not those of limits, nor of data that stays in cache."""
    return [r for r in rows if r.get("percent_of_limit") is not None]
