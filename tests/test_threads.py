"""The thread pool seen from outside: same results at any size, from many callers at once, and after a fork."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time

import pytest
import torch

from kimi_native import ops
from oracle_dense import assert_same_bits, randn

BF16, FP32 = torch.bfloat16, torch.float32


@pytest.fixture(autouse=True)
def _restore_threads():
    before = ops.num_threads()
    yield
    ops.set_num_threads(before)


def some_ops(seed: int = 0) -> list[torch.Tensor]:
    """A few ops of many small tasks each."""
    x, w = randn(9, 3, 64, dtype=FP32, seed=seed), randn(3, 100, 64, dtype=BF16, seed=seed)
    q, cache = randn(3, 13, 80, dtype=FP32, seed=seed), randn(30, 16, 80, dtype=BF16, seed=seed)
    table = torch.arange(30, dtype=torch.int32).view(3, 10)
    lens = torch.tensor([5, 160, 100], dtype=torch.int32)
    return [
        ops.bf16_gemm(x, w),
        ops.rms_norm(randn(50, 64, dtype=BF16, seed=seed), randn(64, dtype=BF16), eps=1e-6),
        ops.mla_decode(q, cache, table, lens, kv_lora_rank=64, softmax_scale=0.1),
    ]


def assert_same_results(results, expected):
    for a, b in zip(results, expected, strict=True):
        assert_same_bits(a, b)


@pytest.mark.parametrize("n", [1, 2, 3, 4, 33])
def test_threads_do_not_change_results(n):
    ops.set_num_threads(1)
    expected = some_ops()
    ops.set_num_threads(n)
    assert ops.num_threads() == n
    for _ in range(20):
        assert_same_results(some_ops(), expected)


def test_threads_survive_changes_and_pauses():
    ops.set_num_threads(1)
    expected = some_ops()
    for n in (2, 1, 4, 3, 2) * 4:
        ops.set_num_threads(n)
        assert_same_results(some_ops(), expected)
        time.sleep(0.002)  # longer than workers spin: the next op finds them asleep
        assert_same_results(some_ops(), expected)


def test_threads_serve_many_callers_at_once():
    expected = [some_ops(seed) for seed in range(6)]
    ops.set_num_threads(3)
    failures = []

    def caller(seed):
        try:
            for _ in range(25):
                assert_same_results(some_ops(seed), expected[seed])
        except (AssertionError, ValueError, RuntimeError) as e:
            failures.append(e)

    callers = [threading.Thread(target=caller, args=(seed,)) for seed in range(6)]
    for t in callers:
        t.start()
    for t in callers:
        t.join(timeout=60)
        assert not t.is_alive(), "a caller hangs"
    assert failures == []


def wait_for(pid: int, seconds: float = 30) -> int:
    """Exit code of a child, which is killed if it hangs."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.01)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    pytest.fail("the child hangs")


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_threads_work_in_a_forked_child():
    ops.set_num_threads(3)
    expected = some_ops()  # the pool runs: the child inherits its memory without its threads
    for _ in range(3):
        pid = os.fork()
        if pid == 0:
            code = 1
            try:
                torch.set_num_threads(1)  # torch's own OpenMP threads do not survive a fork
                same = all(torch.equal(a, b) for a, b in zip(some_ops(), expected, strict=True))
                code = 0 if same and ops.num_threads() == 3 else 2
            finally:
                os._exit(code)
        assert wait_for(pid) == 0
    assert_same_results(some_ops(), expected)


def run_python(code: str) -> str:
    """Standard output of a fresh process; the native module alone, since importing torch takes seconds."""
    code = "from kimi_native import _native\n" + code
    done = subprocess.run(
        [sys.executable, "-c", code], timeout=60, check=True, capture_output=True, text=True
    )
    return done.stdout


def test_threads_let_the_process_end():
    code = """
from array import array
_native.set_num_threads(4)
x, weight, y = (array("H", [0x3F80]) * n for n in (800, 8, 800))
addresses = [a.buffer_info()[0] for a in (x, weight, y)]
_native.cpu.rms_norm(*addresses, 0, 100, 8, 8, 0.0)
print(set(y) == {0x3F80})
"""
    assert run_python(code) == "True\n"


@pytest.mark.parametrize("n", [0, -1, 1025])
def test_threads_refuse_impossible_numbers(n):
    before = ops.num_threads()
    with pytest.raises(ValueError, match=rf"threads: .* 1 to 1024 \(got {n}\)"):
        ops.set_num_threads(n)
    assert ops.num_threads() == before


def test_threads_default_to_the_allowed_cores():
    allowed = sorted(os.sched_getaffinity(0))
    for cores in (allowed, allowed[:1]):
        code = f"import os; os.sched_setaffinity(0, {cores}); print(_native.num_threads())"
        assert run_python(code) == f"{len(cores)}\n"
