"""The GPU side of the tests that run the same kernels in the shim and on a GPU.

KIMI_NATIVE_GPU chooses where ops of tests/simt/test_cuda_*.py and programs of tests/gpu run: empty, in the shim;
"required", on the GPU, with the libraries that tests/gpu/run.sh has built (KIMI_NATIVE_GPU_LIBRARIES).
"""

from __future__ import annotations

import ctypes
import os
from contextlib import contextmanager
from functools import cache
from pathlib import Path

ON_GPU = os.environ.get("KIMI_NATIVE_GPU", "") == "required"


def raise_gpu_error(text: bytes) -> None:
    if text:
        kind, _, message = text.decode().partition(" ")
        raise (ValueError if kind == "value" else RuntimeError)(message)


def _folder() -> Path:
    folder = os.environ.get("KIMI_NATIVE_GPU_LIBRARIES")
    if not folder:
        raise RuntimeError(
            "KIMI_NATIVE_GPU=required: run tests/gpu/run.sh, which builds what it needs"
        )
    return Path(folder)


@cache
def test_library() -> ctypes.CDLL:
    """Buffers, programs and graph replay (tests/gpu/conformance)."""
    lib = ctypes.CDLL(str(_folder() / "libkn_gpu_tests.so"))
    pointer, size = ctypes.c_void_p, ctypes.c_uint64
    lib.kn_gpu_allocate.argtypes = [ctypes.POINTER(pointer), size]
    lib.kn_gpu_free.argtypes = [pointer]
    lib.kn_gpu_copy.argtypes = [pointer, pointer, size]
    lib.kn_gpu_stream.argtypes = [ctypes.POINTER(pointer)]
    for name in (
        "allocate",
        "free",
        "copy",
        "stream",
        "synchronize",
        "begin_capture",
        "replay",
        "program",
    ):
        getattr(lib, f"kn_gpu_{name}").restype = ctypes.c_char_p
    return lib


@cache
def op_library() -> ctypes.CDLL:
    """The package's own CUDA kernels."""
    lib = ctypes.CDLL(str(_folder() / "libkn_cuda.so"))
    for name in ("op", "workspace_bytes"):
        getattr(lib, f"kn_cuda_{name}").argtypes = [ctypes.c_char_p]
        getattr(lib, f"kn_cuda_{name}").restype = ctypes.c_void_p
    return lib


@cache
def stream() -> int:
    out = ctypes.c_void_p()
    raise_gpu_error(test_library().kn_gpu_stream(ctypes.byref(out)))
    return out.value


def copy(to: int, source: int, nbytes: int) -> None:
    if nbytes:
        raise_gpu_error(test_library().kn_gpu_copy(to, source, nbytes))


class DeviceMemory:
    """Device buffers between guards, which are looked at when they are freed."""

    def __init__(self) -> None:
        self._addresses: list[int] = []

    def allocate(self, nbytes: int, name: str) -> int:
        out = ctypes.c_void_p()
        raise_gpu_error(test_library().kn_gpu_allocate(ctypes.byref(out), nbytes))
        self._addresses.append(out.value)
        return out.value

    def free(self) -> None:
        for address in self._addresses:
            raise_gpu_error(test_library().kn_gpu_free(address))
        self._addresses.clear()


@contextmanager
def device_memory():
    m = DeviceMemory()
    yield m
    m.free()


def run_twice(function, restore, read) -> None:
    """Calls function(stream), then again as a CUDA graph from the same start: both must leave the same bytes.

    restore()  puts the buffers' start values back
    read()     bytes of all buffers
    """
    lib = test_library()
    function(stream())
    raise_gpu_error(lib.kn_gpu_synchronize())
    once = read()
    restore()
    raise_gpu_error(lib.kn_gpu_begin_capture())
    function(stream())
    raise_gpu_error(lib.kn_gpu_replay())
    assert read() == once, "the replay of the CUDA graph differs from the first run"
