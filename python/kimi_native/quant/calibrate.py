"""The routed experts of a graph to INT4 by what they are given: calibration rows in, gptq.py's codes out.

One forward pass over all calibration documents, layer after layer: when a layer's experts are called, the rows that are
routed to each decide its codes, and the layers behind see what the quantized ones give. `down` is quantized for what
the already quantized `gate` and `up` hand to it. All other weights are seen in BF16, as the checkpoint will hold them.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear, silu

from kimi_native.nano.graph import Documents, Experts, KimiGraph, Weighted
from kimi_native.quant.gptq import DAMPING, SHRINKS, gptq_or_nearest
from kimi_native.quant.int4 import dequantize, quantize
from kimi_native.quant.qat import QAT_LEVELS, bf16_values
from kimi_native.weights import Int4Weight

_SHOWN = 5  # experts that a message names


@dataclass(frozen=True)
class ProjectionReport:
    """What quantization costs one projection of a layer's experts on the calibration rows.

    layer       its number
    projection  "gate_up" or "down"
    error       |XW - XQ|^2 / |XW|^2 over all experts that had rows enough
    nearest     the same for round-to-nearest
    """

    layer: int
    projection: str
    error: float
    nearest: float


@dataclass(frozen=True)
class CalibrationReport:
    """What a calibration did.

    tokens       calibration tokens
    experts      experts of all layers
    rounded      (layer, expert, rows) of those with too few rows, which are rounded to nearest
    projections  two for each layer with experts
    """

    tokens: int
    experts: int
    rounded: list[tuple[int, int, int]]
    projections: list[ProjectionReport]

    def __str__(self) -> str:
        """One line: how much was learnt from, what it gained, which experts were left out."""
        gains = [p.error / p.nearest for p in self.projections if p.nearest > 0]
        gain = f", error {sum(gains) / len(gains):.2f} of round-to-nearest's" if gains else ""
        named = ", ".join(f"layer {i} expert {e}: {n} rows" for i, e, n in self.rounded[:_SHOWN])
        more = f" and {len(self.rounded) - _SHOWN} more" if len(self.rounded) > _SHOWN else ""
        left = f" ({named}{more})" if self.rounded else ""
        done = self.experts - len(self.rounded)
        return (
            f"{done} experts calibrated on {self.tokens} tokens{gain}, "
            f"{len(self.rounded)} with too few rounded to nearest{left}"
        )


@dataclass(frozen=True)
class Calibrated:
    """A quantized graph.

    graph    multiplies by what its weights hold: INT4 values in the experts, BF16 elsewhere
    weights  name in the checkpoint -> codes and scales of each expert's matrix, for export_checkpoint
    """

    graph: KimiGraph
    weights: dict[str, Int4Weight]
    report: CalibrationReport


@torch.no_grad()
def calibrate_and_quantize(
    graph: KimiGraph,
    batches: Iterable[Documents],
    *,
    min_rows: int | None = None,
    levels: int = QAT_LEVELS,
    damping: float = DAMPING,
    shrinks: Sequence[float] = SHRINKS,
) -> Calibrated:
    """Quantize the routed experts of a copy of the graph for the inputs that the documents give them.

    batches   documents to run, on the graph's device; all of them are held in memory at once
    min_rows  an expert with fewer is rounded to nearest; default: hidden_size, as many as its inputs have dimensions
    levels, damping, shrinks  as in gptq

    Raises ValueError without documents, on a setting out of range, on weights or inputs that are not finite.
    """
    documents = _joined(list(batches))
    calibration = _Calibration(
        graph.config.hidden_size if min_rows is None else min_rows,
        {"levels": levels, "damping": damping, "shrinks": shrinks},
    )
    copied = _as_stored(graph)
    hooks = []
    for index, layer in enumerate(copied.model.layers):
        if isinstance(experts := getattr(layer.mlp, "experts", None), Experts):
            hook = partial(calibration.before_experts, index)
            hooks.append(experts.register_forward_pre_hook(hook))
    copied(documents, rows=documents.ids.new_zeros(1))
    for hook in hooks:
        hook.remove()
    report = CalibrationReport(
        len(documents.ids),
        len(hooks) * (graph.config.n_routed_experts or 0),
        calibration.rounded,
        calibration.projections,
    )
    return Calibrated(copied, calibration.weights, report)


def _as_stored(graph: KimiGraph) -> KimiGraph:
    """A copy whose weights are BF16's, but for the experts', which are still to be quantized."""
    copied = copy.deepcopy(graph)
    for module in copied.modules():
        if isinstance(module, Weighted):
            module.weight.copy_(bf16_values(module.weight))
        if isinstance(module, Experts | Weighted):
            module.rounding = None
    return copied


def _joined(batches: list[Documents]) -> Documents:
    if not batches:
        raise ValueError("calibrate: there must be documents to run (got none)")
    return Documents(
        torch.cat([b.ids for b in batches]),
        torch.cat([b.positions for b in batches]),
        [length for b in batches for length in b.lengths],
    )


class _Calibration:
    """What is gathered while the graph runs."""

    def __init__(self, min_rows: int, options: dict[str, Any]) -> None:
        if min_rows < 1:
            raise ValueError(f"calibrate: min_rows must be at least 1 (got {min_rows})")
        self.min_rows, self.options = min_rows, options
        self.weights: dict[str, Int4Weight] = {}
        self.rounded: list[tuple[int, int, int]] = []
        self.projections: list[ProjectionReport] = []

    def before_experts(self, layer: int, experts: Experts, arguments: tuple[Any, ...]) -> None:
        """Quantize a layer's experts for what they are about to be called with."""
        x, ids = arguments[0], arguments[1]
        gate_up, down = _Costs(), _Costs()
        for e in range(len(experts.down_proj)):
            name = f"model.layers.{layer}.mlp.experts.{e}"
            rows = x[(ids == e).any(1)]
            if len(rows) < self.min_rows:
                self.rounded.append((layer, e, len(rows)))
                rows = None
            both = experts.gate_up_proj[e].flatten(0, 1)
            half = len(both) // 2
            weight = self._quantize(name, both, rows, gate_up)
            for kind, part in (("gate", slice(half)), ("up", slice(half, None))):
                self.weights[f"{name}.{kind}_proj.weight"] = Int4Weight(
                    weight.weight_packed[part], weight.weight_scale[part]
                )
            if rows is not None:
                gate, up = linear(rows, both.to(rows.dtype)).chunk(2, dim=1)
                rows = silu(gate) * up
            matrix = experts.down_proj[e]
            self.weights[f"{name}.down_proj.weight"] = self._quantize(name, matrix, rows, down)
        self.projections.append(gate_up.report(layer, "gate_up"))
        self.projections.append(down.report(layer, "down"))

    def _quantize(self, name: str, w: Tensor, rows: Tensor | None, costs: _Costs) -> Int4Weight:
        """The codes of w [out, in], whose values become theirs; rounded to nearest without rows, or if they are 0."""
        gram = None
        if rows is not None:
            gram = rows.double().T @ rows.double()
            if not torch.isfinite(gram).all():
                raise ValueError(f"calibrate: the inputs of {name} must be finite")
        if gram is None or not gram.diagonal().any():
            weight = quantize(w, levels=self.options["levels"])
        else:
            weight, error, nearest = gptq_or_nearest(w, gram, **self.options)
            costs.add(error, nearest, ((w.double() @ gram) * w.double()).sum())
        w.copy_(dequantize(weight, w.dtype))
        return weight


class _Costs:
    """|XW - XQ|^2 and |XW|^2, added up over experts."""

    def __init__(self) -> None:
        self.error = self.nearest = self.outputs = 0.0

    def add(self, error: Tensor, nearest: Tensor, outputs: Tensor) -> None:
        self.error += float(error.sum())
        self.nearest += float(nearest.sum())
        self.outputs += float(outputs)

    def report(self, layer: int, projection: str) -> ProjectionReport:
        whole = self.outputs or 1.0
        return ProjectionReport(layer, projection, self.error / whole, self.nearest / whole)
