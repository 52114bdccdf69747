"""The K2 graph as a differentiable module, to train: packed documents in, logits and what the recipe watches out.

The same graph as model.py, organised for throughput on many tokens instead of latency on one: no cache, attention in
expanded form document by document, the experts of a layer as two stacked parameters. Parameters are named as in the
published checkpoint, except those of the routed experts; published.py knows both spellings.

Master weights are float32. Matrices multiply in `dtype` (bfloat16 or float32); the residual stream, norms, router,
attention's softmax and the loss are float32. A module's `rounding`, if set, is applied to its weight in each forward
pass: quant/qat.py puts fake quantization there.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.functional import embedding, linear, pad, rms_norm, scaled_dot_product_attention, silu

from kimi_native.config import LATENT_NORM_EPS, KimiConfig
from kimi_native.nano.experts import GroupedExperts, sort_rows

Rounding = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Documents:
    """Documents one after another; none attends to another.

    ids           [tokens] int64
    positions     [tokens] int64, ascending within a document; gaps are allowed
    lengths       tokens of each document
    temperatures  of attention's softmax in each document: what its logits are divided by; None: 1
    """

    ids: Tensor
    positions: Tensor
    lengths: list[int]
    temperatures: list[float] | None = None


@dataclass(frozen=True)
class GraphOutput:
    """What one forward pass gives.

    logits        [rows, vocab] float32
    loads         [moe layers, experts] int64, (token, slot) pairs that each expert got
    max_logits    [layers, heads] float32, largest attention logit of each head (with the softmax scale, at temperature
                  1), or an upper bound of it where that is below the graph's logit_limit
    balance_loss  [] float32, the sequence-wise balance term, averaged over documents and summed over layers
    """

    logits: Tensor
    loads: Tensor
    max_logits: Tensor
    balance_loss: Tensor


@dataclass
class Pass:
    """What the layers of one forward pass share."""

    lengths: list[int]
    temperatures: list[float]
    share: Tensor  # [documents, tokens]: 1 / length where the token belongs to the document, else 0
    cos: Tensor  # [tokens, 1, rope / 2]
    sin: Tensor
    logit_limit: float | None
    loads: list[Tensor]
    max_logits: list[Tensor]
    balance: list[Tensor]


class Weighted(nn.Module):
    """A module with one weight, seen through `rounding`."""

    def __init__(self, *shape: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(*shape))
        self.rounding: Rounding | None = None

    def rounded(self) -> Tensor:
        return self.weight if self.rounding is None else self.rounding(self.weight)


class Linear(Weighted):
    """y = x W^T in x's dtype."""

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__(out_features, in_features)

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.rounded().to(x.dtype))


class RMSNorm(Weighted):
    def __init__(self, size: int, eps: float) -> None:
        super().__init__(size)
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        weight = self.rounded()
        wide = torch.promote_types(x.dtype, weight.dtype)
        return rms_norm(x.to(wide), weight.shape, weight, self.eps).to(x.dtype)


class Attention(nn.Module):
    """Multi-head latent attention, expanded. Source: DeepSeek-V2, arXiv 2405.04434, section 2.1."""

    def __init__(self, config: KimiConfig) -> None:
        super().__init__()
        self.heads, self.scale = config.num_attention_heads, config.softmax_scale()
        self.nope, self.rope = config.qk_nope_head_dim, config.qk_rope_head_dim
        self.value, self.latent = config.v_head_dim, config.kv_lora_rank
        q_width = self.heads * (self.nope + self.rope)
        if config.q_lora_rank is None:
            self.q_proj = Linear(config.hidden_size, q_width)
        else:
            self.q_a_proj = Linear(config.hidden_size, config.q_lora_rank)
            self.q_a_layernorm = RMSNorm(config.q_lora_rank, LATENT_NORM_EPS)
            self.q_b_proj = Linear(config.q_lora_rank, q_width)
        self.kv_a_proj_with_mqa = Linear(config.hidden_size, self.latent + self.rope)
        self.kv_a_layernorm = RMSNorm(self.latent, LATENT_NORM_EPS)
        self.kv_b_proj = Linear(self.latent, self.heads * (self.nope + self.value))
        self.o_proj = Linear(self.heads * self.value, config.hidden_size)

    def query_proj(self) -> Linear:
        """The projection whose rows are the heads' queries."""
        return self.q_proj if hasattr(self, "q_proj") else self.q_b_proj

    def forward(self, x: Tensor, run: Pass) -> Tensor:
        """x [tokens, hidden] to the same, both in the graph's dtype."""
        hidden = x if hasattr(self, "q_proj") else self.q_a_layernorm(self.q_a_proj(x))
        q = self.query_proj()(hidden).unflatten(1, (self.heads, -1))
        compressed, k_rope = self.kv_a_proj_with_mqa(x).split([self.latent, self.rope], dim=1)
        kv = self.kv_b_proj(self.kv_a_layernorm(compressed)).unflatten(1, (self.heads, -1))
        # On a CPU, attention in fp32 is as fast as in BF16 (measured), and exact besides.
        dtype = x.dtype if x.is_cuda else torch.promote_types(x.dtype, torch.float32)
        q_nope, q_rope = q.split([self.nope, self.rope], dim=2)
        k_nope, value = kv.to(dtype).split([self.nope, self.value], dim=2)
        k_rope = rotate(k_rope[:, None], run.cos, run.sin).to(dtype).expand(-1, self.heads, -1)
        query = torch.cat([q_nope.to(dtype), rotate(q_rope, run.cos, run.sin).to(dtype)], dim=2)
        key = torch.cat([k_nope, k_rope], dim=2)
        with torch.no_grad():
            run.max_logits.append(max_logits(query, key, self.scale, run.lengths, run.logit_limit))
        scales = [self.scale / temperature for temperature in run.temperatures]
        out = attend(query, key, value, scales, run.lengths)
        return self.o_proj(out.flatten(1).to(x.dtype))


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Pairs (2j, 2j + 1) of x [tokens, heads, rope] turned by cos, sin [tokens, 1, rope / 2], in their dtype."""
    even, odd = x.to(cos.dtype).unflatten(2, (-1, 2)).unbind(3)
    return torch.stack([even * cos - odd * sin, even * sin + odd * cos], dim=3).flatten(2)


def attend(q: Tensor, k: Tensor, v: Tensor, scales: list[float], lengths: list[int]) -> Tensor:
    """Causal attention inside each document: q, k [tokens, heads, qk], v [tokens, heads, v] to v's shape.

    scales  of each document's logits

    One call per document costs 5 to 15 % more than calls on documents of one length (128 to 1024 tokens, one core),
    less than padding to a common length does.
    """
    width = max(q.shape[2], v.shape[2])  # torch's fast attention wants one width
    q, k, padded = (pad(t, (0, width - t.shape[2])) for t in (q, k, v))
    parts = zip(
        *(t.transpose(0, 1)[None].split(lengths, dim=2) for t in (q, k, padded)), strict=True
    )
    outs = [
        scaled_dot_product_attention(*part, is_causal=True, scale=scale)
        for part, scale in zip(parts, scales, strict=True)
    ]
    return torch.cat(outs, dim=2)[0, ..., : v.shape[2]].transpose(0, 1)


def max_logits(
    q: Tensor, k: Tensor, scale: float, lengths: list[int], limit: float | None
) -> Tensor:
    """[heads] float32: the largest visible logit of each head, or an upper bound where that does not exceed `limit`.

    |q . k| <= |q| |k|: for almost all blocks of queries and keys that is all QK-Clip needs to know, for none of
    attention's arithmetic. What the bound leaves open is multiplied out.
    """
    largest = torch.full((q.shape[1],), -torch.inf, dtype=torch.float32, device=q.device)
    for query, key in zip(q.split(lengths), k.split(lengths), strict=True):
        queries, keys = query.split(LOGIT_BLOCK), key.split(LOGIT_BLOCK)
        q_norms, k_norms = ([t.norm(dim=2).amax(0) for t in side] for side in (queries, keys))
        for i, rows in enumerate(queries):
            for j in range(i + 1):
                bound = (q_norms[i] * k_norms[j] * scale).float()
                if limit is None or bool((bound > limit).any()):
                    bound = (_largest(rows, keys[j], is_diagonal=i == j) * scale).float()
                largest = torch.maximum(largest, bound)
    return largest


def _largest(q: Tensor, k: Tensor, *, is_diagonal: bool) -> Tensor:
    """[heads]: the largest product of a block's queries and keys; on the diagonal, of no key after its query."""
    logits = q.transpose(0, 1) @ k.permute(1, 2, 0)
    if is_diagonal:
        future = torch.ones(logits.shape[1:], dtype=torch.bool, device=q.device).triu(1)
        logits = logits.masked_fill(future, -torch.inf)
    return logits.amax((1, 2))


class MLP(nn.Module):
    """down(silu(gate(x)) * up(x)): the dense layers and the shared expert."""

    def __init__(self, hidden: int, intermediate: int) -> None:
        super().__init__()
        self.gate_proj = Linear(hidden, intermediate)
        self.up_proj = Linear(hidden, intermediate)
        self.down_proj = Linear(intermediate, hidden)

    def forward(self, x: Tensor, run: Pass) -> Tensor:
        return self.down_proj(silu(self.gate_proj(x)) * self.up_proj(x))


class Experts(nn.Module):
    """The routed experts, stacked: gate_up_proj [experts, 2, moe_intermediate, hidden] (gate, then up) and down_proj
    [experts, hidden, moe_intermediate]."""

    def __init__(self, config: KimiConfig) -> None:
        super().__init__()
        experts, hidden = config.n_routed_experts or 0, config.hidden_size
        width = config.moe_intermediate_size
        self.gate_up_proj = nn.Parameter(torch.empty(experts, 2, width, hidden))
        self.down_proj = nn.Parameter(torch.empty(experts, hidden, width))
        self.rounding: Rounding | None = None

    def forward(self, x: Tensor, ids: Tensor, weights: Tensor, run: Pass) -> Tensor:
        rows, loads = sort_rows(ids, self.down_proj.shape[0])
        run.loads.append(loads)
        gate_up, down = self.gate_up_proj, self.down_proj
        if self.rounding is not None:
            gate_up, down = self.rounding(gate_up), self.rounding(down)
        return GroupedExperts.apply(
            x, weights, gate_up.flatten(1, 2).to(x.dtype), down.to(x.dtype), rows
        )


class Gate(Weighted):
    """The router, in float32. Source: DeepSeek-V3, arXiv 2412.19437, section 2.1.2.

    e_score_correction_bias  [experts], a buffer: balance.py moves it, no gradient does; None unless noaux_tc
    chooser  for experiments: scores [tokens, experts] to ids [tokens, topk] int64 in place of the published choice
    """

    def __init__(self, config: KimiConfig) -> None:
        experts = config.n_routed_experts or 0
        super().__init__(experts, config.hidden_size)
        self.config = config
        noaux = config.topk_method == "noaux_tc"
        self.register_buffer("e_score_correction_bias", torch.zeros(experts) if noaux else None)
        self.chooser: Callable[[Tensor], Tensor] | None = None

    def forward(self, x: Tensor, run: Pass) -> tuple[Tensor, Tensor]:
        """x [tokens, hidden] to expert ids and their weights, [tokens, topk] each."""
        weight, config = self.rounded(), self.config
        logits = linear(x.to(weight.dtype), weight)
        sigmoid = config.scoring_func == "sigmoid"
        scores = logits.sigmoid() if sigmoid else logits.softmax(dim=1)
        with torch.no_grad():
            ids = (self.chooser or self._choose)(scores)
            chosen = torch.zeros_like(scores).scatter_(1, ids, 1.0)
            fraction = (
                run.share @ chosen * (scores.shape[1] / ids.shape[1])
            )  # 1 for each when balanced
        run.balance.append((fraction * (run.share @ _normalized(scores))).sum(1).mean())
        weights = scores.gather(1, ids)
        if config.norm_topk_prob and ids.shape[1] > 1:
            weights = _normalized(weights)
        return ids, weights * config.routed_scaling_factor

    def _choose(self, scores: Tensor) -> Tensor:
        """The experts of each token, [tokens, topk] int64: the best of scores + bias in the best groups."""
        config, bias = self.config, self.e_score_correction_bias
        choice = scores if bias is None else scores + bias
        if config.n_group > 1:
            grouped = choice.unflatten(1, (config.n_group, -1))
            best = 2 if config.topk_method == "noaux_tc" else 1
            kept = grouped.topk(best, dim=2).values.sum(2).topk(config.topk_group, dim=1).indices
            hidden = torch.ones_like(grouped[..., 0], dtype=torch.bool).scatter_(1, kept, False)
            choice = grouped.masked_fill(hidden[..., None], -torch.inf).flatten(1)
        return choice.topk(config.num_experts_per_tok, dim=1).indices


def _normalized(scores: Tensor) -> Tensor:
    return scores / (scores.sum(1, keepdim=True) + 1e-20)


class MoE(nn.Module):
    def __init__(self, config: KimiConfig) -> None:
        super().__init__()
        self.gate = Gate(config)
        self.experts = Experts(config)
        self.shared_experts = None
        if config.n_shared_experts:
            width = config.moe_intermediate_size * config.n_shared_experts
            self.shared_experts = MLP(config.hidden_size, width)

    def forward(self, x: Tensor, run: Pass) -> Tensor:
        ids, weights = self.gate(x, run)
        out = self.experts(x, ids, weights, run)
        return out if self.shared_experts is None else out + self.shared_experts(x, run)


class Block(nn.Module):
    def __init__(self, config: KimiConfig, layer: int) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = Attention(config)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = (
            MoE(config)
            if config.is_moe_layer(layer)
            else MLP(config.hidden_size, config.intermediate_size)
        )

    def forward(self, x: Tensor, dtype: torch.dtype, run: Pass) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x).to(dtype), run)
        return x + self.mlp(self.post_attention_layernorm(x).to(dtype), run)


class Trunk(nn.Module):
    """Embedding, layers and final norm: the checkpoint's `model.` prefix."""

    def __init__(self, config: KimiConfig) -> None:
        super().__init__()
        self.embed_tokens = Weighted(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Block(config, i) for i in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)


class KimiGraph(nn.Module):
    """A trainable model of a config; weights random from `seed`, experts' correction biases zero.

    dtype        what matrices multiply in: torch.bfloat16 or torch.float32; after .double(), torch.float64
    logit_limit  the threshold of QK-Clip: attention logits below it are bounded, not computed; None computes them
    """

    def __init__(
        self,
        config: KimiConfig,
        *,
        dtype: torch.dtype = torch.float32,
        logit_limit: float | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.config, self.dtype, self.logit_limit = config, dtype, logit_limit
        self.model = Trunk(config)
        self.lm_head = Linear(config.hidden_size, config.vocab_size)
        if config.tie_word_embeddings:
            self.lm_head.weight = self.model.embed_tokens.weight
        self.register_buffer(
            "inv_freq", torch.tensor(config.rope_inv_freq(), dtype=torch.float64), persistent=False
        )
        self._initialize(torch.Generator().manual_seed(seed))

    @torch.no_grad()
    def _initialize(self, generator: torch.Generator) -> None:
        """Normal of variance 1 / in, what adds to the residual stream divided by its number of additions."""
        additions = 2 * self.config.num_hidden_layers
        for name, p in self.named_parameters():
            if p.dim() == 1:
                p.fill_(1.0)
                continue
            std = EMBEDDING_STD if "embed_tokens" in name else p.shape[-1] ** -0.5
            if name.endswith(("o_proj.weight", "down_proj.weight", "down_proj")):
                std *= additions**-0.5
            p.normal_(0.0, std, generator=generator)

    def forward(self, documents: Documents, rows: Tensor | None = None) -> GraphOutput:
        """Logits of all tokens, or of those that `rows` ([n] int64) lists."""
        run = self._start(documents)
        # Not weight[ids]: the gradient of that adds with atomics, in an order that differs between runs on two threads.
        x = embedding(documents.ids, self.model.embed_tokens.rounded())
        dtype = x.dtype if x.dtype == torch.float64 else self.dtype
        for layer in self.model.layers:
            x = layer(x, dtype, run)
        normed = self.model.norm(x if rows is None else x[rows]).to(dtype)
        logits = self.lm_head(normed)
        return GraphOutput(
            logits.to(torch.promote_types(logits.dtype, torch.float32)),
            torch.stack(run.loads) if run.loads else torch.zeros(0, 0, dtype=torch.int64),
            torch.stack(run.max_logits),
            torch.stack(run.balance).sum() if run.balance else x.new_zeros(()),
        )

    def _start(self, documents: Documents) -> Pass:
        lengths, device = documents.lengths, documents.ids.device
        if sum(lengths) != documents.ids.shape[0] or min(lengths, default=0) < 1:
            raise ValueError(
                "graph: lengths must be positive and add up to the tokens "
                f"(got {lengths} for {documents.ids.shape[0]})"
            )
        wide = self.model.norm.weight.dtype
        angle = documents.positions.double()[:, None, None] * self.inv_freq
        magnitude = self.config.rope_magnitude()
        sizes = torch.tensor(lengths, device=device)
        owner = torch.repeat_interleave(torch.arange(len(lengths), device=device), sizes)
        share = torch.zeros(len(lengths), len(owner), dtype=wide, device=device)
        share[owner, torch.arange(len(owner), device=device)] = 1 / sizes[owner].to(wide)
        temperatures = documents.temperatures or [1.0] * len(lengths)
        if len(temperatures) != len(lengths) or min(temperatures) <= 0:
            raise ValueError(
                f"graph: temperatures must be positive, one a document (got {temperatures} for {len(lengths)})"
            )
        return Pass(
            lengths,
            temperatures,
            share,
            (angle.cos() * magnitude).to(wide),
            (angle.sin() * magnitude).to(wide),
            self.logit_limit,
            [],
            [],
            [],
        )


LOGIT_BLOCK = 256  # queries and keys that max_logits bounds together
EMBEDDING_STD = 0.5  # of the layers' own order: norms see the token from the first step
