"""Seeded random choices that come out alike on every machine and Python: all of them are made from random() alone."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import TypeVar

T = TypeVar("T")


class Dice:
    """Random choices of one seed; the seed may have several parts, such as (dataset seed, index)."""

    def __init__(self, *seed: str | int) -> None:
        # Python promises the same random() for the same seed for ever; randrange and choice it has changed.
        self.random = random.Random("/".join(map(str, seed))).random

    def between(self, low: int, high: int) -> int:
        """A whole number, low and high included."""
        return low + int(self.random() * (high - low + 1))

    def choice(self, items: Sequence[T]) -> T:
        return items[int(self.random() * len(items))]

    def chance(self, probability: float) -> bool:
        return self.random() < probability

    def weighted(self, items: Sequence[T], weights: Sequence[float]) -> T:
        """An item by weight; the weights need not sum to one. Raises ValueError if none is positive."""
        total = sum(weights)
        if total <= 0:
            raise ValueError(f"dice: a weight must be positive (got {list(weights)})")
        rest = self.random() * total
        for item, weight in zip(items, weights, strict=True):
            rest -= weight
            if rest < 0:
                return item
        return next(
            item for item, weight in zip(items[::-1], weights[::-1], strict=True) if weight > 0
        )
