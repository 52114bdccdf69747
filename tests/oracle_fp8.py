"""FP8 cache rows, slowly: Python numbers and struct, one value at a time, from the text of cache_layout.h."""

from __future__ import annotations

import math
import struct

import torch
from torch import Tensor

GROUP = 128
E4M3_STEP = 2.0**-4  # relative rounding of a normal number, at most
SMALLEST_STEP = 2.0**-10  # absolute rounding below 2^-6, of the scale


def e4m3(byte: int) -> float:
    """The number of a byte: 1 sign, 4 exponent bits with bias 7, 3 of fraction; all ones is NaN."""
    exponent, fraction = byte >> 3 & 15, byte & 7
    if (exponent, fraction) == (15, 7):
        return math.nan
    value = (8 + fraction) * 2.0 ** (exponent - 10) if exponent else fraction * 2.0**-9
    return -value if byte & 0x80 else value


_MAGNITUDES = [e4m3(byte) for byte in range(127)]


def to_e4m3(value: float) -> int:
    """The nearest byte; of two equally near the even one."""
    magnitude = abs(value)
    best = min(range(127), key=lambda b: (abs(_MAGNITUDES[b] - magnitude), b % 2))
    return best | (0x80 if math.copysign(1, value) < 0 else 0)


def scale_of(group: list[float]) -> float:
    """The smallest power of two with max|group| <= 448 * scale, at least 2^-110."""
    if not all(math.isfinite(v) and abs(v) <= 1.75 * 2.0**127 for v in group):
        return math.nan
    scale = 2.0**-110
    while max(map(abs, group)) > 448 * scale:
        scale *= 2
    return scale


def _padded(data: bytes) -> bytes:
    return data + bytes(-len(data) % 4)


def pack_row(latent: Tensor, key: Tensor) -> bytes:
    """One row. latent: float values; key: bf16."""
    values, scales = b"", b""
    for group in latent.double().split(GROUP):
        numbers = group.tolist()
        scale = scale_of(numbers)
        lost = math.isnan(scale)
        scales += struct.pack("<I", 0x7FC00000) if lost else struct.pack("<f", scale)
        values += bytes(0x7F if lost else to_e4m3(v / scale) for v in numbers)
    words = key.view(torch.int16).tolist()
    return _padded(values) + scales + _padded(struct.pack(f"<{len(words)}h", *words))


def unpack_row(row: bytes, rank: int, rope: int) -> list[float]:
    """The values of a row."""
    scales = len(_padded(bytes(rank)))
    keys = scales + 4 * math.ceil(rank / GROUP)
    values = []
    for i in range(rank):
        (scale,) = struct.unpack_from("<f", row, scales + i // GROUP * 4)
        values.append(e4m3(row[i]) * scale)
    for i in range(rope):
        (word,) = struct.unpack_from("<H", row, keys + 2 * i)
        values.append(struct.unpack("<f", struct.pack("<I", word << 16))[0])
    return values


def row_error(latent: Tensor) -> Tensor:
    """Bound of |value - latent| for finite latents [.., kv_lora_rank]: e4m3's rounding, relative for normal numbers and
    half of a step of the scale below them; a scale is less than max|group| / 224, or 2^-110."""
    bound = []
    for group in latent.double().abs().split(GROUP, dim=-1):
        scale = (group.amax(dim=-1, keepdim=True) / 224).clamp(min=2.0**-110)
        bound.append(torch.maximum(E4M3_STEP * group, SMALLEST_STEP * scale))
    return torch.cat(bound, dim=-1)
