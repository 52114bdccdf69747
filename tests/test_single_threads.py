"""The pool in which torch uses one thread a thread."""

from __future__ import annotations

import os
import threading

import pytest
import torch

from kimi_native.single_threads import single_threads


def test_single_threads_leave_the_number_of_torch_threads_alone():
    before = torch.get_num_threads()
    pool = single_threads(7)  # a number that no other test uses: the pool is made anew
    assert [pool.submit(torch.get_num_threads).result() for _ in range(7)] == [1] * 7
    seen = []
    other = threading.Thread(target=lambda: seen.append(torch.get_num_threads()))
    other.start()
    other.join()
    assert torch.get_num_threads() == before
    assert seen == [before]
    assert single_threads(7) is pool


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_single_threads_work_in_a_forked_child():
    assert single_threads(2).submit(int).result() == 0
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            code = single_threads(2).submit(int).result()
        finally:
            os._exit(code)
    _, status = os.waitpid(pid, 0)
    assert os.waitstatus_to_exitcode(status) == 0
