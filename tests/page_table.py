"""What of a map is in the page table of this process, as the system says."""

from __future__ import annotations

import mmap

import numpy as np

from kimi_native.mapped_file import MappedFile


def present_pages(file: MappedFile) -> int:
    """Pages of the map that can be read without a page fault."""
    first, count = file.address // mmap.PAGESIZE, -(-file.size // mmap.PAGESIZE)
    with open("/proc/self/pagemap", "rb") as pagemap:
        pagemap.seek(first * 8)
        entries = np.frombuffer(pagemap.read(count * 8), np.uint64)
    return int((entries >> np.uint64(63)).sum())
