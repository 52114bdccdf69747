"""What one pass over the layers shares."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace

from torch import Tensor

from kimi_native import ops
from kimi_native.cache import LatentCache
from kimi_native.mla_schedule import MlaSchedule, mla_schedule, splits_of_pages


@dataclass
class Step:
    """Where the tokens go in the cache, and their rotation."""

    cache: LatentCache
    slots: Tensor  # [tokens] int64: the cache rows of this pass's tokens
    cos: Tensor  # [tokens, rope / 2]
    sin: Tensor
    page_table: Tensor | None = None  # [tokens, pages] int32: of each token's sequence
    seq_lens: Tensor | None = None  # [tokens] int32: how much of it the token sees, itself included
    prefix_slots: Tensor | None = None  # expanded form: rows of all tokens so far
    schedule: MlaSchedule | None = None  # absorbed form on a GPU, see scheduled()

    def scheduled(self) -> Step:
        """The same with what a GPU's layers have in common: the splits of the sequences, which share no page."""
        if self.seq_lens is None or not ops.uses_cuda(self.seq_lens.device):
            return self
        if ops.active_backend() == "reference":
            return self
        (batch, pages), size = self.page_table.shape, self.cache.page_size
        splits = splits_of_pages(batch, self.cache.num_pages * size)
        made = mla_schedule(self.seq_lens, max_tokens=pages * size, max_splits=splits)
        return replace(self, schedule=made)

    def part(self, rows: slice) -> Step:
        """Some of the tokens, in the absorbed form on a CPU."""
        tensors = (self.slots, self.cos, self.sin, self.page_table, self.seq_lens)
        return Step(self.cache, *(t[rows] for t in tensors))

    def on_device(self) -> Step:
        """The same where the cache is."""
        names = {f.name for f in fields(self)} - {"cache", "schedule"}
        tensors = {name: getattr(self, name) for name in names}
        moved = {n: t if t is None else t.to(self.cache.device) for n, t in tensors.items()}
        return Step(self.cache, **moved)
