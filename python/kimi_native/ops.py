"""Public ops: check the tensors, choose the backend, call the kernel. The only importer of `_native`.

Every op has the same name in reference.py (plain torch, naive, the specification) and in ops.h.
The native backend takes CPU tensors. `backend("reference")`, or KIMI_NATIVE_BACKEND=reference, runs the specification
instead: for checking, and for training, since it is differentiable. There is no silent fallback between the two.

Fixed reduction order: natively computed rows depend on their own inputs only, to the last bit, whatever else is in the
call and however many threads run it.
"""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Iterator

import torch
from torch import Tensor

from kimi_native import _native, reference
from kimi_native.checks import check_activation, check_dtype, check_tensor, require
from kimi_native.weights import (
    GROUP_SIZE,
    Int4ExpertWeights,
    Int4Weight,
    Int8Weight,
    MoeDispatch,
)

__all__ = [
    "bf16_gemm",
    "int4_gemm",
    "int4_grouped_gemm",
    "int4_grouped_swiglu",
    "int8_gemm",
    "mla_decode",
    "moe_combine",
    "moe_dispatch",
    "moe_route",
    "rms_norm",
    "swiglu",
]

_DTYPES = {torch.bfloat16: 0, torch.float32: 1}  # kn::DType
_SCORING = {"sigmoid": 0, "softmax": 1}  # kn::Scoring
_GROUP_SCORE = {"top2_sum": 0, "max": 1}  # kn::GroupScore


# ---- runtime settings -----------------------------------------------------------------------------------------------


def cpu_features() -> list[str]:
    """Names of the CPU features that the processor and the operating system offer."""
    return _native.cpu_features()


def supported_isas() -> list[str]:
    """Kernel tiers this machine can run, best first, such as ["avx512", "avx2", "generic"]."""
    return _native.supported_isas()


def active_isa() -> str:
    """The kernel tier in use."""
    return _native.active_isa()


def force_isa(name: str) -> None:
    """Use one kernel tier; "" returns to the default. Raises RuntimeError if this machine lacks it."""
    _native.force_isa(name)


def num_threads() -> int:
    """Threads that native ops use, the caller's included."""
    return _native.num_threads()


def set_num_threads(n: int) -> None:
    """Set the number of threads of native ops. Raises ValueError below 1."""
    _native.set_num_threads(n)


_BACKENDS = ("native", "reference")


def _initial_backend() -> str:
    name = os.environ.get("KIMI_NATIVE_BACKEND", "native")
    if name not in _BACKENDS:
        raise RuntimeError(
            f"KIMI_NATIVE_BACKEND must be one of {', '.join(_BACKENDS)} (got {name})"
        )
    return name


_state = threading.local()
_default_backend = _initial_backend()


def active_backend() -> str:
    """ "native" or "reference"."""
    return getattr(_state, "backend", _default_backend)


@contextlib.contextmanager
def backend(name: str) -> Iterator[None]:
    """Run the ops of this thread on "native" or "reference" inside the with-block."""
    if name not in _BACKENDS:
        raise ValueError(f"backend: name must be one of {', '.join(_BACKENDS)} (got {name})")
    before = active_backend()
    _state.backend = name
    try:
        yield
    finally:
        _state.backend = before


# ---- calling the kernel ----------------------------------------------------------------------------------------------


def _workspace(nbytes: int) -> Tensor:
    """This thread's scratch buffer, grown as needed and kept: nothing is allocated per op in a steady state."""
    buffer = getattr(_state, "workspace", None)
    if buffer is None or buffer.numel() < nbytes + 64:
        buffer = _state.workspace = torch.empty(nbytes + 64, dtype=torch.uint8)
    start = -buffer.data_ptr() % 64
    return buffer[start : start + nbytes]


def _call_with_workspace(name: str, *arguments: int | float) -> None:
    nbytes = getattr(_native.cpu, name + "_workspace_bytes")(*arguments)
    scratch = _workspace(nbytes)
    getattr(_native.cpu, name)(*arguments, scratch.data_ptr(), nbytes)


def _pointer(x: Tensor | None) -> int:
    return 0 if x is None else x.data_ptr()


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
    topk_ids = torch.empty(tokens, topk, dtype=torch.int32)
    topk_weights = torch.empty(tokens, topk, dtype=torch.float32)
    _native.cpu.moe_route(
        logits.data_ptr(),
        _pointer(correction_bias),
        topk_ids.data_ptr(),
        topk_weights.data_ptr(),
        tokens,
        experts,
        topk,
        n_group,
        topk_group,
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
    if active_backend() == "reference":
        return MoeDispatch(*reference.moe_dispatch(topk_ids, experts))
    check_tensor("moe_dispatch", "topk_ids", topk_ids, (None, None), torch.int32)
    require(experts >= 1, f"moe_dispatch: experts must be at least 1 (got {experts})")
    tokens, topk = topk_ids.shape
    token_index = torch.empty(tokens * topk, dtype=torch.int32)
    row_index = torch.empty(tokens, topk, dtype=torch.int32)
    expert_offsets = torch.empty(experts + 1, dtype=torch.int32)
    _native.cpu.moe_dispatch(
        topk_ids.data_ptr(),
        token_index.data_ptr(),
        row_index.data_ptr(),
        expert_offsets.data_ptr(),
        tokens,
        topk,
        experts,
    )
    return MoeDispatch(token_index, row_index, expert_offsets)


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
    out_dtype = out_dtype or (rows if shared is None else shared).dtype
    if active_backend() == "reference":
        return reference.moe_combine(
            rows, dispatch.row_index, topk_weights, shared, out_dtype=out_dtype
        )
    check_tensor("moe_combine", "topk_weights", topk_weights, (None, None), torch.float32)
    tokens, topk = topk_weights.shape
    check_activation("moe_combine", "rows", rows, (tokens * topk, None))
    check_tensor("moe_combine", "row_index", dispatch.row_index, (tokens, topk), torch.int32)
    out = torch.empty(tokens, rows.shape[1], dtype=out_dtype)
    check_activation("moe_combine", "out", out, (tokens, None))
    if shared is not None:
        check_tensor("moe_combine", "shared", shared, tuple(out.shape), out_dtype)
    _native.cpu.moe_combine(
        rows.data_ptr(),
        dispatch.row_index.data_ptr(),
        topk_weights.data_ptr(),
        _pointer(shared),
        out.data_ptr(),
        _DTYPES[rows.dtype],
        _DTYPES[out_dtype],
        tokens,
        topk,
        rows.shape[1],
    )
    return out


# ---- experts: INT4 matrices -----------------------------------------------------------------------------------------


def int4_gemm(x: Tensor, weight: Int4Weight, *, out_dtype: torch.dtype | None = None) -> Tensor:
    """x times an INT4 matrix transposed.

    x        [tokens, in]   bf16 or float32; taken as 16-bit block fixed point per 32 (docs/kernels.md, int4_gemm):
                            exact for bf16 entries within 2**-7 of their group's largest, else within 2**-15 of it
    returns  [tokens, out]  out_dtype (default: of x); integer dot products are exact, sums in fp32

    Raises ValueError on a shape, TypeError on a dtype. Reference: reference.int4_gemm.
    """
    out_dtype = out_dtype or x.dtype
    if active_backend() == "reference":
        return reference.int4_gemm(
            x, weight.weight_packed, weight.weight_scale, out_dtype=out_dtype
        )
    check_activation("int4_gemm", "x", x, (None, weight.in_features))
    y = torch.empty(x.shape[0], weight.out_features, dtype=out_dtype)
    check_activation("int4_gemm", "out", y, (None, None))
    _call_with_workspace(
        "int4_gemm",
        x.data_ptr(),
        weight.weight_packed.data_ptr(),
        weight.weight_scale.data_ptr(),
        y.data_ptr(),
        _DTYPES[x.dtype],
        _DTYPES[out_dtype],
        x.shape[0],
        weight.out_features,
        weight.in_features,
        GROUP_SIZE,
    )
    return y


def _grouped(
    op: str, x: Tensor, dispatch: MoeDispatch, gather: bool, weights: Int4ExpertWeights
) -> int:
    """Checks what the grouped ops share; returns the number of rows."""
    check_activation(op, "x", x, (None, weights.in_features))
    check_tensor(op, "expert_offsets", dispatch.expert_offsets, (len(weights) + 1,), torch.int32)
    check_tensor(op, "token_index", dispatch.token_index, (None,), torch.int32)
    rows = dispatch.token_index.shape[0]
    if not gather:
        require(x.shape[0] == rows, f"{op}: x must have {rows} rows (got {x.shape[0]})")
    return rows


def int4_grouped_swiglu(
    x: Tensor,
    dispatch: MoeDispatch,
    gate: Int4ExpertWeights,
    up: Int4ExpertWeights,
    *,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    """silu(x Wgate^T) * (x Wup^T) for every dispatched row, by its expert, in one pass over x.

    x         [tokens, in]    bf16 or float32; row r reads x[dispatch.token_index[r]]
    gate, up  per expert [out, in] INT4
    returns   [rows, out]     out_dtype (default: of x); products, silu and their product in fp32

    Raises ValueError on a shape or index, TypeError on a dtype. Reference: reference.int4_grouped_swiglu.
    """
    op = "int4_grouped_swiglu"
    out_dtype = out_dtype or x.dtype
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
        )
    rows = _grouped(op, x, dispatch, True, gate)
    y = torch.empty(rows, gate.out_features, dtype=out_dtype)
    check_activation(op, "out", y, (None, None))
    _call_with_workspace(
        op,
        x.data_ptr(),
        dispatch.token_index.data_ptr(),
        dispatch.expert_offsets.data_ptr(),
        gate.packed_pointers.data_ptr(),
        gate.scale_pointers.data_ptr(),
        up.packed_pointers.data_ptr(),
        up.scale_pointers.data_ptr(),
        y.data_ptr(),
        _DTYPES[x.dtype],
        _DTYPES[out_dtype],
        x.shape[0],
        rows,
        len(gate),
        gate.out_features,
        gate.in_features,
        GROUP_SIZE,
    )
    return y


def int4_grouped_gemm(
    x: Tensor,
    dispatch: MoeDispatch,
    weights: Int4ExpertWeights,
    *,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    """x times the INT4 matrix of each row's expert (the down projection).

    x        [rows, in]   bf16 or float32, in the order of `dispatch`
    weights  per expert [out, in] INT4
    returns  [rows, out]  out_dtype (default: of x)

    Raises ValueError on a shape or index, TypeError on a dtype. Reference: reference.int4_grouped_gemm.
    """
    op = "int4_grouped_gemm"
    out_dtype = out_dtype or x.dtype
    if active_backend() == "reference":
        return reference.int4_grouped_gemm(
            x,
            dispatch.expert_offsets,
            [(w.weight_packed, w.weight_scale) for w in weights.weights],
            out_dtype=out_dtype,
        )
    rows = _grouped(op, x, dispatch, False, weights)
    y = torch.empty(rows, weights.out_features, dtype=out_dtype)
    check_activation(op, "out", y, (None, None))
    _call_with_workspace(
        op,
        x.data_ptr(),
        0,
        dispatch.expert_offsets.data_ptr(),
        weights.packed_pointers.data_ptr(),
        weights.scale_pointers.data_ptr(),
        y.data_ptr(),
        _DTYPES[x.dtype],
        _DTYPES[out_dtype],
        x.shape[0],
        rows,
        len(weights),
        weights.out_features,
        weights.in_features,
        GROUP_SIZE,
    )
    return y


# ---- dense matrices -------------------------------------------------------------------------------------------------


def bf16_gemm(x: Tensor, weight: Tensor, *, out_dtype: torch.dtype | None = None) -> Tensor:
    """x times a BF16 matrix transposed, or one matrix per head.

    x        [tokens, in] or [tokens, heads, in]  bf16 or float32; rows of `in` contiguous, other strides free
    weight   [out, in] or [heads, out, in]        bf16; matrices contiguous, any stride from head to head
    returns  [tokens, out] or [tokens, heads, out]  out_dtype (default: of x); products and sums in fp32

    Raises ValueError on a shape or stride, TypeError on a dtype. Reference: reference.bf16_gemm.
    """
    op = "bf16_gemm"
    out_dtype = out_dtype or x.dtype
    if active_backend() == "reference":
        return reference.bf16_gemm(x, weight, out_dtype=out_dtype)
    check_dtype(op, "x", x, torch.bfloat16, torch.float32)
    check_dtype(op, "weight", weight, torch.bfloat16)
    check_dtype(op, "out", torch.empty(0, dtype=out_dtype), torch.bfloat16, torch.float32)
    require(
        x.dim() == weight.dim() and x.dim() in (2, 3) and x.shape[1:-1] == weight.shape[:-2],
        f"{op}: x and weight must be [tokens, in] and [out, in], or [tokens, heads, in] and [heads, out, in] "
        f"(got {list(x.shape)} and {list(weight.shape)})",
    )
    require(
        x.shape[-1] == weight.shape[-1],
        f"{op}: the last sizes of x and weight must be equal (got {x.shape[-1]} and {weight.shape[-1]})",
    )
    require(
        x.stride(-1) == 1 and weight.stride(-1) == 1 and weight.stride(-2) == weight.shape[-1],
        f"{op}: rows of x and matrices of weight must be contiguous (got strides {x.stride()} and {weight.stride()})",
    )
    if x.device.type != "cpu" or weight.device.type != "cpu":
        raise RuntimeError(f"{op}: no kernel for device {x.device} in this build (supported: cpu)")
    per_head = x.dim() == 3
    y = torch.empty(*x.shape[:-1], weight.shape[-2], dtype=out_dtype)
    _call_with_workspace(
        op,
        x.data_ptr(),
        weight.data_ptr(),
        y.data_ptr(),
        _DTYPES[x.dtype],
        _DTYPES[out_dtype],
        x.shape[0],
        x.shape[1] if per_head else 1,
        weight.shape[-2],
        weight.shape[-1],
        x.stride(0),
        x.stride(1) if per_head else 0,
        weight.stride(0) if per_head else 0,
    )
    return y


def int8_gemm(x: Tensor, weight: Int8Weight, *, out_dtype: torch.dtype | None = None) -> Tensor:
    """x times an INT8 matrix transposed; activations as in int4_gemm.

    x        [tokens, in]   bf16 or float32
    returns  [tokens, out]  out_dtype (default: of x)

    Raises ValueError on a shape, TypeError on a dtype. Reference: reference.int8_gemm.
    """
    out_dtype = out_dtype or x.dtype
    if active_backend() == "reference":
        return reference.int8_gemm(x, weight.weight, weight.weight_scale, out_dtype=out_dtype)
    check_activation("int8_gemm", "x", x, (None, weight.in_features))
    y = torch.empty(x.shape[0], weight.out_features, dtype=out_dtype)
    check_activation("int8_gemm", "out", y, (None, None))
    _call_with_workspace(
        "int8_gemm",
        x.data_ptr(),
        weight.weight.data_ptr(),
        weight.weight_scale.data_ptr(),
        y.data_ptr(),
        _DTYPES[x.dtype],
        _DTYPES[out_dtype],
        x.shape[0],
        weight.out_features,
        weight.in_features,
        GROUP_SIZE,
    )
    return y


# ---- attention and norms --------------------------------------------------------------------------------------------


def mla_decode(
    q: Tensor,
    cache: Tensor,
    page_table: Tensor,
    seq_lens: Tensor,
    *,
    kv_lora_rank: int,
    softmax_scale: float,
) -> Tensor:
    """Attention of one new token per sequence over the paged latent cache (absorbed form).

    q           [batch, heads, kv_lora_rank + qk_rope_head_dim]       bf16 or float32
    cache       [pages, page_size, kv_lora_rank + qk_rope_head_dim]   bf16 or float32
    page_table  [batch, max_pages]  int32, entries past the last used page are never read
    seq_lens    [batch]             int32, tokens to attend to; 0 gives a zero row
    returns     [batch, heads, kv_lora_rank]  of q's dtype; scores, softmax and sums in fp32

    Raises ValueError on a shape, layout or page id, TypeError on a dtype.
    Source: DeepSeek-V2, arXiv 2405.04434, section 2.1. Reference: reference.mla_decode.
    """
    op = "mla_decode"
    if active_backend() == "reference":
        return reference.mla_decode(
            q, cache, page_table, seq_lens, kv_lora_rank=kv_lora_rank, softmax_scale=softmax_scale
        )
    check_activation(op, "q", q, (None, None, None))
    batch, heads, width = q.shape
    check_activation(op, "cache", cache, (None, None, width))
    check_tensor(op, "page_table", page_table, (batch, None), torch.int32)
    check_tensor(op, "seq_lens", seq_lens, (batch,), torch.int32)
    require(
        1 <= kv_lora_rank <= width, f"{op}: kv_lora_rank must be 1 to {width} (got {kv_lora_rank})"
    )
    out = torch.empty(batch, heads, kv_lora_rank, dtype=q.dtype)
    _call_with_workspace(
        op,
        q.data_ptr(),
        cache.data_ptr(),
        page_table.data_ptr(),
        seq_lens.data_ptr(),
        out.data_ptr(),
        _DTYPES[q.dtype],
        _DTYPES[cache.dtype],
        batch,
        heads,
        kv_lora_rank,
        width - kv_lora_rank,
        cache.shape[0],
        cache.shape[1],
        page_table.shape[1],
        softmax_scale,
    )
    return out


def rms_norm(x: Tensor, weight: Tensor, *, eps: float) -> Tensor:
    """x / sqrt(mean(x^2) + eps), rounded to x's dtype, times weight.

    x        [tokens, hidden]  bf16 or float32; rows contiguous, any stride from row to row
    weight   [hidden]          bf16
    returns  [tokens, hidden]  of x's dtype; mean and scaling in fp32

    Raises ValueError on a shape or stride, TypeError on a dtype. Reference: reference.rms_norm.
    """
    if active_backend() == "reference":
        return reference.rms_norm(x, weight, eps=eps)
    check_dtype("rms_norm", "x", x, torch.bfloat16, torch.float32)
    require(
        x.dim() == 2 and x.stride(1) == 1 and x.device.type == "cpu",
        f"rms_norm: x must be [tokens, hidden] on the cpu with contiguous rows (got {list(x.shape)}, {x.device})",
    )
    check_tensor("rms_norm", "weight", weight, (x.shape[1],), torch.bfloat16)
    y = torch.empty(x.shape, dtype=x.dtype)
    _native.cpu.rms_norm(
        x.data_ptr(),
        weight.data_ptr(),
        y.data_ptr(),
        _DTYPES[x.dtype],
        x.shape[0],
        x.shape[1],
        max(x.stride(0), x.shape[1]),
        eps,
    )
    return y


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
    y = torch.empty_like(gate)
    _native.cpu.swiglu(
        gate.data_ptr(),
        up.data_ptr(),
        y.data_ptr(),
        _DTYPES[gate.dtype],
        gate.shape[0],
        gate.shape[1],
    )
    return y
