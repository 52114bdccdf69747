"""What the ops allocate on a GPU: full memory is told with the op, and scratch that streams share is used in turns."""

from __future__ import annotations

import itertools
import threading

import pytest
import torch

from kimi_native import device_memory, native, ops
from kimi_native.mla_schedule import mla_schedule
from simt import library_path, simt_only

pytestmark = simt_only
BF16 = torch.bfloat16
FULL = "CUDA out of memory. Tried to allocate 2.00 GiB."


@pytest.fixture(autouse=True)
def _new_thread(monkeypatch):
    """One that has no scratch yet, and GPUs without any."""
    monkeypatch.setattr(device_memory, "_threads", threading.local())
    monkeypatch.setattr(device_memory, "_gpus", {})


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


def scratch_of(nbytes, device=device_memory.CPU):
    with device_memory.gpu_scratch("op", nbytes, device) as room:
        return room


def test_cuda_memory_scratch_that_grows_with_the_batch_is_made_a_few_times():
    """Graphs of 256 batch sizes, met in ascending order, keep these: not 256."""
    kept = [scratch_of(1_000_000 + 4000 * batch) for batch in range(256)]
    assert len({scratch.untyped_storage().data_ptr() for scratch in kept}) <= 5


def test_cuda_memory_threads_of_a_gpu_take_turns_with_one_scratch():
    """asyncio's threads are many, and a scratch of each would fill the GPU. What is launched stays together."""
    log, addresses = [], set()

    def work(name, wait):
        with device_memory.gpu_scratch("op", 1000, device_memory.CPU) as room:
            log.append(name)
            addresses.add(room.data_ptr())
            if wait:
                second.start()
                second.join(0.2)  # it cannot come in
            log.append(name)

    second = threading.Thread(target=work, args=("second", False))
    first = threading.Thread(target=work, args=("first", True))
    first.start()
    first.join()
    second.join()
    assert log == ["first", "first", "second", "second"]
    assert len(addresses) == 1


def test_cuda_memory_threads_of_the_cpu_have_scratch_of_their_own():
    rooms = [device_memory.cpu_scratch("op", 100)]
    thread = threading.Thread(target=lambda: rooms.append(device_memory.cpu_scratch("op", 100)))
    thread.start()
    thread.join()
    assert rooms[0].data_ptr() != rooms[1].data_ptr()
    assert device_memory.cpu_scratch("op", 50).data_ptr() == rooms[0].data_ptr()


class Stream:
    """A stream of torch's words alone."""

    def __init__(self, log):
        self.log = log

    def wait_stream(self, other):
        self.log.append((self, "waits for", other))


class Scratch:
    """A GPU's buffer, of torch's words alone."""

    device = torch.device("cuda", 1)

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
    log, gpu = [], Scratch.device
    first, second, capturing = Stream(log), Stream(log), Stream(log)
    state = {"stream": first}
    monkeypatch.setattr(device_memory, "allocate", lambda op, what, shape, *_: Scratch(shape, log))
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: state["stream"])
    monkeypatch.setattr(
        torch.cuda, "is_current_stream_capturing", lambda: state["stream"] is capturing
    )

    def use(stream, nbytes):
        state["stream"] = stream
        scratch = scratch_of(nbytes, gpu)
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
