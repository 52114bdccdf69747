"""What the operating system says about this machine: memory, cores, and the limits of control groups (v1 and v2).

`root` is where proc and sys are mounted.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path


def available_memory(root: str | Path = "/") -> int:
    """Bytes this process may still take: MemAvailable, or less if a cgroup limits it.

    Raises RuntimeError if /proc/meminfo does not say.
    """
    root = Path(root)
    available = meminfo(root, "MemAvailable")
    if available is None:
        raise RuntimeError(f"memory: {root / 'proc/meminfo'} must hold MemAvailable (found none)")
    left = [available]
    for folder, is_v1 in _cgroup_folders(root, "memory"):
        limit = _number(folder / ("memory.limit_in_bytes" if is_v1 else "memory.max"))
        usage = _number(folder / ("memory.usage_in_bytes" if is_v1 else "memory.current"))
        if limit is not None and usage is not None:
            # File cache is no usage: the system drops it when memory is asked for, as MemAvailable counts it too. A
            # model that was loaded before lies there, in the active part since it was used.
            prefix = "total_" if is_v1 else ""
            cache = sum(_stat(folder, f"{prefix}{part}_file") for part in ("active", "inactive"))
            left.append(limit - max(usage - cache, 0))
    return max(min(left), 0)


def meminfo(root: Path, field: str) -> int | None:
    """Bytes of one field of /proc/meminfo, None if it is not there."""
    for line in (read_text(root / "proc/meminfo") or "").splitlines():
        name, _, value = line.partition(":")
        if name == field and value.split()[:1] and value.split()[0].isdigit():
            return int(value.split()[0]) * 1024
    return None


def memory_limit(root: Path) -> int | None:
    """The tightest cgroup's limit, None without one (v1 writes a number near 2**63 for none)."""
    files = [
        folder / ("memory.limit_in_bytes" if is_v1 else "memory.max")
        for folder, is_v1 in _cgroup_folders(root, "memory")
    ]
    limits = [limit for file in files if (limit := _number(file)) is not None]
    return min((limit for limit in limits if limit < 1 << 60), default=None)


def cpu_quota(root: Path) -> float | None:
    """Cores' worth of time that the tightest cgroup allows, None without a limit."""
    cores = []
    for folder, is_v1 in _cgroup_folders(root, "cpu"):
        if is_v1:
            quota, period = (read_text(folder / f"cpu.cfs_{x}_us") for x in ("quota", "period"))
        else:
            quota, period = [*(read_text(folder / "cpu.max") or "").split(), None, None][:2]
        # "max" or -1: no limit here
        if quota and period and quota.strip().isdigit() and int(period) > 0:
            cores.append(int(quota) / int(period))
    return round(min(cores), 2) if cores else None


def usable_cores() -> int:
    """Cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def read_text(path: Path) -> str | None:
    """A small file, None if it cannot be read."""
    try:
        return path.read_text(errors="replace")
    except OSError:
        return None


def _cgroup_folders(root: Path, controller: str) -> Iterator[tuple[Path, bool]]:
    """(folder, whether it is of v1) of this process's cgroup and of each of its parents.

    In a container the path is often the host's and not visible; its own root then carries the limit.
    """
    for line in (read_text(root / "proc/self/cgroup") or "").splitlines():
        _, controllers, path = [*line.split(":", 2), "", ""][:3]
        if controllers and controller not in controllers.split(","):
            continue
        base = root / "sys/fs/cgroup" / (controller if controllers else "")
        parts = [p for p in path.split("/") if p not in ("", "..")]
        for depth in range(len(parts), -1, -1):
            yield base.joinpath(*parts[:depth]), bool(controllers)


def _number(path: Path) -> int | None:
    text = (read_text(path) or "").strip()
    return int(text) if text.isdigit() else None


def _stat(folder: Path, field: str) -> int:
    for line in (read_text(folder / "memory.stat") or "").splitlines():
        name, _, value = line.partition(" ")
        if name == field and value.isdigit():
            return int(value)
    return 0
