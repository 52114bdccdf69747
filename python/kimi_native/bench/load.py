"""How busy others kept the cores while something was timed: what tells a slow engine from a disturbed one."""

from __future__ import annotations

import os
import time
from collections.abc import Iterable
from pathlib import Path


class OtherLoad:
    """Watches from its making on. pids: processes that count as ours, besides this one."""

    def __init__(self, pids: Iterable[int] = ()) -> None:
        self._pids = (os.getpid(), *pids)
        self._started = time.perf_counter()
        self._busy, self._own = _busy_ticks(), _own_ticks(self._pids)

    def share(self) -> float | None:
        """Part of the cores' time since then that other processes and the hypervisor took; None where /proc is not."""
        busy, own = _busy_ticks(), _own_ticks(self._pids)
        if busy is None or own is None or self._busy is None or self._own is None:
            return None
        cores = os.sysconf("SC_NPROCESSORS_ONLN")
        ticks = (time.perf_counter() - self._started) * os.sysconf("SC_CLK_TCK") * cores
        others = (busy - self._busy) - (own - self._own)
        return round(min(1.0, max(0.0, others / ticks)), 3) if ticks > 0 else 0.0


def _busy_ticks() -> int | None:
    """Of all cores: user, nice, system, irq, softirq and steal."""
    try:
        fields = Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:]
    except OSError:
        return None
    return sum(int(fields[i]) for i in (0, 1, 2, 5, 6, 7))


def _own_ticks(pids: Iterable[int]) -> int | None:
    """User and system time of some processes, all their threads, and the children they have waited for."""
    total = 0
    for pid in pids:
        try:
            stat = Path(f"/proc/{pid}/stat").read_text()
        except OSError:
            return None
        fields = stat.rpartition(")")[2].split()  # a process name may hold spaces
        total += sum(int(ticks) for ticks in fields[11:15])
    return total
