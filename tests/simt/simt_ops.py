"""Runs a CUDA op on torch tensors, each in a guarded buffer of its own: in the shim, or on a GPU (gpu.py)."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass

import torch

import gpu
from op_args import args_type
from simt import SCHEDULES, Fault, Schedule, library, memory, use

CudaOp = ctypes.CFUNCTYPE(ctypes.c_char_p, ctypes.c_void_p, ctypes.c_void_p)
DTYPE_CODE = {torch.bfloat16: 0, torch.float32: 1, torch.uint8: 2}


@dataclass
class Span:
    """The bytes from a tensor's first element to its last."""

    address: int
    nbytes: int

    @classmethod
    def of(cls, tensor: torch.Tensor) -> Span:
        if tensor.numel() == 0:
            return cls(tensor.data_ptr(), 0)
        last = sum((n - 1) * s for n, s in zip(tensor.shape, tensor.stride(), strict=True))
        return cls(tensor.data_ptr(), (last + 1) * tensor.element_size())


def call(function: int, args: ctypes.Structure, other: object = None) -> None:
    """One function of libkn_cuda, as the package calls it."""
    text = CudaOp(function)(ctypes.byref(args), other)
    kind, _, message = text.decode().partition(" ")
    if kind == "runtime":
        raise Fault(message)
    if kind:
        raise ValueError(message)


def workspace_bytes(name: str, args: ctypes.Structure) -> int | None:
    """What an op with these arguments needs; None if it takes no workspace."""
    function = op_library().kn_cuda_workspace_bytes(name.encode())
    if not function:
        return None
    result = ctypes.c_int64(-1)
    call(function, args, ctypes.addressof(result))
    return result.value


def op_library() -> ctypes.CDLL:
    return gpu.op_library() if gpu.ON_GPU else library()


def copy(to: int, source: int, nbytes: int) -> None:
    (gpu.copy if gpu.ON_GPU else ctypes.memmove)(to, source, nbytes)


def run_op(
    name: str,
    *,
    schedule: Schedule = SCHEDULES[0],
    flush: str = "end",
    **fields: object,
) -> None:
    """Calls kn::cuda::NAME. Tensors are copied in, and back
    when the op has run; the same tensor given twice is one buffer. A list of tensors (or of addresses) becomes an array
    of pointers; dtypes are given as torch dtypes. Scratch, if not given, is what the op asks for, and starts as NaN."""
    args = args_type(name)()
    buffers: dict[int, tuple[Span, int]] = {}
    if not gpu.ON_GPU:
        use(schedule)
    with gpu.device_memory() if gpu.ON_GPU else memory(flush) as m:

        def place(tensor: torch.Tensor, field: str) -> int:
            span = Span.of(tensor)
            if span.address not in buffers:
                buffers[span.address] = (span, m.allocate(span.nbytes, field))
            return buffers[span.address][1]

        tables = []  # of pointers; alive until the op has run
        for field, value in fields.items():
            if isinstance(value, list):
                each = [t if isinstance(t, int) else place(t, field) for t in value]
                tables.append(torch.tensor(each, dtype=torch.int64))
                value = tables[-1]
            if isinstance(value, torch.Tensor):
                value = place(value, field)
            setattr(args, field, DTYPE_CODE.get(value, value))
        needed = workspace_bytes(name, args)
        scratch = b""
        if needed is not None and "workspace" not in fields:
            args.workspace, args.workspace_bytes = m.allocate(needed, "workspace"), needed
            scratch = b"\xff" * needed
        call_op(name, args, list(buffers.values()), scratch)


def call_op(
    name: str, args: ctypes.Structure, buffers: list[tuple[Span, int]], scratch: bytes
) -> None:
    """Copies in, calls, copies back; on a GPU also as a CUDA graph, which must leave the same bytes."""

    def restore():
        for span, address in buffers:
            copy(address, span.address, span.nbytes)
        if scratch:
            copy(args.workspace, ctypes.cast(scratch, ctypes.c_void_p).value, len(scratch))

    def read():
        contents = []
        for span, address in buffers:
            content = ctypes.create_string_buffer(max(span.nbytes, 1))
            copy(ctypes.addressof(content), address, span.nbytes)
            contents.append(content.raw)
        return contents

    function = op_library().kn_cuda_op(name.encode())
    restore()
    if gpu.ON_GPU:
        gpu.run_twice(lambda stream: call(function, args, stream), restore, read)
    else:
        call(function, args)
    for span, address in buffers:
        copy(span.address, address, span.nbytes)
