"""Memory on huge pages: tensors that do not overlap, all that was reserved and no more, advised to the system."""

from __future__ import annotations

import gc
import itertools
import re
from pathlib import Path

import pytest
import torch

from kimi_native.huge_pages import HugePages, aligned_bytes

PARTS = [
    ((3, 5), torch.int8),
    ((7, 32), torch.bfloat16),
    ((0, 8), torch.int32),
    ((1, 16), torch.int32),
    ((600, 1024), torch.float32),
    ((1,), torch.int8),
]


def reserved() -> HugePages:
    pages = HugePages()
    for part in PARTS:
        pages.reserve(*part)
    return pages


def test_huge_pages_gives_tensors_of_their_own_in_any_order():
    pages = reserved()
    tensors = [pages.empty(*part) for part in reversed(PARTS)]
    for i, (t, (shape, dtype)) in enumerate(zip(tensors, reversed(PARTS), strict=True)):
        assert (t.shape, t.dtype, t.is_contiguous()) == (shape, dtype, True)
        assert t.numel() == 0 or t.data_ptr() % 64 == 0
        assert not t.any()
        t.fill_(i)
    assert all((t == i).all() for i, t in enumerate(tensors))
    spans = sorted((t.data_ptr(), t.nbytes) for t in tensors if t.numel())
    assert spans[0][0] % (2 << 20) == 0
    for (start, nbytes), (following, _) in itertools.pairwise(spans):
        assert following == start + -(-nbytes // 64) * 64
    assert pages.nbytes == sum(-(-t.nbytes // 64) * 64 for t in tensors)
    assert pages.nbytes == sum(aligned_bytes(t.nbytes) for t in tensors)


def test_huge_pages_refuses_what_was_not_reserved():
    pages = reserved()
    for part in PARTS:
        pages.empty(*part)
    with pytest.raises(RuntimeError, match=r"must have been reserved \(got 1 bytes, 0 left\)"):
        pages.empty((1,), torch.int8)
    with pytest.raises(RuntimeError, match="reserve must come before the first empty"):
        pages.reserve((1,), torch.int8)


def mapping_of(address: int) -> dict[str, str] | None:
    """The fields of /proc/self/smaps for the mapping that holds an address."""
    found = None
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if span := re.match(r"([0-9a-f]+)-([0-9a-f]+) ", line):
            start, stop = (int(x, 16) for x in span.groups())
            found = {} if start <= address < stop else None
        elif found is not None:
            name, _, value = line.partition(":")
            found[name] = value.strip()
            if name == "VmFlags":
                return found
    return None


def test_huge_pages_are_asked_for():
    if not Path("/sys/kernel/mm/transparent_hugepage").exists():
        pytest.skip("this kernel has no transparent huge pages")
    pages = HugePages()
    pages.reserve((8 << 20,), torch.int8)
    tensor = pages.empty((8 << 20,), torch.int8)
    assert "hg" in mapping_of(tensor.data_ptr())["VmFlags"].split()


def test_huge_pages_are_given_back_with_the_last_tensor():
    pages = HugePages()
    pages.reserve((64 << 20,), torch.int8)
    first = pages.empty((32 << 20,), torch.int8).fill_(1)
    second = pages.empty((32 << 20,), torch.int8).fill_(2)
    address = first.data_ptr()
    del pages, first
    gc.collect()
    assert (second == 2).all()
    del second
    gc.collect()
    assert mapping_of(address) is None
