"""What a recording of ops needs from Python: buffers that outlive it, and a guard against lost operations."""

from __future__ import annotations

import math
import weakref
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

_ALIGNMENT = 64


class Arena:
    """Tensors whose memory the arena keeps, and hands out again once no tensor refers to it.

    While calls are recorded in order, a buffer that Python has dropped will not be read by a later call: reusing it
    keeps the memory of a recording near its peak use, as an allocator does for the same calls made one by one.
    """

    def __init__(self) -> None:
        self._free: dict[int, list[np.ndarray]] = {}  # by size
        self.nbytes = 0

    def empty(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """An uninitialised contiguous tensor at a 64-byte boundary."""
        size = -(-math.prod(shape) * dtype.itemsize // _ALIGNMENT) * _ALIGNMENT
        if size == 0:
            return torch.empty(shape, dtype=dtype)
        free = self._free.setdefault(size, [])
        block = free.pop() if free else self._new_block(size)
        # The tensor's storage, and every view of it, holds `lent`; the block returns when the last of them is gone.
        lent = block[:]
        weakref.finalize(lent, free.append, block)
        return torch.from_numpy(lent)[: math.prod(shape) * dtype.itemsize].view(dtype).view(shape)

    def _new_block(self, size: int) -> np.ndarray:
        memory = np.empty(size + _ALIGNMENT, dtype=np.uint8)
        start = -memory.ctypes.data % _ALIGNMENT
        self.nbytes += memory.nbytes
        return memory[start : start + size]


# Torch operations that touch no data: a recording loses nothing by them.
_VIEWS = {
    "alias",
    "as_strided",
    "detach",
    "empty",
    "expand",
    "lift_fresh",
    "permute",
    "select",
    "slice",
}
_VIEWS |= {"split", "squeeze", "t", "transpose", "unbind", "unsqueeze", "view", "_unsafe_view"}


class ViewsOnly(TorchDispatchMode):
    """Inside the with-block torch may make views; anything that computes or copies raises RuntimeError."""

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # else torch imports its compiler, a second, to mark __torch_dispatch__ as not for it

    def __torch_dispatch__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        name = func.overloadpacket.__name__
        if name not in _VIEWS:
            raise RuntimeError(
                f"record: torch.{name} would not be recorded; use an op, or move it out of the recording"
            )
        return func(*args, **(kwargs or {}))
