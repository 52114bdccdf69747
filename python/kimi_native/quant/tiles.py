"""INT4 matrices in the layout that the CUDA kernels read, made on the GPU from the checkpoint's own while loading."""

from __future__ import annotations

import torch

from kimi_native import ops
from kimi_native.weights import GROUP_SIZE, Int4TiledWeight, Int4Weight


def tile_int4(weight: Int4Weight, device: torch.device | str) -> Int4TiledWeight:
    """The same matrix, bit for bit, as tiles on `device`. Returns when the copy is enqueued.

    Raises RuntimeError if there are no CUDA kernels or the device has no room.
    """
    packed, scale = weight.weight_packed.to(device), weight.weight_scale.to(device)
    out, in_ = weight.out_features, weight.in_features
    tiles, tile_scales = (_aligned(n, packed.device) for n in ops.int4_tiled_bytes(out, in_))
    ops.call("int4_pack", (packed, scale, tiles, tile_scales), out, in_, GROUP_SIZE)
    return Int4TiledWeight(tiles, tile_scales, out, in_)


def _aligned(nbytes: int, device: torch.device) -> torch.Tensor:
    buffer = torch.empty(nbytes + 16, dtype=torch.uint8, device=device)
    start = -buffer.data_ptr() % 16
    return buffer[start : start + nbytes]
