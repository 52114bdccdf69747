"""Examples packed into batches of a token budget. A batch depends on (dataset, seed, counter) alone, so that a run
resumes from a number: the example counter goes through one permutation of the dataset after another."""

from __future__ import annotations

import random
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from kimi_native.nano.dataset import Dataset, Example
from kimi_native.nano.graph import Documents

_ROUNDS = 4
_MASK = (1 << 64) - 1


@dataclass(frozen=True)
class Stretch:
    """Random positions, for answers longer than any example (Ruoss et al., arXiv 2305.16843).

    chance        share of the examples whose positions are not 0, 1, 2, ...
    max_position  positions stay below it
    max_jumps     up to so many times the positions jump ahead inside an example; between jumps they stay adjacent
    """

    chance: float = 0.0
    max_position: int = 0
    max_jumps: int = 0

    def __post_init__(self) -> None:
        if not 0 <= self.chance <= 1 or min(self.max_position, self.max_jumps) < 0:
            raise ValueError(
                "stretch: chance must be 0 to 1, max_position and max_jumps not negative "
                f"(got {self.chance}, {self.max_position}, {self.max_jumps})"
            )


@dataclass(frozen=True)
class Batch:
    """Documents to run and what to predict.

    rows      [predictions] int64: the tokens of `documents` after which something is to be predicted
    targets   [predictions] int64: the ids to predict there
    counter   of the first example that the next batch takes
    """

    documents: Documents
    rows: Tensor
    targets: Tensor
    counter: int

    def to(self, device: str | torch.device) -> Batch:
        d = self.documents
        documents = replace(d, ids=d.ids.to(device), positions=d.positions.to(device))
        return Batch(documents, self.rows.to(device), self.targets.to(device), self.counter)


def make_batch(
    dataset: Dataset,
    counter: int,
    *,
    tokens: int,
    seed: int,
    stretch: Stretch | None = None,
    highest_temperature: float = 1.0,
) -> Batch:
    """The examples from `counter` on that fit into `tokens`: those fed in, which an example's last token is not.

    highest_temperature  each example's attention has a temperature between 1 and this, drawn evenly

    Raises ValueError on an empty dataset, an example of more than `tokens` + 1 or less than two tokens, and on a batch
    without anything to predict.
    """
    if len(dataset) == 0:
        raise ValueError("batch: the dataset must not be empty (got 0 examples)")
    first, taken = counter, []
    room = tokens
    while True:
        epoch, within = divmod(counter, len(dataset))
        index = shuffled(within, len(dataset), f"{seed}/{epoch}")
        example = dataset.example(index)
        if not 2 <= len(example.ids) <= tokens + 1:
            raise ValueError(
                f"batch: example {index} must have 2 to {tokens + 1} tokens (got {len(example.ids)})"
            )
        if len(example.ids) - 1 > room:
            break
        room -= len(example.ids) - 1
        taken.append(example)
        counter += 1
    generators = [random.Random(f"{seed}/{first + i}/positions") for i in range(len(taken))]
    batch = _pack(taken, counter, generators, stretch or Stretch())
    if highest_temperature == 1:
        return batch
    drawn = [
        random.Random(f"{seed}/{first + i}/temperature").uniform(1, highest_temperature)
        for i in range(len(taken))
    ]
    return replace(batch, documents=replace(batch.documents, temperatures=drawn))


def _pack(
    examples: list[Example], counter: int, generators: list[random.Random], stretch: Stretch
) -> Batch:
    lengths = [len(e.ids) - 1 for e in examples]
    predicted = torch.tensor([p for e in examples for p in e.loss[1:]])
    following = torch.tensor([i for e in examples for i in e.ids[1:]])
    rows = predicted.nonzero()[:, 0]
    if len(rows) == 0:
        raise ValueError(
            f"batch: something must be predicted (got {len(examples)} examples with no loss)"
        )
    positions = [
        p
        for length, generator in zip(lengths, generators, strict=True)
        for p in random_positions(length, generator, stretch)
    ]
    ids = torch.tensor([i for e in examples for i in e.ids[:-1]])
    documents = Documents(ids, torch.tensor(positions), lengths)
    return Batch(documents, rows, following[rows], counter)


def random_positions(length: int, generator: random.Random, stretch: Stretch) -> list[int]:
    """Ascending positions of one example: all shifted, and some jumps ahead, both log-uniform in size."""
    spare = stretch.max_position - length
    if spare < 1 or generator.random() >= stretch.chance:
        return list(range(length))
    total = int(spare ** generator.random())
    jumps = generator.randint(0, stretch.max_jumps)
    at = [0, *sorted(generator.randrange(length) for _ in range(jumps))]
    cuts = sorted(generator.randint(0, total) for _ in range(jumps))
    steps = [1] * length
    steps[0] = 0
    for place, low, high in zip(at, [0, *cuts], [*cuts, total], strict=True):
        steps[place] += high - low
    positions, position = [], 0
    for step in steps:
        position += step
        positions.append(position)
    return positions


def shuffled(index: int, length: int, seed: str) -> int:
    """Where a permutation of range(length), chosen by the seed, puts index: a Feistel network, nothing stored."""
    half = max(1, (max(length - 1, 1).bit_length() + 1) // 2)
    keys = random.Random(seed)
    rounds = [keys.getrandbits(64) for _ in range(_ROUNDS)]
    while True:  # the network permutes a power of 4 below 4 * length; walk until back in the range
        left, right = index >> half, index & ((1 << half) - 1)
        for key in rounds:
            left, right = right, left ^ (_mixed(right ^ key) & ((1 << half) - 1))
        index = (left << half) | right
        if index < length:
            return index


def _mixed(x: int) -> int:
    """splitmix64's finalizer."""
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & _MASK
    return x ^ (x >> 31)
