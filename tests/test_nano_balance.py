"""The bias rule and the learning rate's course."""

from __future__ import annotations

import math

import pytest
import torch

from graphs import small_graph, some_documents
from kimi_native.nano.balance import max_violation, update_bias
from kimi_native.nano.schedule import Schedule

pytestmark = pytest.mark.usefixtures("one_thread")


def test_balance_moves_each_bias_towards_the_mean():
    graph = small_graph(n_routed_experts=4, num_experts_per_tok=2)
    gates = [layer.mlp.gate for layer in graph.model.layers[1:]]
    before = [gate.e_score_correction_bias.clone() for gate in gates]
    update_bias(graph, torch.tensor([[5, 1, 3, 3], [0, 0, 0, 13]]), 0.25)
    moved = [
        (gate.e_score_correction_bias - b).tolist() for gate, b in zip(gates, before, strict=True)
    ]
    assert moved[0] == pytest.approx([-0.25, 0.25, 0.0, 0.0])
    assert moved[1] == pytest.approx([0.25, 0.25, 0.25, -0.25])


def test_balance_rule_evens_out_the_loads():
    graph, documents = small_graph(), some_documents([200])
    with torch.no_grad():
        first = graph(documents).loads
        for _ in range(100):
            update_bias(graph, graph(documents).loads, 0.005)
        last = graph(documents).loads
    assert max(max_violation(last)) < 0.15 < max(max_violation(first))


def test_balance_without_a_bias_does_nothing():
    graph = small_graph("tiny-v2", q_lora_rank=None)
    update_bias(graph, graph(some_documents()).loads, 0.1)
    assert all(not name.endswith("bias") for name, _ in graph.named_buffers())


def test_balance_refuses_loads_of_another_depth():
    with pytest.raises(ValueError, match="argument 2 is"):
        update_bias(small_graph(), torch.ones(3, 8, dtype=torch.int64), 0.1)


def test_max_violation():
    assert max_violation(torch.tensor([[4, 4], [6, 2]])) == [0.0, 0.5]


def test_schedule_warms_up_stays_and_decays():
    rates = [Schedule(1.0, 10, 2, 4, 0.2).at(i) for i in range(10)]
    assert rates[:6] == [0.5, 1.0, 1.0, 1.0, 1.0, 1.0]
    expected = [0.2 + 0.8 * (1 + math.cos(math.pi * i / 5)) / 2 for i in (1, 2, 3, 4)]
    assert rates[6:] == pytest.approx(expected)


def test_schedule_without_warmup_or_decay_is_constant():
    assert {Schedule(3.0, 5, 0, 0).at(i) for i in range(5)} == {3.0}


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ((1.0, 10, 6, 5), "fit into steps"),
        ((1.0, 10, -1, 5), "fit into steps"),
        ((1.0, 10, 1, 5, 2.0), "0 <= final_rate <= rate"),
        ((math.inf, 10, 1, 5), "0 <= final_rate <= rate"),
        ((math.nan, 10, 1, 5), "0 <= final_rate <= rate"),
    ],
)
def test_schedule_refuses(args, message):
    with pytest.raises(ValueError, match=message):
        Schedule(*args)
