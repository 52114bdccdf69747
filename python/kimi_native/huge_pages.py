"""Memory that kernels stream through, such as weights made while loading and the latent cache: one piece, on 2 MiB
pages where the system gives them.

A tensor of its own from the allocator would lie on 4 KiB pages: the kernels would wait for page tables, and the first
touch of each page for the system.
"""

from __future__ import annotations

import contextlib
import math
import mmap

import torch
from torch import Tensor

_HUGE_PAGE = 2 << 20
_ALIGNMENT = 64  # a cache line


def aligned_bytes(nbytes: int) -> int:
    """What a tensor of `nbytes` takes of HugePages."""
    return -(-nbytes // _ALIGNMENT) * _ALIGNMENT


class HugePages:
    """Tensors one after the other: `reserve` all of them, then take them with `empty`, in any order.

    nbytes  of all that was reserved. The memory comes with the first tensor and goes with the last.
    """

    def __init__(self) -> None:
        self.nbytes = 0
        self._memory: Tensor | None = None
        self._used = 0

    def reserve(self, shape: tuple[int, ...], dtype: torch.dtype) -> None:
        """Makes room for one more tensor; RuntimeError once one has been taken."""
        if self._memory is not None:
            raise RuntimeError("HugePages: reserve must come before the first empty")
        self.nbytes += aligned_bytes(math.prod(shape) * dtype.itemsize)

    def empty(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """A contiguous tensor of zeros at a 64-byte boundary; RuntimeError if there is no room left for it."""
        if self._memory is None:
            self._memory = _map(self.nbytes)
        nbytes = math.prod(shape) * dtype.itemsize
        if self._used + aligned_bytes(nbytes) > self.nbytes:
            left = self.nbytes - self._used
            raise RuntimeError(
                f"HugePages: a tensor must have been reserved (got {nbytes} bytes, {left} left)"
            )
        start = self._used
        self._used += aligned_bytes(nbytes)
        return self._memory[start : start + nbytes].view(dtype).view(shape)


def _map(nbytes: int) -> Tensor:
    """Private memory that begins at a huge page. What the alignment leaves over is never touched: it costs nothing."""
    pages = mmap.mmap(-1, nbytes + _HUGE_PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with contextlib.suppress(OSError):  # an advice; without it there are 4 KiB pages
        pages.madvise(mmap.MADV_HUGEPAGE)
    whole = torch.frombuffer(pages, dtype=torch.uint8)
    start = -whole.data_ptr() % _HUGE_PAGE
    return whole[start : start + nbytes]
