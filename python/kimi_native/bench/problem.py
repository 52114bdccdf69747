"""A problem that several engines solve: its weights, rotated through more than the last-level cache, and its cost."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kimi_native import ops
from kimi_native.errors import KimiNativeError
from kimi_native.recorded import MAX_RECORDED_TOKENS

MAX_ROTATION_BYTES = 2 << 30  # of each engine's weights


class PeerMissing(KimiNativeError):
    """A peer cannot take part here: it is not installed, or lacks what is compared."""


class Problem:
    """One op on one shape. A subclass sets everything below, and solves call number `call` in `ours`.

    op, shape         as in rows
    usual_tokens      token counts to time
    peers             classes made with (problem, threads), see peers.Contestant, with set_tokens(tokens)
    limbs             integer weights: exact products may be two int8 limbs
    computes          what `ours` can do, as of load(compute=); `compute` is what it does
    num_calls         calls that differ: what `ours` is given is taken modulo this
    tokens, nbytes, flops  of the present number of tokens, after set_tokens
    """

    op: str
    shape: str
    usual_tokens: Sequence[int] = (1, 4, 16, 64, 256)
    peers: Sequence[Any] = ()
    limbs = True
    computes: Sequence[str] = ("exact",)
    compute = "exact"
    num_calls: int
    tokens: int
    nbytes: float
    flops: float

    def set_tokens(self, tokens: int) -> None:
        raise NotImplementedError

    def ours(self, call: int) -> Tensor:
        raise NotImplementedError

    def token_counts(self, asked: Iterable[int] | None, *, quick: bool) -> list[int]:
        if asked is not None:
            return list(asked)
        return list(self.usual_tokens[:3:2] if quick else self.usual_tokens)


class OurCalls:
    """Our calls as the engine makes them: up to MAX_RECORDED_TOKENS tokens, those of a decode step, recorded once and
    made again by one native call each; beyond, those of a prefill, from Python."""

    def __init__(self, problem: Problem) -> None:
        self._problem = problem
        self._recorded: list[tuple[ops.Recording, Tensor]] = []
        if problem.tokens <= MAX_RECORDED_TOKENS:
            self._recorded = [self._record(call) for call in range(problem.num_calls)]

    def _record(self, call: int) -> tuple[ops.Recording, Tensor]:
        with ops.record() as recording:
            out = self._problem.ours(call)
        return recording, out

    def __call__(self, call: int) -> Tensor:
        if not self._recorded:
            return self._problem.ours(call)
        recording, out = self._recorded[call % len(self._recorded)]
        recording.replay()
        return out


def num_copies(nbytes: int) -> int:
    """Copies of so many bytes of weights that exceed the last-level cache twice, or MAX_ROTATION_BYTES."""
    rotation = min(2 * last_level_cache_bytes(), MAX_ROTATION_BYTES)
    return min(max(2, -(-rotation // nbytes)), 1024)


def last_level_cache_bytes() -> int:
    """Of the first processor; 32 MiB where the system does not say."""
    sizes = []
    for file in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size"):
        text = file.read_text().strip()
        unit = {"K": 1 << 10, "M": 1 << 20}.get(text[-1:], 1)
        sizes.append(int(text.rstrip("KM")) * unit)
    return max(sizes, default=32 << 20)


def copies_of(tensor: Tensor, copies: int) -> list[Tensor]:
    """The same values in different memory: only the bytes' addresses matter for speed."""
    return [tensor.clone() for _ in range(copies)]


def random_bf16(*shape: int, seed: int = 0, scale: float = 1.0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(*shape, generator=generator) * scale).bfloat16()
