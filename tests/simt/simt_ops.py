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


def call_op(name: str, args: ctypes.Structure) -> None:
    """The op by its name, as the package finds it in libkn_cuda."""
    text = CudaOp(library().kn_cuda_op(name.encode()))(ctypes.byref(args), None)
    kind, _, message = text.decode().partition(" ")
    if kind == "runtime":
        raise Fault(message)
    if kind:
        raise ValueError(message)


def run_op(
    name: str, *, schedule: Schedule = SCHEDULES[0], flush: str = "end", **fields: object
) -> None:
    """Calls kn::cuda::NAME. Tensors are copied in, and back when the op has run; the same tensor given twice is one
    buffer. dtypes are given as torch dtypes."""
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
        call_op(name, args)
        for span, address in buffers.values():
            ctypes.memmove(span.address, address, span.nbytes)
