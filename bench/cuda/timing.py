"""Two engines timed in turns on a GPU: each a CUDA graph of many calls, replayed between two events."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch
from torch import Tensor

from kimi_native.device_memory import gpu_scratch

Solve = Callable[[int], Tensor]
FEWEST_SAMPLES = 20
GRAPH_SECONDS = 400e-6  # events tick in half microseconds
MOST_CALLS = 1024


class Runs:
    """Calls 0, 1, ... of `solve`, made again by each `seconds`: as one CUDA graph, or from Python where `solve` cannot
    be captured (`graph` says which). On a CPU, in a rehearsal, one call.

    solve     called with a number to rotate weights by; must have warmed up whatever it compiles in its first call
    rotation  calls that differ
    floor_s   what one call takes at least
    """

    def __init__(self, solve: Solve, rotation: int, floor_s: float, device: torch.device) -> None:
        self._solve, self._cuda = solve, device.type == "cuda"
        self.calls, self.graph = 1, False
        if self._cuda:
            rounds = 1 + int(GRAPH_SECONDS / max(floor_s * rotation, 1e-7))
            self.calls = rotation * max(1, min(rounds, MOST_CALLS // rotation))
            self._capture(device)

    def seconds(self) -> float:
        """Of one call, in this replay."""
        if not self._cuda:
            begin = time.perf_counter()
            self._solve(0)
            return time.perf_counter() - begin
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        self._replay()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) / 1e3 / self.calls

    def _capture(self, device: torch.device) -> None:
        self._replay = self._make_calls
        self._solve(0)
        torch.cuda.synchronize(device)
        graph = torch.cuda.CUDAGraph()
        try:
            # Its kernels write to the scratch: it is kept.
            with gpu_scratch("timing", 0, device) as self._scratch, torch.cuda.graph(graph):
                self._make_calls()
        except RuntimeError:
            torch.cuda.synchronize(device)
            return
        self._replay, self.graph = graph.replay, True

    def _make_calls(self) -> None:
        for call in range(self.calls):
            self._solve(call)


def take_turns(ours: Runs, theirs: Runs, budget_s: float) -> tuple[list[float], list[float]]:
    """Seconds of each one's calls, alternating, after a few that are not counted."""
    fewest = FEWEST_SAMPLES if ours._cuda else 1
    for runs in (ours, theirs) * (fewest // 8):
        runs.seconds()
    samples: tuple[list[float], list[float]] = ([], [])
    spent = 0.0
    while len(samples[1]) < fewest or (ours._cuda and spent < budget_s and len(samples[1]) < 500):
        for times, runs in zip(samples, (ours, theirs), strict=True):
            times.append(runs.seconds())
            spent += times[-1] * runs.calls
    return samples
