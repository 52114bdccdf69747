"""mla_decode beside the absorbed attention written in torch, in fp32 and in bf16, over a contiguous cache."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from kimi_native import ops
from kimi_native.bench.problem import Problem, copies_of, num_copies, random_bf16
from kimi_native.cache import PAGE_SIZE

LATENT, ROPE = 512, 64
SCALE = 0.07  # about (128 + 64) ** -0.5
SHAPES = {
    "k2": (64, (1024, 8192, 32768)),
    "moonlight": (16, (1024, 8192, 32768)),
    "tiny": (4, (128,)),
}


class MlaDecode(Problem):
    """One sequence; its tokens are in page order, so that a torch view needs no gathering."""

    op = "mla_decode"
    usual_tokens = (1,)
    limbs = False

    def __init__(self, shape: str, heads: int, length: int) -> None:
        self.shape, self.heads, self.length = shape, heads, length
        cache = random_bf16(length // PAGE_SIZE, PAGE_SIZE, LATENT + ROPE, seed=1)
        self.copies = num_copies(cache.nbytes)
        self.caches = copies_of(cache, self.copies)
        self.page_table = torch.arange(length // PAGE_SIZE, dtype=torch.int32)[None]
        self.seq_lens = torch.tensor([length], dtype=torch.int32)
        self.q = random_bf16(1, heads, LATENT + ROPE, seed=2, scale=0.5).float()
        self.num_calls = self.copies
        self.peers = (TorchFp32, TorchBf16)

    def token_counts(self, asked, *, quick: bool) -> list[int]:
        return [1]

    def set_tokens(self, tokens: int) -> None:
        self.tokens = tokens
        self.nbytes = self.caches[0].nbytes + 4 * self.heads * (2 * LATENT + ROPE)
        self.flops = 2 * self.heads * self.length * (2 * LATENT + ROPE)

    def ours(self, call: int) -> Tensor:
        return ops.mla_decode(
            self.q,
            self.caches[call % self.copies],
            self.page_table,
            self.seq_lens,
            kv_lora_rank=LATENT,
            softmax_scale=SCALE,
        )


class TorchFp32:
    """The cache kept in fp32: twice the bytes, none of the conversion."""

    name, compute, calls_per_run = "torch-fp32", "fp32", 1

    def __init__(self, problem: MlaDecode, threads: int) -> None:
        rows = problem.caches[0].flatten(0, 1).to(self._dtype())
        self.caches = copies_of(rows, num_copies(rows.nbytes))
        self.q = problem.q[0].to(self._dtype())

    def _dtype(self) -> torch.dtype:
        return torch.float32

    def set_tokens(self, tokens: int) -> None:
        pass

    def __call__(self, call: int) -> Tensor:
        rows = self.caches[call % len(self.caches)]
        scores = (self.q @ rows.T).float() * SCALE
        return (scores.softmax(-1).to(rows.dtype) @ rows[:, :LATENT])[None]


class TorchBf16(TorchFp32):
    name, compute = "torch-bf16", "bf16"

    def _dtype(self) -> torch.dtype:
        return torch.bfloat16


def problems() -> Iterator[tuple[Callable[[], Problem], str]]:
    for name, (heads, lengths) in SHAPES.items():
        for length in lengths:
            shape = f"{name} heads={heads} length={length}"
            yield (lambda s=shape, h=heads, n=length: MlaDecode(s, h, n)), shape
