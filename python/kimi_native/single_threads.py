"""A pool of threads on which torch uses one thread each: work shared out in pieces of our own choosing.

Left to itself torch shares out every operation, and its threads wait for each other after each: results may depend on
how many there are, and where other processes compute too, the waiting costs many times the work.
"""

from __future__ import annotations

import os
import threading
from concurrent.futures import ThreadPoolExecutor

import torch

_lock = threading.Lock()
_pool: ThreadPoolExecutor | None = None
_pool_threads = 0


def single_threads(count: int) -> ThreadPoolExecutor:
    """`count` threads on which torch uses one thread; kept until another number is asked for."""
    global _pool, _pool_threads
    with _lock:
        if _pool is None or _pool_threads != count:
            if _pool is not None:
                _pool.shutdown(wait=False)
            _pool, _pool_threads = _start(count), count
        return _pool


def _start(count: int) -> ThreadPoolExecutor:
    before = torch.get_num_threads()
    started = threading.Barrier(count + 1)

    def prepare() -> None:
        torch.get_num_threads()  # or the thread's first operation would take over what holds for all
        torch.set_num_threads(1)
        started.wait()

    pool = ThreadPoolExecutor(count, "kimi-native-torch", prepare)
    for _ in range(count):  # no thread is idle before all have started, so each call adds one
        pool.submit(int)
    started.wait()
    # What the threads set for themselves is also the default of threads to come: give that back.
    torch.set_num_threads(before)
    return pool


def _forget() -> None:
    """A forked child has none of the threads."""
    global _pool, _lock
    _pool, _lock = None, threading.Lock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget)
