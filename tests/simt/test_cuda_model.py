"""A whole model on the CUDA kernels, in the shim, against the same model on the CPU kernels."""

from __future__ import annotations

import contextlib

import pytest
import torch

from kimi_native import mla_schedule, native, ops, recorded
from kimi_native.cache import LatentCache
from kimi_native.errors import MemoryPlanError, RequestError
from kimi_native.loader import load_model
from kimi_native.make_checkpoint import make_checkpoint
from kimi_native.placement import WORKING_BYTES, HostExperts, check_device, device_bytes, place
from kimi_native.quant.modules import Int4Experts
from oracle_dense import assert_same_bits
from simt import Schedule, library_path, simt_only, use

pytestmark = simt_only
HOST = torch.device("cpu")
# What the model is allowed to differ from the published implementation in fp32, as a share of the logits' range.
LIMIT = 1e-4


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("model")
    widths = {
        "kv_lora_rank": 512,
        "qk_rope_head_dim": 64,
    }  # the family's; the GPU's mla_decode has no other
    sizes = {"layers": 2, "experts": 8, "seed": 3, "overrides": widths}
    make_checkpoint(path / "int4", **sizes)
    make_checkpoint(path / "bf16", **sizes, format="bf16")
    make_checkpoint(path / "narrow", layers=1)
    return path


def prefill(model, tokens=70):
    """Logits of a prompt in two calls, with an fp32 cache."""
    cache = LatentCache(model.config, max_tokens=128, dtype=torch.float32)
    seq = cache.new_sequence()
    prompt = torch.arange(tokens) * 7 % model.config.vocab_size
    return torch.stack([model.prefill(part, cache, seq) for part in prompt.split(50)])


def decode(model, dtype):
    """Logits of three steps of two sequences; one crosses into its second page."""
    cache = LatentCache(model.config, max_tokens=256, dtype=dtype)
    seqs = [cache.new_sequence(), cache.new_sequence()]
    prompt = torch.arange(62) * 7 % model.config.vocab_size
    for seq, length in zip(seqs, (62, 3), strict=True):
        model.prefill(prompt[:length], cache, seq)
    return torch.cat([model.decode(torch.tensor([t, t + 1]), cache, seqs) for t in (5, 9, 2)])


@pytest.mark.parametrize("experts_on_cpu", [False, True])
@pytest.mark.parametrize(
    ("format", "dense"), [("int4", "bf16"), ("int4", "int4"), ("bf16", "int8")]
)
def test_cuda_model_gives_the_logits_of_the_cpu(folder, format, dense, experts_on_cpu):
    path, options = folder / format, {"dtype": "float32", "dense": dense}
    expected = prefill(load_model(path, **options)[0])
    model, _ = load_model(path, **options)
    with native.cuda_on_host(library_path()):
        place(model, HOST, experts_on_cpu=experts_on_cpu, cache_bytes=0)
        actual = prefill(model)
    worst = (actual - expected).abs().max() / (expected.max() - expected.min())
    print(f"{format}, dense {dense}: {worst:.1e} of the range")
    assert worst <= LIMIT
    assert sum(isinstance(m, HostExperts) for m in model.modules()) == experts_on_cpu


def test_cuda_model_fetches_for_its_experts_before_the_gpu_gets_the_shared_one(folder, monkeypatch):
    """Else the copies would wait behind the shared expert, and the CPU for what it is to overlap with."""
    model, _ = load_model(folder / "int4", dtype="float32")
    order = []
    with native.cuda_on_host(library_path()):
        place(model, HOST, experts_on_cpu=True, cache_bytes=0)
        (moe,) = (
            m for m in model.modules() if isinstance(getattr(m, "experts", None), HostExperts)
        )
        for module, method, name in (
            (moe.experts, "fetch", "fetch"),
            (moe.shared_experts, "forward", "shared"),
            (moe.experts, "forward", "experts"),
        ):
            original = getattr(module, method)
            monkeypatch.setattr(
                module, method, lambda *a, f=original, n=name: order.append(n) or f(*a)
            )
        prefill(model, 5)
    assert order == ["fetch", "shared", "experts"]


def test_cuda_model_on_hopper_has_the_logits_of_other_gpus_to_the_last_bit(folder):
    model, _ = load_model(folder / "int4", dtype="float32", dense="int4")
    logits = []
    with native.cuda_on_host(library_path()):
        place(model, HOST, experts_on_cpu=False, cache_bytes=0)
        for hopper in (True, False):
            use(Schedule(hopper=hopper))
            logits.append(prefill(model, 40))
    assert torch.equal(*logits)


@pytest.mark.parametrize("rows", [torch.bfloat16, torch.uint8], ids=["bf16", "fp8"])
def test_cuda_model_decodes_in_bf16_as_exactly_as_the_cpu(folder, rows):
    """Both round at every op, each in its own order: measured against fp32, neither is worse than the other."""
    exact = decode(load_model(folder / "int4", dtype="float32")[0], torch.float32)
    cpu = decode(load_model(folder / "int4")[0], rows)
    model, _ = load_model(folder / "int4")
    with native.cuda_on_host(library_path()):
        place(model, HOST, experts_on_cpu=False, cache_bytes=0)
        gpu = decode(model, rows)
    errors = [(logits - exact).abs() for logits in (cpu, gpu)]
    print("median and largest error, CPU and CUDA:", [(e.median(), e.max()) for e in errors])
    # Not derived: two samples of one kind of error; seen 0.97 times the median and 0.94 times the largest.
    assert errors[1].median() <= 1.25 * errors[0].median()
    assert errors[1].max() <= 2 * errors[0].max()


def test_cuda_model_makes_one_schedule_a_step_for_all_its_layers(folder, monkeypatch):
    model, _ = load_model(folder / "int4")
    schedules, calls = [], []
    call_with_room, call_with_workspace = mla_schedule.call_with_room, ops.call_with_workspace

    def made(*arguments):
        schedules.append(call_with_room(*arguments))
        return schedules[-1]

    def called(name, *arguments):
        calls.append((name, arguments[-2]))  # of mla_decode: the address of its splits
        call_with_workspace(name, *arguments)

    monkeypatch.setattr(mla_schedule, "call_with_room", made)
    monkeypatch.setattr(ops, "call_with_workspace", called)
    with native.cuda_on_host(library_path()):
        place(model, HOST, experts_on_cpu=False, cache_bytes=0)
        decode(model, torch.bfloat16)
    expected = [s.data_ptr() for s in schedules for _ in range(model.config.num_hidden_layers)]
    assert len(schedules) == 3
    assert [splits for name, splits in calls if name == "mla_decode"] == expected


class Graph:
    """A CUDA graph of torch's words alone: what is captured has been computed then."""

    def replay(self):
        pass


def test_cuda_model_has_all_its_graphs_in_the_memory_of_one(folder, monkeypatch):
    """Else every batch size would keep its own, logits and all: 9 GB for the sizes up to 128 of K2."""
    captures = []

    @contextlib.contextmanager
    def capture(graph, **options):
        captures.append(options)
        yield

    words = {"Stream": object, "graph_pool_handle": object, "CUDAGraph": Graph, "graph": capture}
    words |= {"device": contextlib.nullcontext, "synchronize": lambda device: None}
    for name, word in words.items():
        monkeypatch.setattr(torch.cuda, name, word)
    model, _ = load_model(folder / "int4")
    logits = {}
    with native.cuda_on_host(library_path()):
        place(model, HOST, experts_on_cpu=False, cache_bytes=0)
        for graphs in (None, recorded._Graphs(HOST, model.config.vocab_size)):
            cache = LatentCache(model.config, max_tokens=256)
            steps = model if graphs is None else recorded.RecordedModel(model, cache)
            if graphs:
                steps._graphs = graphs
            seqs = [cache.new_sequence(), cache.new_sequence()]
            for seq in seqs:
                model.prefill(torch.tensor([5, 9]), cache, seq)
            ids = torch.tensor([7, 8])
            two = steps.decode(ids, cache, seqs)
            first = two.clone()
            one = steps.decode(ids[:1], cache, seqs[:1])
            logits[graphs is None] = torch.cat([first, one])
    assert_same_bits(logits[False], logits[True])
    assert captures[0] == captures[1]
    assert captures[0]["capture_error_mode"] == "thread_local"  # a Model is one of several threads
    assert one.data_ptr() == two.data_ptr()


def test_cuda_model_counts_the_bytes_that_it_takes(folder):
    model, _ = load_model(folder / "int4")
    expected = device_bytes(model, experts_on_cpu=False)
    with native.cuda_on_host(library_path()):
        place(model, HOST, experts_on_cpu=False, cache_bytes=0)
    taken = sum(p.numel() * p.element_size() for p in model.parameters())
    for module in model.modules():
        if hasattr(module, "key_up_t"):
            taken += module.key_up_t.numel() * 2
        if isinstance(module, Int4Experts):
            for weights in (module.gate, module.up, module.down):
                for w in weights.weights:
                    taken += w.weight_packed.numel() + w.weight_scale.numel()
    assert taken == expected


@pytest.mark.parametrize("experts_on_cpu", [False, True])
@pytest.mark.parametrize("cache_bytes", [0, 5 << 20])
def test_cuda_model_is_refused_before_a_copy_where_there_is_no_room(
    folder, monkeypatch, experts_on_cpu, cache_bytes
):
    """A GPU of torch's words alone: nothing may be moved to it."""
    model, _ = load_model(folder / "int4")
    needed = device_bytes(model, experts_on_cpu=experts_on_cpu) + cache_bytes + WORKING_BYTES
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (needed - 1, 1 << 40))
    with pytest.raises(
        MemoryPlanError, match=r"^memory: the model needs .* on cuda:1, .* are free"
    ):
        place(
            model,
            torch.device("cuda:1"),
            experts_on_cpu=experts_on_cpu,
            cache_bytes=cache_bytes,
        )
    assert {p.device for p in model.parameters()} == {HOST}
    assert not any(isinstance(m, HostExperts) for m in model.modules())


def test_cuda_model_refuses_widths_without_a_kernel(folder):
    model, _ = load_model(folder / "narrow")
    with pytest.raises(RequestError, match="kv_lora_rank and qk_rope_head_dim must be 512 and 64"):
        place(model, HOST, experts_on_cpu=False, cache_bytes=0)


@pytest.mark.parametrize(
    ("device", "experts", "message"),
    [
        ("gpu", None, "device must be 'cpu', 'cuda' or 'cuda:N'"),
        ("cuda:x", None, "device must be 'cpu', 'cuda' or 'cuda:N'"),
        ("cpu", "cuda", "experts must be 'cpu' or None"),
    ],
)
def test_cuda_model_refuses_unknown_places(device, experts, message):
    with pytest.raises(RequestError, match=message):
        check_device(device, experts)


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_cuda_model_says_why_there_is_no_gpu():
    with pytest.raises(RequestError, match="load: device cuda cannot be used: "):
        check_device("cuda", None)
