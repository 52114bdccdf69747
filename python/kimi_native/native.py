"""The seam's Python side, under ops.py: the native library's settings, scratch memory, and recordings of calls.

The native backend takes CPU tensors. `backend("reference")`, or KIMI_NATIVE_BACKEND=reference, runs the specification
instead: for checking, and for training, since it is differentiable. There is no silent fallback between the two.
"""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Iterator

import torch
from torch import Tensor

from kimi_native import _native
from kimi_native.arena import Arena, ViewsOnly

# ---- runtime settings -----------------------------------------------------------------------------------------------


def cpu_features() -> list[str]:
    """Names of the CPU features that the processor and the operating system offer."""
    return _native.cpu_features()


def supported_isas() -> list[str]:
    """Kernel tiers this machine can run, best first, such as ["avx512", "avx2", "generic"]."""
    return _native.supported_isas()


def active_isa() -> str:
    """The kernel tier in use."""
    return _native.active_isa()


def force_isa(name: str) -> None:
    """Use one kernel tier; "" returns to the default. Raises RuntimeError if this machine lacks it."""
    _native.force_isa(name)


def num_threads() -> int:
    """Threads that native ops use, the caller's included."""
    return _native.num_threads()


def set_num_threads(n: int) -> None:
    """Set the number of threads of native ops. Raises ValueError below 1."""
    _native.set_num_threads(n)


def cuda_library() -> dict[str, object]:
    """The CUDA kernels beside this package: "architectures" they are compiled for, "error" why none can run (or "")."""
    library = _native.cuda_library()
    return {"architectures": library.architectures.split(), "error": library.error}


_BACKENDS = ("native", "reference")


def _initial_backend() -> str:
    name = os.environ.get("KIMI_NATIVE_BACKEND", "native")
    if name not in _BACKENDS:
        raise RuntimeError(
            f"KIMI_NATIVE_BACKEND must be one of {', '.join(_BACKENDS)} (got {name})"
        )
    return name


_state = threading.local()
_default_backend = _initial_backend()


def active_backend() -> str:
    """ "native" or "reference"."""
    return getattr(_state, "backend", _default_backend)


@contextlib.contextmanager
def backend(name: str) -> Iterator[None]:
    """Run the ops of this thread on "native" or "reference" inside the with-block."""
    if name not in _BACKENDS:
        raise ValueError(f"backend: name must be one of {', '.join(_BACKENDS)} (got {name})")
    before = active_backend()
    _state.backend = name
    try:
        yield
    finally:
        _state.backend = before


# ---- calling the kernel ----------------------------------------------------------------------------------------------


def empty(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """An uninitialised tensor for an op to write, from the arena of the recording in progress if there is one."""
    arena = getattr(_state, "arena", None)
    return torch.empty(shape, dtype=dtype) if arena is None else arena.empty(shape, dtype)


def workspace(nbytes: int) -> Tensor:
    """This thread's scratch buffer, grown as needed and kept: nothing is allocated per op in a steady state."""
    buffer = getattr(_state, "workspace", None)
    if buffer is None or buffer.numel() < nbytes + 64:
        buffer = _state.workspace = torch.empty(nbytes + 64, dtype=torch.uint8)
    start = -buffer.data_ptr() % 64
    return buffer[start : start + nbytes]


def call_with_workspace(name: str, *arguments: int | float) -> None:
    nbytes = getattr(_native.cpu, name + "_workspace_bytes")(*arguments)
    scratch = workspace(nbytes)
    getattr(_native.cpu, name)(*arguments, scratch.data_ptr(), nbytes)


def pointer(x: Tensor | None) -> int:
    return 0 if x is None else x.data_ptr()


# ---- recording -------------------------------------------------------------------------------------------------------


class Recording:
    """Op calls made once, to be made again as one native call on the same buffers: a CUDA graph's twin on the CPU.

    with ops.record() as recording:
        y = some_function_of_ops(x)     # runs as always
    x.copy_(other)
    recording.replay()                  # y now holds the result for other

    Only ops are kept. So that nothing is lost silently, a torch operation that computes or copies inside the block
    raises RuntimeError; making views is allowed. Inputs and weights must stay alive and where they are; outputs and
    intermediate results live in the recording. What an op checks it checks again at each replay. Replays use the tier
    and the threads of their time.
    """

    def __init__(self) -> None:
        self._native = _native.Recording()
        self._arena = Arena()

    def replay(self) -> None:
        """Make the calls again; the GIL is released. Raises what the ops raise."""
        self._native.replay()

    @property
    def num_calls(self) -> int:
        return self._native.num_calls

    @property
    def nbytes(self) -> int:
        """Bytes of the buffers that the recording owns."""
        return self._arena.nbytes


@contextlib.contextmanager
def record() -> Iterator[Recording]:
    """Record the native ops of this thread inside the with-block; see Recording. Not with the reference backend."""
    if active_backend() == "reference":
        raise RuntimeError("record: the reference backend has nothing to record")
    recording = Recording()
    recording._native.begin()
    _state.arena = recording._arena
    try:
        with ViewsOnly():
            yield recording
    finally:
        _state.arena = None
        _native.Recording.end()
