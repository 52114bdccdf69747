"""bf16_gemm and int8_gemm beside torch's bf16 linear layer on the same matrix."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch.nn.functional as F
from torch import Tensor

from kimi_native import ops
from kimi_native.bench.problem import Problem, copies_of, num_copies, random_bf16
from kimi_native.quant.int8 import quantize_int8
from kimi_native.weights import Int8Weight

SHAPES = {
    "k2 shared gate": (2048, 7168),
    "k2 q_b": (12288, 1536),
    "k2 o_proj": (7168, 8192),
    "moonlight q_proj": (3072, 2048),
    "moonlight dense gate": (11264, 2048),
    "tiny": (64, 128),
}


class _Dense(Problem):
    def __init__(self, shape: str, out: int, in_: int) -> None:
        self.shape, self.out, self.in_ = shape, out, in_
        self.matrix = random_bf16(out, in_, seed=1, scale=in_**-0.5)
        self.copies = num_copies(self.matrix.nbytes)
        self.bf16 = copies_of(self.matrix, self.copies)
        self.weight_bytes = self.matrix.nbytes
        self.num_calls = self.copies
        self.peers = (TorchBf16,)

    def set_tokens(self, tokens: int) -> None:
        self.tokens = tokens
        self.x = random_bf16(tokens, self.in_, seed=2)
        self.nbytes = self.weight_bytes + 2 * tokens * (self.in_ + self.out)
        self.flops = 2 * tokens * self.out * self.in_


class Bf16Gemm(_Dense):
    op = "bf16_gemm"
    limbs = False

    def ours(self, call: int) -> Tensor:
        return ops.bf16_gemm(self.x, self.bf16[call % self.copies])


class Int8Gemm(_Dense):
    op = "int8_gemm"

    def __init__(self, shape: str, out: int, in_: int) -> None:
        super().__init__(shape, out, in_)
        int8 = quantize_int8(self.matrix)
        self.weight_bytes = int8.weight.nbytes + int8.weight_scale.nbytes
        self.int8_copies = self.num_calls = num_copies(self.weight_bytes)
        self.int8 = [
            Int8Weight(int8.weight.clone(), int8.weight_scale.clone())
            for _ in range(self.int8_copies)
        ]

    def ours(self, call: int) -> Tensor:
        return ops.int8_gemm(self.x, self.int8[call % self.int8_copies])


class TorchBf16:
    name, compute, calls_per_run = "torch-bf16", "bf16", 1

    def __init__(self, problem: _Dense, threads: int) -> None:
        self.problem = problem

    def set_tokens(self, tokens: int) -> None:
        pass

    def __call__(self, call: int) -> Tensor:
        return F.linear(self.problem.x, self.problem.bf16[call % self.problem.copies])


def _problems(kind: type[_Dense]) -> Iterator[tuple[Callable[[], Problem], str]]:
    for name, (out, in_) in SHAPES.items():
        shape = f"{name} {out}x{in_}"
        yield (lambda shape=shape, out=out, in_=in_: kind(shape, out, in_)), shape


def bf16_problems() -> Iterator[tuple[Callable[[], Problem], str]]:
    return _problems(Bf16Gemm)


def int8_problems() -> Iterator[tuple[Callable[[], Problem], str]]:
    return _problems(Int8Gemm)
