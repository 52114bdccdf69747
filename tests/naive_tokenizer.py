"""A second tokenizer: the pattern written with lookaheads for another regex engine, and a plain merge loop."""

from __future__ import annotations

from itertools import pairwise

import regex

NO_HAN = r"(?!\p{Han})"
UPPER = rf"(?:{NO_HAN}[\p{{Lu}}\p{{Lt}}\p{{Lm}}\p{{Lo}}\p{{M}}])"
LOWER = rf"(?:{NO_HAN}[\p{{Ll}}\p{{Lm}}\p{{Lo}}\p{{M}}])"
ORACLE_PATTERN = regex.compile(
    r"\p{Han}+"
    rf"|[^\r\n\p{{L}}\p{{N}}]?{UPPER}*{LOWER}+(?i:'(?:s|t|re|ve|m|ll|d))?"
    rf"|[^\r\n\p{{L}}\p{{N}}]?{UPPER}+{LOWER}*(?i:'(?:s|t|re|ve|m|ll|d))?"
    r"|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+"
    r"|\s+(?!\S)"
    r"|\s+"
)


def naive_encode(ranks: dict[bytes, int], text: str) -> list[int]:
    ids = []
    for match in ORACLE_PATTERN.finditer(text):
        parts = [bytes([b]) for b in match.group().encode()]
        while len(parts) > 1:
            pairs = [ranks.get(a + b, len(ranks)) for a, b in pairwise(parts)]
            best = min(pairs)
            if best == len(ranks):
                break
            at = pairs.index(best)
            parts[at : at + 2] = [parts[at] + parts[at + 1]]
        whole = b"".join(parts)
        ids += [ranks[whole]] if whole in ranks else [ranks[p] for p in parts]
    return ids
