"""The model against the published implementation, and against itself: batches, threads, chunks."""

from __future__ import annotations

import copy
import functools

import pytest
import torch

from kimi_native import ops
from kimi_native.cache import LatentCache
from kimi_native.loader import load_model
from published import make_oracle, oracle_logits, save_published, yarn

PROMPT, DECODED = 37, 64

CONFIGS = {
    "q_lora, yarn 64, beta 1/1": ("deepseek_v3", {"rope_parameters": yarn(64, 1)}, "kimi_k2"),
    "q_lora, yarn 64, beta 32/1": ("deepseek_v3", {"rope_parameters": yarn(64, 32)}, "kimi_k2"),
    "no q_lora, no yarn, 2 shared": (
        "deepseek_v3",
        {"q_lora_rank": None, "n_shared_experts": 2},
        None,
    ),
    "groups 4, top 2 of them": ("deepseek_v3", {"n_group": 4, "topk_group": 2}, None),
    "two dense layers first, no renormalisation": (
        "deepseek_v3",
        {"first_k_dense_replace": 2, "norm_topk_prob": False},
        None,
    ),
    "mtp layer present": ("deepseek_v3", {}, None),
    "softmax greedy, yarn 40, mscale 0.707": (
        "deepseek_v2",
        {
            "q_lora_rank": None,
            "topk_method": "greedy",
            "norm_topk_prob": False,
            "routed_scaling_factor": 1.0,
            "rope_parameters": {**yarn(40, 32, mscale=0.707), "rope_theta": 10000.0},
        },
        None,
    ),
    "softmax group limited": (
        "deepseek_v2",
        {
            "topk_method": "group_limited_greedy",
            "n_group": 4,
            "topk_group": 2,
            "norm_topk_prob": False,
            "routed_scaling_factor": 2.0,
        },
        None,
    ),
}


@pytest.fixture(scope="module", params=CONFIGS, ids=lambda name: name.replace(" ", "-"))
def published(request, tmp_path_factory):
    """(oracle in float32, folder, ids of prompt and answer)"""
    family, overrides, model_type = CONFIGS[request.param]
    oracle = make_oracle(family, overrides, seed=list(CONFIGS).index(request.param))
    path = tmp_path_factory.mktemp("published")
    save_published(oracle, path, model_type=model_type, mtp_layer="mtp" in request.param)
    ids = torch.randint(2, 320, (PROMPT + DECODED,), generator=torch.Generator().manual_seed(7))
    return oracle, path, ids


@functools.cache
def loaded(path, dtype="bfloat16"):
    return load_model(path, max_context=512, dtype=dtype)[0]


def run(path, ids, *, dtype, prompt=PROMPT):
    """Logits after the prompt and after each further token, fed one by one: [1 + decoded, vocab]."""
    model = loaded(path, dtype)
    cache = LatentCache(model.config, max_tokens=512, dtype=model.dtype)
    cache.data.fill_(float("nan"))
    seq = cache.new_sequence()
    rows = [model.prefill(ids[:prompt], cache, seq)]
    rows += [model.decode(ids[i : i + 1], cache, [seq])[0] for i in range(prompt, len(ids))]
    return torch.stack(rows)


def test_model_fp32_logits_match_published(published):
    oracle, path, ids = published
    expected = oracle_logits(oracle, ids)[PROMPT - 1 :]
    actual = run(path, ids, dtype="float32")
    span = (expected.max() - expected.min()).item()
    worst = (actual - expected).abs().max().item()
    print(f"worst difference {worst / span:.2e} of the logits' range {span:.1f}")
    assert worst <= 1e-4 * span


def test_model_bf16_is_as_close_as_the_published_bf16(published):
    """Greedy tokens differ from the fp32 oracle's only inside BF16 noise, and typical errors are no larger.

    The noise is what the published model itself moves by when it computes in BF16: its largest difference over a few
    random texts, since a flipped expert choice, rare and legitimate in both, moves a position far more than
    rounding does. The median position's error, which no flip touches, must not exceed the published model's by more
    than a fifth.
    """
    oracle, path, ids = published
    expected = oracle_logits(oracle, ids)[PROMPT - 1 :]
    half_oracle = copy.deepcopy(oracle).to(torch.bfloat16)
    half = oracle_logits(half_oracle, ids)[PROMPT - 1 :].float()
    actual = run(path, ids, dtype="bfloat16")
    top = expected.topk(2).values
    margin = top[:, 0] - top[:, 1]
    more = torch.randint(2, 320, (4, len(ids)), generator=torch.Generator().manual_seed(8))
    noise = max(
        (oracle_logits(half_oracle, m) - oracle_logits(oracle, m)).abs().max() for m in more
    )
    differs = actual.argmax(-1) != expected.argmax(-1)
    theirs = half.argmax(-1) != expected.argmax(-1)
    ours, published_error = ((x - expected).abs().amax(-1).median() for x in (actual, half))
    print(
        f"greedy tokens unlike fp32: {int(differs.sum())} of {len(differs)} (published BF16: {int(theirs.sum())}), "
        f"margins {[round(m, 3) for m in margin[differs].tolist()]}, noise {noise:.3f}; "
        f"median error {ours:.4f} (published BF16: {published_error:.4f})"
    )
    assert (margin[differs] < 2 * noise).all()
    assert ours <= 1.2 * published_error


def test_model_is_the_same_on_every_tier(published, isa):
    oracle, path, ids = published
    expected = oracle_logits(oracle, ids)[PROMPT - 1 :][:8]
    actual = run(path, ids[: PROMPT + 7], dtype="float32")
    assert (actual - expected).abs().max() <= 1e-4 * (expected.max() - expected.min())


def test_model_native_equals_reference_backend(published):
    _, path, ids = published
    native = run(path, ids[: PROMPT + 4], dtype="float32")
    with ops.backend("reference"):
        reference = run(path, ids[: PROMPT + 4], dtype="float32")
    assert (native - reference).abs().max() <= 1e-4 * (reference.max() - reference.min())


def test_model_does_not_depend_on_threads(published):
    _, path, ids = published
    before = ops.num_threads(), torch.get_num_threads()
    results = []
    for threads in (1, 2, 3):
        ops.set_num_threads(threads)
        torch.set_num_threads(threads)
        results.append(run(path, ids[: PROMPT + 8], dtype="bfloat16"))
    ops.set_num_threads(before[0])
    torch.set_num_threads(before[1])
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


def test_model_batch_neighbours_change_nothing(published):
    _, path, ids = published
    model = loaded(path)
    cache = LatentCache(model.config, max_tokens=2048, dtype=model.dtype)
    cache.data.fill_(float("nan"))
    lengths = [1, 17, 63, 64, 65]
    seqs = [cache.new_sequence() for _ in lengths]
    for seq, n in zip(seqs, lengths, strict=True):
        model.prefill(ids[:n], cache, seq)
    for step in range(3):
        batch = model.decode(ids[[10 + step] * len(seqs)], cache, seqs)
        for row, n in zip(batch, lengths, strict=True):
            alone = run(path, torch.cat([ids[:n], ids[10 : 11 + step]]), dtype="bfloat16", prompt=n)
            assert torch.equal(row, alone[-1]), f"length {n}, step {step}"


def test_model_prefill_in_chunks_equals_published(published, monkeypatch):
    oracle, path, ids = published
    monkeypatch.setattr("kimi_native.model.PREFILL_CHUNK", 16)
    monkeypatch.setattr("kimi_native.model._EXPANDED_BYTES", 1)  # one head at a time
    expected = oracle_logits(oracle, ids)[[-1]]
    actual = run(path, ids, dtype="float32", prompt=len(ids))
    assert (actual - expected).abs().max() <= 1e-4 * (expected.max() - expected.min())


def test_model_refuses_bad_ids(published):
    _, path, _ = published
    model = loaded(path)
    cache = LatentCache(model.config, max_tokens=64, dtype=model.dtype)
    seq = cache.new_sequence()
    with pytest.raises(ValueError, match=r"ids must be in \[0, 320\) \(got 320 to 320\)"):
        model.prefill(torch.tensor([320]), cache, seq)
    with pytest.raises(ValueError, match="non-empty"):
        model.prefill(torch.tensor([], dtype=torch.int64), cache, seq)
    with pytest.raises(ValueError, match="one id per sequence"):
        model.decode(torch.tensor([1, 2]), cache, [seq])


def test_model_context_longer_than_the_cache_is_an_error(published):
    from kimi_native.errors import RequestError

    _, path, ids = published
    model = loaded(path)
    cache = LatentCache(model.config, max_tokens=64, dtype=model.dtype)
    seq = cache.new_sequence()
    with pytest.raises(RequestError, match="free of 1"):
        model.prefill(ids[:65], cache, seq)
    assert cache.free_tokens == 64
    assert seq.length == 0
