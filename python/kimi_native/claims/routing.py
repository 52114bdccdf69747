"""Learned expert routing: what the bias rule does for the load, and what the router is worth.

Five small models learn kimi-nano's conversations for as many tokens: the recipe; the same without its bias rule;
without anything that balances; with experts drawn at random; and a dense model of as many parameters at work. Loads are
followed step by step, what the experts tell about tokens is measured at the end.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from kimi_native import presets
from kimi_native.claims.training import conversations, nano_files, train
from kimi_native.nano.graph import KimiGraph
from kimi_native.nano.settings import TrainSettings
from kimi_native.nano.train_log import LOG_NAME, read_log
from kimi_native.quant.export import export_checkpoint
from kimi_native.routing import measure_routing

if TYPE_CHECKING:
    from kimi_native.generate import Model

VARIANTS = ("balanced", "no bias rule", "unbalanced", "random", "dense")
_DIGITS = 1e4  # of a score: what is behind them has nothing to do with its size
Load = Callable[[Path], "Model"]
Say = Callable[[str], None]


@dataclass(frozen=True)
class Plan:
    """steps that each model is trained on; held-out tokens that loss and information are taken over."""

    steps: int
    tokens: int


FULL, QUICK = Plan(600, 65536), Plan(12, 8192)


def settings_of(variant: str, plan: Plan, seed: int) -> TrainSettings:
    settings = TrainSettings(
        steps=plan.steps,
        tokens_per_step=4096,
        seed=seed,
        learning_rate=5e-3,
        warmup_steps=max(1, plan.steps // 10),
        decay_steps=plan.steps // 3,
        log_every=1,
    )
    if variant == "balanced":
        return settings
    if variant == "no bias rule":
        return replace(settings, bias_rate=0.0)
    return replace(settings, bias_rate=0.0, balance_weight=0.0)


def values_of(variant: str) -> dict[str, Any]:
    """config.json: kimi-nano's; the dense model has the experts at work as one MLP in every layer."""
    values = presets.text_config("nano", {})
    if variant == "dense":
        at_work = values["num_experts_per_tok"] + values["n_shared_experts"]
        values["intermediate_size"] = at_work * values["moe_intermediate_size"]
        values["first_k_dense_replace"] = values["num_hidden_layers"]
    return values


def random_choice(scores: Tensor, topk: int) -> Tensor:
    """[tokens, topk] experts that nothing can learn to choose: by the far digits of the scores, the same every time."""
    return torch.frac(scores.detach().float() * _DIGITS).topk(topk, dim=1).indices


def run(folder: Path, plan: Plan, *, seed: int, load: Load, say: Say) -> dict[str, Any]:
    """One row for each of VARIANTS.

    folder  gets the runs; an interrupted experiment goes on there
    load    opens a checkpoint
    say     told what is going on
    """
    batch = conversations(plan.tokens, seed=seed, split="held-out")
    rows = []
    for variant in VARIANTS:
        say(f"training {plan.steps} steps, {variant}")
        out, values = folder / variant.replace(" ", "-"), values_of(variant)
        prepare = _draw_experts if variant == "random" else None
        graph = train(values, out, settings_of(variant, plan, seed), prepare=prepare)
        with torch.no_grad():
            loss = float(cross_entropy(graph(batch.documents, batch.rows).logits, batch.targets))
        row = {"variant": variant, "loss": loss, "parameters": _num_parameters(graph)}
        if variant != "dense":
            row |= load_history(read_log(out / LOG_NAME))
        if variant not in (
            "dense",
            "random",
        ):  # a checkpoint cannot say that its router is to be ignored
            export_checkpoint(
                graph, out / "checkpoint", values, format="bf16", files=nano_files(), overwrite=True
            )
            texts = _texts(batch.documents.ids.tolist(), batch.documents.lengths)
            statistics = measure_routing(
                load(out / "checkpoint"), texts, labels="roles"
            ).statistics()
            row["information"] = [s.information for s in statistics]
        rows.append(row)
    return {"plan": asdict(plan), "seed": seed, "rows": rows}


def _draw_experts(graph: KimiGraph) -> None:
    topk = graph.config.num_experts_per_tok
    for layer in graph.model.layers:
        if hasattr(layer.mlp, "gate"):
            layer.mlp.gate.chooser = lambda scores: random_choice(scores, topk)


def _num_parameters(graph: KimiGraph) -> int:
    return sum(parameter.numel() for parameter in graph.parameters())


def _texts(ids: list[int], lengths: Sequence[int]) -> list[list[int]]:
    ends = np.cumsum(lengths).tolist()
    return [ids[end - length : end] for end, length in zip(ends, lengths, strict=True)]


def load_history(steps: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """By step: the largest load of any layer over that layer's mean, and experts without a token in all layers."""
    loads = [np.array(step["loads"]) for step in steps]
    return {
        "step": [step["step"] for step in steps],
        "max_over_mean": [float((load.max(1) / load.mean(1)).max()) for load in loads],
        "without_tokens": [int((load == 0).sum()) for load in loads],
    }
