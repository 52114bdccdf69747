"""What the device reaches by torch's own means, measured in the same run: a large copy, and a large bf16 product."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True)
class Limits:
    """bytes_per_s counts read and written ones of a copy; flops are of a bf16 product, 8192 square."""

    device: str
    isa: str
    bytes_per_s: float
    flops: float

    def seconds(self, nbytes: float, flops: float) -> tuple[str, float]:
        """The limit that binds, and what a problem takes at it."""
        copy, compute = nbytes / self.bytes_per_s, flops / self.flops
        return ("copy", copy) if copy >= compute else ("bf16", compute)

    def rows(self) -> Iterator[dict[str, Any]]:
        common = {"op": "limits", "device": self.device, "threads": 0}
        yield {**common, "limit": "copy", "gb_per_s": float(f"{self.bytes_per_s / 1e9:.5g}")}
        yield {**common, "limit": "bf16", "gflop_per_s": float(f"{self.flops / 1e9:.6g}")}

    @staticmethod
    def line(row: dict[str, Any]) -> str:
        rate = (
            f"{row['gb_per_s']:.0f} GB/s"
            if "gb_per_s" in row
            else f"{row['gflop_per_s'] / 1e3:.1f} TFLOP/s"
        )
        return f"# {row['device']}: {row['limit']} {rate}"


def measure_limits(device: torch.device) -> Limits:
    cuda = device.type == "cuda"
    size, nbytes = (8192, 4 << 30) if cuda else (64, 1 << 20)
    a, b = (torch.randn(size, size, dtype=torch.bfloat16, device=device) for _ in range(2))
    product = _median(lambda: a @ b, 40, device)  # first: it wakes the clocks
    source = torch.randint(256, (nbytes,), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    copy = _median(lambda: target.copy_(source), 20, device)
    name, isa = "rehearsal", "simt"
    if cuda:
        name = torch.cuda.get_device_name(device)
        isa = "sm_{}{}".format(*torch.cuda.get_device_capability(device))
    return Limits(name, isa, 2 * nbytes / copy, 2 * size**3 / product)


def _median(run: Callable[[], object], times: int, device: torch.device) -> float:
    """Median of the later half for a GPU, which needs a while to reach its clocks."""
    if device.type != "cuda":
        begin = time.perf_counter()
        run()
        return time.perf_counter() - begin
    seconds = []
    for _ in range(times):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        run()
        end.record()
        end.synchronize()
        seconds.append(begin.elapsed_time(end) / 1e3)
    return sorted(seconds[times // 2 :])[times // 4]
