"""The emulated twins of ptx_sm90.cuh (bulk copies, TMA boxes, wgmma) against plain indexing and products."""

from __future__ import annotations

import numpy as np
import pytest

from simt import SCHEDULES, Fault, Schedule, run_program
from test_simt_ptx import bf16_bits, from_bf16, rng

schedules = pytest.mark.parametrize("schedule", SCHEDULES, ids=str)


@schedules
@pytest.mark.parametrize("pieces", [1, 2, 3, 9])
def test_simt_bulk_copies_flow_through_a_ring_of_mbarriers(pieces, schedule):
    data = rng(1).integers(0, 1000, (pieces, 64), np.int32)
    out = run_program("bulk_copy", data, np.zeros_like(data), schedule=schedule)
    assert (out == data + np.arange(pieces)[:, None]).all()


@schedules
@pytest.mark.parametrize("swizzle", [0, 32, 64, 128])
@pytest.mark.parametrize(("column", "row"), [(0, 0), (24, 31), (-5, -3), (70, 2), (8, 16)])
def test_simt_tma_brings_a_swizzled_box_with_zeros_outside(column, row, swizzle, schedule):
    """Address bits 4.. are xored with bits 7..: one, two or three of them (CUDA driver API, CUtensorMapSwizzle)."""
    data = np.zeros((40, 88), np.uint16)
    data[:, :] = rng(2).integers(1, 2**16, data.shape)
    box_columns = swizzle // 2 or 64
    variant = swizzle * 10000 + (row + 20) * 100 + column + 20
    out = run_program(
        "tma_load_2d",
        data,
        np.zeros((16, box_columns), np.uint16),
        variant=variant,
        schedule=schedule,
    )
    padded = np.zeros((120, 200), np.uint16)
    padded[40:80, 60:132] = data[:, :72]  # 72 of the 88 columns belong to the tensor
    box = padded[40 + row : 56 + row, 60 + column : 60 + column + box_columns]
    bits = {0: 0, 32: 1, 64: 2, 128: 3}[swizzle]
    expected = np.zeros(box.size * 2, np.uint8)
    flat = np.ascontiguousarray(box).view(np.uint8).ravel()
    at = np.arange(flat.size)
    expected[at ^ ((at >> 7 & (2**bits - 1)) << 4)] = flat
    assert (out.view(np.uint8).ravel() == expected).all()


# Every schedule with the small tiles; the large ones differ in nothing but size.
TILES = [(n, s) for n in (16, 32, 64) for s in SCHEDULES] + [(n, SCHEDULES[2]) for n in (128, 256)]
WIDTHS = (16, 32, 64, 128)  # bytes of a row in shared memory, by swizzle


@pytest.mark.parametrize("program", ["wgmma_shared", "wgmma_registers"])
@pytest.mark.parametrize("swizzle", [0, 1, 2, 3])
@pytest.mark.parametrize(("n", "schedule"), TILES, ids=str)
def test_simt_wgmma_is_the_matrix_product(n, swizzle, program, schedule):
    check_wgmma(program, n, swizzle, schedule)


@pytest.mark.parametrize("program", ["wgmma_shared_n", "wgmma_registers_n"])
@pytest.mark.parametrize(
    ("n", "schedule", "swizzle"),
    [(n, s, w) for n, s in TILES for w in range(4) if n * 2 >= WIDTHS[w]],
    ids=str,
)
def test_simt_wgmma_is_the_matrix_product_with_an_n_major_matrix(n, swizzle, program, schedule):
    check_wgmma(program, n, swizzle, schedule)


def check_wgmma(program, n, swizzle, schedule):
    r = rng(3)
    a, b = bf16_bits(r.normal(size=(64, 64))), bf16_bits(r.normal(size=(n, 64)))
    d = r.normal(size=(64, n)).astype(np.float32)
    data = np.concatenate([x.view(np.uint8).ravel() for x in (a, b, d)])
    out = run_program(
        program, data, np.zeros((64, n), np.float32), variant=10 * n + swizzle, schedule=schedule
    )
    wide_a, wide_b = from_bf16(a).astype(np.float64), from_bf16(b).astype(np.float64)
    expected = d + wide_a @ wide_b.T
    # 64 exact products, added in four groups of sixteen that start from zero or the accumulator.
    bound = 68 * 2.0**-24 * (np.abs(d) + np.abs(wide_a) @ np.abs(wide_b).T)
    assert (np.abs(out - expected) <= bound).all()


@schedules
@pytest.mark.parametrize(
    ("bug", "message"),
    [
        (1, "wait is missing|race"),
        (2, "race|wait is missing"),
        (3, "wrote without a fence_proxy_async"),
        (4, "no wgmma_fence since"),
        (5, "deadlock.*mbarrier_wait .mbarrier at byte 0: parity 0, 0 of 1 arrivals and 128 bytes"),
        (6, "no mbarrier at byte 0|race: mbarrier"),
    ],
)
def test_simt_hopper_bugs_are_found(bug, message, schedule):
    hopper_fault(bug, message, schedule)


@pytest.mark.parametrize("schedule", [SCHEDULES[0], SCHEDULES[2]], ids=str)
@pytest.mark.parametrize(
    ("bug", "message"),
    [(7, "more arrivals than the 1 of a phase"), (8, "bulk copy into it in flight")],
)
def test_simt_hopper_bugs_that_only_late_copies_show_are_found(bug, message, schedule):
    hopper_fault(bug, message, schedule)


def hopper_fault(bug, message, schedule):
    data = rng(4).integers(0, 1000, 1024, np.int32)
    with pytest.raises(Fault, match=message):
        run_program("hopper", data, np.zeros(4096, np.int32), variant=bug, schedule=schedule)


@schedules
def test_simt_hopper_program_without_a_bug_runs(schedule):
    data = rng(4).integers(0, 1000, 1024, np.int32)
    out = run_program("hopper", data, np.zeros(4096, np.int32), schedule=schedule)
    assert (out[:128] == data[:128] + data[(np.arange(128) + 1) % 128]).all()


def test_simt_accumulators_in_flight_are_nan():
    data = rng(4).integers(0, 1000, 1024, np.int32)
    out = run_program(
        "hopper", data, np.zeros(4096, np.int32), variant=9, schedule=Schedule(asynchronous="late")
    )
    assert np.isnan(out[128:256].view(np.float32)).all()
