"""What ops ask of a device's memory: results, and scratch, which is kept so that nothing is allocated per op in a
steady state. On the CPU every thread has its own; the threads of a GPU take turns with one, since a server's are many.
"""

from __future__ import annotations

import contextlib
import math
import threading
from collections.abc import Iterator

import torch
from torch import Tensor

CPU = torch.device("cpu")


def allocate(
    op: str, what: str, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device
) -> Tensor:
    """An uninitialised tensor; where a GPU's memory is full, an error that says whose it would have been."""
    with memory_of(op, what, device, f"{math.prod(shape) * dtype.itemsize} bytes"):
        return torch.empty(shape, dtype=dtype, device=device)


@contextlib.contextmanager
def memory_of(op: str, what: str, device: torch.device, got: str) -> Iterator[None]:
    """Names in the error of a full memory what the with-block needed it for."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise torch.OutOfMemoryError(
            f"{op}: {what} must fit into the memory of {device} (got {got}): {error}"
        ) from error


class _Buffer:
    """Scratch that grows as needed, by a quarter at least: every CUDA graph keeps the one that it was captured with."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._memory: Tensor | None = None

    def room(self, op: str, nbytes: int) -> Tensor:
        """uint8, 64-byte aligned."""
        memory = self._memory
        if memory is None or memory.numel() < nbytes + 64:
            grown = 0 if memory is None else memory.numel() * 5 // 4
            shape = (max(nbytes + 64, grown),)
            self._memory = memory = allocate(op, "its scratch", shape, torch.uint8, self._device)
        start = -memory.data_ptr() % 64
        return memory[start : start + nbytes]


# ---- a thread's own, on the CPU --------------------------------------------------------------------------------------

_threads = threading.local()


def cpu_scratch(op: str, nbytes: int) -> Tensor:
    """Of this thread, until its next call."""
    if not hasattr(_threads, "buffer"):
        _threads.buffer = _Buffer(CPU)
    return _threads.buffer.room(op, nbytes)


# ---- one for all, on a GPU -------------------------------------------------------------------------------------------


class _Gpu:
    def __init__(self, device: torch.device) -> None:
        self.buffer = _Buffer(device)
        self.stream: torch.cuda.Stream | None = None


_gpus: dict[torch.device, _Gpu] = {}
_lock = threading.RLock()


@contextlib.contextmanager
def gpu_scratch(op: str, nbytes: int, device: torch.device) -> Iterator[Tensor]:
    """For what is launched on the current stream inside the with-block: other threads wait for its end, and kernels of
    this stream for those of the one that had the scratch before. Blocks may be nested, and share it."""
    with _lock:
        gpu = _gpus.get(device)
        if gpu is None:
            gpu = _gpus[device] = _Gpu(device)
        room = gpu.buffer.room(op, nbytes)
        if device.type == "cuda":
            _take_turns(gpu, room)
        yield room


def _take_turns(gpu: _Gpu, room: Tensor) -> None:
    """The stream of a capture runs nothing: it stands for those that the graph is replayed on."""
    if torch.cuda.is_current_stream_capturing():
        return
    stream, last = torch.cuda.current_stream(room.device), gpu.stream
    if last is not None and last != stream:
        stream.wait_stream(last)
        room.record_stream(stream)
    gpu.stream = stream
