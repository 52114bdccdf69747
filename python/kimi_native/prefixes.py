"""Cache rows that a finished request leaves for the next one of the same conversation.

Rows have the same bits however a prompt is cut, so a request that starts from kept ones equals one that starts from
nothing. On a CPU decode's rows are prefill's too, and those of the generated tokens are kept with the prompt's. A GPU's
decode has another form, with other last bits: there they are not kept, or what follows would depend on it.

Kept pages count as free: who needs them gets them, from the conversation that was quiet longest.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from kimi_native.errors import RequestError

if TYPE_CHECKING:
    from kimi_native.cache import CachedSequence, LatentCache


class KeptPrefix:
    """Handle of one conversation, given to each of its requests; holds rows between them as long as there is room."""

    def __init__(self) -> None:
        self.ids: list[int] = []
        self.seq: CachedSequence | None = None

    def __repr__(self) -> str:
        return f"KeptPrefix({len(self.ids)} tokens)"


def checked_handles(prefixes: Sequence[KeptPrefix] | None, count: int) -> list[KeptPrefix | None]:
    """One handle for each of `count` prompts, or None for each.

    Raises RequestError on another number, on what is no handle, and on one handle for two prompts.
    """
    if prefixes is None:
        return [None] * count
    handles = list(prefixes)
    wrong = next((handle for handle in handles if not isinstance(handle, KeptPrefix)), None)
    if wrong is not None:
        raise RequestError(f"generate: prefixes must be KeptPrefix (got {type(wrong).__name__})")
    if len(handles) != count:
        raise RequestError(
            f"generate: prefixes must be as many as the prompts (got {len(handles)} for {count})"
        )
    if len(set(map(id, handles))) != count:
        raise RequestError("generate: each prompt needs a prefix of its own (got one twice)")
    return handles


class PrefixStore:
    """All kept prefixes of one cache, the one used last at the end. Each sequence has one owner: store or request."""

    def __init__(self, cache: LatentCache) -> None:
        self._cache = cache
        self._kept: dict[KeptPrefix, None] = {}

    @property
    def kept_tokens(self) -> int:
        """Tokens that fit into the kept pages."""
        return sum(len(p.seq.pages) for p in self._kept) * self._cache.page_size

    def take(self, prefix: KeptPrefix | None, prompt_ids: Sequence[int]) -> CachedSequence:
        """A sequence with the rows that prefix and prompt share, at least one token short of the prompt; else empty."""
        if prefix is None or prefix.seq is None:
            return self._cache.new_sequence()
        shared = min(common_length(prefix.ids, prompt_ids), len(prompt_ids) - 1)
        seq, prefix.seq, prefix.ids = prefix.seq, None, []
        del self._kept[prefix]
        self._cache.truncate(seq, shared)
        return seq

    def keep(self, prefix: KeptPrefix, ids: Sequence[int], seq: CachedSequence) -> None:
        """Hands over a sequence whose first rows are those of `ids`; frees its others and what was kept before."""
        self.drop(prefix)
        self._cache.truncate(seq, len(ids))
        prefix.ids, prefix.seq = list(ids), seq
        self._kept[prefix] = None

    def drop(self, prefix: KeptPrefix) -> None:
        """Frees what is kept under a handle; the handle can be used again."""
        if prefix.seq is not None:
            del self._kept[prefix]
            self._cache.free(prefix.seq)
            prefix.seq, prefix.ids = None, []

    def make_room(self, tokens: int) -> bool:
        """Whether `tokens` tokens fit into free pages, after dropping prefixes if that is enough to make them fit."""
        if tokens > self._cache.free_tokens + self.kept_tokens:
            return False
        while tokens > self._cache.free_tokens:
            self.drop(next(iter(self._kept)))
        return True


def common_length(a: Sequence[int], b: Sequence[int]) -> int:
    """Number of ids with which both start."""
    shorter = min(len(a), len(b))
    if a[:shorter] == b[:shorter]:
        return shorter
    return next(i for i in range(shorter) if a[i] != b[i])
