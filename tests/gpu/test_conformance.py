"""Every PTX wrapper on a GPU and in the shim, on the same bits.

Only this shows that the emulation shares the hardware's fragment, descriptor and swizzle layouts. In a rehearsal the
other side is the shim again, with another schedule.
"""

from __future__ import annotations

import ctypes
import os
import re
from pathlib import Path

import numpy as np
import pytest

import gpu
import simt
from simt import Schedule

ROOT = Path(__file__).resolve().parents[2]
U = 2.0**-24


def rng(name, variant):
    return np.random.default_rng([variant, *name.encode()])


def normal_bf16(r, count):
    """uint16 patterns of normal numbers."""
    return (r.normal(size=count).astype(np.float32).view(np.uint32) >> 16).astype(np.uint16)


def bits(name, variant, count):
    return rng(name, variant).integers(0, 2**32, count, np.uint32)


def indices(name, variant, count):
    return rng(name, variant).integers(0, 250, count, np.uint32)


def fragments(name, variant, count):
    """Per lane 4 accumulators, then 6 words of operands."""
    r = rng(name, variant)
    words = bits(name, variant, count).reshape(-1, 10)
    if name.endswith("bf16"):
        words[:, :4] = r.normal(size=(len(words), 4)).astype(np.float32).view(np.uint32)
        words[:, 4:] = normal_bf16(r, 12 * len(words)).view(np.uint32).reshape(-1, 6)
    else:
        words[:, :4] %= 1 << 20
    return words.ravel()


def floats(name, variant, count):
    return (20 * rng(name, variant).normal(size=count)).astype(np.float32).view(np.uint32)


def wgmma_operands(name, variant, count):
    """a [64, 64] and b [n, 64] in bf16, d [64, n] in fp32."""
    r, n = rng(name, variant), variant // 10
    operands = normal_bf16(r, (64 + n) * 64).view(np.uint32)
    return np.concatenate([operands, r.normal(size=64 * n).astype(np.float32).view(np.uint32)])


def exact_operands(name, variant, count):
    """The same where every sum is an integer below 2**23 times a power of two, from one that makes small numbers
    subnormal to the largest that stays finite, a power for each row of b: a is q / 4 of an INT4 q, b an integer of at
    most 8 bits of up to 2**14, d = 0. Fixed point tokens as INT4 products on Hopper have them."""
    r, n = rng(name, variant), variant // 10
    a = (r.integers(-8, 8, (64, 64)) / 4).astype(np.float32)
    integers = r.integers(-255, 256, (n, 64)) * 2.0 ** r.integers(0, 7, (n, 64))
    exponents = np.linspace(-133, 105, n).round()
    b = (integers * 2.0 ** exponents[:, None]).astype(np.float32)
    operands = np.concatenate([a.ravel(), b.ravel()]).view(np.uint32) >> 16
    return np.concatenate([operands.astype(np.uint16).view(np.uint32), np.zeros(64 * n, np.uint32)])


def same_bits(ours, theirs):
    assert (ours == theirs).all(), f"{int((ours != theirs).sum())} of {ours.size} words differ"


def same_sums(ours, theirs):
    """Two fp32 sums of up to 64 exact products of normal numbers (each below 40) and a start, in any order: each side
    rounds at most 68 times a partial sum below 65 * 40. A wrong layout is off by about 8."""
    error = np.abs(ours.view(np.float32).astype(np.float64) - theirs.view(np.float32))
    assert error.max() <= 2 * 68 * U * 65 * 40


def within_two_ulps(ours, theirs):
    """Each side within two ulp of the exact value."""
    a, b = ours.view(np.float32).astype(np.float64), theirs.view(np.float32).astype(np.float64)
    assert (np.abs(a - b) <= 4 * 2.0**-23 * np.abs(a)).all()


WORDS = ["lop3", "prmt", "fma_bf16x2", "to_bf16x2", "to_bf16", "load_streaming"]
# program: [(variant, words in, words out, input, comparison)]
CASES = {
    "mma_m16n8k16_bf16": [(v, 320, 128, fragments, same_sums) for v in range(4)],
    "mma_m16n8k32_s8": [(v, 320, 128, fragments, same_bits) for v in range(4)],
    "ldmatrix": [(v, 128, 128, bits, same_bits) for v in range(4)],
    "cp_async_16": [(0, 384, 384, bits, same_bits)],
    "cp_async_8": [(0, 192, 192, bits, same_bits)],
    "cp_async_4": [(0, 96, 96, bits, same_bits)],
    "named_barrier": [(0, 64, 128, indices, same_bits)],
    **{name: [(0, 30000, 10000, bits, same_bits)] for name in WORDS},
    "exp2_approx": [(0, 30000, 10000, floats, within_two_ulps)],
    "shuffle": [(v, 32, 288, indices, same_bits) for v in range(4)],
    "chain_of_blocks": [(0, 4, 2, indices, same_bits)],
}
HOPPER = {
    **{
        name: [(0, 64 * pieces, 64 * pieces, indices, same_bits) for pieces in (1, 2, 3, 9)]
        for name in ("bulk_copy", "bulk_copy_once")
    },
    **{
        name: [
            (
                swizzle * 10000 + (row + 20) * 100 + column + 20,
                40 * 44,
                (swizzle // 2 or 64) * 8,
                bits,
                same_bits,
            )
            for swizzle in (0, 32, 64, 128)
            for column, row in ((0, 0), (24, 31), (-5, -3), (70, 2), (8, 16))
        ]
        for name in ("tma_load_2d", "tma_load_2d_once")
    },
    **{
        name: [
            (10 * n + swizzle, (64 + n) * 32 + 64 * n, 64 * n, make, compare)
            for n in (16, 32, 64, 128, 256)
            for swizzle in range(4)
            if not name.endswith("_n") or n >= 8 << swizzle  # a row of b is as wide as the swizzle
            for make, compare in ((wgmma_operands, same_sums), (exact_operands, same_bits))
        ]
        for name in ("wgmma_shared", "wgmma_registers", "wgmma_shared_n", "wgmma_registers_n")
    },
}
IS_HOPPER = os.environ.get("KIMI_NATIVE_GPU_ARCH", "90a").startswith("90")
hopper_only = pytest.mark.skipif(
    not IS_HOPPER, reason=f"needs sm_90a (this is sm_{os.environ.get('KIMI_NATIVE_GPU_ARCH')})"
)


def other_side(name, data, out, variant):
    if not gpu.ON_GPU:
        other = Schedule(asynchronous="early", seed=7, resident=4)
        return simt.run_program(name, data, out, variant=variant, schedule=other)
    result = out.copy()
    with gpu.device_memory() as m:
        source, target = m.allocate(data.nbytes, "in"), m.allocate(out.nbytes, "out")
        gpu.copy(source, data.ctypes.data, data.nbytes)
        gpu.copy(target, out.ctypes.data, out.nbytes)
        buffers = simt.Buffers(source, target, data.nbytes, out.nbytes, variant, gpu.stream())
        gpu.raise_gpu_error(gpu.test_library().kn_gpu_program(name.encode(), ctypes.byref(buffers)))
        gpu.copy(result.ctypes.data, target, out.nbytes)
    return result


@pytest.mark.parametrize(
    ("name", "case"),
    [
        pytest.param(name, case, id=f"{name}-{case[0]}-{case[1]}-{case[3].__name__}", marks=marks)
        for cases, marks in ((CASES, ()), (HOPPER, hopper_only))
        for name in cases
        for case in cases[name]
    ],
)
def test_conformance(name, case):
    variant, words_in, words_out, make, compare = case
    data, out = make(name, variant, words_in), np.zeros(words_out, np.uint32)
    schedule = Schedule(resident=4)
    ours = simt.run_program(name, data, out, variant=variant, schedule=schedule)
    compare(ours, other_side(name, data, out, variant))


def test_conformance_covers_every_program():
    sources = (ROOT / "tests/gpu/conformance").glob("wrappers*.cu")
    programs = {
        name for path in sources for name in re.findall(r"KN_PROGRAM\((\w+),", path.read_text())
    }
    assert programs == set(CASES) | set(HOPPER)


def test_conformance_covers_every_wrapper():
    """Every function of the two PTX headers is called by a program (those that only set registers aside excepted)."""
    text = "".join(p.read_text() for p in (ROOT / "tests/gpu/conformance").glob("wrappers*.cu"))
    wrappers = set()
    for header in ("ptx.cuh", "ptx_sm90.cuh"):
        source = (ROOT / "csrc/cuda" / header).read_text()
        wrappers |= set(re.findall(r"__forceinline__ \w+ (\w+)\(", source))
    missing = {w for w in wrappers if not re.search(rf"ptx::{w}\b", text)}
    assert missing == {"shared_address", "give_registers", "take_registers"}
