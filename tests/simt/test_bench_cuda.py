"""kn_cuda_bench, rehearsed in the shim: what it runs, what its rows hold. No time is judged here."""

from __future__ import annotations

import json
import subprocess
from functools import cache
from pathlib import Path

import pytest

from simt import library_path, not_sanitized
from simt_build import build_bench

pytestmark = not_sanitized

FIELDS = {
    *("op", "isa", "device", "threads", "tokens", "shape", "time_us", "spread", "samples"),
    *("bytes", "gb_per_s", "gflop_per_s", "limit", "percent_of_limit", "compute"),
}
OPS = {
    *("int4_gemm", "int4_pack", "bf16_gemm", "int8_gemm", "mla_decode", "moe_route"),
    *("moe_dispatch", "moe_routing", "int4_grouped_swiglu", "int4_grouped_gemm", "moe_experts"),
    *("moe_combine", "moe_layer", "rms_norm", "add_rms_norm", "swiglu", "rope_append"),
}


@cache
def program_path():
    return build_bench(library_path())


def program(*arguments: str) -> subprocess.CompletedProcess:
    return subprocess.run([program_path(), *arguments], capture_output=True, text=True, check=False)


def rows_of(*arguments: str) -> list[dict]:
    result = program(*arguments, "--json")
    assert result.returncode == 0, result.stderr
    return [json.loads(line) for line in result.stdout.splitlines()]


@pytest.fixture(scope="module")
def tiny_rows():
    """Every program; 70 tokens fill tiles of Hopper's kernels, and 70 sequences would take minutes."""
    others = [name for name in program("list").stdout.split() if name != "mla_decode"]
    return rows_of(*others, "--tokens", "1,70") + rows_of("mla_decode")


def test_cuda_bench_times_every_op(tiny_rows):
    timed = [row for row in tiny_rows if row["op"] != "limits"]
    assert {row["op"] for row in timed} == OPS
    for row in timed:
        assert set(row) >= FIELDS
        assert row["shape"].startswith("tiny")
        assert row["isa"] == "simt"
        assert row["time_us"] > 0
        rate = row["bytes"] / row["time_us"] / 1e3
        assert row["gb_per_s"] == pytest.approx(rate, rel=2e-3, abs=1e-9)
        assert (row["percent_of_limit"] is None) == (row["limit"] == "cache")


def row_of(rows: list[dict], op: str, tokens: int, shape: str = "tiny") -> dict:
    timed = (row for row in rows if row["op"] != "limits")
    return next(
        r for r in timed if (r["op"], r["tokens"]) == (op, tokens) and r["shape"].startswith(shape)
    )


def test_cuda_bench_counts_the_bytes_that_are_needed(tiny_rows):
    matrix = row_of(tiny_rows, "int4_gemm", 70)
    assert matrix["bytes"] == 80 * 192 * 9 // 16 + 70 * 2 * (80 + 192)
    layer = row_of(tiny_rows, "moe_layer", 70)
    assert layer["experts_hit"] == 8  # 140 draws of eight
    assert layer["bytes"] == 8 * 3 * 96 * 192 * 9 // 16 + 70 * 4 * 192
    cached = row_of(tiny_rows, "mla_decode", 1, "tiny-fp8")
    assert cached["bytes"] == 640 * 656 + 2 * 20 * (576 + 512)


def test_cuda_bench_says_what_the_limits_are(tiny_rows):
    limits = {row["limit"]: row for row in tiny_rows if row["op"] == "limits"}
    assert limits.keys() == {"read", "copy", "launch"}  # a rehearsal has no cuBLAS
    assert limits["read"]["gb_per_s"] > 0


def test_cuda_bench_percent_follows_from_the_limits(tiny_rows):
    read = next(r["gb_per_s"] for r in tiny_rows if r["op"] == "limits" and r["limit"] == "read")
    row = next(r for r in tiny_rows if r["op"] == "int8_gemm")
    expected = 100 * row["bytes"] / row["time_us"] / 1e3 / read
    assert row["percent_of_limit"] == pytest.approx(expected, rel=1e-2, abs=0.01)


def test_cuda_bench_gives_no_time_to_a_wrong_kernel():
    """swiglu leaves its output as it was; the other programs go on."""
    silent = build_bench(library_path(), Path(__file__).with_name("silent_swiglu.cpp"))
    command = [silent, "elementwise", "int4_pack", "--tokens", "1", "--json"]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 1
    assert "elementwise: swiglu: the result is wrong" in result.stderr
    ops = {json.loads(line)["op"] for line in result.stdout.splitlines()} - {"limits"}
    assert ops == {"rms_norm", "add_rms_norm", "int4_pack"}


def test_cuda_bench_lists_its_programs():
    assert program("list").stdout.split() == [
        *("moe_layer", "mla_decode", "int4_gemm", "bf16_gemm", "int8_gemm", "moe_routing"),
        *("elementwise", "int4_pack"),
    ]


def test_cuda_bench_prints_lines_for_people():
    result = program("int4_gemm", "--tokens", "3")
    assert result.returncode == 0
    head, limits, line = result.stdout.splitlines()
    assert head.startswith("# rehearsal, simt")
    assert "a rehearsal has no cuBLAS" in limits
    assert line.startswith("int4_gemm ")
    assert "% of read limit" in line


@pytest.mark.parametrize(
    ("arguments", "code", "says"),
    [
        (["no_such_op"], 2, "no_such_op: no such program"),
        (["--tokens", "none"], 2, "--tokens: must be positive numbers (got none)"),
        (["--threads", "2"], 2, "are options of kn_bench"),
        (["int8_gemm", "--shape", "nowhere"], 1, "no case matches (shape=nowhere)"),
    ],
)
def test_cuda_bench_refuses_with_a_word(arguments, code, says):
    result = program(*arguments)
    assert result.returncode == code
    assert says in result.stderr
