"""A file mapped into memory, read-only: its bytes without a copy, and a named error when they cannot be read.

Touching a page that is not there, because the file was truncated or the disk fails, normally ends the process. Every
map here is watched (csrc/core/mapped_files.cpp): such a page reads as zeros instead, and `check` raises. So whoever
computes with mapped bytes calls `check` before the result is used.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import mmap
import os
import weakref
from pathlib import Path
from typing import BinaryIO

import numpy as np

from kimi_native import _native
from kimi_native.errors import ModelFormatError


class MappedFile:
    """The first `size` bytes of an open file; the file object may be closed afterwards.

    buffer   all of it as a ctypes array, which keeps the map alive. Python takes it for writable; writing faults
    address  where it begins in memory, a multiple of the page size

    Raises ModelFormatError if the file has fewer bytes by now, OSError if it cannot be mapped.
    """

    def __init__(self, file: BinaryIO, size: int, path: Path) -> None:
        self.path, self.size = path, size
        try:
            pages = mmap.mmap(file.fileno(), size, access=mmap.ACCESS_READ)
        except ValueError:
            raise ModelFormatError(
                f"{path}: must keep its {size} bytes while it is opened (got fewer)"
            ) from None
        # Where the file system can (ext4 and XFS on recent Linux), 2 MB are read and mapped at once: a 4096th of the
        # page faults, and no 4 KB page table for the kernels to walk.
        with contextlib.suppress(OSError):
            pages.madvise(mmap.MADV_HUGEPAGE)
        self.address = int(np.frombuffer(pages, np.uint8, 1).ctypes.data)
        # Straight from the map, torch would warn of every tensor that it is not writable.
        self.buffer = (ctypes.c_char * size).from_address(self.address)
        self.buffer.pages = pages
        self._number = _native.watch_mapping(self.address, size)
        # The buffer goes when the last tensor in it goes, and the map after it.
        weakref.finalize(self.buffer, _native.unwatch_mapping, self._number).atexit = False

    def check(self) -> None:
        """Raises ModelFormatError if bytes that were read since the file was mapped were not there."""
        lost = _native.lost_from(self._number)
        if lost >= 0:
            raise self._unreadable(lost)

    def populate(self, start: int, nbytes: int) -> None:
        """Reads bytes into memory and maps them, so that whoever uses them next does not wait for a page.

        Raises ModelFormatError if the file does not hold them any more. Other Python threads run meanwhile.
        """
        first = start - start % mmap.PAGESIZE
        error = _native.populate_pages(self.address + first, start + nbytes - first)
        if error == errno.EINVAL:  # Linux before 5.14
            self.will_need(start, nbytes)
            bytes(memoryview(self.buffer)[first : start + nbytes : mmap.PAGESIZE])
            self.check()
        elif error in (errno.EFAULT, errno.EIO):
            raise self._unreadable(first)
        elif error:
            raise OSError(error, os.strerror(error), str(self.path))

    def will_need(self, start: int, nbytes: int) -> None:
        """Asks the system to begin reading bytes that are used soon; does not wait for them."""
        self._advise(mmap.MADV_WILLNEED, start, start + nbytes)

    def release(self, start: int, nbytes: int) -> None:
        """Takes bytes that are not used again out of the process; they may stay in the system's file cache."""
        inner = -(-start // mmap.PAGESIZE) * mmap.PAGESIZE
        stop = start + nbytes
        self._advise(mmap.MADV_DONTNEED, inner, stop - stop % mmap.PAGESIZE)

    def _advise(self, advice: int, start: int, stop: int) -> None:
        first = start - start % mmap.PAGESIZE
        if stop > first:
            with contextlib.suppress(OSError):  # an advice
                self.buffer.pages.madvise(advice, first, stop - first)

    def _unreadable(self, offset: int) -> ModelFormatError:
        try:
            now = os.stat(self.path).st_size
            what = f"truncated to {now} bytes" if now < self.size else "a failing disk"
        except OSError:
            what = "removed"
        return ModelFormatError(
            f"{self.path}: must keep its {self.size} bytes readable while the model is in use (got {what}, noticed at "
            f"byte {offset}); load the model again when the file is whole"
        )
