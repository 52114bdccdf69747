"""A trained graph to a checkpoint folder in the published format, INT4 or BF16."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from kimi_native.checkpoint_writer import (
    FolderWriter,
    PlainTensor,
    file_index,
    is_shard,
    needed_bytes,
    one_after_another,
)
from kimi_native.config import KimiConfig
from kimi_native.folder_names import CONFIG_NAME, INDEX_NAME
from kimi_native.nano.graph import KimiGraph
from kimi_native.nano.published import published_tensors
from kimi_native.presets import QUANTIZATION
from kimi_native.quant.int4 import dequantize, quantize
from kimi_native.quant.qat import QAT_LEVELS
from kimi_native.tensor_table import tensor_kind
from kimi_native.weights import Int4Weight

SHARD_NAME = "model-00001-of-00001.safetensors"
_OWN_FILES = (CONFIG_NAME, INDEX_NAME)
_DTYPES = {torch.bfloat16: "BF16", torch.float32: "F32", torch.int32: "I32"}


def export_checkpoint(
    graph: KimiGraph,
    out_dir: str | os.PathLike[str],
    values: Mapping[str, Any],
    *,
    format: str = "int4",
    files: Mapping[str, bytes] | None = None,
    weights: Mapping[str, Int4Weight] | None = None,
    overwrite: bool = False,
) -> dict[str, Any]:
    """Write a graph's weights as a checkpoint folder.

    out_dir  made if missing; must be empty, or hold a checkpoint with these files to be overwritten on request
    values   config.json of the graph's config, in one level; its quantization_config is replaced
    format   "int4": routed experts as apply_qat rounds them, the rest BF16. "bf16": everything BF16
    files    further files by name: the tokenizer's, generation_config.json
    weights  for "int4": codes to store as they are, by the name of a routed expert's matrix; as calibrate.py has them
    returns  path, format, tensors, bytes (of tensors)

    Raises ValueError on format, config or codes not the graph's or weights not finite, CheckpointWriteError on out_dir.
    """
    config, files = _file_config(graph, values, format), dict(files or {})
    stored = dict(_stored(graph, format, weights or {}))
    tensors = [PlainTensor(n, _DTYPES[t.dtype], tuple(t.shape)) for n, t in stored.items()]
    folder = FolderWriter("export", Path(out_dir))
    present = folder.present_files(lambda n: n in files or is_own_file(n))
    folder.require_overwrite(present, overwrite)
    folder.require_room(needed_bytes(tensors, sum(map(len, files.values()))), freed=present)
    folder.make()
    folder.remove(present)
    with folder.kept_if_whole():
        for name, content in files.items():
            folder.write(name, one_after_another([content]))
        folder.write_shard(SHARD_NAME, tensors, ((n, 0, _octets(t)) for n, t in stored.items()))
        folder.sync()
        folder.write_json(INDEX_NAME, file_index({SHARD_NAME: tensors}))
        folder.write_json(CONFIG_NAME, config)
        folder.sync()
    counts = {"tensors": len(tensors), "bytes": sum(t.nbytes for t in tensors)}
    return {"path": str(folder.path), "format": format} | counts


def is_own_file(name: str) -> bool:
    """Whether an exported checkpoint may hold a file of that name, the caller's `files` aside."""
    return name in _OWN_FILES or is_shard(name)


def _file_config(graph: KimiGraph, values: Mapping[str, Any], format: str) -> dict[str, Any]:
    if format not in ("int4", "bf16"):
        raise ValueError(f"export: format must be int4 or bf16 (got {format})")
    config = {k: v for k, v in values.items() if k != "quantization_config"}
    if KimiConfig.from_dict(config, source="export: values") != replace(
        graph.config, quantization=None
    ):
        raise ValueError("export: values must be the config.json of the graph's config")
    if format == "int4":
        config["quantization_config"] = QUANTIZATION["int4"]
    return config


def _stored(
    graph: KimiGraph, format: str, weights: Mapping[str, Int4Weight]
) -> Iterator[tuple[str, Tensor]]:
    """The tensors of the checkpoint, in the order of the graph."""
    named = {n for n, _ in published_tensors(graph) if tensor_kind(n) == "routed experts"}
    if strangers := sorted(weights.keys() - (named if format == "int4" else set())):
        raise ValueError(f"export: weights must be of routed experts in int4 (got {strangers[0]})")
    for name, tensor in published_tensors(graph):
        if not torch.isfinite(tensor).all():
            raise ValueError(f"export: {name} must be finite")
        if name.endswith("e_score_correction_bias"):
            yield name, tensor.float().cpu()
        elif format == "int4" and tensor_kind(name) == "routed experts":
            weight = _codes(name, tensor, weights)
            yield f"{name}_packed", weight.weight_packed.cpu()
            yield f"{name}_scale", weight.weight_scale.cpu()
            yield f"{name}_shape", torch.tensor(tensor.shape, dtype=torch.int32)
        else:
            yield name, tensor.to(torch.bfloat16).cpu()


def _codes(name: str, tensor: Tensor, weights: Mapping[str, Int4Weight]) -> Int4Weight:
    if name not in weights:
        return quantize(tensor, levels=QAT_LEVELS)
    weight = weights[name]
    if not torch.equal(dequantize(weight, tensor.dtype), tensor):
        raise ValueError(f"export: weights of {name} must give the graph's values (got others)")
    return weight


def _octets(tensor: Tensor) -> np.ndarray:
    return tensor.contiguous().view(torch.uint8).numpy()
