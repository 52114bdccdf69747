"""Runs a CUDA op in the shim on torch tensors, each in a guarded buffer of its own."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass

import torch

from op_args import args_type
from simt import SCHEDULES, Fault, Schedule, library, memory, use

CudaOp = ctypes.CFUNCTYPE(ctypes.c_char_p, ctypes.c_void_p, ctypes.c_void_p)
DTYPE_CODE = {torch.bfloat16: 0, torch.float32: 1}


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
    function = library().kn_cuda_workspace_bytes(name.encode())
    if not function:
        return None
    result = ctypes.c_int64(-1)
    call(function, args, ctypes.addressof(result))
    return result.value


def run_op(
    name: str, *, schedule: Schedule = SCHEDULES[0], flush: str = "end", **fields: object
) -> None:
    """Calls kn::cuda::NAME. Tensors are copied in, and back when the op has run; the same tensor given twice is one
    buffer. dtypes are given as torch dtypes. Scratch, if not given, is what the op asks for, and starts as NaN."""
    use(schedule)
    args = args_type(name)()
    buffers: dict[int, tuple[Span, int]] = {}
    with memory(flush) as m:
        for field, value in fields.items():
            if isinstance(value, torch.Tensor):
                span = Span.of(value)
                if span.address not in buffers:
                    buffers[span.address] = (span, m.allocate(span.nbytes, field))
                    ctypes.memmove(buffers[span.address][1], span.address, span.nbytes)
                value = buffers[span.address][1]
            setattr(args, field, DTYPE_CODE.get(value, value))
        needed = workspace_bytes(name, args)
        if needed is not None and "workspace" not in fields:
            args.workspace, args.workspace_bytes = m.allocate(needed, "workspace"), needed
            ctypes.memset(args.workspace, 0xFF, needed)
        call(library().kn_cuda_op(name.encode()), args)
        for span, address in buffers.values():
            ctypes.memmove(span.address, address, span.nbytes)
