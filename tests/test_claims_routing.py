"""The routing experiment of `kimi-native claims`: what each variant is, and that it runs to its tables."""

from __future__ import annotations

import json

import pytest
import torch

from kimi_native import cli
from kimi_native.claims import routing
from kimi_native.claims.training import train
from kimi_native.config import KimiConfig
from kimi_native.nano.graph import Documents, KimiGraph


def graph_of(variant):
    return KimiGraph(KimiConfig.from_dict(routing.values_of(variant), source="test"))


def test_routing_dense_model_is_as_large_as_what_is_at_work():
    """Per token: all of the dense model; of the other its experts at work, without routers and first layer."""
    sparse, dense = graph_of("balanced"), graph_of("dense")
    config, layer = sparse.config, sparse.model.layers[1].mlp
    expert = layer.experts.gate_up_proj[0].numel() + layer.experts.down_proj[0].numel()
    shared = sum(p.numel() for p in layer.shared_experts.parameters())
    at_work = config.num_experts_per_tok * expert + shared
    for block in dense.model.layers:
        assert sum(p.numel() for p in block.mlp.parameters()) == at_work
    assert not any(hasattr(block.mlp, "gate") for block in dense.model.layers)


def test_routing_random_choice_is_even_and_tells_nothing():
    """Each expert as often as the others, whatever the scores' order; the same for the same scores."""
    g = torch.Generator().manual_seed(0)
    scores = (torch.randn(20_000, 32, generator=g) + torch.linspace(-2, 2, 32)).sigmoid()
    ids = routing.random_choice(scores, 4)
    assert ids.shape == (20_000, 4)
    assert (ids.sort(1).values.diff() > 0).all()
    share = torch.bincount(ids.flatten(), minlength=32) / (20_000 * 4 / 32)
    assert (share - 1).abs().max() < 5 * (32 / (20_000 * 4)) ** 0.5
    best = scores.topk(4, dim=1).indices
    overlap = (ids[:, :, None] == best[:, None]).any(2).double().mean()
    assert abs(overlap - 4 / 32) < 0.01
    assert torch.equal(ids, routing.random_choice(scores.clone(), 4))


def test_routing_chooser_takes_the_choice_and_leaves_the_weights():
    graph = graph_of("random")
    routing._draw_experts(graph)
    gate = graph.model.layers[2].mlp.gate
    assert graph.model.layers[1].mlp.gate.chooser is not None
    documents = Documents(torch.arange(60), torch.arange(60), [60])
    loads = graph(documents).loads
    assert loads.sum(1).tolist() == [240] * 4
    before = graph(documents).logits
    gate.chooser = None
    assert not torch.equal(before, graph(documents).logits)


def test_routing_settings_take_one_thing_away_at_a_time():
    plan = routing.Plan(30, 4096)
    balanced, no_rule, unbalanced = (
        routing.settings_of(v, plan, 0) for v in ("balanced", "no bias rule", "unbalanced")
    )
    assert balanced.bias_rate > 0
    assert (no_rule.bias_rate, no_rule.balance_weight) == (0, balanced.balance_weight)
    assert (unbalanced.bias_rate, unbalanced.balance_weight) == (0, 0)


def test_routing_load_history_is_the_worst_layer_of_each_step():
    steps = [
        {"step": 0, "loads": [[1, 1, 2], [0, 0, 6]]},
        {"step": 1, "loads": [[3, 3, 3], [2, 3, 4]]},
    ]
    assert routing.load_history(steps) == {
        "step": [0, 1],
        "max_over_mean": [3.0, pytest.approx(4 / 3)],
        "without_tokens": [2, 0],
    }


def test_claims_routing_trains_and_compares(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(routing, "QUICK", routing.Plan(2, 4096))
    out = tmp_path / "out"
    argv = ["claims", "routing", "--quick", "--out", str(out), "--max-context", "4096"]
    assert cli.main(argv) == 0
    text = capsys.readouterr().out
    assert all(variant in text for variant in routing.VARIANTS)
    rows = {r["variant"]: r for r in json.loads((out / "routing.json").read_text())["rows"]}
    assert list(rows) == list(routing.VARIANTS)
    assert len({row["loss"] for row in rows.values()}) == 5
    assert len(rows["balanced"]["information"]) == 4
    assert rows["balanced"]["step"] == [0, 1]
    assert "information" not in rows["random"]
    assert rows["dense"]["parameters"] < rows["balanced"]["parameters"] / 3
    assert (out / "routing.png").read_bytes().startswith(b"\x89PNG")


def test_train_interrupted_is_no_result(tmp_path, monkeypatch):
    monkeypatch.setattr("kimi_native.nano.trainer.Trainer.run", lambda self, progress: False)
    settings = routing.settings_of("dense", routing.Plan(1, 4096), 0)
    with pytest.raises(KeyboardInterrupt):
        train(routing.values_of("dense"), tmp_path, settings)
