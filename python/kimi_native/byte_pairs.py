"""Byte-pair merges learned from a text, in the family's order: most frequent first."""

from __future__ import annotations

import collections
import heapq
import itertools
import re
from collections.abc import Iterator, Mapping

# The published files' order, GPT-2's: printable bytes first, so that an id is not its byte.
_PRINTABLE = (*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100))
BYTE_TOKENS = tuple(bytes([b]) for b in sorted(range(256), key=lambda b: (b not in _PRINTABLE, b)))

# The family's splitting pattern on ASCII, where its letter classes are A-Z and a-z.
_PIECES = re.compile(
    r"[^\r\nA-Za-z0-9]?[A-Z]*[a-z]+(?:'(?:s|t|re|ve|m|ll|d))?"
    r"|[^\r\nA-Za-z0-9]?[A-Z]+[a-z]*(?:'(?:s|t|re|ve|m|ll|d))?"
    r"|[0-9]{1,3}| ?[^\sA-Za-z0-9]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def count_pieces(text: str) -> collections.Counter[str]:
    """How often each piece occurs that the family's pattern cuts the text into; merges never cross a piece.

    Raises ValueError if the text is not ASCII.
    """
    if not text.isascii():
        raise ValueError(
            f"byte_pairs: text must be ASCII (got {next(c for c in text if c > chr(127))!r})"
        )
    return collections.Counter(_PIECES.findall(text))


def learned_tokens(pieces: Mapping[str, int], count: int | None = None) -> tuple[bytes, ...]:
    """Byte-pair merges of the pieces until every piece is one token; most frequent first, then the smallest bytes.

    pieces  piece -> how often it occurs
    count   stop after so many merges
    """
    words = [[bytes([b]) for b in piece.encode()] for piece in pieces]
    weights = list(pieces.values())
    counts: collections.Counter[bytes] = collections.Counter()
    where: dict[bytes, set[int]] = collections.defaultdict(set)
    for index, word in enumerate(words):
        _count_pairs(word, weights[index], counts)
        for joined in _pairs(word):
            where[joined].add(index)
    heap = [(-n, joined) for joined, n in counts.items()]
    heapq.heapify(heap)
    learned: dict[bytes, None] = {}
    while heap and len(learned) != count:
        n, joined = heapq.heappop(heap)
        if counts[joined] != -n or n == 0:
            continue  # the count changed after this entry was pushed; a newer entry exists
        learned[joined] = None
        changed: set[bytes] = set()
        for index in sorted(where.pop(joined)):
            before = list(_pairs(words[index]))
            _count_pairs(words[index], -weights[index], counts)
            words[index] = _merged(words[index], joined)
            _count_pairs(words[index], weights[index], counts)
            for pair in _pairs(words[index]):
                where[pair].add(index)
            changed.update(before, _pairs(words[index]))
        for pair in changed:
            if counts[pair] > 0:
                heapq.heappush(heap, (-counts[pair], pair))
    return tuple(learned)


def _pairs(word: list[bytes]) -> Iterator[bytes]:
    return (a + b for a, b in itertools.pairwise(word))


def _count_pairs(word: list[bytes], weight: int, counts: collections.Counter[bytes]) -> None:
    for joined in _pairs(word):
        counts[joined] += weight


def _merged(word: list[bytes], joined: bytes) -> list[bytes]:
    out: list[bytes] = []
    i = 0
    while i < len(word):
        if i + 1 < len(word) and word[i] + word[i + 1] == joined:
            out.append(joined)
            i += 2
        else:
            out.append(word[i])
            i += 1
    return out
