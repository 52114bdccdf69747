"""The shim finds planted bugs in every schedule, says where they are, and passes the correct forms of the same code."""

from __future__ import annotations

import numpy as np
import pytest

from simt import SCHEDULES, Fault, Schedule, run_program, stats

VALUES = np.arange(1024, dtype=np.int32)


def run(name, bug, schedule=SCHEDULES[0], *, count=1024, out=128, flush="end"):
    return run_program(
        name,
        VALUES[:count],
        np.zeros(out, np.int32),
        variant=bug,
        schedule=schedule,
        flush=flush,
    )


schedules = pytest.mark.parametrize("schedule", SCHEDULES, ids=str)


@schedules
def test_simt_reverse_through_shared_memory(schedule):
    assert (run("reverse", 0, schedule) == VALUES[127::-1]).all()


@schedules
def test_simt_missing_barrier_is_found(schedule):
    with pytest.raises(Fault, match=r"kernel reverse, block \(0, 0, 0\), thread .* race: "):
        run("reverse", 1, schedule)


@schedules
def test_simt_buffer_used_again_without_a_barrier_is_found(schedule):
    expected = sum(np.roll(VALUES[:128], -32) + turn for turn in range(4))
    assert (run("reuse", 0, schedule) == expected).all()
    with pytest.raises(Fault, match=r"race: .*(read|wrote), and nothing orders the two"):
        run("reuse", 1, schedule)


@schedules
def test_simt_race_with_the_right_result_is_found(schedule):
    assert run("ordered", 0, schedule)[0] == VALUES[:4].sum()
    with pytest.raises(Fault, match=r"race: (load reads|store writes) shared byte 0"):
        run("ordered", 1, schedule)


@schedules
def test_simt_asynchronous_copies_arrive(schedule):
    pieces = VALUES.reshape(2, 128, 4).sum(axis=(0, 2), dtype=np.int32)
    assert (run("copy", 0, schedule) == np.roll(pieces, -1)).all()


@schedules
@pytest.mark.parametrize("bug", [1, 3])
def test_simt_missing_wait_is_found(schedule, bug):
    with pytest.raises(Fault, match=r"while an asynchronous copy .* \(a wait is missing\)"):
        run("copy", bug, schedule)


@schedules
def test_simt_missing_barrier_behind_a_wait_is_found(schedule):
    with pytest.raises(Fault, match=r"race|a wait is missing"):
        run("copy", 2, schedule)


@schedules
def test_simt_divergent_barrier_is_a_deadlock_that_names_threads(schedule):
    assert (run("divergent", 0, schedule) == VALUES[:128]).all()
    with pytest.raises(Fault) as fault:
        run("divergent", 1, schedule)
    assert str(fault.value) == (
        "kernel divergent: deadlock; block (0, 0, 0); "
        "threads 0-39 wait at __syncthreads (barrier 0: 40 of 128 arrived); "
        "threads 40-127 wait at barrier_sync (barrier 3: 88 of 128 arrived)"
    )


@schedules
def test_simt_lane_that_left_is_a_deadlock(schedule):
    assert (run("lost_lane", 0, schedule, out=32) == 7).all()
    with pytest.raises(Fault, match=r"threads 5 have ended; threads 0-4, 6-31 wait at __shfl_sync"):
        run("lost_lane", 1, schedule, out=32)


@schedules
def test_simt_lanes_in_different_operations_are_found(schedule):
    with pytest.raises(Fault, match="lanes of one warp meet in different operations: __"):
        run("lost_lane", 2, schedule, out=32)


@pytest.mark.parametrize(
    ("bug", "flush", "message"),
    [
        (1, "end", r"thread \(127, 0, 0\): store: out of bounds, 4 bytes at byte 512 of 512"),
        (2, "end", r"thread \(127, 0, 0\): out of bounds: 0 bytes behind the end of in \(512"),
        (3, "front", r"thread \(0, 0, 0\): out of bounds: 4 bytes before the start of in \(512"),
        (4, "end", r"thread \(127, 0, 0\): out of bounds: 0 bytes behind the end of out"),
        (4, "front", r"out: byte 512 was written, outside of its 512 bytes"),
    ],
)
def test_simt_out_of_bounds_is_found(bug, flush, message):
    assert (run("bounds", 0, count=128, flush=flush) == VALUES[:128]).all()
    with pytest.raises(Fault, match=message):
        run("bounds", bug, count=128, flush=flush)


@pytest.mark.parametrize(
    ("bug", "message"),
    [
        (1, "ldmatrix_x4: misaligned, byte .* is not a multiple of 16"),
        (2, "misaligned access through a typed pointer"),
        (3, "store: misaligned, byte 152 of shared memory is not a multiple of 16"),
        (4, "cp_async: misaligned, the source is not a multiple of 16"),
    ],
)
def test_simt_misaligned_access_is_found(bug, message):
    assert (run("misaligned", 0) == 0).all()
    with pytest.raises(Fault, match=message):
        run("misaligned", bug)


def test_simt_stack_overflow_is_reported():
    assert (run("stack", 0) == VALUES[:128]).all()
    with pytest.raises(Fault, match="stack overflow"):
        run("stack", 1)


@pytest.mark.parametrize(
    "schedule", [Schedule(resident=4), Schedule(seed=5, resident=4, os_threads=2)], ids=str
)
def test_simt_blocks_wait_for_each_other_if_resident(schedule):
    assert run("chain", 0, schedule)[0] == 4
    with pytest.raises(Fault, match=r"chain: deadlock; .*wait at spin_until"):
        run("chain", 1, schedule)


def test_simt_block_that_waits_for_one_not_resident_is_a_deadlock():
    # Seed 3 starts blocks 2 and 3 first: CUDA promises no order.
    with pytest.raises(Fault, match=r"deadlock; .*2 blocks have not started \(resident are 2 for"):
        run("chain", 0, Schedule(seed=3, resident=2))


@pytest.mark.parametrize(("conflicts", "wavefronts"), [(0, 2), (1, 64)])
def test_simt_bank_conflicts_are_counted(conflicts, wavefronts):
    # A store and a load of 32 words in one column: 33 words to a row spread them over the banks, 32 do not.
    assert (run("banks", conflicts, out=32) == VALUES[:32]).all()
    assert stats()["wavefronts"] == wavefronts
    assert stats()["ideal_wavefronts"] == 2


def test_simt_schedule_is_a_function_of_the_seed():
    def first_race(seed):
        with pytest.raises(Fault) as fault:
            run("reverse", 1, Schedule(seed=seed))
        return str(fault.value)

    assert len({first_race(seed) for seed in range(1, 9)}) > 1
    assert first_race(4) == first_race(4)


def test_simt_goes_on_after_a_fault():
    for _ in range(20):
        with pytest.raises(Fault):
            run("divergent", 1, SCHEDULES[3])
        assert (run("reverse", 0, SCHEDULES[3]) == VALUES[127::-1]).all()
