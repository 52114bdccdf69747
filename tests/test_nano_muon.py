"""MuonClip against a naive implementation, one matrix at a time in float64."""

from __future__ import annotations

import copy
import math

import pytest
import torch

from graphs import SHAPES, small_graph, some_documents
from kimi_native.nano.graph import KimiGraph
from kimi_native.nano.muon import MuonAdamW, MuonSettings, orthogonalize, qk_clip

pytestmark = pytest.mark.usefixtures("one_thread")


def naive_orthogonal(m: torch.Tensor) -> torch.Tensor:
    if m.shape[0] > m.shape[1]:
        return naive_orthogonal(m.T).T
    x = m / (math.sqrt(float((m * m).sum())) + 1e-7)
    for _ in range(5):
        a = x @ x.T
        x = 3.4445 * x + (-4.7750 * a + 2.0315 * (a @ a)) @ x
    return x


def naive_muon(w, grads, rate):
    """The weights after each gradient in turn."""
    w, momentum = w.double(), torch.zeros_like(w, dtype=torch.float64)
    for g in grads:
        momentum = 0.95 * momentum + g.double()
        update = naive_orthogonal(g.double() + 0.95 * momentum)
        w = w - rate * (0.2 * math.sqrt(max(w.shape)) * update + 0.1 * w)
    return w


def naive_adamw(w, grads, rate, decay):
    w, m, v = w.double(), 0.0, 0.0
    for i, g in enumerate(grads, 1):
        g = g.double()
        m, v = 0.9 * m + 0.1 * g, 0.95 * v + 0.05 * g * g
        w = w - rate * decay * w
        w = w - rate * (m / (1 - 0.9**i)) / ((v / (1 - 0.95**i)).sqrt() + 1e-8)
    return w


def matrices(t: torch.Tensor) -> torch.Tensor:
    return t.reshape(-1, *t.shape[-2:])


@pytest.mark.parametrize("preset", ["tiny", "tiny-noqlora"])
def test_muon_three_steps_equal_the_naive_ones(preset):
    graph = small_graph(
        preset, **SHAPES["no q_lora, 2 shared, no yarn"][1] if "no" in preset else {}
    )
    optimizer = MuonAdamW(graph, dtype=torch.float32)
    before = {n: p.detach().clone() for n, p in graph.named_parameters()}
    generator = torch.Generator().manual_seed(5)
    grads = {n: [] for n in before}
    for _ in range(3):
        for name, p in graph.named_parameters():
            p.grad = torch.randn(p.shape, generator=generator)
            grads[name].append(p.grad.clone())
        optimizer.step(0.01)
    for name, p in graph.named_parameters():
        if p.dim() == 1 or name in ("model.embed_tokens.weight", "lm_head.weight"):
            expected = naive_adamw(before[name], grads[name], 0.01, 0.1 if p.dim() == 2 else 0.0)
        else:
            each = zip(
                matrices(before[name]),
                *(matrices(g) for g in grads[name]),
                strict=True,
            )
            expected = torch.stack([naive_muon(w, g, 0.01) for w, *g in each]).view(p.shape)
        # float32 in 5 steps of products that amplify small singular values 3.4445-fold each
        assert (p - expected).abs().max() <= 1e-4 * 0.01, name


@pytest.mark.parametrize("shape", [(24, 64), (64, 24), (1, 7), (3, 2, 16, 16)])
def test_orthogonalize_makes_singular_values_near_one(shape):
    m = torch.randn(shape, generator=torch.Generator().manual_seed(1)) * 1e-3
    for dtype, low, high in ((torch.float32, 0.6, 1.25), (torch.bfloat16, 0.5, 1.3)):
        values = torch.linalg.svdvals(orthogonalize(m, dtype))
        largest = values.amax(-1)
        assert (largest < high).all()
        assert (largest > low).all()
    wide = orthogonalize(m, torch.float32)
    half = orthogonalize(m, torch.bfloat16)
    assert half.dtype == torch.float32
    assert (
        wide - half
    ).norm() <= 0.1 * wide.norm()  # 2^-9 a product, amplified where singular values are small


def test_orthogonalize_of_zeros_is_zeros():
    assert torch.equal(orthogonalize(torch.zeros(2, 4, 6)), torch.zeros(2, 4, 6))


def test_muon_update_has_the_size_of_adamw():
    """0.2 sqrt(max(n, m)) times an orthogonal matrix of full rank has root mean square 0.2 up to the spread of
    Newton-Schulz."""
    for shape in [(64, 64), (32, 96), (192, 96)]:
        update = 0.2 * max(shape) ** 0.5 * orthogonalize(torch.randn(shape), torch.float32)
        assert 0.14 < update.square().mean().sqrt() < 0.26


def test_muon_needs_every_gradient():
    graph = small_graph()
    with pytest.raises(ValueError, match=r"muon: model\.\S+ must have a gradient \(got None\)"):
        MuonAdamW(graph).step(0.1)


def test_muon_settings_reach_the_update():
    graph, still = small_graph(), MuonSettings(weight_decay=1.0)
    for p in graph.parameters():
        p.grad = torch.zeros_like(p)
    before = copy.deepcopy(graph)
    MuonAdamW(graph, still).step(0.5)
    for (name, p), (_, q) in zip(graph.named_parameters(), before.named_parameters(), strict=True):
        assert torch.allclose(p, q * (0.5 if p.dim() > 1 else 1.0)), name


# ---- QK-Clip --------------------------------------------------------------------------------------------------------


def first_layer(graph: KimiGraph) -> torch.Tensor:
    """Attention logits that depend on the first layer's attention alone."""
    return graph(some_documents()).max_logits[0].double()


@pytest.mark.parametrize("name", ["k2, yarn", "no q_lora, 2 shared, no yarn"])
def test_qk_clip_brings_the_largest_logit_to_the_threshold(name):
    graph = small_graph(SHAPES[name][0], **SHAPES[name][1])
    logits = graph(some_documents()).max_logits
    first = logits[0].sort().values
    threshold = float(first[0] + first[1]) / 2  # one head of the first layer stays
    assert qk_clip(graph, logits, threshold) == int((logits > threshold).sum())
    expected = logits[0].double().clamp(max=threshold)
    assert torch.allclose(first_layer(graph), expected, rtol=1e-5)


def test_qk_clip_scales_what_the_recipe_scales():
    graph = small_graph()
    before = copy.deepcopy(graph.state_dict())
    logits = torch.zeros(3, 3)
    logits[1, 2] = 400.0
    assert qk_clip(graph, logits, 100.0) == 1
    changed = {n for n, t in graph.state_dict().items() if not torch.equal(t, before[n])}
    query, key = (f"model.layers.1.self_attn.{n}.weight" for n in ("q_b_proj", "kv_b_proj"))
    assert changed == {query, key}
    q_scale, k_scale = torch.ones(3, 24, 1), torch.ones(3, 28, 1)
    q_scale[2, :16], q_scale[2, 16:], k_scale[2, :16] = 0.5, 0.25, 0.5
    state = graph.state_dict()
    assert torch.equal(state[query], (before[query].view(3, 24, -1) * q_scale).view(72, -1))
    assert torch.equal(state[key], (before[key].view(3, 28, -1) * k_scale).view(84, -1))


def test_qk_clip_leaves_logits_at_the_threshold():
    graph = small_graph()
    before = copy.deepcopy(graph.state_dict())
    assert qk_clip(graph, torch.full((3, 3), 100.0), 100.0) == 0
    assert all(torch.equal(t, before[n]) for n, t in graph.state_dict().items())
