"""A model on a GPU: its logits against the CPU's, and decode steps replayed as CUDA graphs against the same steps run.

In a rehearsal the kernels run in the shim, on CPU tensors, and there are no graphs.
"""

from __future__ import annotations

import contextlib

import pytest
import torch

import gpu
import kimi_native as kn
from kimi_native import native
from kimi_native.cache import LatentCache
from kimi_native.loader import load_model
from kimi_native.make_checkpoint import make_checkpoint
from kimi_native.placement import check_device, place
from kimi_native.recorded import RecordedModel
from simt import library_path

on_gpu_only = pytest.mark.skipif(not gpu.ON_GPU, reason="a rehearsal has no GPU")
PROMPT = [i * 7 % 2000 for i in range(62)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("model") / "int4"
    widths = {"kv_lora_rank": 512, "qk_rope_head_dim": 64}
    make_checkpoint(path, layers=3, experts=8, seed=3, overrides=widths)
    return path


@contextlib.contextmanager
def kernels():
    with contextlib.nullcontext() if gpu.ON_GPU else native.cuda_on_host(library_path()):
        yield check_device("cuda", None) if gpu.ON_GPU else torch.device("cpu")


def steps(model, cache):
    """Logits after a prompt of 62 tokens, then of decode steps, in most of them beside a sequence of 3."""
    seqs = [cache.new_sequence(), cache.new_sequence()]
    rows = [
        model.prefill(torch.tensor(PROMPT[:n]), cache, s)
        for s, n in zip(seqs, (62, 3), strict=True)
    ]
    for step, batch in enumerate((2, 2, 1, 2, 1, 2)):
        ids = torch.tensor([step, 2 * step])[:batch]
        rows += model.decode(ids, cache, seqs[:batch]).clone()
    return torch.stack([row.cpu() for row in rows])


@pytest.mark.parametrize("experts_on_cpu", [False, True])
def test_model_on_a_gpu_is_as_exact_as_on_the_cpu(folder, experts_on_cpu):
    exact_model = load_model(folder, dtype="float32")[0]
    exact = steps(exact_model, LatentCache(exact_model.config, max_tokens=256, dtype=torch.float32))
    on_cpu = load_model(folder)[0]
    cpu = steps(on_cpu, LatentCache(on_cpu.config, max_tokens=256))
    model = load_model(folder)[0]
    with kernels() as device:
        place(model, device, experts_on_cpu=experts_on_cpu, cache_bytes=0)
        there = steps(model, LatentCache(model.config, max_tokens=256, device=device))
    errors = [(logits - exact).abs() for logits in (cpu, there)]
    assert errors[1].median() <= 1.25 * errors[0].median()
    assert errors[1].max() <= 2 * errors[0].max()


@on_gpu_only
def test_decode_steps_replayed_as_graphs_have_the_bits_of_the_steps(folder):
    model = load_model(folder)[0]
    with kernels() as device:
        place(model, device, experts_on_cpu=False, cache_bytes=0)
        run = steps(model, LatentCache(model.config, max_tokens=256, device=device))
        cache = LatentCache(model.config, max_tokens=256, device=device)
        graphs = RecordedModel(model, cache)
        replayed = steps(graphs, cache)
    assert list(graphs._steps) == [(2, False), (1, False)]  # else the same steps were run twice
    assert torch.equal(run, replayed)


@on_gpu_only
@pytest.mark.parametrize("experts", [None, "cpu"])
def test_load_to_a_gpu_generates(folder, experts):
    model = kn.load(folder, device="cuda", experts=experts, max_context=256)
    answers = model.generate([PROMPT, PROMPT[:5]], max_tokens=16, seed=1, temperature=0.7)
    again = model.generate(PROMPT, max_tokens=16, seed=1, temperature=0.7)
    assert again.ids == answers[0].ids  # whatever else is in the batch
