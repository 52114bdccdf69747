"""What is compared: K2's matrices, a layer of its experts, its attention; our way to solve each, and its cost.

Weights rotate through more than the L2 cache (60 MB on an H200). On a CPU, in a rehearsal, shapes are tiny.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from kimi_native import fp8_rows, ops
from kimi_native.quant.tiles import tile_int4, tile_int4_experts
from kimi_native.weights import GROUP_SIZE, Int4ExpertWeights, Int4Weight, MoeDispatch

ROTATION_BYTES = 320 << 20
LATENT, ROPE, PAGE = 512, 64, 64
SCALE = 0.07  # about (128 + 64) ** -0.5
ROUTINGS = 16


def num_copies(nbytes: int, device: torch.device) -> int:
    return min(max(2, -(-ROTATION_BYTES // nbytes)), 256) if device.type == "cuda" else 2


def random_bf16(*shape: int, device: torch.device, scale: float = 1.0) -> Tensor:
    return torch.randn(shape, dtype=torch.bfloat16, device=device) * scale


def random_int4(*shape: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """weight_packed [..., out, in / 8] int32 and weight_scale [..., out, in / 32] of a random matrix, or of several."""
    *experts, out, in_ = shape
    words = torch.randint(
        -(2**31), 2**31, (*experts, out, in_ // 8), dtype=torch.int32, device=device
    )
    scale = torch.rand(*experts, out, in_ // GROUP_SIZE, dtype=torch.bfloat16, device=device)
    return words, (scale + 0.5) * in_**-0.5 / 4.6


def dequantized(words: Tensor, scale: Tensor) -> Tensor:
    """[..., out, in] bf16."""
    nibbles = torch.stack([words >> shift & 15 for shift in range(0, 32, 4)], dim=-1)
    values = (nibbles - 8).to(torch.bfloat16).flatten(-2)
    return values * scale.repeat_interleave(GROUP_SIZE, dim=-1)


class Problem:
    """op, shape, tokens as in rows; nbytes and flops of one call; num_calls that differ; extra fields of the row."""

    op: str
    shape: str
    tokens: int
    nbytes: float
    flops: float
    num_calls: int
    extra: dict[str, float] = {}  # noqa: RUF012  replaced, never changed

    def ours(self, call: int) -> Tensor:
        """What our kernel gives in call number `call`; each op's problem says it."""
        raise NotImplementedError


@dataclass(frozen=True)
class Matrix:
    name: str
    out: int
    in_: int

    def __str__(self) -> str:
        return f"{self.name} {self.out}x{self.in_}"


class Bf16Gemm(Problem):
    op = "bf16_gemm"

    def __init__(self, matrix: Matrix, tokens: int, device: torch.device) -> None:
        self.shape, self.tokens = str(matrix), tokens
        out, in_ = matrix.out, matrix.in_
        self.num_calls = num_copies(2 * out * in_, device)
        self.weights = random_bf16(self.num_calls, out, in_, device=device, scale=in_**-0.5)
        self.x = random_bf16(tokens, in_, device=device)
        self.nbytes = 2 * (out * in_ + tokens * (out + in_))
        self.flops = 2 * tokens * out * in_

    def ours(self, call: int) -> Tensor:
        return ops.bf16_gemm(self.x, self.weights[call % self.num_calls])


class Int4Gemm(Problem):
    op = "int4_gemm"

    def __init__(self, matrix: Matrix, tokens: int, device: torch.device) -> None:
        self.shape, self.tokens, self.matrix = str(matrix), tokens, matrix
        out, in_ = matrix.out, matrix.in_
        packed_bytes = out * in_ * 9 // 16
        self.num_calls = num_copies(packed_bytes, device)
        self.words, self.scale = random_int4(out, in_, device=device)
        one = Int4Weight(self.words, self.scale)
        self.tiles = [tile_int4(one, device) for _ in range(self.num_calls)]
        self.x = random_bf16(tokens, in_, device=device)
        self.nbytes = packed_bytes + 2 * tokens * (out + in_)
        self.flops = 2 * tokens * out * in_

    def ours(self, call: int) -> Tensor:
        return ops.int4_gemm(self.x, self.tiles[call % self.num_calls])


@dataclass(frozen=True)
class MoeShape:
    name: str
    experts: int
    topk: int
    hidden: int
    intermediate: int

    def __str__(self) -> str:
        return (
            f"{self.name} experts={self.experts} topk={self.topk} {self.hidden}x{self.intermediate}"
        )


class ExpertWeights:
    """A layer's experts in the layout of the checkpoint, gate above up, for all to make theirs from; and our tiles."""

    def __init__(self, shape: MoeShape, device: torch.device) -> None:
        s = self.shape = shape
        self.device = device
        self.gate_up = random_int4(s.experts, 2 * s.intermediate, s.hidden, device=device)
        self.down = random_int4(s.experts, s.hidden, s.intermediate, device=device)
        half = s.intermediate
        self.tiles = [
            tile_int4_experts(Int4ExpertWeights(self._matrices(*part)), device)
            for part in (
                [t[:, :half] for t in self.gate_up],
                [t[:, half:] for t in self.gate_up],
                self.down,
            )
        ]

    @staticmethod
    def _matrices(words: Tensor, scale: Tensor) -> list[Int4Weight]:
        return [Int4Weight(w, s) for w, s in zip(words, scale, strict=True)]


class MoeExperts(Problem):
    """The two products and SwiGLU over rows that are routed and sorted; routing and the weighted sum are not part."""

    op = "moe_experts"

    def __init__(self, weights: ExpertWeights, tokens: int) -> None:
        s, device = weights.shape, weights.device
        self.weights, self.shape, self.tokens = weights, str(s), tokens
        self.x = random_bf16(tokens, s.hidden, device=device)
        # Few tokens hit few experts, and another call must hit others; many hit all of them.
        few = device.type == "cuda" and tokens * s.topk < 4 * s.experts
        self.num_calls = ROUTINGS if few else 2
        self.dispatches, hit = [], 0
        for _ in range(self.num_calls):
            # A token's experts are a random subset; which are hit differs from call to call, so they are cold.
            ids = torch.rand(tokens, s.experts, device=device).topk(s.topk).indices.int()
            self.dispatches.append(ops.moe_dispatch(ids, s.experts))
            hit += len(ids.unique()) / self.num_calls
        expert_bytes = 3 * s.hidden * s.intermediate * 9 // 16
        self.nbytes = hit * expert_bytes + tokens * s.hidden * (2 + 4 * s.topk)
        self.flops = 6 * tokens * s.topk * s.hidden * s.intermediate
        self.extra = {"experts_hit": round(hit, 1)}

    def dispatch(self, call: int) -> MoeDispatch:
        return self.dispatches[call % self.num_calls]

    def ours(self, call: int) -> Tensor:
        gate, up, down = self.weights.tiles
        dispatch = self.dispatch(call)
        inner = ops.int4_grouped_swiglu(self.x, dispatch, gate, up)
        return ops.int4_grouped_gemm(inner, dispatch, down, out_dtype=torch.float32)


class MlaDecode(Problem):
    op = "mla_decode"

    def __init__(
        self, name: str, heads: int, length: int, batch: int, device: torch.device, *, fp8: bool
    ) -> None:
        self.shape = f"{name}{'-fp8' if fp8 else ''} heads={heads} length={length}"
        self.tokens, self.heads, self.length, self.fp8 = batch, heads, length, fp8
        pages = length // PAGE
        width = fp8_rows.row_bytes(LATENT, ROPE) if fp8 else 2 * (LATENT + ROPE)
        cache_bytes = batch * length * width
        self.num_calls = num_copies(cache_bytes, device)
        self.caches = [self._cache(batch * pages, device) for _ in range(self.num_calls)]
        order = torch.randperm(batch * pages, device=device)
        self.page_table = order.view(batch, pages).int()
        self.seq_lens = torch.full((batch,), length, dtype=torch.int32, device=device)
        self.q = random_bf16(batch, heads, LATENT + ROPE, device=device, scale=0.5)
        self.nbytes = cache_bytes + 2 * batch * heads * (2 * LATENT + ROPE)
        self.flops = 2 * batch * length * heads * (2 * LATENT + ROPE)

    def _cache(self, pages: int, device: torch.device) -> Tensor:
        if not self.fp8:
            return random_bf16(pages, PAGE, LATENT + ROPE, device=device)
        rows = random_bf16(min(pages, 64) * PAGE, LATENT + ROPE, device=device)
        rows = fp8_rows.quantize(rows[:, :LATENT], rows[:, LATENT:])
        return rows.view(-1, PAGE, rows.shape[1]).repeat(-(-pages // 64), 1, 1)[:pages].contiguous()

    def cache(self, call: int) -> Tensor:
        return self.caches[call % self.num_calls]

    def ours(self, call: int) -> Tensor:
        return ops.mla_decode(
            self.q,
            self.cache(call),
            self.page_table,
            self.seq_lens,
            kv_lora_rank=LATENT,
            softmax_scale=SCALE,
        )


# ---- the cases ------------------------------------------------------------------------------------------------------

TOKENS = (1, 16, 64, 256, 4096)
MOE_TOKENS = (1, 8, 64, 128, 4096)
MATRICES = (Matrix("k2 o_proj", 7168, 8192), Matrix("k2 shared gate", 2048, 7168))
INT4_MATRICES = (Matrix("k2 gate/up", 2048, 7168), Matrix("k2 o_proj", 7168, 8192))
K2_EXPERTS = MoeShape("k2", 384, 8, 7168, 2048)
MLA = ((4096, (1, 8, 128)), (32768, (1, 8)), (131072, (1, 8)))  # length: batches

TINY_MATRIX = Matrix("tiny", 64, 128)
TINY_EXPERTS = MoeShape("tiny", 8, 2, 128, 64)


def problems(op: str, device: torch.device) -> Iterator[Problem]:
    tiny = device.type == "cpu"
    if op in ("bf16_gemm", "int4_gemm"):
        kind, matrices = (Bf16Gemm, MATRICES) if op == "bf16_gemm" else (Int4Gemm, INT4_MATRICES)
        for matrix in (TINY_MATRIX,) if tiny else matrices:
            for tokens in (1, 40) if tiny else TOKENS:
                yield kind(matrix, tokens, device)
    elif op == "moe_experts":
        weights = ExpertWeights(TINY_EXPERTS if tiny else K2_EXPERTS, device)
        for tokens in (1, 5) if tiny else MOE_TOKENS:
            yield MoeExperts(weights, tokens)
    else:
        for length, batches in ((128, (1, 2)),) if tiny else MLA:
            for batch in batches:
                for fp8 in (False, True):
                    name, heads = ("tiny", 16) if tiny else ("k2", 64)
                    yield MlaDecode(name, heads, length, batch, device, fp8=fp8)


OPS = ("moe_experts", "mla_decode", "int4_gemm", "bf16_gemm")
