"""Threads and tier of the process: set for good, put back by a failure, and left alone when not asked for."""

from __future__ import annotations

import os

import pytest
import torch

from kimi_native import ops
from kimi_native.machine_settings import machine_settings


@pytest.fixture(autouse=True)
def _restore():
    before = state()
    yield
    ops.set_num_threads(before[0])
    torch.set_num_threads(before[1])
    ops.force_isa(before[2])


def state() -> tuple[int, int, str]:
    return ops.num_threads(), torch.get_num_threads(), ops.active_isa()


@pytest.mark.parametrize(
    ("cores", "threads", "started"), [(5, 3, 3), (5, 5, 5), (5, 1000, 5), (1, 2, 1)]
)
def test_machine_settings_start_no_more_threads_than_cores(monkeypatch, cores, threads, started):
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(cores)))
    with machine_settings(threads, None):
        pass
    assert (ops.num_threads(), torch.get_num_threads()) == (started, started)


def test_machine_settings_without_a_value_stay_as_they_are_set():
    with machine_settings(1, "generic"):
        pass
    with machine_settings(None, None):
        assert state() == (1, 1, "generic")
    assert state() == (1, 1, "generic")


def test_machine_settings_are_put_back_by_a_failure():
    ops.set_num_threads(2)
    before = state()
    with pytest.raises(KeyError), machine_settings(1, "generic"):
        raise KeyError
    assert state() == before
