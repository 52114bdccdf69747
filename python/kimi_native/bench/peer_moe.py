"""A layer of experts beside torch's INT4 product in a loop over the hit experts, and beside kt-kernel's; routing is
part of all."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from kimi_native import ops
from kimi_native.bench.peer_int4 import torch_int4_mm, torch_int4_pack
from kimi_native.bench.peer_kt import KtKernel, KtKernelSpare
from kimi_native.bench.problem import Problem, num_copies, random_bf16
from kimi_native.weights import GROUP_SIZE, Int4ExpertWeights, Int4Weight

ROUTINGS = 16


@dataclass(frozen=True)
class Shape:
    name: str
    experts: int
    topk: int
    hidden: int
    intermediate: int

    def __str__(self) -> str:
        return (
            f"{self.name} experts={self.experts} topk={self.topk} {self.hidden}x{self.intermediate}"
        )


SHAPES = (
    Shape("k2", 64, 8, 7168, 2048),
    Shape("moonlight", 64, 6, 2048, 1408),
    Shape("tiny", 8, 2, 128, 64),
)


class MoeLayer(Problem):
    op = "moe_layer"
    computes = ("exact", "int8")
    usual_tokens = (1, 4, 16, 128)

    def __init__(self, shape: Shape) -> None:
        self.dims, self.shape = shape, str(shape)
        self.experts = shape.experts
        self.expert_bytes = 3 * shape.hidden * shape.intermediate * 9 // 16
        self.layers = -(-num_copies(self.expert_bytes) // shape.experts)
        self.up = random_nibbles(shape.intermediate, shape.hidden)  # gate too
        self.down = random_nibbles(shape.hidden, shape.intermediate)
        self.weights = [
            [self._projection(*part) for part in (self.up, self.up, self.down)]
            for _ in range(self.layers)
        ]
        self.num_calls = ROUTINGS * self.layers
        self.peers = (TorchLoop, KtKernel, KtKernelSpare)

    def _projection(self, nibbles: Tensor, scale: Tensor) -> Int4ExpertWeights:
        words = (nibbles[:, 0::2] | nibbles[:, 1::2] << 4).view(torch.int32)
        return Int4ExpertWeights(
            [Int4Weight(words.clone(), scale.clone()) for _ in range(self.experts)]
        )

    def set_tokens(self, tokens: int) -> None:
        d = self.dims
        self.tokens = tokens
        self.x = random_bf16(tokens, d.hidden, seed=2)
        self.logits = [self._routing(tokens, call) for call in range(ROUTINGS)]
        hit = [len(r.topk(d.topk).indices.unique()) for r in self.logits]
        self.nbytes = sum(hit) / len(hit) * self.expert_bytes + 4 * tokens * d.hidden
        self.flops = 6 * tokens * d.topk * d.hidden * d.intermediate

    def _routing(self, tokens: int, call: int) -> Tensor:
        """Random logits; a call of few tokens takes the experts next in line, which are cold."""
        d = self.dims
        logits = torch.randn(tokens, d.experts, generator=torch.Generator().manual_seed(call))
        if tokens * d.topk <= d.experts:
            first = call * tokens * d.topk
            chosen = torch.arange(first, first + tokens * d.topk) % d.experts
            logits.scatter_(1, chosen.view(tokens, d.topk), 6 + torch.rand(tokens, d.topk))
        return logits

    def route(self, call: int) -> tuple[Tensor, Tensor]:
        return ops.moe_route(self.logits[call % ROUTINGS], None, topk=self.dims.topk)

    def layer(self, call: int) -> int:
        """Few tokens go round a layer's experts before they go on to the next layer."""
        return call // ROUTINGS % self.layers

    def ours(self, call: int) -> Tensor:
        topk_ids, topk_weights = self.route(call)
        gate, up, down = self.weights[self.layer(call)]
        dispatch = ops.moe_dispatch(topk_ids, self.experts)
        inner = ops.int4_grouped_swiglu(self.x, dispatch, gate, up, compute=self.compute)
        rows = ops.int4_grouped_gemm(
            inner, dispatch, down, out_dtype=torch.float32, compute=self.compute
        )
        return ops.moe_combine(rows, dispatch, topk_weights, None, out_dtype=torch.bfloat16)


class TorchLoop:
    name, compute, calls_per_run = "torch-int4-loop", "exact", 1

    def __init__(self, problem: MoeLayer, threads: int) -> None:
        self.problem = problem
        up, down = torch_int4_pack(*problem.up), torch_int4_pack(*problem.down)
        self.weights = [
            [[tuple(t.clone() for t in m) for m in (up, up, down)] for _ in range(problem.experts)]
            for _ in range(problem.layers)
        ]

    def set_tokens(self, tokens: int) -> None:
        pass

    def __call__(self, call: int) -> Tensor:
        p = self.problem
        topk_ids, topk_weights = p.route(call)
        layer = self.weights[p.layer(call)]
        out = torch.zeros(p.tokens, p.dims.hidden)
        for e in topk_ids.unique().tolist():
            token, slot = (topk_ids == e).nonzero(as_tuple=True)
            gate, up, down = layer[e]
            x = p.x[token]
            inner = F.silu(torch_int4_mm(x, *gate)) * torch_int4_mm(x, *up)
            rows = torch_int4_mm(inner, *down).float() * topk_weights[token, slot, None]
            out.index_add_(0, token, rows)
        return out.bfloat16()


def random_nibbles(out: int, in_: int) -> tuple[Tensor, Tensor]:
    """[out, in] uint8 from 0 to 15, and [out, in / 32] bf16 scales that keep a product's size."""
    generator = torch.Generator().manual_seed(out)
    nibbles = torch.randint(0, 16, (out, in_), generator=generator, dtype=torch.uint8)
    scale = torch.rand(out, in_ // GROUP_SIZE, generator=generator) + 0.5
    return nibbles, (scale * in_**-0.5 / 4.6).bfloat16()


def problems() -> Iterator[tuple[Callable[[], Problem], str]]:
    for shape in SHAPES:
        yield (lambda shape=shape: MoeLayer(shape)), str(shape)
