"""A task that a working training run solves in minutes: say a random sequence again. Imports no torch."""

from __future__ import annotations

import random
from dataclasses import dataclass

from kimi_native.nano.dataset import Example


@dataclass(frozen=True)
class CopyTask:
    """`first symbols` sep `the same symbols` end: ids 0 (sep) and 1 (end), symbols 2 .. vocab_size - 1.

    examples   how many; of each, the length is drawn from shortest .. longest
    """

    vocab_size: int
    shortest: int = 4
    longest: int = 24
    examples: int = 1 << 20
    seed: int = 0

    def __len__(self) -> int:
        return self.examples

    def example(self, index: int) -> Example:
        if not 0 <= index < self.examples:
            raise IndexError(f"copy task: index must be 0 to {self.examples - 1} (got {index})")
        generator = random.Random(f"{self.seed}/{index}")
        length = generator.randint(self.shortest, self.longest)
        symbols = [generator.randrange(2, self.vocab_size) for _ in range(length)]
        return Example([*symbols, 0, *symbols, 1], [False] * (length + 1) + [True] * (length + 1))
