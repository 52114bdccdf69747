"""The seam's Python side, under ops.py: the native library's settings, and recordings of calls.

The native backend takes an op to the kernels of the device that its tensors are on. `backend("reference")`, or
KIMI_NATIVE_BACKEND=reference, runs the specification instead: for checking, and for training, since it is
differentiable. There is no silent fallback between the two.
"""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from kimi_native import _native
from kimi_native.arena import Arena, ViewsOnly
from kimi_native.checks import check_integer, check_type
from kimi_native.contents import check_contents
from kimi_native.device_memory import CPU, allocate, cpu_scratch, gpu_scratch

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
    """Use one kernel tier; "" returns to the default. Raises RuntimeError if this machine lacks it, TypeError."""
    check_type("force_isa", "name", name, str)
    _native.force_isa(name)


def num_threads() -> int:
    """Threads that native ops use, the caller's included."""
    return _native.num_threads()


def set_num_threads(n: int) -> None:
    """Set the number of threads of native ops. Raises ValueError below 1 or above 1024, TypeError."""
    check_integer("set_num_threads", n=n)
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


_Tensors = Sequence[Tensor | None]


def empty(
    op: str, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device = CPU
) -> Tensor:
    """An uninitialised tensor for an op to write, from the arena of the recording in progress if there is one."""
    arena = getattr(_state, "arena", None)
    if arena is None or device.type != "cpu":
        return allocate(op, "its result", shape, dtype, device)
    return arena.empty(shape, dtype)


def call(name: str, tensors: _Tensors, *sizes: float) -> None:
    """One op on the device that its tensors are on; arguments follow ops.h, tensors (None: null) first.

    Raises RuntimeError if the tensors are on several devices, and what the op raises.
    """
    device = _device_of(name, tensors)
    if uses_cuda(device):
        if is_synchronous():
            check_contents(name, tensors, sizes)
        _call_cuda(name, device, [*map(pointer, tensors), *sizes])
    else:
        getattr(_native.cpu, name)(*map(pointer, tensors), *sizes)


def call_with_workspace(name: str, tensors: _Tensors, *sizes: float) -> None:
    """The same for an op with scratch."""
    device = _device_of(name, tensors)
    arguments = [*map(pointer, tensors), *sizes]
    if uses_cuda(device):
        if is_synchronous():
            check_contents(name, tensors, sizes)
        with _current(device):  # scratch may differ from GPU to GPU
            nbytes = getattr(_native.cuda, name + "_workspace_bytes")(*arguments)
        with gpu_scratch(name, nbytes, device) as scratch:
            _call_cuda(name, device, [*arguments, scratch.data_ptr(), nbytes])
    else:
        nbytes = getattr(_native.cpu, name + "_workspace_bytes")(*arguments)
        getattr(_native.cpu, name)(*arguments, cpu_scratch(name, nbytes).data_ptr(), nbytes)


def call_with_room(name: str, tensors: _Tensors, *sizes: float) -> Tensor:
    """The same for an op of a GPU whose scratch is its result: a new tensor, uint8."""
    device = _device_of(name, tensors)
    if is_synchronous():
        check_contents(name, tensors, sizes)
    arguments = [*map(pointer, tensors), *sizes]
    with _current(device):
        nbytes = getattr(_native.cuda, name + "_workspace_bytes")(*arguments)
    room = allocate(name, "its result", (nbytes,), torch.uint8, device)
    _call_cuda(name, device, [*arguments, room.data_ptr(), nbytes])
    return room


def pointer(x: Tensor | None) -> int:
    return 0 if x is None else x.data_ptr()


def _device_of(op: str, tensors: _Tensors) -> torch.device:
    device = None
    for x in tensors:
        if x is None or x.device == device:
            continue
        if device is not None:
            raise RuntimeError(f"{op}: tensors must be on one device (got {device} and {x.device})")
        device = x.device
    return CPU if device is None else device


def int4_tiled_bytes(out_features: int, in_features: int) -> tuple[int, int]:
    """Bytes of a matrix's tiles and of their scales; see Int4TiledWeight."""
    sizes = (out_features, in_features)
    return _native.int4_tiled_bytes(*sizes), _native.int4_tiled_scale_bytes(*sizes)


# ---- GPUs ------------------------------------------------------------------------------------------------------------

_cuda_on_host = False
_synchronous = os.environ.get("KIMI_NATIVE_SYNC", "") == "1"


def is_synchronous() -> bool:
    """Whether an op on a GPU looks at contents before it starts, and waits until it is done (KIMI_NATIVE_SYNC=1)."""
    if not _synchronous:
        return False
    return not (torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing())


def uses_cuda(device: torch.device) -> bool:
    """Whether the CUDA kernels take tensors of this device."""
    on_host = _cuda_on_host and not getattr(_state, "cpu_kernels", False)
    return device.type == "cuda" or on_host


@contextlib.contextmanager
def cpu_kernels() -> Iterator[None]:
    """Inside the with-block this thread's CPU tensors stay with the CPU kernels, whatever cuda_on_host says."""
    _state.cpu_kernels = True
    try:
        yield
    finally:
        _state.cpu_kernels = False


@contextlib.contextmanager
def cuda_on_host(library: str | os.PathLike[str]) -> Iterator[None]:
    """Inside the with-block every thread's ops take CPU tensors to the CUDA kernels, in a library of them built against
    csrc/simt: the GPU's path without a GPU. Raises RuntimeError if the library cannot be opened."""
    global _cuda_on_host
    _native.open_cuda_library(str(library))
    _cuda_on_host = True
    try:
        yield
    finally:
        _cuda_on_host = False
        _native.open_cuda_library("")


def _current(device: torch.device) -> contextlib.AbstractContextManager[object]:
    """Makes a GPU the current one inside the with-block; the shim's tensors are the CPU's, of which there is one."""
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()


def _call_cuda(name: str, device: torch.device, arguments: list[float]) -> None:
    op = getattr(_native.cuda, name)
    if _cuda_on_host:
        op(*arguments, 0)
        return
    with _current(device):
        op(*arguments, torch.cuda.current_stream(device).cuda_stream)
    if is_synchronous():
        try:
            torch.cuda.synchronize(device)
        except RuntimeError as error:
            raise RuntimeError(f"{name}: the GPU reports: {error}") from error


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
    if uses_cuda(CPU):
        raise RuntimeError("record: CUDA kernels on the host are not recorded")
    recording = Recording()
    recording._native.begin()
    _state.arena = recording._arena
    try:
        with ViewsOnly():
            yield recording
    finally:
        _state.arena = None
        _native.Recording.end()
