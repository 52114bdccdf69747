"""Runs kernels in the shim: programs (bytes in, bytes out) and, with tensors in guarded buffers, ops."""

from __future__ import annotations

import ctypes
import os
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
import pytest

import gpu
from simt_build import build


class Fault(Exception):
    """What the shim found wrong with a kernel."""


@dataclass(frozen=True)
class Schedule:
    """How the threads of a grid are run, and on what; see csrc/simt/options.h."""

    seed: int = 0
    asynchronous: str = "late"
    os_threads: int = 1
    resident: int = 1
    hopper: bool = False

    def __str__(self) -> str:
        name = f"{self.asynchronous}-seed{self.seed}-{self.os_threads}x{self.resident}"
        return name + ("-hopper" if self.hopper else "")


# Programs of their own, which the sanitizers of a shim loaded by a test do not fit, and would slow down tenfold.
not_sanitized = pytest.mark.skipif(
    bool(os.environ.get("KIMI_NATIVE_SIMT_SANITIZE")), reason="the shim is built with sanitizers"
)

# What only the shim can do: report a fault and go on, count bank conflicts.
simt_only = pytest.mark.skipif(
    gpu.ON_GPU, reason="only the shim reports this; a GPU stops for good"
)

# Every combination that has found a bug no other one did, and no more: the matrix of all kernel tests.
SCHEDULES = [
    Schedule(),
    Schedule(asynchronous="early", seed=1),
    Schedule(asynchronous="late", seed=2, resident=3),
    Schedule(asynchronous="seeded", seed=3, os_threads=2, resident=2),
]

if gpu.ON_GPU:  # which has a schedule of its own
    SCHEDULES = SCHEDULES[:1]

_ASYNC = {"early": 0, "late": 1, "seeded": 2}
_ERRORS = {"fault": Fault, "value": ValueError, "runtime": RuntimeError}


class Buffers(ctypes.Structure):
    _fields_ = (
        ("in_", ctypes.c_void_p),
        ("out", ctypes.c_void_p),
        ("in_bytes", ctypes.c_int64),
        ("out_bytes", ctypes.c_int64),
        ("variant", ctypes.c_int32),
        ("stream", ctypes.c_void_p),
    )


@cache
def library_path() -> Path:
    """The shim with all kernels, one build for all of a process: two in it would share some of their state.

    KIMI_NATIVE_SIMT_SANITIZE: for -fsanitize; KIMI_NATIVE_SIMT_DEFINES: macros to set.
    """
    sanitize = os.environ.get("KIMI_NATIVE_SIMT_SANITIZE", "")
    defines = tuple(os.environ.get("KIMI_NATIVE_SIMT_DEFINES", "").split())
    return build(sanitize, defines)


@cache
def library() -> ctypes.CDLL:
    lib = ctypes.CDLL(str(library_path()))
    lib.kn_simt_options.argtypes = [ctypes.c_uint64, *[ctypes.c_int] * 4]
    lib.kn_simt_allocate.argtypes = [ctypes.c_uint64, ctypes.c_int, ctypes.c_char_p]
    lib.kn_simt_allocate.restype = ctypes.c_void_p
    lib.kn_simt_free.argtypes = [ctypes.c_void_p]
    for name in ("op", "workspace_bytes"):
        getattr(lib, f"kn_cuda_{name}").argtypes = [ctypes.c_char_p]
        getattr(lib, f"kn_cuda_{name}").restype = ctypes.c_void_p
    for name in ("free", "program"):
        getattr(lib, f"kn_simt_{name}").restype = ctypes.c_char_p
    return lib


def raise_error(text: bytes) -> None:
    if text:
        kind, _, message = text.decode().partition(" ")
        raise _ERRORS[kind](message)


class Memory:
    """Guarded buffers: an access outside of one is a Fault, at the access or when the block is left."""

    def __init__(self, flush: str) -> None:
        self._front = int(flush == "front")
        self._addresses: list[int] = []

    def allocate(self, nbytes: int, name: str) -> int:
        address = library().kn_simt_allocate(nbytes, self._front, name.encode())
        self._addresses.append(address)
        return address

    def free(self) -> list[bytes]:
        errors = [library().kn_simt_free(a) for a in self._addresses]
        self._addresses.clear()
        return [e for e in errors if e]


@contextmanager
def memory(flush: str = "end"):
    """Buffers that touch an inaccessible page at their end ("end") or start ("front")."""
    m = Memory(flush)
    try:
        yield m
    except BaseException:
        m.free()
        raise
    for error in m.free():
        raise_error(error)


def use(schedule: Schedule) -> None:
    library().kn_simt_options(
        schedule.seed,
        _ASYNC[schedule.asynchronous],
        schedule.os_threads,
        schedule.resident,
        schedule.hopper,
    )


def stats() -> dict[str, int]:
    """Counts of the last launch."""
    three = (ctypes.c_uint64 * 3)()
    library().kn_simt_stats(three)
    return dict(zip(("switches", "wavefronts", "ideal_wavefronts"), three, strict=True))


def run_program(
    name: str,
    data: np.ndarray,
    out: np.ndarray,
    *,
    variant: int = 0,
    schedule: Schedule = Schedule(),
    flush: str = "end",
) -> np.ndarray:
    """A program on `data`; `out` gives the start value, shape and dtype of the result."""
    use(schedule)
    data = np.ascontiguousarray(data)
    result = out.copy()
    with memory(flush) as m:
        source, target = m.allocate(data.nbytes, "in"), m.allocate(out.nbytes, "out")
        ctypes.memmove(source, data.ctypes.data, data.nbytes)
        ctypes.memmove(target, out.ctypes.data, out.nbytes)
        buffers = Buffers(source, target, data.nbytes, out.nbytes, variant, None)
        raise_error(library().kn_simt_program(name.encode(), ctypes.byref(buffers)))
        ctypes.memmove(result.ctypes.data, target, out.nbytes)
    return result
