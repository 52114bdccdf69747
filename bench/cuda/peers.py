#!/usr/bin/env python3
"""Other kernels and ours on the same GPU problems, in turns in one process; the ratio of their times is printed.

    bench/cuda/peers.py [OP ...] [--peer TEXT] [--tokens N,...] [--time-budget S] [--json]
    bench/cuda/peers.py step                    one decode step of a slice of K2 against the sum of its floors
    bench/cuda/peers.py --rehearse LIBRARY      tiny shapes on the CPU, our kernels in that build of the shim

A peer that is not installed or fails is one line on stderr, and the next one has its turn. A result that is not ours,
or a failure of ours, is one too, and makes the exit code 1. Needs the package with its CUDA kernels, and torch with
CUDA.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent))

import peer_packages
import peer_torch
import peer_triton
from decode_step import step_rows
from limits import Limits, measure_limits
from peer_torch import Missing
from problems import OPS, Problem, problems
from timing import Runs, take_turns

from kimi_native import native
from kimi_native.bench.rows import median_and_spread

PEERS: dict[str, dict[str, Callable[[Any], Any]]] = {
    "moe_experts": {
        "triton-int4": peer_triton.grouped_int4,
        "humming": peer_packages.humming_moe,
        "torch-grouped-bf16": peer_torch.grouped_mm,
    },
    "mla_decode": {
        "triton": peer_triton.mla_decode,
        "flashinfer-fa3": partial(peer_packages.flashinfer_mla, backend="fa3"),
        "flashinfer-fa2": partial(peer_packages.flashinfer_mla, backend="fa2"),
        "torch-bmm": peer_torch.absorbed_attention,
    },
    "int4_gemm": {
        "humming": peer_packages.humming_gemm,
        "torch-int4pack": peer_torch.int4pack_mm,
        "torch-bf16": peer_torch.dequantized_matmul,
    },
    "bf16_gemm": {"torch-bf16": peer_torch.bf16_matmul},
}
# Rounding to bf16 between and after products explains a root-mean-square difference of a percent or so.
TOLERANCE = 0.02


class Different(Exception):
    """A peer's result is not ours: one of the two is wrong."""


class Comparison:
    """What a run asks for and finds; `failures` counts what makes its exit code 1."""

    def __init__(self, args: argparse.Namespace, limits: Limits, device: torch.device) -> None:
        self.args, self.limits, self.device = args, limits, device
        self.failures = 0
        self._said: set[str] = set()

    def rows(self, op: str) -> Iterator[dict[str, Any]]:
        """A row of ours and the peer's for each problem and peer; ours alone where there is none."""
        try:
            if op == "step":
                yield from step_rows(self.limits, self.device)
                return
            for problem in problems(op, self.device):
                if not self.args.tokens or problem.tokens in self.args.tokens:
                    yield from self._rows_of(problem)
        except (
            Exception
        ) as error:  # ours failed: named, exit code 1, and the other ops still get their figures
            self._failed(op, error)
            if _device_is_lost():
                raise SystemExit("peers: the device is lost: the rest is not measured") from None

    def _rows_of(self, problem: Problem) -> Iterator[dict[str, Any]]:
        expected = problem.ours(0)
        alone = True
        for name, make in PEERS[problem.op].items():
            if self.args.peer in name and (pair := self._pair(problem, name, make, expected)):
                yield from pair
                alone = False
        if alone:
            runs = self._runs(problem, problem.ours)
            times = take_turns(runs, runs, self.args.time_budget)[0]
            yield make_row(problem, times, self.limits, peer=None, ratio=None, graph=runs.graph)

    def _pair(
        self,
        problem: Problem,
        name: str,
        make: Callable[[Any], Callable[[int], torch.Tensor]],
        expected: torch.Tensor,
    ) -> list[dict[str, Any]]:
        """Both rows; none, and a line that says why, if the peer cannot take part."""
        try:
            return self._timed_pair(problem, name, make(problem), expected)
        except Missing as error:
            self._say(f"{name}: left out: {error}")
        except Different as error:
            self._failed(name, error)
        except Exception as error:  # whatever another package raises
            if _device_is_lost():
                raise
            where = f"{problem.op} {problem.shape} tokens={problem.tokens}"
            self._say(f"{name}: failed at {where}: {_first_line(error)}")
        finally:
            if self.device.type == "cuda":
                torch.cuda.empty_cache()
        return []

    def _timed_pair(
        self,
        problem: Problem,
        name: str,
        solve: Callable[[int], torch.Tensor],
        expected: torch.Tensor,
    ) -> list[dict[str, Any]]:
        error = difference(expected, solve(0))
        if not error <= TOLERANCE:
            where = f"{problem.op} {problem.shape} tokens={problem.tokens}"
            raise Different(f"its result is not ours for {where} (relative difference {error:.3g})")
        ours, theirs = self._runs(problem, problem.ours), self._runs(problem, solve)
        times = take_turns(ours, theirs, self.args.time_budget)
        medians = [median_and_spread(t)[0] for t in times]
        more = {
            "peer": name,
            "ratio": round(medians[1] / medians[0], 3),
            "graph": theirs.graph,
            "difference": float(f"{error:.3g}"),
        }
        return [
            make_row(problem, times[0], self.limits, peer=None, ratio=None, graph=ours.graph),
            make_row(problem, times[1], self.limits, **more),
        ]

    def _runs(self, problem: Problem, solve: Callable[[int], torch.Tensor]) -> Runs:
        floor = self.limits.seconds(problem.nbytes, problem.flops)[1]
        return Runs(solve, problem.num_calls, floor, self.device)

    def _say(self, text: str) -> None:
        if text not in self._said:
            self._said.add(text)
            note(text)

    def _failed(self, who: str, error: Exception) -> None:
        self.failures += 1
        self._say(f"{who}: {_first_line(error)}")


def difference(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    """Relative, in the root mean square; NaN for another shape."""
    if ours.shape != theirs.shape:
        return float("nan")
    a, b = ours.double(), theirs.double()
    return float((a - b).norm() / a.norm())


def make_row(problem: Problem, seconds: list[float], limits: Limits, **more: Any) -> dict[str, Any]:
    """The fields of kn_cuda_bench's rows, and those of peers."""
    median, spread = median_and_spread(seconds)
    limit, floor = limits.seconds(problem.nbytes, problem.flops)
    return {
        "op": problem.op,
        "isa": limits.isa,
        "device": limits.device,
        "threads": 0,
        "tokens": problem.tokens,
        "shape": problem.shape,
        "time_us": float(f"{median * 1e6:.6g}"),
        "spread": round(spread, 4),
        "samples": len(seconds),
        "bytes": round(problem.nbytes),
        "gb_per_s": float(f"{problem.nbytes / median / 1e9:.6g}"),
        "gflop_per_s": float(f"{problem.flops / median / 1e9:.6g}"),
        "limit": limit,
        "percent_of_limit": round(100 * floor / median, 2),
        "compute": "exact" if more.get("peer") is None else "bf16",
        **problem.extra,
        **more,
    }


def row_line(row: dict[str, Any]) -> str:
    who = row["op"] if row.get("peer") is None else f"  {row['peer']}"
    text = (
        f"{who:<22} tokens={row['tokens']:<5} {row['shape']:<40} | {row['time_us']:11.2f} us "
        f"±{100 * row['spread']:4.1f}% | {row['gb_per_s']:7.1f} GB/s | {row['gflop_per_s'] / 1e3:6.1f} TFLOP/s | "
        f"{row['percent_of_limit']:3.0f} % of {row['limit']} limit"
    )
    if row.get("tokens_per_s"):
        text += f" | {row['tokens_per_s']:.1f} tokens/s"
    if row.get("graph") is False:
        text += " | no CUDA graph"
    return text if row.get("ratio") is None else f"{text} | {row['ratio']:.2f} x our time"


def note(text: str) -> None:
    print(f"peers: {text}", file=sys.stderr, flush=True)


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[0][:300]}"


def _device_is_lost() -> bool:
    """Whether an earlier kernel has ended the context: then every later call fails too."""
    if not torch.cuda.is_available():
        return False
    try:
        torch.cuda.synchronize()
    except RuntimeError:
        return True
    return False


def lacking() -> str:
    """What keeps this machine from the comparison, or ""."""
    if not torch.cuda.is_available():
        return "torch sees no GPU (with --rehearse LIBRARY none is needed)"
    return str(native.cuda_library()["error"])


def counts(text: str) -> tuple[int, ...]:
    parts = text.split(",")
    if not all(part.isascii() and part.isdigit() and int(part) > 0 for part in parts):
        raise argparse.ArgumentTypeError(f"must be counts such as 1,16 (got {text})")
    return tuple(map(int, parts))


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="peers.py", description=__doc__.split("\n")[0])
    parser.add_argument(
        "ops", nargs="*", metavar="OP", help=f"of {', '.join(OPS)}, step (default: all)"
    )
    parser.add_argument("--peer", default="", metavar="TEXT", help="peers whose name contains this")
    parser.add_argument("--tokens", type=counts, metavar="N,...", help="of the usual counts, these")
    parser.add_argument(
        "--time-budget", type=float, default=0.3, metavar="S", help="for one pair (0.3)"
    )
    parser.add_argument("--rehearse", metavar="LIBRARY", help="a build of the kernels in the shim")
    parser.add_argument("--json", action="store_true", help="one JSON object per line")
    args = parser.parse_args(arguments)
    if unknown := [op for op in args.ops if op not in (*OPS, "step")]:
        parser.error(f"OP must be of {', '.join(OPS)}, step (got {', '.join(unknown)})")
    return args


def main(arguments: list[str] | None = None) -> int:
    args = parse(arguments)
    problem = "" if args.rehearse else lacking()
    if problem:
        note(problem)
        return 1
    cpu = torch.device("cpu")
    device = cpu if args.rehearse else torch.device("cuda", torch.cuda.current_device())
    kernels = native.cuda_on_host(args.rehearse) if args.rehearse else contextlib.nullcontext()
    torch.manual_seed(0)
    with kernels, torch.no_grad():
        limits = measure_limits(device)
        comparison = Comparison(args, limits, device)
        for row in limits.rows():
            print(json.dumps(row) if args.json else limits.line(row), flush=True)
        for op in args.ops or (*OPS, "step"):
            for row in comparison.rows(op):
                print(json.dumps(row) if args.json else row_line(row), flush=True)
    return 1 if comparison.failures else 0


if __name__ == "__main__":
    sys.exit(main())
