"""Load balancing without an auxiliary loss: the router's selection bias follows the loads.

After each step an expert with less than the mean load is made easier to choose and one with more harder. The bias never
enters an expert's weight, so no gradient fights the language model's. The sequence-wise loss that complements it is
GraphOutput.balance_loss. Source: DeepSeek-V3, arXiv 2412.19437, section 2.1.2.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kimi_native.nano.graph import Gate, KimiGraph


@torch.no_grad()
def update_bias(graph: KimiGraph, loads: Tensor, rate: float) -> None:
    """bias += rate * sign(mean load - load) in every layer with experts.

    loads  [moe layers, experts] int64, summed over the step's batch
    """
    gates = [m for m in graph.modules() if isinstance(m, Gate)]
    for gate, load in zip(gates, loads, strict=True):
        if gate.e_score_correction_bias is not None:
            # mean - load times the number of experts: exact in integers
            direction = torch.sign(load.sum() - load * load.shape[0])
            gate.e_score_correction_bias.add_(direction, alpha=rate)


def max_violation(loads: Tensor) -> list[float]:
    """Largest load over the mean, minus 1, of each layer; 0 is balance. nan without tokens."""
    mean = loads.double().mean(dim=1)
    return (loads.double().amax(dim=1) / mean - 1).tolist()
