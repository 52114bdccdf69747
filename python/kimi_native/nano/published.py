"""A graph's tensors under the checkpoint's names: the stacked experts one by one, everything else as it is called."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from kimi_native.checkpoint import Checkpoint
from kimi_native.errors import ModelFormatError
from kimi_native.nano.graph import KimiGraph
from kimi_native.quant.fp8 import dequantize_block
from kimi_native.quant.int4 import dequantize
from kimi_native.weights import Int4Weight


def published_tensors(graph: KimiGraph) -> Iterator[tuple[str, Tensor]]:
    """(name in the checkpoint, without a wrapper's prefix; view of the graph's own tensor), no gradient recorded."""
    for name, parameter in graph.named_parameters():  # a tied head comes once, as the embedding
        tensor = parameter.detach()
        parent, _, kind = name.rpartition(".")
        if kind == "gate_up_proj":
            for e, pair in enumerate(tensor):
                yield f"{parent}.{e}.gate_proj.weight", pair[0]
                yield f"{parent}.{e}.up_proj.weight", pair[1]
        elif kind == "down_proj":
            for e, matrix in enumerate(tensor):
                yield f"{parent}.{e}.down_proj.weight", matrix
        else:
            yield name, tensor
    for name, buffer in graph.named_buffers():
        if name.endswith("e_score_correction_bias"):
            yield name, buffer


@torch.no_grad()
def read_published(graph: KimiGraph, checkpoint: Checkpoint) -> None:
    """Fill a graph with the weights of a checkpoint of the same config: BF16, FP16, FP32, INT4 or FP8.

    Raises ModelFormatError on values that are not finite or a file that cannot be read.
    """
    for name, tensor in published_tensors(graph):
        stored = checkpoint.config.tensor_prefix + name
        values = _values(checkpoint, stored)
        if not torch.isfinite(values).all():
            checkpoint.check_readable()
            raise ModelFormatError(f"{checkpoint.path}: tensor {stored}: values must be finite")
        tensor.copy_(values)
    checkpoint.check_readable()


def _values(checkpoint: Checkpoint, name: str) -> Tensor:
    packed = f"{name}_packed"
    if packed in checkpoint.tensors:
        weight = Int4Weight(checkpoint.tensor(packed), checkpoint.tensor(f"{name}_scale"))
        return dequantize(weight, torch.float32)
    values = checkpoint.tensor(name)
    if values.dtype == torch.float8_e4m3fn:
        return dequantize_block(values, checkpoint.tensor(f"{name}_scale_inv"))
    return values
