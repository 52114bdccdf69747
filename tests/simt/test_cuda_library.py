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


def test_cuda_library_of_an_earlier_interface_is_refused(tmp_path):
    """That of number 1 has no schedule among mla_decode's arguments."""
    source, library = tmp_path / "old.cpp", tmp_path / "libold.so"
    source.write_text('extern "C" int kn_cuda_abi() { return 1; }')
    subprocess.run([compiler(), "-shared", "-fPIC", str(source), "-o", str(library)], check=True)
    message = r"must be of this build \(got interface 1, need \d+\)"
    with pytest.raises(RuntimeError, match=message), native.cuda_on_host(library):
        pass
