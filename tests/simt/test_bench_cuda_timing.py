"""bench/cuda/timing.py: what is captured, replayed and counted, on a GPU that only keeps a clock."""

from __future__ import annotations

import contextlib
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "bench" / "cuda"))

import timing

GPU = SimpleNamespace(type="cuda")


class Clock:
    """A GPU on which a call takes `cost` seconds, when it is made and when it is replayed."""

    def __init__(self, cost: float, *, can_capture: bool = True) -> None:
        self.now, self.cost, self.calls = 0.0, cost, []
        self._captured: int | None = None
        self._can_capture = can_capture

    def solve(self, call: int) -> torch.Tensor:
        self.calls.append(call)
        if self._captured is None:
            self.now += self.cost
        else:
            self._captured += 1
        return torch.empty(0)

    @contextlib.contextmanager
    def capture(self, graph: SimpleNamespace):
        if not self._can_capture:
            raise RuntimeError("operation not permitted when stream is capturing")
        self._captured = 0
        yield
        graph.count, self._captured = self._captured, None

    def install(self, monkeypatch: pytest.MonkeyPatch) -> None:
        clock = self

        class Event:
            def __init__(self, enable_timing: bool) -> None:
                assert enable_timing

            def record(self) -> None:
                self.at = clock.now

            def synchronize(self) -> None:
                pass

            def elapsed_time(self, end: Event) -> float:
                return 1e3 * (end.at - self.at)

        class CUDAGraph:
            count = 0

            def replay(self) -> None:
                clock.now += self.count * clock.cost

        monkeypatch.setattr(torch.cuda, "Event", Event)
        monkeypatch.setattr(torch.cuda, "CUDAGraph", CUDAGraph)
        monkeypatch.setattr(torch.cuda, "graph", self.capture)
        monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
        monkeypatch.setattr(
            timing, "gpu_scratch", lambda op, nbytes, device: contextlib.nullcontext()
        )


def test_timing_captures_whole_rotations_until_a_graph_takes_long_enough(monkeypatch):
    clock = Clock(cost=1e-4)
    clock.install(monkeypatch)
    runs = timing.Runs(clock.solve, rotation=3, floor_s=1e-4, device=GPU)
    assert (runs.calls, runs.graph) == (6, True)  # 3 calls take 300 us, less than 400
    assert clock.calls == [0, *range(6)]  # one to warm up
    assert runs.seconds() == pytest.approx(1e-4)
    assert len(clock.calls) == 7  # a replay calls nothing


def test_timing_calls_what_cannot_be_captured(monkeypatch):
    clock = Clock(cost=2e-4, can_capture=False)
    clock.install(monkeypatch)
    runs = timing.Runs(clock.solve, rotation=4, floor_s=1.0, device=GPU)
    assert (runs.calls, runs.graph) == (4, False)
    clock.calls.clear()
    assert runs.seconds() == pytest.approx(2e-4)
    assert clock.calls == [0, 1, 2, 3]


def test_timing_takes_turns(monkeypatch):
    clock = Clock(cost=1e-3)
    clock.install(monkeypatch)
    runs = timing.Runs(clock.solve, rotation=2, floor_s=1.0, device=GPU)
    ours, theirs = timing.take_turns(runs, runs, budget_s=0.2)
    assert len(ours) == len(theirs) == 50  # 0.2 s of 2 ms each, in pairs
    assert ours == pytest.approx([1e-3] * 50)
    assert len(timing.take_turns(runs, runs, budget_s=0.0)[1]) == timing.FEWEST_SAMPLES
