"""One name through the house: an op is called the same everywhere, and is nowhere missing."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from kimi_native import ops

ROOT = Path(__file__).resolve().parents[1]

# place: (files, what the op NAME looks like there)
PLACES = {
    "ops.h": ("csrc/include/kimi_native/ops.h", r"\bvoid NAME\("),
    "the CPU sources": ("csrc/cpu/NAME.cpp", r"\bvoid NAME\(const \w+Args&"),
    "the bindings": ("csrc/bindings.cpp", r'"NAME"'),
    "ops.py": ("python/kimi_native/ops.py", r"^def NAME\("),
    "torch_ops.py": ("python/kimi_native/torch_ops.py", r'"NAME\('),
    "reference.py": ("python/kimi_native/reference.py", r"^def NAME\("),
    "the op tests": ("tests/test_*.py", r"\bops\.NAME\("),
    "the reference tests": ("tests/test_reference.py", r"\breference\.NAME\("),
    "the benchmarks": ("bench/*.cpp", r"\bcpu::NAME\("),
    "docs/kernels.md": ("docs/kernels.md", r"^## NAME$"),
    "the CUDA sources": ("csrc/cuda/NAME*.cu", r"\bNAME\("),
    "the CUDA benchmarks": ("bench/cuda/*.[ch]*", r"\bcuda::NAME\("),
}

# Ops whose CUDA kernel is not written yet; an op leaves the list with the commit that brings its csrc/cuda/NAME*.cu.
WITHOUT_CUDA = {"int4_quantize"}


def holds(pattern: str, files: str, name: str) -> bool:
    needle = re.compile(pattern.replace("NAME", name), re.MULTILINE)
    return any(needle.search(path.read_text()) for path in ROOT.glob(files.replace("NAME", name)))


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("name", ops.__all__)
def test_names_op_is_present(name, place):
    files, pattern = PLACES[place]
    if place.startswith("the CUDA") and name in WITHOUT_CUDA:
        assert not holds(pattern, files, name), f"{name} has a CUDA kernel: take it off the list"
        return
    assert holds(pattern, files, name), f"{name} is missing from {place} ({files}: {pattern})"


def test_names_no_op_is_outside_the_list():
    """Every op that ops.h declares is public in ops.py."""
    header = (ROOT / "csrc/include/kimi_native/ops.h").read_text()
    assert sorted(re.findall(r"\bvoid (\w+)\(const \w+Args&\)", header)) == sorted(ops.__all__)


def test_names_list_of_ops_without_cuda_names_ops():
    assert set(ops.__all__) >= WITHOUT_CUDA


def test_names_documented_ops_exist():
    headings = re.findall(
        r"^## ([a-z0-9_]+)$", (ROOT / "docs/kernels.md").read_text(), re.MULTILINE
    )
    assert sorted(headings) == sorted(ops.__all__)


def test_names_checker_sees_a_missing_name():
    for files, pattern in PLACES.values():
        assert not holds(pattern, files, "no_such_op")
