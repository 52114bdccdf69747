"""Public ops: check the tensors, choose the backend, call the kernel.

Every op has the same name in reference.py (plain torch, naive, the specification) and in ops.h.
A TypeError is of an argument's type or a tensor's dtype. A ValueError about contents (ids, slots, pages, lengths, rows)
is the CPU's, and a GPU's with KIMI_NATIVE_SYNC=1; else its kernel stops, and torch reports an error of the device.
The settings of native.py (backend, tier, threads, recording) are reached as attributes of this module.

Fixed reduction order: natively computed rows depend on their own inputs only, to the last bit, whatever else is in the
call and however many threads run it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kimi_native import fp8_rows, reference
from kimi_native.checks import (
    check_activation,
    check_cache,
    check_dtype,
    check_eps,
    check_integer,
    check_matrices,
    check_number,
    check_rows,
    check_tensor,
    check_type,
    checked_out_dtype,
    checked_rank,
    require,
)
from kimi_native.mla_schedule import MlaSchedule, schedule_arguments
from kimi_native.native import (  # noqa: F401  the settings, as attributes of this module
    Recording,
    active_backend,
    active_isa,
    backend,
    call,
    call_with_workspace,
    cpu_features,
    cpu_kernels,
    cuda_library,
    empty,
    force_isa,
    int4_tiled_bytes,
    is_synchronous,
    num_threads,
    record,
    set_num_threads,
    supported_isas,
    uses_cuda,
)
from kimi_native.weights import (
    GROUP_SIZE,
    Int4ExpertWeights,
    Int4TiledWeight,
    Int4Weight,
    Int8Weight,
    MoeDispatch,
    check_layout,
)

__all__ = [
    "add_rms_norm",
    "bf16_gemm",
    "int4_gemm",
    "int4_grouped_gemm",
    "int4_grouped_swiglu",
    "int4_quantize",
    "int8_gemm",
    "mla_decode",
    "moe_combine",
    "moe_dispatch",
    "moe_route",
    "rms_norm",
    "rope_append",
    "swiglu",
]

_DTYPES = {torch.bfloat16: 0, torch.float32: 1, fp8_rows.DTYPE: 2}  # kn::DType
_COMPUTE = {"exact": 0, "int8": 1}  # kn::Compute
_SCORING = {"sigmoid": 0, "softmax": 1}  # kn::Scoring
_GROUP_SCORE = {"top2_sum": 0, "max": 1}  # kn::GroupScore


# ---- experts: routing -----------------------------------------------------------------------------------------------


def moe_route(
    logits: Tensor,
    correction_bias: Tensor | None,
    *,
    topk: int,
    scoring: str = "sigmoid",
    n_group: int = 1,
    topk_group: int = 1,
    group_score: str = "top2_sum",
    norm_topk_prob: bool = True,
    routed_scaling_factor: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """Router logits to the chosen experts of each token and their weights.

    logits           [tokens, experts]  float32
    correction_bias  [experts]          float32 or None; added for the selection only (noaux_tc)
    returns topk_ids [tokens, topk] int32, best first, ties to the lowest index,
            topk_weights [tokens, topk] float32: the unbiased scores, divided by their sum + 1e-20 if norm_topk_prob
            (and topk > 1), times routed_scaling_factor. A row with a NaN logit gets NaN weights.

    scoring: "sigmoid" (V3, K2) or "softmax" (V2). With n_group > 1 only the topk_group best groups take part;
    group_score is "top2_sum" (V3: the two best biased scores) or "max" (V2).

    Raises ValueError on a shape or option, TypeError on a dtype.
    Source: DeepSeek-V3, arXiv 2412.19437, section 2.1.2. Reference: reference.moe_route.
    """
    check_integer("moe_route", topk=topk, n_group=n_group, topk_group=topk_group)
    check_number("moe_route", routed_scaling_factor=routed_scaling_factor)
    check_type("moe_route", "norm_topk_prob", norm_topk_prob, bool)
    require(scoring in _SCORING, f"moe_route: scoring must be sigmoid or softmax (got {scoring})")
    require(
        group_score in _GROUP_SCORE,
        f"moe_route: group_score must be top2_sum or max (got {group_score})",
    )
    options = {
        "topk": topk,
        "scoring": scoring,
        "n_group": n_group,
        "topk_group": topk_group,
        "group_score": group_score,
        "norm_topk_prob": norm_topk_prob,
        "routed_scaling_factor": routed_scaling_factor,
    }
    if active_backend() == "reference":
        return reference.moe_route(logits, correction_bias, **options)
    check_tensor("moe_route", "logits", logits, (None, None), torch.float32)
    tokens, experts = logits.shape
    if correction_bias is not None:
        check_tensor("moe_route", "correction_bias", correction_bias, (experts,), torch.float32)
    require(1 <= topk <= experts, f"moe_route: topk must be 1 to {experts} (got {topk})")
    topk_ids = empty("moe_route", (tokens, topk), torch.int32, logits.device)
    topk_weights = empty("moe_route", (tokens, topk), torch.float32, logits.device)
    call(
        "moe_route",
        (logits, correction_bias, topk_ids, topk_weights),
        *(tokens, experts, topk, n_group, topk_group),
        _SCORING[scoring],
        _GROUP_SCORE[group_score],
        norm_topk_prob,
        routed_scaling_factor,
    )
    return topk_ids, topk_weights


def moe_dispatch(topk_ids: Tensor, experts: int) -> MoeDispatch:
    """Sort (token, slot) pairs by expert, token order kept within an expert.

    topk_ids  [tokens, topk]  int32, each in [0, experts)
    returns   MoeDispatch

    Raises ValueError on a shape or an id out of range, TypeError on a dtype. Reference: reference.moe_dispatch.
    """
    check_integer("moe_dispatch", experts=experts)
    if active_backend() == "reference":
        return MoeDispatch(*reference.moe_dispatch(topk_ids, experts))
    check_tensor("moe_dispatch", "topk_ids", topk_ids, (None, None), torch.int32)
    require(experts >= 1, f"moe_dispatch: experts must be at least 1 (got {experts})")
    tokens, topk = topk_ids.shape
    shapes = ((tokens * topk,), (tokens, topk), (experts + 1,))
    outputs = [empty("moe_dispatch", shape, torch.int32, topk_ids.device) for shape in shapes]
    call("moe_dispatch", (topk_ids, *outputs), tokens, topk, experts)
    return MoeDispatch(*outputs)


def moe_combine(
    rows: Tensor,
    dispatch: MoeDispatch,
    topk_weights: Tensor,
    shared: Tensor | None = None,
    *,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    """Weighted sum of each token's expert rows in slot order, plus the shared expert; fp32, rounded once.

    rows          [tokens * topk, hidden]  bf16 or float32, in the order of `dispatch`
    topk_weights  [tokens, topk]           float32
    shared        [tokens, hidden]         out_dtype, or None
    returns       [tokens, hidden]         out_dtype (default: of shared, else of rows)

    Raises ValueError on a shape or an index out of range, TypeError on a dtype. Reference: reference.moe_combine.
    """
    check_type("moe_combine", "dispatch", dispatch, MoeDispatch)
    check_type("moe_combine", "rows", rows, Tensor)
    like = rows if shared is None else shared
    out_dtype = checked_out_dtype("moe_combine", "shared", like, out_dtype)
    if active_backend() == "reference":
        return reference.moe_combine(
            rows, dispatch.row_index, topk_weights, shared, out_dtype=out_dtype
        )
    check_tensor("moe_combine", "topk_weights", topk_weights, (None, None), torch.float32)
    tokens, topk = topk_weights.shape
    check_activation("moe_combine", "rows", rows, (tokens * topk, None))
    check_tensor("moe_combine", "row_index", dispatch.row_index, (tokens, topk), torch.int32)
    out = empty("moe_combine", (tokens, rows.shape[1]), out_dtype, rows.device)
    check_activation("moe_combine", "out", out, (tokens, None))
    if shared is not None:
        check_tensor("moe_combine", "shared", shared, tuple(out.shape), out_dtype)
    call(
        "moe_combine",
        (rows, dispatch.row_index, topk_weights, shared, out),
        _DTYPES[rows.dtype],
        _DTYPES[out_dtype],
        tokens,
        topk,
        rows.shape[1],
    )
    return out


# ---- experts: INT4 matrices -----------------------------------------------------------------------------------------


def int4_gemm(
    x: Tensor,
    weight: Int4Weight,
    *,
    out_dtype: torch.dtype | None = None,
    compute: str = "exact",
) -> Tensor:
    """x times an INT4 matrix transposed.

    x        [tokens, in]   bf16 or float32; taken as 16-bit block fixed point per 32 (docs/kernels.md, int4_gemm):
                            exact for bf16 entries within 2**-7 of their group's largest, else within 2**-15 of it
    compute  "int8": x is taken as 8 bits per entry instead, within 1/254 of its group's largest, which is not exact
    returns  [tokens, out]  out_dtype (default: of x); integer dot products are exact, sums in fp32

    Raises ValueError on a shape, TypeError on a dtype. Reference: reference.int4_gemm.
    """
    check_type("int4_gemm", "weight", weight, Int4Weight, Int4TiledWeight)
    out_dtype = checked_out_dtype("int4_gemm", "x", x, out_dtype)
    if active_backend() == "reference":
        return reference.int4_gemm(
            x, weight.weight_packed, weight.weight_scale, out_dtype=out_dtype, compute=compute
        )
    check_layout("int4_gemm", weight, tiled=uses_cuda(x.device))
    parts = (weight.weight_packed, weight.weight_scale)
    sizes = (weight.out_features, weight.in_features)
    return _group_gemm("int4_gemm", x, *parts, *sizes, out_dtype, _compute("int4_gemm", compute))


def _compute(op: str, name: str) -> int:
    require(name in _COMPUTE, f"{op}: compute must be exact or int8 (got {name})")
    return _COMPUTE[name]


def _group_gemm(
    op: str,
    x: Tensor,
    matrix: Tensor,
    scale: Tensor,
    out: int,
    in_: int,
    out_dtype: torch.dtype,
    *compute: int,
) -> Tensor:
    """What int4_gemm and int8_gemm share: everything but the width of a weight."""
    check_activation(op, "x", x, (None, in_))
    y = empty(op, (x.shape[0], out), out_dtype, x.device)
    check_activation(op, "out", y, (None, None))
    call_with_workspace(
        op,
        (x, matrix, scale, y),
        _DTYPES[x.dtype],
        _DTYPES[out_dtype],
        x.shape[0],
        out,
        in_,
        GROUP_SIZE,
        *compute,
    )
    return y


def _grouped(
    op: str,
    x: Tensor,
    x_index: Tensor | None,
    dispatch: MoeDispatch,
    projections: tuple[Int4ExpertWeights, ...],
    out_dtype: torch.dtype,
    compute: str,
) -> Tensor:
    """What the grouped ops share: a row per token and slot, by the matrices of its expert."""
    first = projections[0]
    for projection in projections:
        check_layout(op, projection, tiled=uses_cuda(x.device))
    check_activation(op, "x", x, (None, first.in_features))
    check_tensor(op, "expert_offsets", dispatch.expert_offsets, (len(first) + 1,), torch.int32)
    check_tensor(op, "token_index", dispatch.token_index, (None,), torch.int32)
    rows = dispatch.token_index.shape[0]
    if x_index is None:
        require(x.shape[0] == rows, f"{op}: x must have {rows} rows (got {x.shape[0]})")
    y = empty(op, (rows, first.out_features), out_dtype, x.device)
    check_activation(op, "out", y, (None, None))
    tables = [t for p in projections for t in (p.packed_pointers, p.scale_pointers)]
    call_with_workspace(
        op,
        (x, x_index, dispatch.expert_offsets, *tables, y),
        _DTYPES[x.dtype],
        _DTYPES[out_dtype],
        x.shape[0],
        rows,
        len(first),
        first.out_features,
        first.in_features,
        GROUP_SIZE,
        _compute(op, compute),
    )
    return y


def int4_grouped_swiglu(
    x: Tensor,
    dispatch: MoeDispatch,
    gate: Int4ExpertWeights,
    up: Int4ExpertWeights,
    *,
    out_dtype: torch.dtype | None = None,
    compute: str = "exact",
) -> Tensor:
    """silu(x Wgate^T) * (x Wup^T) for every dispatched row, by its expert, in one pass over x.

    x         [tokens, in]    bf16 or float32; row r reads x[dispatch.token_index[r]]
    gate, up  per expert [out, in] INT4
    compute   as in int4_gemm
    returns   [rows, out]     out_dtype (default: of x); products, silu and their product in fp32

    Raises ValueError on a shape or index, TypeError on a dtype. Reference: reference.int4_grouped_swiglu.
    """
    op = "int4_grouped_swiglu"
    out_dtype = checked_out_dtype(op, "x", x, out_dtype)
    check_type(op, "dispatch", dispatch, MoeDispatch)
    check_type(op, "gate", gate, Int4ExpertWeights)
    check_type(op, "up", up, Int4ExpertWeights)
    require(
        (len(gate), gate.out_features, gate.in_features)
        == (len(up), up.out_features, up.in_features),
        f"{op}: gate and up must have the same experts and shapes "
        f"(got {(len(gate), gate.out_features, gate.in_features)} and {(len(up), up.out_features, up.in_features)})",
    )
    if active_backend() == "reference":
        return reference.int4_grouped_swiglu(
            x,
            dispatch.token_index,
            dispatch.expert_offsets,
            [(w.weight_packed, w.weight_scale) for w in gate.weights],
            [(w.weight_packed, w.weight_scale) for w in up.weights],
            out_dtype=out_dtype,
            compute=compute,
        )
    return _grouped(op, x, dispatch.token_index, dispatch, (gate, up), out_dtype, compute)


def int4_grouped_gemm(
    x: Tensor,
    dispatch: MoeDispatch,
    weights: Int4ExpertWeights,
    *,
    out_dtype: torch.dtype | None = None,
    compute: str = "exact",
) -> Tensor:
    """x times the INT4 matrix of each row's expert (the down projection).

    x        [rows, in]   bf16 or float32, in the order of `dispatch`
    weights  per expert [out, in] INT4
    compute  as in int4_gemm
    returns  [rows, out]  out_dtype (default: of x)

    Raises ValueError on a shape or index, TypeError on a dtype. Reference: reference.int4_grouped_gemm.
    """
    op = "int4_grouped_gemm"
    out_dtype = checked_out_dtype(op, "x", x, out_dtype)
    check_type(op, "dispatch", dispatch, MoeDispatch)
    check_type(op, "weights", weights, Int4ExpertWeights)
    if active_backend() == "reference":
        return reference.int4_grouped_gemm(
            x,
            dispatch.expert_offsets,
            [(w.weight_packed, w.weight_scale) for w in weights.weights],
            out_dtype=out_dtype,
            compute=compute,
        )
    return _grouped(op, x, None, dispatch, (weights,), out_dtype, compute)


# ---- dense matrices -------------------------------------------------------------------------------------------------


def bf16_gemm(
    x: Tensor,
    weight: Tensor,
    *,
    out_dtype: torch.dtype | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """x times a BF16 matrix transposed, or one matrix per head.

    x        [tokens, in] or [tokens, heads, in]  bf16 or float32; rows of `in` contiguous, other strides free
    weight   [out, in] or [heads, out, in]        bf16; matrices contiguous, any stride from head to head
    out      [tokens, out] or [tokens, heads, out]  bf16 or float32, written; rows contiguous, other strides free
    returns  `out`, or a new tensor of that shape and out_dtype (default: of x); products and sums in fp32

    Raises ValueError on a shape or stride, TypeError on a dtype. Reference: reference.bf16_gemm.
    """
    op = "bf16_gemm"
    check_type(op, "x", x, Tensor)
    check_type(op, "weight", weight, Tensor)
    out_dtype = checked_out_dtype(op, "out", x if out is None else out, out_dtype)
    if active_backend() == "reference":
        y = reference.bf16_gemm(x, weight, out_dtype=out_dtype)
        return y if out is None else out.copy_(y)
    check_matrices(op, x, weight)
    per_head = x.dim() == 3
    shape = (*x.shape[:-1], weight.shape[-2])
    y = empty(op, shape, out_dtype, x.device) if out is None else out
    check_dtype(op, "out", y, *_DTYPES)
    check_rows(op, "out", y, shape, out_dtype)
    call_with_workspace(
        op,
        (x, weight, y),
        *(_DTYPES[x.dtype], _DTYPES[out_dtype]),
        *(x.shape[0], x.shape[1] if per_head else 1, *weight.shape[-2:]),
        x.stride(0),
        x.stride(1) if per_head else 0,
        weight.stride(0) if per_head else 0,
        y.stride(0),
        y.stride(1) if per_head else 0,
    )
    return y


def int8_gemm(x: Tensor, weight: Int8Weight, *, out_dtype: torch.dtype | None = None) -> Tensor:
    """x times an INT8 matrix transposed; activations as in int4_gemm.

    x        [tokens, in]   bf16 or float32
    returns  [tokens, out]  out_dtype (default: of x)

    Raises ValueError on a shape, TypeError on a dtype. Reference: reference.int8_gemm.
    """
    check_type("int8_gemm", "weight", weight, Int8Weight)
    out_dtype = checked_out_dtype("int8_gemm", "x", x, out_dtype)
    if active_backend() == "reference":
        return reference.int8_gemm(x, weight.weight, weight.weight_scale, out_dtype=out_dtype)
    parts = (weight.weight, weight.weight_scale)
    return _group_gemm("int8_gemm", x, *parts, weight.out_features, weight.in_features, out_dtype)


def int4_quantize(w: Tensor, *, out: Int4Weight | None = None) -> Int4Weight:
    """A BF16 matrix to INT4 in the checkpoint's layout: the bits of quant.int4.quantize(w), in one pass over w.

    w        [out, in]  bf16, finite, in a multiple of 32
    out      an Int4Weight of that shape, written; default: a new one
    returns  Int4Weight; per 32 weights scale = bf16(max|w| / 7), at least 2**-126, and q = w / scale to the nearest
             integer, halves to even, in -7 .. 7

    Raises ValueError on a shape or on NaN or infinity, TypeError on a dtype. Reference: reference.int4_quantize.
    """
    op = "int4_quantize"
    check_tensor(op, "w", w, (None, None), torch.bfloat16)
    rows, columns = w.shape
    require(
        columns > 0 and columns % GROUP_SIZE == 0,
        f"{op}: in must be a positive multiple of {GROUP_SIZE} (got {columns})",
    )
    if out is None:
        packed = empty(op, (rows, columns // 8), torch.int32, w.device)
        out = Int4Weight(packed, empty(op, (rows, columns // GROUP_SIZE), torch.bfloat16, w.device))
    check_type(op, "out", out, Int4Weight)
    require(
        (out.out_features, out.in_features) == (rows, columns),
        f"{op}: out must be {[rows, columns]} (got {[out.out_features, out.in_features]})",
    )
    if active_backend() == "reference":
        for written, part in zip(
            (out.weight_packed, out.weight_scale), reference.int4_quantize(w), strict=True
        ):
            written.copy_(part)
        return out
    parts = (w, out.weight_packed, out.weight_scale)
    call("int4_quantize", parts, rows, columns, GROUP_SIZE)
    return out


# ---- attention and norms --------------------------------------------------------------------------------------------


def mla_decode(
    q: Tensor,
    cache: Tensor,
    page_table: Tensor,
    seq_lens: Tensor,
    *,
    kv_lora_rank: int,
    softmax_scale: float,
    schedule: MlaSchedule | None = None,
) -> Tensor:
    """Attention of one new token per sequence over the paged latent cache (absorbed form).

    q           [batch, heads, kv_lora_rank + qk_rope_head_dim]       bf16 or float32
    cache       [pages, page_size, kv_lora_rank + qk_rope_head_dim]   bf16 or float32; uint8: FP8 rows (fp8_rows.py)
    page_table  [batch, max_pages]  int32, entries past the last used page are never read
    seq_lens    [batch]             int32, tokens to attend to; 0 gives a zero row
    schedule    on a GPU: mla_schedule of these seq_lens, which all layers of a step can share
    returns     [batch, heads, kv_lora_rank]  of q's dtype; scores, softmax and sums in fp32

    Raises ValueError on a shape, layout or page id, TypeError on a dtype.
    Source: DeepSeek-V2, arXiv 2405.04434, section 2.1. Reference: reference.mla_decode.
    """
    op = "mla_decode"
    check_integer(op, kv_lora_rank=kv_lora_rank)
    check_number(op, softmax_scale=softmax_scale)
    if active_backend() == "reference":
        return reference.mla_decode(
            q, cache, page_table, seq_lens, kv_lora_rank=kv_lora_rank, softmax_scale=softmax_scale
        )
    check_activation(op, "q", q, (None, None, None))
    batch, heads, width = q.shape
    require(
        1 <= kv_lora_rank <= width, f"{op}: kv_lora_rank must be 1 to {width} (got {kv_lora_rank})"
    )
    check_cache(op, cache, kv_lora_rank, width - kv_lora_rank)
    check_tensor(op, "page_table", page_table, (batch, None), torch.int32)
    check_tensor(op, "seq_lens", seq_lens, (batch,), torch.int32)
    max_tokens = page_table.shape[1] * cache.shape[1]
    out = empty(op, (batch, heads, kv_lora_rank), q.dtype, q.device)
    call_with_workspace(
        op,
        (q, cache, page_table, seq_lens, out),
        *(_DTYPES[q.dtype], _DTYPES[cache.dtype]),
        batch,
        heads,
        kv_lora_rank,
        width - kv_lora_rank,
        cache.shape[0],
        cache.shape[1],
        page_table.shape[1],
        softmax_scale,
        *schedule_arguments(op, schedule, seq_lens, max_tokens=max_tokens),
    )
    return out


def rms_norm(x: Tensor, weight: Tensor, *, eps: float) -> Tensor:
    """x / sqrt(mean(x^2) + eps), rounded to x's dtype, times weight.

    x        [tokens, hidden]  bf16 or float32; rows contiguous, any stride from row to row
    weight   [hidden]          bf16
    returns  [tokens, hidden]  of x's dtype; mean and scaling in fp32

    Raises ValueError on a shape, stride or eps, TypeError on a dtype. Reference: reference.rms_norm.
    """
    check_eps("rms_norm", eps)
    if active_backend() == "reference":
        return reference.rms_norm(x, weight, eps=eps)
    check_dtype("rms_norm", "x", x, torch.bfloat16, torch.float32)
    require(
        x.dim() == 2 and x.stride(1) == 1,
        f"rms_norm: x must be [tokens, hidden] with contiguous rows (got {list(x.shape)}, strides {x.stride()})",
    )
    check_tensor("rms_norm", "weight", weight, (x.shape[1],), torch.bfloat16)
    y = empty("rms_norm", x.shape, x.dtype, x.device)
    call(
        "rms_norm",
        (x, weight, y),
        _DTYPES[x.dtype],
        x.shape[0],
        x.shape[1],
        x.stride(0) if x.shape[0] > 1 else x.shape[1],
        eps,
    )
    return y


def add_rms_norm(
    x: Tensor, residual: Tensor, weight: Tensor, *, eps: float
) -> tuple[Tensor, Tensor]:
    """The residual stream's step: rms_norm of x + residual, and that sum.

    x, residual  [tokens, hidden]  bf16 or float32, of one dtype
    weight       [hidden]          bf16
    returns      y, sum            [tokens, hidden] each, of x's dtype; y = rms_norm(sum)

    Raises ValueError on a shape or eps, TypeError on a dtype. Reference: reference.add_rms_norm.
    """
    check_eps("add_rms_norm", eps)
    if active_backend() == "reference":
        return reference.add_rms_norm(x, residual, weight, eps=eps)
    check_activation("add_rms_norm", "x", x, (None, None))
    check_tensor("add_rms_norm", "residual", residual, tuple(x.shape), x.dtype)
    check_tensor("add_rms_norm", "weight", weight, (x.shape[1],), torch.bfloat16)
    y, total = (empty("add_rms_norm", x.shape, x.dtype, x.device) for _ in range(2))
    call(
        "add_rms_norm",
        (x, residual, weight, y, total),
        _DTYPES[x.dtype],
        x.shape[0],
        x.shape[1],
        eps,
    )
    return y, total


def rope_append(
    q: Tensor,
    latent: Tensor,
    k_rope: Tensor,
    cos: Tensor,
    sin: Tensor,
    slots: Tensor,
    cache: Tensor,
    q_out: Tensor,
) -> Tensor:
    """Rotate the rope part of queries and of the shared key; append latent and key to the cache.

    q         [tokens, heads, rope]      bf16 or float32; pairs (2j, 2j + 1) turn by (cos, sin)[:, j]
    latent    [tokens, kv_lora_rank]     of q's dtype
    k_rope    [tokens, rope]             of q's dtype
    cos, sin  [tokens, rope / 2]         float32
    slots     [tokens]                   int64, distinct: rows of the cache, its pages laid end to end
    cache     [pages, page_size, kv_lora_rank + rope]  bf16 or float32; row slots[t] = latent[t], rotated k_rope[t];
              uint8: FP8 rows (fp8_rows.py)
    q_out     [tokens, heads, rope]      bf16 or float32, written and returned; may be q itself

    Rows are contiguous in their last dimension, other strides of q, latent, k_rope and q_out are free. Rotations in
    fp32, rounded once to q's dtype.

    Raises ValueError on a shape, stride or slot, TypeError on a dtype. Reference: reference.rope_append.
    """
    op = "rope_append"
    check_type(op, "q", q, Tensor)
    if active_backend() == "reference":
        return reference.rope_append(q, latent, k_rope, cos, sin, slots, cache, q_out)
    require(q.dim() == 3, f"{op}: q must be [tokens, heads, rope] (got {list(q.shape)})")
    tokens, heads, rope = q.shape
    rank = checked_rank(op, cache, latent, rope)
    check_rows(op, "q", q, (tokens, heads, rope), torch.bfloat16, torch.float32)
    check_rows(op, "q_out", q_out, (tokens, heads, rope), torch.bfloat16, torch.float32)
    check_rows(op, "latent", latent, (tokens, rank), q.dtype)
    check_rows(op, "k_rope", k_rope, (tokens, rope), q.dtype)
    for name, table in (("cos", cos), ("sin", sin)):
        check_tensor(op, name, table, (tokens, rope // 2), torch.float32)
    check_tensor(op, "slots", slots, (tokens,), torch.int64)
    call(
        "rope_append",
        (q, latent, k_rope, cos, sin, slots, q_out, cache),
        *(_DTYPES[t.dtype] for t in (q, q_out, cache)),
        tokens,
        heads,
        rank,
        rope,
        cache.shape[0] * cache.shape[1],
        q.stride(0),
        q.stride(1),
        q_out.stride(0),
        q_out.stride(1),
        latent.stride(0),
        k_rope.stride(0),
    )
    return q_out


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) * up, elementwise.

    gate, up  [tokens, width]  bf16 or float32, of one shape and dtype
    returns   [tokens, width]  of gate's dtype; computed in fp32 and rounded once

    Raises ValueError on a shape, TypeError on a dtype. Reference: reference.swiglu.
    """
    if active_backend() == "reference":
        return reference.swiglu(gate, up)
    check_activation("swiglu", "gate", gate, (None, None))
    check_tensor("swiglu", "up", up, tuple(gate.shape), gate.dtype)
    y = empty("swiglu", gate.shape, gate.dtype, gate.device)
    call("swiglu", (gate, up, y), _DTYPES[gate.dtype], *gate.shape)
    return y
