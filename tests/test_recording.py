"""Recordings: a replay does what the calls did, on what the buffers then hold; nothing is lost silently."""

from __future__ import annotations

import functools
import gc

import pytest
import torch

from kimi_native import ops
from kimi_native.arena import Arena
from kimi_native.cache import LatentCache
from kimi_native.loader import load_model
from kimi_native.make_checkpoint import make_checkpoint
from kimi_native.recorded import MAX_RECORDED_TOKENS, RecordedModel
from oracle_dense import assert_same_bits
from oracle_dense import randn as typed_randn

randn = functools.partial(typed_randn, dtype=torch.float32)
BF16 = torch.bfloat16


def some_ops(x, weight, norm):
    y, total = ops.add_rms_norm(ops.bf16_gemm(x, weight), x, norm, eps=1e-6)
    return ops.swiglu(y, ops.rms_norm(total, norm, eps=1e-6))


def test_recording_replays_on_new_inputs(isa):
    weight, norm = randn(32, 32, dtype=BF16), randn(32, dtype=BF16, seed=1)
    x = randn(3, 32, dtype=BF16, seed=2)
    with ops.record() as recording:
        y = some_ops(x, weight, norm)
    assert recording.num_calls == 4
    assert_same_bits(y, some_ops(x, weight, norm))  # recording runs the ops too
    for seed in (3, 4):
        x.copy_(randn(3, 32, dtype=BF16, seed=seed))
        expected = some_ops(x, weight, norm)
        assert not torch.equal(y, expected)
        recording.replay()
        assert_same_bits(y, expected)


def test_recording_follows_tier_and_threads():
    weight, norm, x = randn(64, 64, dtype=BF16), randn(64, dtype=BF16), randn(2, 64, dtype=BF16)
    with ops.record() as recording:
        y = some_ops(x, weight, norm)
    before = ops.num_threads()
    try:
        for name in ops.supported_isas():
            ops.force_isa(name)
            for threads in (1, 3):
                ops.set_num_threads(threads)
                recording.replay()
                assert_same_bits(y, some_ops(x, weight, norm))
    finally:
        ops.force_isa("")
        ops.set_num_threads(before)


def test_recording_brings_the_workspace_that_a_longer_context_needs():
    q, cache = randn(1, 2, 24), randn(40, 16, 24, dtype=BF16)
    table, lens = torch.arange(40, dtype=torch.int32)[None], torch.tensor([3], dtype=torch.int32)

    def attend():
        return ops.mla_decode(q, cache, table, lens, kv_lora_rank=16, softmax_scale=0.3)

    with ops.record() as recording:
        out = attend()
    lens[0] = 640
    recording.replay()
    assert_same_bits(out, attend())


def test_recording_checks_again_at_each_replay():
    q, cache = randn(1, 2, 24), randn(4, 16, 24, dtype=BF16)
    table, lens = torch.zeros(1, 4, dtype=torch.int32), torch.tensor([3], dtype=torch.int32)
    with ops.record() as recording:
        ops.mla_decode(q, cache, table, lens, kv_lora_rank=16, softmax_scale=0.3)
    table[0, 0] = 9
    with pytest.raises(
        ValueError, match=r"mla_decode: used page ids .* \(got page_table\[0\]\[0\]=9\)"
    ):
        recording.replay()


@pytest.mark.parametrize(
    "operation",
    [
        lambda x: x + 1,
        lambda x: x.float(),
        lambda x: x.T.contiguous(),
        lambda x: x.copy_(x),
        lambda x: torch.zeros(3),
        lambda x: x[torch.tensor([0])],
    ],
)
def test_recording_refuses_torch_operations_it_would_lose(operation):
    x = randn(3, 32, dtype=BF16)
    with (
        pytest.raises(RuntimeError, match=r"record: torch\..* would not be recorded"),
        ops.record(),
    ):
        operation(x)
    operation(x)  # and lets them go on afterwards
    with ops.record() as recording:
        ops.swiglu(x, x)
    assert recording.num_calls == 1


def test_recording_allows_views():
    x = randn(4, 32, dtype=BF16)
    with ops.record() as recording:
        y = ops.swiglu(x.view(2, 64)[:1], x.view(2, 64)[1:]).view(2, 32).T[0]
    assert recording.num_calls == 1
    assert y.shape == (2,)


def test_recording_cannot_be_nested_and_needs_the_native_backend():
    with ops.record(), pytest.raises(RuntimeError, match="recording already"), ops.record():
        pass
    with (
        pytest.raises(RuntimeError, match="reference backend"),
        ops.backend("reference"),
        ops.record(),
    ):
        pass
    x = randn(1, 32)
    with ops.record() as recording:  # the failures above ended their own recordings only
        ops.swiglu(x, x)
    assert recording.num_calls == 1


def test_recording_keeps_its_buffers_and_reuses_dropped_ones():
    x, weight = randn(8, 64), randn(64, 64, dtype=BF16)
    with ops.record() as recording:
        y = x
        for _ in range(20):
            y = ops.bf16_gemm(y, weight)
    assert 2 * y.nbytes <= recording.nbytes <= 3 * (y.nbytes + 128)
    expected = y.clone()
    gc.collect()
    others = [torch.full((8, 64), float(i)) for i in range(50)]  # memory that malloc might reuse
    recording.replay()
    assert_same_bits(y, expected)
    assert all((t == i).all() for i, t in enumerate(others))


def test_arena_lends_a_block_to_one_tensor_at_a_time():
    arena = Arena()
    a = arena.empty((3, 5), torch.float32)
    row = a[1]
    address = a.data_ptr()
    assert address % 64 == 0
    del a
    assert arena.empty((3, 5), torch.float32).data_ptr() != address  # a view still refers to it
    del row
    gc.collect()
    blocks = [arena.empty((3, 5), torch.float32) for _ in range(2)]
    assert address in {b.data_ptr() for b in blocks}
    assert len({b.data_ptr() for b in blocks}) == 2
    assert arena.empty((0, 5), torch.bfloat16).shape == (0, 5)


# ---- the recorded model ---------------------------------------------------------------------------------------------


def load_tiny(folder, format):
    make_checkpoint(folder / format, format=format)
    return load_model(folder / format, max_context=512)[0]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return load_tiny(tmp_path_factory.mktemp("recorded"), "int4")


def prompts(model, cache, lengths):
    """Sequences after prefill of random prompts."""
    seqs = []
    for i, n in enumerate(lengths):
        ids = torch.randint(
            0, model.config.vocab_size, (n,), generator=torch.Generator().manual_seed(i)
        )
        seqs.append(cache.new_sequence())
        model.prefill(ids, cache, seqs[-1])
    return seqs


def test_recorded_model_has_the_bits_of_the_model(tiny):
    cache = LatentCache(tiny.config, max_tokens=2048)
    recorded = RecordedModel(tiny, cache)
    lengths = (3, 70, 130)
    ours, theirs = prompts(tiny, cache, lengths), prompts(tiny, cache, lengths)
    generator = torch.Generator().manual_seed(9)
    for step in range(70):  # past a page boundary of every sequence
        rows = [0, 1, 2] if step % 3 else [2, 0]  # batches come and go
        ids = torch.randint(0, tiny.config.vocab_size, (len(rows),), generator=generator)
        expected = tiny.decode(ids, cache, [theirs[r] for r in rows])
        assert_same_bits(recorded.decode(ids, cache, [ours[r] for r in rows]), expected)
    assert [s.length for s in ours] == [s.length for s in theirs]


def test_recorded_model_works_inside_inference_mode(tiny):
    cache = LatentCache(tiny.config, max_tokens=1024)
    recorded = RecordedModel(tiny, cache)
    ours, theirs = prompts(tiny, cache, (5,)), prompts(tiny, cache, (5,))
    for inside in (True, False, True):
        with torch.inference_mode(inside):
            ids = torch.tensor([3])
            expected = tiny.decode(ids, cache, theirs)
            assert_same_bits(recorded.decode(ids, cache, ours), expected)


def test_recorded_model_runs_larger_batches_as_they_are(tiny):
    cache = LatentCache(tiny.config, max_tokens=64 * (MAX_RECORDED_TOKENS + 1) * 2)
    recorded = RecordedModel(tiny, cache)
    lengths = range(1, MAX_RECORDED_TOKENS + 2)
    ours, theirs = prompts(tiny, cache, lengths), prompts(tiny, cache, lengths)
    ids = torch.arange(MAX_RECORDED_TOKENS + 1)
    expected = tiny.decode(ids, cache, theirs)
    assert_same_bits(recorded.decode(ids, cache, ours), expected)


def test_recorded_model_with_bf16_experts_runs_as_it_is(tmp_path):
    model = load_tiny(tmp_path, "bf16")
    cache = LatentCache(model.config, max_tokens=512)
    ours, theirs = prompts(model, cache, (5,)), prompts(model, cache, (5,))
    expected = model.decode(torch.tensor([1]), cache, theirs)
    assert_same_bits(RecordedModel(model, cache).decode(torch.tensor([1]), cache, ours), expected)


def test_recorded_model_refuses_what_the_model_refuses(tiny):
    cache = LatentCache(tiny.config, max_tokens=64)
    recorded = RecordedModel(tiny, cache)
    (seq,) = prompts(tiny, cache, (3,))
    with pytest.raises(ValueError, match="one id per sequence"):
        recorded.decode(torch.tensor([1, 2]), cache, [seq])
    with pytest.raises(ValueError, match="ids must be in"):
        recorded.decode(torch.tensor([tiny.config.vocab_size]), cache, [seq])
    assert seq.length == 3
