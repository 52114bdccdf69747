"""FP8 rows of the latent cache, byte by byte: csrc/include/kimi_native/cache_layout.h in torch.

  latent  kv_lora_rank e4m3 bytes, then zeros up to a multiple of 4 bytes
  scales  one float32 for each 128 latent values; the last group may be shorter
  key     qk_rope_head_dim bf16, then zeros up to a multiple of 4 bytes

656 bytes at K2's 512 + 64, against 1152 in bf16. A cache of such rows is a uint8 tensor [pages, page_size, row_bytes].
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

DTYPE = torch.uint8  # of a cache with such rows
GROUP = 128  # latent values that share a scale
_SMALLEST = 127 - 110  # exponent bits of 2^-110: every value is a normal number in fp32 and bf16


def row_bytes(kv_lora_rank: int, qk_rope_head_dim: int) -> int:
    """Bytes of one row."""
    return _round_up(_key_offset(kv_lora_rank) + 2 * qk_rope_head_dim)


def cache_row_items(dtype: torch.dtype, kv_lora_rank: int, qk_rope_head_dim: int) -> int:
    """Elements in a row of a cache of any dtype: bytes of an FP8 row, else values."""
    if dtype == DTYPE:
        return row_bytes(kv_lora_rank, qk_rope_head_dim)
    return kv_lora_rank + qk_rope_head_dim


def quantize(latent: Tensor, key: Tensor) -> Tensor:
    """Rows of some tokens. A group's scale is the smallest power of two with max|group| <= 448 * scale, but not below
    2^-110; NaN, with all bytes 0x7f, if the group holds NaN, infinity or a magnitude above 1.75 * 2^127.

    latent   [tokens, kv_lora_rank]      any float dtype, taken as float32
    key      [tokens, qk_rope_head_dim]  any float dtype, rounded to bf16
    returns  [tokens, row_bytes]  uint8
    """
    tokens, rank = latent.shape
    groups = F.pad(latent.float(), (0, -rank % GROUP)).view(tokens, -(-rank // GROUP), GROUP)
    largest = groups.abs().amax(dim=-1)
    # Adding 2^23 - 1 - 0x600000 to the bits carries into the exponent above 1.75 * 2^e; 448 = 1.75 * 2^8.
    exponent = ((largest.view(torch.int32) + 0x1FFFFF) >> 23) - 8
    scale = (exponent.clamp(min=_SMALLEST) << 23).view(torch.float32)
    lost = ~(largest <= 1.75 * 2.0**127)
    scale = scale.masked_fill(lost, torch.nan)
    values = (groups / scale[..., None]).to(torch.float8_e4m3fn).view(torch.uint8)
    values = values.masked_fill(lost[..., None], 0x7F).flatten(1)[:, :rank]
    parts = [values, scale.view(torch.uint8), key.to(torch.bfloat16).contiguous().view(torch.uint8)]
    return torch.cat([F.pad(part, (0, -part.shape[1] % 4)) for part in parts], dim=1)


def dequantize(rows: Tensor, kv_lora_rank: int, qk_rope_head_dim: int) -> Tensor:
    """The values of some rows: e4m3 times scale, rounded to float32, and the key. Exact, in bf16 too, if the scales are
    powers of two, as quantize and ops.rope_append write them.

    rows     [tokens, row_bytes]  uint8
    returns  [tokens, kv_lora_rank + qk_rope_head_dim]  float32
    """
    scales, key = _round_up(kv_lora_rank), _key_offset(kv_lora_rank)
    values = rows[:, :kv_lora_rank].contiguous().view(torch.float8_e4m3fn).float()
    scale = rows[:, scales:key].contiguous().view(torch.float32)
    latent = values * scale.repeat_interleave(GROUP, dim=1)[:, :kv_lora_rank]
    rope = rows[:, key : key + 2 * qk_rope_head_dim].contiguous().view(torch.bfloat16)
    return torch.cat([latent, rope.float()], dim=1)


def _round_up(nbytes: int) -> int:
    return -(-nbytes // 4) * 4


def _key_offset(kv_lora_rank: int) -> int:
    return _round_up(kv_lora_rank) + -(-kv_lora_rank // GROUP) * 4
