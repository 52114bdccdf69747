"""A checkpoint folder to what the engine runs: the model, where it is to compute, and its cache beside it."""

from __future__ import annotations

import os
from typing import Any

from kimi_native import fp8_rows
from kimi_native.cache import PAGE_SIZE, LatentCache
from kimi_native.checkpoint import Checkpoint
from kimi_native.errors import RequestError
from kimi_native.loader import DTYPES, load_model
from kimi_native.placement import check_device, place
from kimi_native.recorded import RecordedModel


def load_network(
    path: str | os.PathLike[str],
    *,
    max_context: int,
    max_batch: int,
    dtype: str,
    cache: str,
    device: str,
    experts: str | None,
    ignored: tuple[str, ...],
    **weights: Any,
) -> tuple[RecordedModel, LatentCache, Checkpoint]:
    """A checkpoint's model on a device, over the cache that it decodes with.

    device, experts  as of generate.load; other arguments and errors as of loader.load_model
    """
    where = check_device(device, experts)
    if where.type != "cpu" and dtype != "bfloat16":
        raise RequestError(f"load: dtype must be bfloat16 on a GPU (got {dtype})")
    if where.type != "cpu" and weights.get("compute", "exact") != "exact":
        raise RequestError(f"load: compute must be exact on a GPU (got {weights['compute']})")
    network, checkpoint = load_model(
        path,
        max_context=max_context,
        max_batch=max_batch,
        dtype=dtype,
        cache=cache,
        ignore_config_keys=ignored,
        **weights,
    )
    # Every sequence may leave a part of its last page empty.
    pages = max_batch * -(-max_context // PAGE_SIZE)
    tokens = pages * PAGE_SIZE
    config, rows = network.config, fp8_rows.DTYPE if cache == "fp8" else DTYPES[dtype]
    if where.type != "cpu":
        items = fp8_rows.cache_row_items(rows, config.kv_lora_rank, config.qk_rope_head_dim)
        cache_bytes = tokens * config.num_hidden_layers * items * rows.itemsize
        place(network, where, experts_on_cpu=experts == "cpu", cache_bytes=cache_bytes)
    latents = LatentCache(config, max_tokens=tokens, dtype=rows, device=where)
    return RecordedModel(network, latents), latents, checkpoint
