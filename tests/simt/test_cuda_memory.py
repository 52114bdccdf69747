"""What the ops allocate on a GPU: full memory is told with the op, and scratch that streams share is used in turns."""

from __future__ import annotations

import itertools
import threading

import pytest
import torch

from kimi_native import native, ops
from kimi_native.mla_schedule import mla_schedule
from simt import library_path, simt_only

pytestmark = simt_only
BF16 = torch.bfloat16
FULL = "CUDA out of memory. Tried to allocate 2.00 GiB."


@pytest.fixture(autouse=True)
def _new_thread(monkeypatch):
    """One that has no scratch yet."""
    monkeypatch.setattr(native, "_state", threading.local())


def fill_memory(monkeypatch, *, after):
    """Only the first allocations succeed."""
    empty, calls = torch.empty, itertools.count()

    def full(*arguments, **options):
        if next(calls) >= after:
            raise torch.OutOfMemoryError(FULL)
        return empty(*arguments, **options)

    monkeypatch.setattr(torch, "empty", full)


@pytest.mark.parametrize(
    ("call", "after", "message"),
    [
        (
            lambda: ops.rms_norm(torch.ones(2, 8), torch.ones(8, dtype=BF16), eps=1e-6),
            0,
            r"rms_norm: its result must fit into the memory of cpu \(got 64 bytes\): CUDA out of",
        ),
        (
            lambda: ops.bf16_gemm(torch.ones(2, 8), torch.ones(3, 8, dtype=BF16)),
            1,
            r"bf16_gemm: its scratch must fit into the memory of cpu \(got 160 bytes\): CUDA out",
        ),
        (
            lambda: mla_schedule(torch.tensor([70], dtype=torch.int32), max_tokens=640),
            0,
            r"mla_schedule: its result must fit into the memory of cpu \(got 32 bytes\): CUDA out",
        ),
    ],
)
def test_cuda_memory_that_is_full_is_told_with_the_op(call, after, message, monkeypatch):
    with native.cuda_on_host(library_path()):
        fill_memory(monkeypatch, after=after)
        with pytest.raises(torch.OutOfMemoryError, match=f"^{message}"):
            call()


def test_cuda_memory_scratch_that_grows_with_the_batch_is_made_a_few_times():
    """Graphs of 256 batch sizes, met in ascending order, keep these: not 256."""
    kept = [native.workspace(1_000_000 + 4000 * batch) for batch in range(256)]
    assert len({scratch.untyped_storage().data_ptr() for scratch in kept}) <= 5


class Stream:
    """A stream of torch's words alone."""

    def __init__(self, log):
        self.log = log

    def wait_stream(self, other):
        self.log.append((self, "waits for", other))


class Scratch:
    """A GPU's buffer, of torch's words alone."""

    def __init__(self, shape, log):
        self.shape, self.log = shape, log

    def data_ptr(self):
        return 64

    def numel(self):
        return self.shape[0]

    def __getitem__(self, part):
        return self

    def record_stream(self, stream):
        self.log.append((stream, "uses", self))


def test_cuda_memory_scratch_is_used_by_one_stream_after_the_other(monkeypatch):
    log, gpu = [], torch.device("cuda", 1)
    first, second, capturing = Stream(log), Stream(log), Stream(log)
    state = {"stream": first}
    monkeypatch.setattr(native, "_allocate", lambda op, what, shape, *_: Scratch(shape, log))
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: state["stream"])
    monkeypatch.setattr(
        torch.cuda, "is_current_stream_capturing", lambda: state["stream"] is capturing
    )

    def use(stream, nbytes):
        state["stream"] = stream
        scratch = native.workspace(nbytes, gpu)
        steps = [step for step in log if step[1] != "uses"]
        recorded = [(who, what) for who, _, what in log if what is scratch]
        log.clear()
        return steps, [who for who, _ in recorded]

    assert use(first, 100) == ([], [])
    assert use(first, 200) == ([], [])
    assert use(second, 50) == ([(second, "waits for", first)], [second])
    assert use(second, 1000) == ([], [])
    assert use(capturing, 1000) == ([], [])  # of a graph, which is replayed elsewhere
    assert use(first, 1000) == ([(first, "waits for", second)], [first])
