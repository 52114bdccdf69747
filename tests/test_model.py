"""The model against the published implementation, and against itself: batches, threads, chunks."""

from __future__ import annotations

import functools
import json
import math
import re

import pytest
import torch

from kimi_native import ops
from kimi_native.cache import LatentCache
from kimi_native.config import KimiConfig
from kimi_native.loader import load_model
from kimi_native.make_checkpoint import make_checkpoint
from kimi_native.model import Rope
from published import (
    BASE,
    half_precision,
    make_oracle,
    oracle_logits,
    read_oracle,
    save_published,
    yarn,
)

PROMPT, DECODED = 37, 64

# name: (family, config values, how it is saved)
CONFIGS: dict[str, tuple[str, dict, dict]] = {
    "q_lora, yarn 64, beta 1/1": (
        "deepseek_v3",
        {"rope_parameters": yarn(64, 1)},
        {"model_type": "kimi_k2"},
    ),
    "kimi_k25 wrapper, yarn 64, beta 32/1": (
        "deepseek_v3",
        {"rope_parameters": yarn(64, 32)},
        {"wrapped": True},
    ),
    "no q_lora, no yarn, 2 shared, tied head": (
        "deepseek_v3",
        {"q_lora_rank": None, "n_shared_experts": 2, "tie_word_embeddings": True},
        {},
    ),
    "groups 4, top 2 of them": ("deepseek_v3", {"n_group": 4, "topk_group": 2}, {}),
    "two dense layers first, no renormalisation": (
        "deepseek_v3",
        {"first_k_dense_replace": 2, "norm_topk_prob": False},
        {},
    ),
    "mtp layer present": ("deepseek_v3", {}, {"mtp_layer": True}),
    "glm4, mlp_layer_types, other head sizes": (
        "glm4_moe_lite",
        {
            "num_hidden_layers": 4,
            "mlp_layer_types": ["sparse", "dense", "dense", "sparse"],
            "qk_nope_head_dim": 48,
            "v_head_dim": 64,
            "routed_scaling_factor": 1.8,
            "eos_token_id": [1, 2, 3],
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e6},
        },
        {},
    ),
    "softmax greedy, yarn 40, mscale 0.707": (
        "deepseek_v2",
        {
            "q_lora_rank": None,
            "topk_method": "greedy",
            "norm_topk_prob": False,
            "routed_scaling_factor": 1.0,
            "rope_parameters": {**yarn(40, 32, mscale=0.707), "rope_theta": 10000.0},
        },
        {},
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
        {},
    ),
}
IDS = torch.randint(2, 320, (PROMPT + DECODED,), generator=torch.Generator().manual_seed(7))


def make_published(name, folder, **changes):
    """(oracle in float32, folder, ids of prompt and answer)"""
    family, overrides, saved = CONFIGS[name]
    decided = changes.pop("decided", False)
    seed = list(CONFIGS).index(name)
    oracle = make_oracle(family, {**overrides, **changes}, seed, decided=decided)
    save_published(oracle, folder, **saved)
    return oracle, folder, IDS


@pytest.fixture(scope="module", params=CONFIGS, ids=lambda name: name.replace(" ", "-"))
def published(request, tmp_path_factory):
    return make_published(request.param, tmp_path_factory.mktemp("published"))


@pytest.fixture(params=CONFIGS, ids=lambda name: name.replace(" ", "-"))
def decided(request, tmp_path):
    """As `published`, with experts that no rounding can change: favoured by the bias, or (softmax) all of them."""
    softmax = CONFIGS[request.param][0] == "deepseek_v2"
    groups = CONFIGS[request.param][1].get("n_group", 1)
    changes = {"num_experts_per_tok": 16, "topk_group": groups} if softmax else {"decided": True}
    return make_published(request.param, tmp_path, **changes)


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


def test_model_bf16_greedy_tokens_agree_outside_the_noise(decided):
    """Greedy tokens differ from the fp32 oracle's only where its top two are closer than BF16 can tell.

    The noise is what the published model itself moves a logit by when it computes in BF16, the largest of five texts;
    two logits may move apart by twice as much. Which experts answer is fixed here: a flipped choice, rare and
    legitimate in both, would move a position twenty times further, and the bound would exclude nothing.
    """
    oracle, path, ids = decided
    expected = oracle_logits(oracle, ids)[PROMPT - 1 :]
    half = half_precision(oracle)
    texts = torch.randint(2, 320, (5, len(ids)), generator=torch.Generator().manual_seed(8))
    noise = max((oracle_logits(half, t) - oracle_logits(oracle, t)).abs().max() for t in texts)
    actual = run(path, ids, dtype="bfloat16")
    top = expected.topk(2).values
    margin = top[:, 0] - top[:, 1]
    differs = actual.argmax(-1) != expected.argmax(-1)
    worst = (actual - expected).abs().max()
    print(
        f"greedy tokens unlike fp32: {int(differs.sum())} of {len(differs)}, margins "
        f"{[round(m, 3) for m in margin[differs].tolist()]}; noise {noise:.3f}, our worst error {worst:.3f}"
    )
    assert (margin[differs] < 2 * noise).all()
    assert (margin > 2 * noise).double().mean() > 0.5, "the noise would excuse most positions"
    assert worst <= 1.5 * noise


def test_model_bf16_is_as_close_as_the_published_bf16(published):
    """With routing as it comes: no more greedy tokens unlike fp32 than the published BF16 has, and no larger errors.

    Both counts are sums of rare independent events of one rate, so their difference has a standard deviation of
    sqrt(2 * count); three of them are allowed. The median position's error, which no flipped expert touches, must not
    exceed the published model's by more than a fifth.
    """
    oracle, path, ids = published
    expected = oracle_logits(oracle, ids)[PROMPT - 1 :]
    half = oracle_logits(half_precision(oracle), ids)[PROMPT - 1 :].float()
    actual = run(path, ids, dtype="bfloat16")
    differs, theirs = (int((x.argmax(-1) != expected.argmax(-1)).sum()) for x in (actual, half))
    ours, published_error = ((x - expected).abs().amax(-1).median() for x in (actual, half))
    print(
        f"greedy tokens unlike fp32: {differs} of {len(expected)} (published BF16: {theirs}); "
        f"median error {ours:.4f} (published BF16: {published_error:.4f})"
    )
    assert differs <= theirs + 3 * (2 * max(theirs, 1)) ** 0.5
    assert ours <= 1.2 * published_error


@pytest.mark.parametrize("preset", ["tiny", "tiny-noqlora", "tiny-yarn", "tiny-groups"])
def test_model_of_a_made_checkpoint_matches_published(tmp_path, preset):
    """A folder that make_checkpoint wrote, read by both: its names and shapes are the published ones."""
    make_checkpoint(tmp_path, preset=preset, format="bf16")
    ids = torch.randint(0, 1700, (200,), generator=torch.Generator().manual_seed(1))
    expected = oracle_logits(read_oracle(tmp_path), ids)[149:]
    actual = run(tmp_path, ids, dtype="float32", prompt=150)
    assert (actual - expected).abs().max() <= 1e-4 * (expected.max() - expected.min())


def test_model_latent_norms_keep_the_class_default_eps(tmp_path):
    """q_a_layernorm and kv_a_layernorm have eps 1e-6 whatever rms_norm_eps says: seen where their inputs are small."""
    family, overrides, saved = CONFIGS["q_lora, yarn 64, beta 1/1"]
    oracle = make_oracle(family, overrides, 3)
    with torch.no_grad():
        for name, p in oracle.named_parameters():
            if "q_a_proj" in name or "kv_a_proj" in name:
                p.mul_(2**-9)  # exact; a variance near 4e-6
    save_published(oracle, tmp_path, **saved)
    assert oracle.config.rms_norm_eps == 1e-5
    expected = oracle_logits(oracle, IDS)[PROMPT - 1 :]
    actual = run(tmp_path, IDS, dtype="float32")
    assert (actual - expected).abs().max() <= 1e-4 * (expected.max() - expected.min())


@pytest.mark.parametrize("name", CONFIGS)
def test_rope_tables_hold_at_every_position_of_the_context(name):
    """float64 angles, whatever blocks the positions fall into and in whatever order they are asked for."""
    family, overrides, _ = CONFIGS[name]
    values = {**BASE, **overrides, "model_type": family}
    if "mlp_layer_types" in values:
        del values["first_k_dense_replace"]
    rope = Rope(KimiConfig.from_dict(values))
    positions = torch.tensor([262143, 0, 1, 511, 512, 513, 4095, 4096, 99999, 0])
    cos, sin = rope.tables(positions)
    assert cos.dtype == sin.dtype == torch.float32
    for row, position in enumerate(positions.tolist()):
        for j, frequency in enumerate(rope.inv_freq.tolist()):
            angle = position * frequency
            assert cos[row, j].item() == pytest.approx(rope.magnitude * math.cos(angle), abs=1e-7)
            assert sin[row, j].item() == pytest.approx(rope.magnitude * math.sin(angle), abs=1e-7)


def test_published_class_with_an_unknown_model_type_is_refused(tmp_path):
    """What a kimi_k2 config does to the published class: routed experts stay random, with a warning. Not here."""
    make_checkpoint(tmp_path, preset="tiny", format="bf16")
    assert json.loads((tmp_path / "config.json").read_text())["model_type"] == "kimi_k2"
    with pytest.raises(ValueError, match=r"missing_keys.*mlp\.experts\.gate_up_proj") as refused:
        read_oracle(tmp_path, as_model_type="kimi_k2")
    assert re.search(r"unexpected_keys.*experts\.13\.up_proj\.weight", str(refused.value))


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


def test_model_does_not_depend_on_threads(published, monkeypatch):
    _, path, ids = published
    monkeypatch.setattr("kimi_native.model.PREFILL_CHUNK", 32)  # the last chunk has five tokens
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
    monkeypatch.setattr("kimi_native.model.ATTENTION_ROWS", 5)
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
