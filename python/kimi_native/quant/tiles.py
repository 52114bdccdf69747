"""INT4 matrices in the layout that the CUDA kernels read, made on the GPU from the checkpoint's own while loading."""

from __future__ import annotations

import torch
from torch import Tensor

from kimi_native import ops
from kimi_native.weights import GROUP_SIZE, Int4ExpertWeights, Int4TiledWeight, Int4Weight

_ALIGNMENT = 16


def tile_int4(weight: Int4Weight, device: torch.device | str) -> Int4TiledWeight:
    """The same matrix, bit for bit, as tiles on `device`. Returns when the work is enqueued.

    Raises RuntimeError if there are no CUDA kernels or the device has no room.
    """
    return _tile_all([weight], device)[0]


def tile_int4_experts(weights: Int4ExpertWeights, device: torch.device | str) -> Int4ExpertWeights:
    """A projection of all experts as tiles on `device`, in two allocations."""
    return Int4ExpertWeights(_tile_all(weights.weights, device))


def tiled_bytes(out_features: int, in_features: int) -> int:
    """Bytes that a matrix takes as tiles, scales included."""
    return sum(map(_padded, ops.int4_tiled_bytes(out_features, in_features)))


def _tile_all(weights: list[Int4Weight], device: torch.device | str) -> list[Int4TiledWeight]:
    """All of one shape."""
    out, in_ = weights[0].out_features, weights[0].in_features
    pools = [_Pool(size, len(weights), device) for size in ops.int4_tiled_bytes(out, in_)]
    tiled = []
    for i, weight in enumerate(weights):
        tiles, scales = (pool.piece(i) for pool in pools)
        packed, scale = (t.to(device) for t in (weight.weight_packed, weight.weight_scale))
        ops.call("int4_pack", (packed, scale, tiles, scales), out, in_, GROUP_SIZE)
        tiled.append(Int4TiledWeight(tiles, scales, out, in_))
    return tiled


def _padded(nbytes: int) -> int:
    return -(-nbytes // _ALIGNMENT) * _ALIGNMENT


class _Pool:
    """One allocation cut into equal, aligned pieces."""

    def __init__(self, nbytes: int, count: int, device: torch.device | str) -> None:
        self._nbytes, self._step = nbytes, _padded(nbytes)
        memory = torch.empty(self._step * count + _ALIGNMENT, dtype=torch.uint8, device=device)
        self._memory = memory[-memory.data_ptr() % _ALIGNMENT :]

    def piece(self, index: int) -> Tensor:
        start = index * self._step
        return self._memory[start : start + self._nbytes]
