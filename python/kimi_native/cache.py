"""The paged latent cache: one row of kv_lora_rank + qk_rope_head_dim values per token and layer, in bf16 or float32, or
in FP8 (fp8_rows.py) at 57 % of bf16's bytes.

A row holds the latent after its norm, then the rotated shared key part: everything absorbed attention needs, 35.6 times
less than expanded keys and values at K2's shape. Rows live in pages of 64 tokens; a sequence owns a list of pages, so
sequences grow without copying and give their pages back in one step. All memory is set aside when the cache is made
(and committed by the operating system as it is first written, on huge pages where it has them: attention reads all rows
of a sequence for every token, and would wait for page tables); nothing is allocated per token.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from kimi_native import fp8_rows
from kimi_native.errors import RequestError
from kimi_native.huge_pages import HugePages

if TYPE_CHECKING:
    from kimi_native.config import KimiConfig

PAGE_SIZE = 64


class CachedSequence:
    """What the cache knows of one sequence: its pages, in order, and how many tokens they hold."""

    def __init__(self) -> None:
        self.length = 0
        self.pages: list[int] = []

    def __repr__(self) -> str:
        return f"CachedSequence(length={self.length}, pages={self.pages})"


class LatentCache:
    """Pages for at least `max_tokens` tokens, shared by all sequences.

    data  [layers, pages, page_size, kv_lora_rank + qk_rope_head_dim], of `dtype`, on `device`; dtype uint8 means FP8
          rows, [layers, pages, page_size, fp8_rows.row_bytes]

    Raises ValueError if max_tokens or page_size is below 1.
    """

    def __init__(
        self,
        config: KimiConfig,
        *,
        max_tokens: int,
        dtype: torch.dtype = torch.bfloat16,
        page_size: int = PAGE_SIZE,
        device: torch.device | str = "cpu",
    ) -> None:
        if max_tokens < 1 or page_size < 1:
            raise ValueError(
                "cache: max_tokens and page_size must be at least 1 "
                f"(got max_tokens={max_tokens}, page_size={page_size})"
            )
        self.page_size = page_size
        self.num_pages = -(-max_tokens // page_size)
        self._widths = (config.kv_lora_rank, config.qk_rope_head_dim)
        items = fp8_rows.cache_row_items(dtype, *self._widths)
        shape = (config.num_hidden_layers, self.num_pages, page_size, items)
        self.data = _memory(shape, dtype, torch.device(device))
        self._free_pages = list(range(self.num_pages - 1, -1, -1))

    @property
    def dtype(self) -> torch.dtype:
        return self.data.dtype

    @property
    def device(self) -> torch.device:
        return self.data.device

    @property
    def free_tokens(self) -> int:
        """Tokens that fit into the pages nobody owns."""
        return len(self._free_pages) * self.page_size

    def new_sequence(self) -> CachedSequence:
        return CachedSequence()

    def reserve(self, seq: CachedSequence, tokens: int) -> None:
        """Make room for `tokens` more tokens. Raises RequestError, and takes nothing, if pages run out."""
        needed = -(-(seq.length + tokens) // self.page_size) - len(seq.pages)
        if needed > len(self._free_pages):
            raise RequestError(
                f"cache: {tokens} more tokens need {needed} pages of {self.page_size} tokens "
                f"(got {len(self._free_pages)} free of {self.num_pages}); raise max_context or max_batch"
            )
        for _ in range(needed):
            seq.pages.append(self._free_pages.pop())

    def free(self, seq: CachedSequence) -> None:
        """Give a sequence's pages back; the sequence is empty afterwards."""
        self._free_pages.extend(reversed(seq.pages))
        seq.pages = []
        seq.length = 0

    def truncate(self, seq: CachedSequence, length: int) -> None:
        """Forget the tokens from `length` on and give back every page but those of the others. ValueError below 0."""
        if length < 0:
            raise ValueError(f"cache: length must be at least 0 (got {length})")
        seq.length = min(seq.length, length)
        kept = -(-seq.length // self.page_size)
        self._free_pages.extend(reversed(seq.pages[kept:]))
        del seq.pages[kept:]

    def slots(self, seq: CachedSequence, start: int, stop: int) -> Tensor:
        """Row numbers, within one layer's flattened pages, of the tokens start .. stop - 1: [stop - start] int64."""
        position = torch.arange(start, stop)
        pages = torch.tensor(seq.pages, dtype=torch.int64)
        return pages[position // self.page_size] * self.page_size + position % self.page_size

    def read(self, layer: int, slots: Tensor) -> Tensor:
        """The rows at `slots` of one layer, gathered: [tokens, latent_width] of `dtype`, bf16 of FP8 rows."""
        rows = self.data[layer].view(-1, self.data.shape[-1])[slots]
        if self.dtype != fp8_rows.DTYPE:
            return rows
        return fp8_rows.dequantize(rows, *self._widths).bfloat16()  # exact: see quantize

    def page_table(self, seqs: list[CachedSequence]) -> Tensor:
        """[sequences, most pages] int32; unused entries hold a page number that no kernel may read."""
        width = max(len(s.pages) for s in seqs)
        unused = 2**31 - 1
        return torch.tensor(
            [s.pages + [unused] * (width - len(s.pages)) for s in seqs], dtype=torch.int32
        )


def _memory(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    if device.type != "cpu":
        return torch.empty(shape, dtype=dtype, device=device)
    pages = HugePages()
    pages.reserve(shape, dtype)
    return pages.empty(shape, dtype)
