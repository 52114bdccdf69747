"""The library of CUDA kernels and the extension that opens it must mean the same by an op's arguments."""

from __future__ import annotations

import hashlib
import re
import subprocess

import pytest

from kimi_native import native
from op_args import HEADER, args_type
from simt import simt_only
from simt_build import compiler

pytestmark = simt_only


def test_cuda_library_interface_has_a_new_number_when_arguments_change():
    """Else a library that is left from an earlier build would take one argument for another."""
    structs = re.findall(r"^struct (\w+)Args {", HEADER.read_text(), re.MULTILINE)
    ops = [re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", name).lower() for name in structs]
    fields = [(op, [(n, t.__name__) for n, t in args_type(op)._fields_]) for op in sorted(ops)]
    digest = hashlib.sha256(repr(fields).encode()).hexdigest()[:16]
    text = (HEADER.parent / "cuda_library.h").read_text()
    number = int(re.search(r"kCudaAbi = (\d+);", text).group(1))
    assert (number, digest) == (2, "828767aa22e5eec7"), "raise kCudaAbi, and put both here"


MACHINE = r"""
#include <cstdio>
#include <cstring>
#include "cuda/machine.h"
int main(int, char** a) {
  try {
    if (!std::strcmp(a[1], "driver")) kn::cuda::check_driver(std::atoi(a[2]), std::atoi(a[3]));
    else kn::cuda::check_architecture("GPU", std::atoi(a[2]), std::atoi(a[3]), a[4]);
  } catch (const std::runtime_error& e) { std::printf("%s", e.what()); }
}
"""


@pytest.fixture(scope="module")
def machine(tmp_path_factory):
    """What the library says of a machine, "" if it is fit."""
    folder = tmp_path_factory.mktemp("machine")
    (folder / "machine.cpp").write_text(MACHINE)
    includes = [f"-I{HEADER.parents[2]}", f"-I{HEADER.parents[1]}"]
    command = [compiler(), "-std=c++20", *includes, "machine.cpp", "-o", "machine"]
    subprocess.run(command, cwd=folder, check=True)

    def say(*arguments):
        command = [folder / "machine", *map(str, arguments)]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout

    return say


@pytest.mark.parametrize("driver", [13000, 13020, 14010])
def test_cuda_library_takes_a_driver_of_its_generation_and_later_ones(driver, machine):
    assert machine("driver", driver, 13010) == ""


def test_cuda_library_says_which_driver_it_needs(machine):
    expected = "cuda: the driver must be for CUDA 13.0 or later (got 12.8)"
    assert machine("driver", 12080, 13010) == expected
    assert machine("driver", 0, 13010) == "cuda: no NVIDIA driver was found"


@pytest.mark.parametrize(
    ("major", "minor", "architectures"),
    [
        (8, 0, "80 90a 120"),
        (8, 9, "80 90a 120"),
        (9, 0, "80 90a 120"),
        (9, 0, "120 90a"),
        (10, 3, "80 90a 120"),  # by PTX
        (12, 1, "86 120"),
        (8, 9, "90a 86"),
    ],
)
def test_cuda_library_takes_a_gpu_that_it_has_code_for(major, minor, architectures, machine):
    assert machine("gpu", major, minor, architectures) == ""


@pytest.mark.parametrize(
    ("major", "minor", "architectures"),
    [
        (7, 5, "80 90a 120"),
        (7, 5, "75"),
        (8, 0, "86 120"),
        (8, 0, "90a"),
        (10, 0, "90a 120"),
        (12, 0, "90a 100"),
    ],
)
def test_cuda_library_says_which_gpus_it_has_code_for(major, minor, architectures, machine):
    assert machine("gpu", major, minor, architectures) == (
        "cuda: GPU must have a compute capability of 8.0 or more that this build is for, "
        f"{architectures} (got {major}.{minor})"
    )


def test_cuda_library_of_an_earlier_interface_is_refused(tmp_path):
    """That of number 1 has no schedule among mla_decode's arguments."""
    source, library = tmp_path / "old.cpp", tmp_path / "libold.so"
    source.write_text('extern "C" int kn_cuda_abi() { return 1; }')
    subprocess.run([compiler(), "-shared", "-fPIC", str(source), "-o", str(library)], check=True)
    message = r"must be of this build \(got interface 1, need \d+\)"
    with pytest.raises(RuntimeError, match=message), native.cuda_on_host(library):
        pass
