"""Random tensors in the published storage formats, in pieces of bounded size.

Every piece comes from (seed, weight name, row chunk) alone, so values depend neither on sharding nor on other tensors.
Normal values are looked up: 16 random bits choose one of 65536 quantiles, already scaled and rounded to BF16. That is
several times as fast as drawing float32 normals, and a seed's values do not change with a library's sampler.
"""

from __future__ import annotations

import functools
import hashlib
import math
import statistics
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from kimi_native.checkpoint_writer import ITEM_BYTES
from kimi_native.presets import GROUP_SIZE, Weight

if TYPE_CHECKING:
    from torch import Tensor

_BLOCK_SIZE = 128  # FP8 blocks, and so the unit of a row chunk
_CHUNK_ELEMENTS = 1 << 22  # 8 MB of BF16; 32 MB of indices while a chunk is made

_NORM_STD = 0.1  # around 1
_BIAS_STD = 0.05  # a fifth of the spread of sigmoid(N(0, 1)): it changes which experts are chosen, but does not decide


@dataclass(frozen=True)
class StoredTensor:
    """One tensor of a file.

    dtype   as safetensors names it
    weight  the model's weight it belongs to
    part    "values", "int4_packed", "int4_scale", "int4_shape", "fp8_weight" or "fp8_scale_inv"
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    weight: Weight
    part: str

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * ITEM_BYTES[self.dtype]


def stored_tensors(weight: Weight, format: str, bias_dtype: str) -> Iterator[StoredTensor]:
    """How `format` ("bf16", "int4" or "fp8") stores one weight."""
    name, shape = weight.name, weight.shape
    if format == "int4" and weight.kind == "expert":
        out, in_ = shape
        yield StoredTensor(f"{name}_packed", "I32", (out, in_ // 8), weight, "int4_packed")
        scale_shape = (out, in_ // GROUP_SIZE)
        yield StoredTensor(f"{name}_scale", "BF16", scale_shape, weight, "int4_scale")
        yield StoredTensor(f"{name}_shape", "I32", (2,), weight, "int4_shape")
    elif format == "fp8" and weight.kind in ("expert", "linear"):
        blocks = tuple(-(-n // _BLOCK_SIZE) for n in shape)
        yield StoredTensor(name, "F8_E4M3", shape, weight, "fp8_weight")
        yield StoredTensor(f"{name}_scale_inv", "F32", blocks, weight, "fp8_scale_inv")
    else:
        dtype = bias_dtype if weight.kind == "bias" else "BF16"
        yield StoredTensor(name, dtype, shape, weight, "values")


def row_chunks(shape: tuple[int, ...]) -> list[tuple[int, int, int]]:
    """(index, first row, last row + 1) of the pieces in which a weight is made; a vector is one piece."""
    if len(shape) == 1:
        return [(0, 0, shape[0])]
    rows, columns = shape
    step = max(_CHUNK_ELEMENTS // columns // _BLOCK_SIZE, 1) * _BLOCK_SIZE
    return [(i, r, min(r + step, rows)) for i, r in enumerate(range(0, rows, step))]


def piece(tensor: StoredTensor, seed: int, chunk: tuple[int, int, int]) -> np.ndarray:
    """The bytes of one row chunk of a stored tensor, as a contiguous array of some dtype."""
    weight, (index, first, last) = tensor.weight, chunk
    if tensor.part == "int4_shape":
        return np.array(weight.shape, "<i4") if index == 0 else np.empty(0, "<i4")
    shape = (last - first, *weight.shape[1:])
    source = _Source(seed, weight.name, index)
    if tensor.part == "int4_packed":
        return _nibbles(source, shape)
    if tensor.part == "int4_scale":
        return _scales(source, shape)
    if tensor.dtype == "F32" and tensor.part == "values":
        return np.take(_quantiles() * np.float32(_BIAS_STD), source.bits("normal", shape))
    values = _values(source, weight, shape)
    if tensor.part == "values":
        return values
    w8, scale_inv = _fp8(values)
    return (w8 if tensor.part == "fp8_weight" else scale_inv).numpy()


# ---- bits and normal values ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Source:
    """Random bits of one row chunk of one weight."""

    seed: int
    name: str
    chunk: int

    def octets(self, stream: str, count: int) -> np.ndarray:
        """`count` random bytes; `stream` tells apart what one weight is made of."""
        label = f"{self.seed}/{self.name}/{self.chunk}/{stream}"
        key = int.from_bytes(hashlib.sha256(label.encode()).digest(), "little")
        words = np.random.SFC64(key).random_raw(-(-count // 8)).astype("<u8", copy=False)
        return words.view(np.uint8)[:count]

    def bits(self, stream: str, shape: tuple[int, ...]) -> np.ndarray:
        """16 random bits per element."""
        return self.octets(stream, 2 * math.prod(shape)).view("<u2").reshape(shape)


@functools.lru_cache(maxsize=1)
def _quantiles() -> np.ndarray:
    """[65536] float32: the middles of the normal distribution's 65536-quantiles, ascending; the largest is 4.17."""
    inverse = statistics.NormalDist().inv_cdf
    upper = np.array([inverse((i + 0.5) / 65536) for i in range(32768, 65536)], np.float32)
    return np.concatenate([-upper[::-1], upper])


def to_bf16(x: np.ndarray) -> np.ndarray:
    """Finite float32 to the bits of BF16, halves to even."""
    u = x.view(np.uint32)
    return ((u + 0x7FFF + ((u >> 16) & 1)) >> 16).astype("<u2")


@functools.lru_cache(maxsize=32)
def _normal_table(mean: float, std: float) -> np.ndarray:
    """[65536] bits of BF16: mean + std * quantile."""
    return to_bf16(np.float32(mean) + np.float32(std) * _quantiles())


# ---- values ----------------------------------------------------------------------------------------------------------


def _values(source: _Source, weight: Weight, shape: tuple[int, ...]) -> np.ndarray:
    """BF16 bits of one row chunk."""
    if weight.kind == "expert":
        return _expert_values(source, shape)
    mean, std = {
        "embedding": (0.0, 1.0),
        "norm": (1.0, _NORM_STD),
        "bias": (0.0, _BIAS_STD),
    }.get(weight.kind, (0.0, weight.shape[-1] ** -0.5))
    return np.take(_normal_table(mean, std), source.bits("normal", shape), mode="wrap")


_NIBBLE_LOW_BITS = np.uint64(0x1111111111111111)


def _nibbles(source: _Source, shape: tuple[int, int]) -> np.ndarray:
    """[rows, in / 2] bytes: uniform q + 8 with q in -7 .. 7, zero twice as likely as another level."""
    rows, columns = shape
    packed = source.octets("int4", rows * columns // 2)
    # columns is a multiple of 32, so the bytes fill whole words. A nibble of 0 (q = -8) becomes 8 (q = 0).
    words = packed.view(np.uint64)
    some = words | (words >> np.uint64(1))
    some |= some >> np.uint64(2)
    words |= (~some & _NIBBLE_LOW_BITS) << np.uint64(3)
    return packed.reshape(rows, columns // 2)


@functools.lru_cache(maxsize=32)
def _scale_table(columns: int) -> np.ndarray:
    """[256] bits of BF16 in ascending order, 5 significant bits each: q has 3, so q * scale is exact in BF16."""
    # rms of the levels sqrt(280 / 16), of the spread 0.5 .. 1.5 sqrt(13 / 12): weights get a variance of 1 / in
    middle = 1.0 / math.sqrt(columns * 280 / 16 * 13 / 12)
    scales = ((np.arange(256) + 0.5) / 256 + 0.5) * middle
    mantissa, exponent = np.frexp(scales)
    return to_bf16(np.ldexp(np.round(mantissa * 32) / 32, exponent).astype(np.float32))


def _scales(source: _Source, shape: tuple[int, int]) -> np.ndarray:
    """[rows, in / 32] bits of BF16."""
    rows, columns = shape
    octets = source.octets("scale", rows * columns // GROUP_SIZE)
    table = _scale_table(columns)
    return np.take(table, octets.reshape(rows, columns // GROUP_SIZE), mode="wrap")


def _expert_values(source: _Source, shape: tuple[int, int]) -> np.ndarray:
    """What the INT4 form of the same weight means: q * scale, exact in BF16."""
    rows, columns = shape
    octets = _nibbles(source, shape)
    values = np.empty((rows, columns // GROUP_SIZE, GROUP_SIZE), np.float32)
    flat = values.reshape(rows, columns)
    flat[:, 0::2] = (octets & 0x0F).astype(np.int8) - np.int8(8)
    flat[:, 1::2] = (octets >> 4).astype(np.int8) - np.int8(8)
    scale = (_scales(source, shape).astype(np.uint32) << 16).view(np.float32)
    values *= scale[:, :, None]
    return (flat.view(np.uint32) >> 16).astype("<u2")


def _fp8(values: np.ndarray) -> tuple[Tensor, Tensor]:
    """The FP8 form of BF16 bits: weight (as bytes) and scale_inv. torch is loaded for this format only."""
    import torch

    from kimi_native.quant.fp8 import quantize_block

    w8, scale_inv = quantize_block(torch.from_numpy(values.view(np.int16)).view(torch.bfloat16))
    return w8.view(torch.uint8), scale_inv
