"""A run that diverges stops with the step and the tensor named."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from kimi_native.errors import DivergedError
from kimi_native.nano.graph import Documents, KimiGraph


def check_loss(graph: KimiGraph, documents: Documents, step: int, loss: float) -> None:
    """Raises DivergedError unless the loss is finite; names the first module whose output is not."""
    if not math.isfinite(loss):
        where = _first_bad_output(graph, documents) or "the loss alone"
        raise DivergedError(
            f"train: step {step}: the loss must be finite (got {loss}, from {where})"
        )


def norms(tensors: Iterable[Tensor]) -> Tensor:
    """[tensors] float32: the norm of each, NaN or infinite if one of its values is."""
    return torch.stack([t.norm() for t in tensors])


def check_norms(kind: str, names: Iterable[str], norms: Tensor, step: int) -> None:
    """Raises DivergedError naming the first tensor whose norm is not finite."""
    finite = torch.isfinite(norms)
    if bool(finite.all()):
        return
    name, norm = next((n, v) for n, v, ok in zip(names, norms, finite, strict=True) if not ok)
    others = int((~finite).sum()) - 1
    more = f", and {others} more tensors" if others else ""
    raise DivergedError(
        f"train: step {step}: the {kind} of {name} must be finite (got norm {norm.item()}{more}); "
        "a lower learning_rate or longer warmup_steps may help"
    )


@torch.no_grad()
def _first_bad_output(graph: KimiGraph, documents: Documents) -> str | None:
    """Run the graph once more and look at every module's output."""
    bad: list[str] = []

    def look(name: str) -> Any:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            first = output[1] if isinstance(output, tuple) else output
            if isinstance(first, Tensor) and not torch.isfinite(first).all():
                bad.append(name)

        return hook

    handles = [m.register_forward_hook(look(name)) for name, m in graph.named_modules() if name]
    try:
        graph(documents)
    finally:
        for handle in handles:
            handle.remove()
    return f"the output of {bad[0]}" if bad else None
