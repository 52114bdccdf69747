"""The DeepSeek-V3 graph as Kimi K2 uses it: MLA attention and many small experts. Read top to bottom.

Shapes: tokens x features throughout; `tokens` are the positions of one prompt in `prefill` and one position of each
sequence in `decode`. Module names are the checkpoint's tensor names. This file knows neither quantization nor
parallelism: the loader replaces modules of a built model (a Linear by one with INT8 weights, Experts by INT4 ones).

Two forms of attention, equal in exact arithmetic. The absorbed one takes the up-projections into the query and the
output and attends to the latent itself: a CPU's, for prefill and decode alike, so that a token's row is the same
whoever computes it; and a GPU's for decode. There prefill expands keys and values per head, for torch's attention.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from kimi_native import ops
from kimi_native.attention import attend_heads
from kimi_native.cache import CachedSequence, LatentCache
from kimi_native.config import LATENT_NORM_EPS, KimiConfig
from kimi_native.step import Step

PREFILL_CHUNK = 1024  # tokens per pass: groups enough tokens per expert, bounds the working memory
ATTENTION_ROWS = 128  # of them whose absorbed queries, heads x a cache row, are there at once
_EXPANDED_BYTES = 256 << 20  # keys and values rebuilt at once during prefill on a GPU
_ROPE_BLOCK = 512  # positions per block of the rotation table


def _empty(*shape: int) -> nn.Parameter:
    """A weight without storage; the loader fills it in."""
    return nn.Parameter(
        torch.empty(*shape, device="meta", dtype=torch.bfloat16), requires_grad=False
    )


class Linear(nn.Module):
    """y = x W^T with a BF16 weight [out, in], which may be a view of a mapped file."""

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__()
        self.weight = _empty(out_features, in_features)

    def forward(self, x: Tensor, out_dtype: torch.dtype | None = None) -> Tensor:
        return ops.bf16_gemm(x, self.weight, out_dtype=out_dtype)


class RMSNorm(nn.Module):
    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = _empty(size)
        self.eps = eps

    def forward(self, x: Tensor, update: Tensor | None = None) -> Tensor | tuple[Tensor, Tensor]:
        """The norm of x; with `update`, the norm of x + update, and that sum."""
        if update is None:
            return ops.rms_norm(x, self.weight, eps=self.eps)
        return ops.add_rms_norm(update, x, self.weight, eps=self.eps)


class Rope:
    """Rotation tables. A position's cosines and sines are computed in float64, in blocks of fixed positions, so that
    they never depend on the request; K2's longest angle, 262,144 rad, would lose 0.01 rad in float32."""

    def __init__(self, config: KimiConfig) -> None:
        self.inv_freq = torch.tensor(config.rope_inv_freq(), dtype=torch.float64)
        self.magnitude = config.rope_magnitude()
        self._blocks: dict[int, tuple[Tensor, Tensor]] = {}

    def _block(self, index: int) -> tuple[Tensor, Tensor]:
        if index not in self._blocks:
            position = torch.arange(index * _ROPE_BLOCK, (index + 1) * _ROPE_BLOCK)
            angle = position.double()[:, None] * self.inv_freq
            self._blocks[index] = (
                (angle.cos() * self.magnitude).float(),
                (angle.sin() * self.magnitude).float(),
            )
        return self._blocks[index]

    def tables(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """cos and sin, [tokens, rope / 2] float32 each, for positions [tokens] int64."""
        cos = torch.empty(positions.shape[0], self.inv_freq.shape[0])
        sin = torch.empty_like(cos)
        block = positions // _ROPE_BLOCK
        for index in block.unique().tolist():
            rows = block == index
            within = positions[rows] % _ROPE_BLOCK
            block_cos, block_sin = self._block(index)
            cos[rows], sin[rows] = block_cos[within], block_sin[within]
        return cos, sin


class Attention(nn.Module):
    """Multi-head latent attention. Source: DeepSeek-V2, arXiv 2405.04434, section 2.1."""

    def __init__(self, config: KimiConfig, layer: int) -> None:
        super().__init__()
        self.layer = layer
        self.heads = config.num_attention_heads
        self.nope, self.rope = config.qk_nope_head_dim, config.qk_rope_head_dim
        self.value, self.latent = config.v_head_dim, config.kv_lora_rank
        self.scale = config.softmax_scale()
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
        self.key_up_t: Tensor | None = None  # [heads, latent, nope], made by absorb()
        self.value_up: Tensor | None = None  # [heads, value, latent], a view of kv_b_proj

    def absorb(self) -> None:
        """Split kv_b_proj for the absorbed form: its key half transposed (a copy), its value half as a view."""
        per_head = self.kv_b_proj.weight.detach().view(
            self.heads, self.nope + self.value, self.latent
        )
        self.key_up_t = per_head[:, : self.nope].transpose(1, 2).contiguous()
        self.value_up = per_head[:, self.nope :]

    def forward(self, x: Tensor, step: Step) -> Tensor:
        q = self._query(x).view(x.shape[0], self.heads, self.nope + self.rope)
        compressed = self.kv_a_proj_with_mqa(x)
        latent = self.kv_a_layernorm(compressed[:, : self.latent])
        k_rope = compressed[:, self.latent :]
        if step.prefix_slots is not None:
            return self.o_proj(self._expanded(q, latent, k_rope, step).flatten(1))
        if x.shape[0] <= ATTENTION_ROWS or step.schedule is not None:
            return self.o_proj(self._absorbed(q, latent, k_rope, step).flatten(1))
        blocks = (slice(i, i + ATTENTION_ROWS) for i in range(0, x.shape[0], ATTENTION_ROWS))
        attended = [self._absorbed(q[b], latent[b], k_rope[b], step.part(b)) for b in blocks]
        return self.o_proj(torch.cat(attended).flatten(1))

    def _rope_append(
        self, q_rope: Tensor, latent: Tensor, k_rope: Tensor, step: Step, q_out: Tensor
    ) -> None:
        cache = step.cache.data[self.layer]
        ops.rope_append(q_rope, latent, k_rope, step.cos, step.sin, step.slots, cache, q_out)

    def _query(self, x: Tensor) -> Tensor:
        if hasattr(self, "q_proj"):
            return self.q_proj(x)
        return self.q_b_proj(self.q_a_layernorm(self.q_a_proj(x)))

    def _absorbed(self, q: Tensor, latent: Tensor, k_rope: Tensor, step: Step) -> Tensor:
        """Tokens after what is cached of their sequences, and after one another where they have one sequence:
        q . k = (q_nope Wk) . latent + q_rope . k_rope, and Wv after the sum."""
        if self.key_up_t is None or self.value_up is None:
            raise RuntimeError("model: Attention.absorb() must come first (the loader calls it)")
        # A GPU's tensor cores take BF16; a CPU loses nothing by keeping what the two products give.
        dtype = torch.bfloat16 if ops.uses_cuda(q.device) else torch.float32
        query = ops.empty("mla_decode", (*q.shape[:2], self.latent + self.rope), dtype, q.device)
        self._rope_append(q[..., self.nope :], latent, k_rope, step, query[..., self.latent :])
        ops.bf16_gemm(q[..., : self.nope], self.key_up_t, out=query[..., : self.latent])
        attended = ops.mla_decode(
            query,
            step.cache.data[self.layer],
            step.page_table,
            step.seq_lens,
            kv_lora_rank=self.latent,
            softmax_scale=self.scale,
            schedule=step.schedule,
        )
        return ops.bf16_gemm(attended, self.value_up, out_dtype=q.dtype)

    def _expanded(self, q: Tensor, latent: Tensor, k_rope: Tensor, step: Step) -> Tensor:
        """A run of tokens of one sequence, causal over everything cached so far; some heads at a time, in fp32."""
        self._rope_append(q[..., self.nope :], latent, k_rope, step, q[..., self.nope :])
        rows = step.cache.read(self.layer, step.prefix_slots)
        latent, k_rope = rows[:, : self.latent].contiguous(), rows[:, self.latent :].float()
        queries, keys = q.shape[0], rows.shape[0]
        width = max(self.nope + self.rope, self.value)
        per_head = self.kv_b_proj.weight.view(self.heads, -1, self.latent)
        at_once = max(1, _EXPANDED_BYTES // (keys * width * 12))
        out = torch.empty(queries, self.heads, self.value, device=q.device)
        for first in range(0, self.heads, at_once):
            block = slice(first, min(first + at_once, self.heads))
            num = block.stop - block.start
            expanded = ops.bf16_gemm(latent, per_head[block].flatten(0, 1), out_dtype=torch.float32)
            expanded = expanded.view(keys, num, -1)
            key = torch.cat(
                [expanded[..., : self.nope], k_rope[:, None].expand(-1, num, -1)], dim=-1
            )
            query, value = q[:, block].float(), expanded[..., self.nope :]
            query, key, value = (t.transpose(0, 1) for t in (query, key, value))
            attended = attend_heads(query, key, value, softmax_scale=self.scale)
            out[:, block] = attended.transpose(0, 1)
        return out.to(q.dtype)


class MLP(nn.Module):
    """down(silu(gate(x)) * up(x)): the dense layers and the shared expert."""

    def __init__(self, hidden: int, intermediate: int) -> None:
        super().__init__()
        self.gate_proj = Linear(hidden, intermediate)
        self.up_proj = Linear(hidden, intermediate)
        self.down_proj = Linear(intermediate, hidden)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(ops.swiglu(self.gate_proj(x), self.up_proj(x)))


class Experts(nn.Module):
    """The routed experts as BF16 matrices, one at a time over the rows dispatched to each.

    gate, up  one [moe_intermediate, hidden] tensor per expert; down  [hidden, moe_intermediate]. Filled by the loader.
    """

    def __init__(self) -> None:
        super().__init__()
        self.gate: list[Tensor] = []
        self.up: list[Tensor] = []
        self.down: list[Tensor] = []

    def forward(self, x: Tensor, dispatch: ops.MoeDispatch) -> Tensor:
        """x [tokens, hidden] to the outputs of all dispatched rows, [tokens * topk, hidden] float32."""
        out = torch.empty(dispatch.token_index.shape[0], x.shape[1], device=x.device)
        offsets = dispatch.expert_offsets.tolist()
        for e in range(len(self.gate)):
            rows = slice(offsets[e], offsets[e + 1])
            if rows.start == rows.stop:
                continue
            tokens = x[dispatch.token_index[rows].long()]
            inner = ops.swiglu(
                ops.bf16_gemm(tokens, self.gate[e]), ops.bf16_gemm(tokens, self.up[e])
            )
            out[rows] = ops.bf16_gemm(inner, self.down[e], out_dtype=torch.float32)
        return out


class Gate(nn.Module):
    """The router: a linear layer in fp32, then moe_route. Source: DeepSeek-V3, arXiv 2412.19437, section 2.1.2."""

    def __init__(self, config: KimiConfig) -> None:
        super().__init__()
        self.weight = _empty(config.n_routed_experts, config.hidden_size)
        noaux = config.topk_method == "noaux_tc"
        self.e_score_correction_bias = (
            nn.Parameter(torch.empty(config.n_routed_experts, device="meta"), requires_grad=False)
            if noaux
            else None
        )
        grouped = config.topk_method != "greedy"
        self.options = {
            "topk": config.num_experts_per_tok,
            "scoring": config.scoring_func,
            "n_group": config.n_group if grouped else 1,
            "topk_group": config.topk_group if grouped else 1,
            "group_score": "top2_sum" if noaux else "max",
            "norm_topk_prob": config.norm_topk_prob,
            "routed_scaling_factor": config.routed_scaling_factor,
        }

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        logits = ops.bf16_gemm(x, self.weight, out_dtype=torch.float32)
        return ops.moe_route(logits, self.e_score_correction_bias, **self.options)


class MoE(nn.Module):
    """Route, dispatch, run the hit experts, combine with the shared expert."""

    def __init__(self, config: KimiConfig) -> None:
        super().__init__()
        self.gate = Gate(config)
        self.num_experts = config.n_routed_experts
        self.experts = Experts()
        self.shared_experts = None
        if config.n_shared_experts:
            width = config.moe_intermediate_size * config.n_shared_experts
            self.shared_experts = MLP(config.hidden_size, width)

    def forward(self, x: Tensor) -> Tensor:
        topk_ids, topk_weights = self.gate(x)
        dispatch = ops.moe_dispatch(topk_ids, self.num_experts)
        # Experts beside a GPU fetch their inputs first; it then computes the shared expert while they are at work.
        fetch = getattr(self.experts, "fetch", None)
        if fetch:
            fetch(x, dispatch)
        shared = None if self.shared_experts is None else self.shared_experts(x)
        rows = self.experts(x, dispatch)
        return ops.moe_combine(rows, dispatch, topk_weights, shared, out_dtype=x.dtype)


class Block(nn.Module):
    def __init__(self, config: KimiConfig, layer: int) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = Attention(config, layer)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = (
            MoE(config)
            if config.is_moe_layer(layer)
            else MLP(config.hidden_size, config.intermediate_size)
        )

    def forward(self, x: Tensor, update: Tensor | None, step: Step) -> tuple[Tensor, Tensor]:
        """The residual stream x before `update` is added, to the same after this layer."""
        if update is None:
            normed = self.input_layernorm(x)
        else:
            normed, x = self.input_layernorm(x, update)
        normed, x = self.post_attention_layernorm(x, self.self_attn(normed, step))
        return x, self.mlp(normed)


class Trunk(nn.Module):
    """Embedding, layers and final norm: the checkpoint's `model.` prefix."""

    def __init__(self, config: KimiConfig) -> None:
        super().__init__()
        # Not nn.Embedding(...), which would load torch's symbolic shapes to fill a tensor without storage (0.6 s).
        self.embed_tokens = nn.Embedding.from_pretrained(
            _empty(config.vocab_size, config.hidden_size)
        )
        self.layers = nn.ModuleList(Block(config, i) for i in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(self, x: Tensor, step: Step) -> tuple[Tensor, Tensor]:
        """Embedded tokens to the residual stream and the last layer's update of it."""
        step, update = step.scheduled(), None
        for layer in self.layers:
            x, update = layer(x, update, step)
        return x, update


class KimiModel(nn.Module):
    """Token ids and a cache in, logits out. Made by loader.load_model; forward passes append to the cache.

    config  the checkpoint's configuration
    dtype   activations: torch.bfloat16 as published, or torch.float32 (the weights stay as they are stored)
    """

    def __init__(self, config: KimiConfig, dtype: torch.dtype = torch.bfloat16) -> None:
        super().__init__()
        self.config = config
        self.dtype = dtype
        self.model = Trunk(config)
        self.lm_head = Linear(config.hidden_size, config.vocab_size)
        self.rope = Rope(config)

    @property
    def decode_equals_prefill(self) -> bool:
        """Whether a token's cache row and logits have the same bits whoever computes them: on a CPU."""
        return not ops.uses_cuda(self.model.embed_tokens.weight.device)

    @torch.no_grad()
    def prefill(self, ids: Tensor, cache: LatentCache, seq: CachedSequence) -> Tensor:
        """Append tokens to a sequence and return the logits after the last one.

        ids      [tokens] int64 on the CPU, at least one; computed PREFILL_CHUNK at a time
        returns  [vocab_size] float32 where the model is; on a CPU the same bits, here and in the cache, however the
                 tokens are shared among calls of prefill and decode

        Raises ValueError on an empty prompt or an id outside the vocabulary, RequestError when the cache is full.
        """
        self._check_ids(ids)
        cache.reserve(seq, ids.shape[0])
        for chunk in ids.split(PREFILL_CHUNK):
            step = self.prefill_step([chunk], cache, [seq])
            x, update = self.model(self.embed(chunk), step.on_device())
            seq.length += chunk.shape[0]
        return self.logits(x[-1:], update[-1:])[0]

    @torch.no_grad()
    def prefill_batch(
        self, prompts: list[Tensor], cache: LatentCache, seqs: list[CachedSequence]
    ) -> Tensor:
        """`prefill` of several sequences; on a CPU in one pass, if it is one of PREFILL_CHUNK tokens at most.

        returns  [sequences, vocab_size] float32 where the model is; a row does not depend on the other sequences
        """
        tokens = sum(ids.shape[0] for ids in prompts)
        if len(seqs) == 1 or tokens > PREFILL_CHUNK or not self.decode_equals_prefill:
            rows = [self.prefill(ids, cache, seq) for ids, seq in zip(prompts, seqs, strict=True)]
            return torch.stack(rows)
        step = self.prefill_step(prompts, cache, seqs)
        x, update = self.model(self.embed(torch.cat(prompts)), step)
        for ids, seq in zip(prompts, seqs, strict=True):
            seq.length += ids.shape[0]
        last = torch.tensor([ids.shape[0] for ids in prompts]).cumsum(0) - 1
        return self.logits(x[last], update[last])

    def prefill_step(
        self, prompts: list[Tensor], cache: LatentCache, seqs: list[CachedSequence]
    ) -> Step:
        """Check the ids, reserve the cache, and say where each sequence's next tokens go (on the CPU).

        A GPU's expanded form takes one sequence.
        """
        slots, positions = [], []
        for ids, seq in zip(prompts, seqs, strict=True):
            self._check_ids(ids)
            cache.reserve(seq, ids.shape[0])
            start, stop = seq.length, seq.length + ids.shape[0]
            slots.append(cache.slots(seq, start, stop))
            positions.append(torch.arange(start, stop))
        position = torch.cat(positions)
        where = cache, torch.cat(slots), *self.rope.tables(position)
        if ops.uses_cuda(cache.device):
            (seq,) = seqs
            return Step(*where, prefix_slots=cache.slots(seq, 0, int(position[-1]) + 1))
        counts = torch.tensor([ids.shape[0] for ids in prompts])
        return Step(
            *where,
            page_table=cache.page_table(seqs).repeat_interleave(counts, 0),
            seq_lens=(position + 1).to(torch.int32),
        )

    @torch.no_grad()
    def decode(self, ids: Tensor, cache: LatentCache, seqs: list[CachedSequence]) -> Tensor:
        """Append one token to each sequence and return the logits after it.

        ids      [sequences] int64 on the CPU
        returns  [sequences, vocab_size] float32 where the model is; a row does not depend on the other sequences

        Raises ValueError on a wrong count or an id outside the vocabulary, RequestError when the cache is full.
        """
        step = self.decode_step(ids, cache, seqs)
        logits = self.logits(*self.model(self.embed(ids), step.on_device()))
        for seq in seqs:
            seq.length += 1
        return logits

    def decode_step(self, ids: Tensor, cache: LatentCache, seqs: list[CachedSequence]) -> Step:
        """Check the arguments of `decode`, reserve the cache, and say where each sequence's token goes (on the CPU)."""
        self._check_ids(ids)
        if ids.shape[0] != len(seqs):
            raise ValueError(
                f"decode: one id per sequence is needed (got {ids.shape[0]} and {len(seqs)})"
            )
        for seq in seqs:
            cache.reserve(seq, 1)
        lengths = torch.tensor([s.length for s in seqs])
        slots = torch.cat([cache.slots(s, s.length, s.length + 1) for s in seqs])
        return Step(
            cache,
            slots,
            *self.rope.tables(lengths),
            page_table=cache.page_table(seqs),
            seq_lens=(lengths + 1).to(torch.int32),
        )

    def embed(self, ids: Tensor) -> Tensor:
        """[tokens] int64 to [tokens, hidden] in the model's dtype."""
        table = self.model.embed_tokens.weight
        return table[ids.to(table.device)].to(self.dtype)

    def logits(self, x: Tensor, update: Tensor) -> Tensor:
        """The residual stream after the last layer to [tokens, vocab_size] float32."""
        normed, _ = self.model.norm(x, update)
        return self.lm_head(normed, out_dtype=torch.float32)

    def _check_ids(self, ids: Tensor) -> None:
        if ids.dim() != 1 or ids.dtype != torch.int64 or ids.shape[0] == 0:
            raise ValueError(
                f"model: ids must be a non-empty int64 vector (got {list(ids.shape)}, {ids.dtype})"
            )
        low, high = int(ids.min()), int(ids.max())
        if low < 0 or high >= self.config.vocab_size:
            raise ValueError(
                f"model: ids must be in [0, {self.config.vocab_size}) (got {low} to {high})"
            )
