"""torch.ops.kimi_native.<op>: the ops as torch operators, for torch.compile. Importing this module registers them.

Each is an alias of the function of the same name in ops.py: same meaning, same bits, same errors. Operators take plain
tensors and numbers, so a quantized matrix is its tensors, a MoeDispatch is its members, and the matrices of all experts
are the number that `expert_handle` gives: a graph with every expert's tensors as inputs would be too large to compile.
For inference: no gradients are registered.
"""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Callable

import torch
from torch import Tensor

from kimi_native import ops
from kimi_native.weights import Int4ExpertWeights, Int4Weight, Int8Weight, MoeDispatch

_next_handle = itertools.count(1)
_handles: weakref.WeakKeyDictionary[Int4ExpertWeights, int] = weakref.WeakKeyDictionary()
_experts: weakref.WeakValueDictionary[int, Int4ExpertWeights] = weakref.WeakValueDictionary()


def expert_handle(weights: Int4ExpertWeights) -> int:
    """The number under which the grouped operators know these matrices, for as long as the caller keeps them."""
    if weights not in _handles:
        _handles[weights] = next(_next_handle)
        _experts[_handles[weights]] = weights
    return _handles[weights]


def _of_handle(op: str, handle: int) -> Int4ExpertWeights:
    weights = _experts.get(handle)
    if weights is None:
        raise ValueError(
            f"{op}: a handle must be that of expert weights which still exist (got {handle})"
        )
    return weights


def _register(schema: str, fake: Callable) -> Callable[[Callable], Callable]:
    """Defines kimi_native::<schema> with the decorated function on the CPU and `fake` for shapes and dtypes."""
    name = "kimi_native::" + schema.partition("(")[0]

    def decorate(function: Callable) -> Callable:
        torch.library.define(name, schema[schema.index("(") :])
        torch.library.impl(name, "cpu", function)
        torch.library.register_fake(name, fake)
        return function

    return decorate


def _rows(x: Tensor, columns: int, out_dtype: torch.dtype | None) -> Tensor:
    return x.new_empty((*x.shape[:-1], columns), dtype=out_dtype or x.dtype)


# ---- experts --------------------------------------------------------------------------------------------------------


def _moe_route_fake(logits: Tensor, correction_bias: Tensor | None, *, topk: int, **_: object):
    shape = (logits.shape[0], topk)
    return logits.new_empty(shape, dtype=torch.int32), logits.new_empty(shape)


_register(
    "moe_route(Tensor logits, Tensor? correction_bias, *, int topk, str scoring='sigmoid', int n_group=1, "
    "int topk_group=1, str group_score='top2_sum', bool norm_topk_prob=True, float routed_scaling_factor=1.0) "
    "-> (Tensor, Tensor)",
    _moe_route_fake,
)(ops.moe_route)


def _moe_dispatch_fake(topk_ids: Tensor, experts: int) -> tuple[Tensor, Tensor, Tensor]:
    tokens, topk = topk_ids.shape
    return (
        topk_ids.new_empty(tokens * topk),
        topk_ids.new_empty(tokens, topk),
        topk_ids.new_empty(experts + 1),
    )


@_register(
    "moe_dispatch(Tensor topk_ids, int experts) -> (Tensor, Tensor, Tensor)", _moe_dispatch_fake
)
def _moe_dispatch(topk_ids: Tensor, experts: int) -> tuple[Tensor, Tensor, Tensor]:
    d = ops.moe_dispatch(topk_ids, experts)
    return d.token_index, d.row_index, d.expert_offsets


def _moe_combine_fake(
    rows: Tensor,
    row_index: Tensor,
    topk_weights: Tensor,
    shared: Tensor | None = None,
    *,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    dtype = out_dtype or (rows if shared is None else shared).dtype
    return rows.new_empty(row_index.shape[0], rows.shape[1], dtype=dtype)


@_register(
    "moe_combine(Tensor rows, Tensor row_index, Tensor topk_weights, Tensor? shared=None, *, "
    "ScalarType? out_dtype=None) -> Tensor",
    _moe_combine_fake,
)
def _moe_combine(
    rows: Tensor,
    row_index: Tensor,
    topk_weights: Tensor,
    shared: Tensor | None = None,
    *,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    dispatch = MoeDispatch(row_index, row_index, row_index)  # row_index is all that is read
    return ops.moe_combine(rows, dispatch, topk_weights, shared, out_dtype=out_dtype)


def _int4_grouped_swiglu_fake(
    x: Tensor,
    token_index: Tensor,
    expert_offsets: Tensor,
    gate: int,
    up: int,
    *,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    columns = _of_handle("int4_grouped_swiglu", gate).out_features
    return x.new_empty(token_index.shape[0], columns, dtype=out_dtype or x.dtype)


@_register(
    "int4_grouped_swiglu(Tensor x, Tensor token_index, Tensor expert_offsets, int gate, int up, *, "
    "ScalarType? out_dtype=None) -> Tensor",
    _int4_grouped_swiglu_fake,
)
def _int4_grouped_swiglu(
    x: Tensor,
    token_index: Tensor,
    expert_offsets: Tensor,
    gate: int,
    up: int,
    *,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    weights = (_of_handle("int4_grouped_swiglu", handle) for handle in (gate, up))
    dispatch = MoeDispatch(token_index, token_index, expert_offsets)
    return ops.int4_grouped_swiglu(x, dispatch, *weights, out_dtype=out_dtype)


def _int4_grouped_gemm_fake(
    x: Tensor,
    token_index: Tensor,
    expert_offsets: Tensor,
    weights: int,
    *,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    return _rows(x, _of_handle("int4_grouped_gemm", weights).out_features, out_dtype)


@_register(
    "int4_grouped_gemm(Tensor x, Tensor token_index, Tensor expert_offsets, int weights, *, "
    "ScalarType? out_dtype=None) -> Tensor",
    _int4_grouped_gemm_fake,
)
def _int4_grouped_gemm(
    x: Tensor,
    token_index: Tensor,
    expert_offsets: Tensor,
    weights: int,
    *,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    dispatch = MoeDispatch(token_index, token_index, expert_offsets)
    known = _of_handle("int4_grouped_gemm", weights)
    return ops.int4_grouped_gemm(x, dispatch, known, out_dtype=out_dtype)


# ---- matrices -------------------------------------------------------------------------------------------------------


@_register(
    "int4_gemm(Tensor x, Tensor weight_packed, Tensor weight_scale, *, ScalarType? out_dtype=None) -> Tensor",
    lambda x, packed, scale, *, out_dtype=None: _rows(x, packed.shape[0], out_dtype),
)
def _int4_gemm(
    x: Tensor,
    weight_packed: Tensor,
    weight_scale: Tensor,
    *,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    return ops.int4_gemm(x, Int4Weight(weight_packed, weight_scale), out_dtype=out_dtype)


@_register(
    "int8_gemm(Tensor x, Tensor weight, Tensor weight_scale, *, ScalarType? out_dtype=None) -> Tensor",
    lambda x, weight, scale, *, out_dtype=None: _rows(x, weight.shape[0], out_dtype),
)
def _int8_gemm(
    x: Tensor, weight: Tensor, weight_scale: Tensor, *, out_dtype: torch.dtype | None = None
) -> Tensor:
    return ops.int8_gemm(x, Int8Weight(weight, weight_scale), out_dtype=out_dtype)


_register(
    "bf16_gemm(Tensor x, Tensor weight, *, ScalarType? out_dtype=None) -> Tensor",
    lambda x, weight, *, out_dtype=None: _rows(x, weight.shape[-2], out_dtype),
)(ops.bf16_gemm)


# ---- attention and small ops ----------------------------------------------------------------------------------------


_register(
    "mla_decode(Tensor q, Tensor cache, Tensor page_table, Tensor seq_lens, *, int kv_lora_rank, "
    "float softmax_scale) -> Tensor",
    lambda q, cache, table, lens, *, kv_lora_rank, softmax_scale: _rows(q, kv_lora_rank, None),
)(ops.mla_decode)
_register(
    "rms_norm(Tensor x, Tensor weight, *, float eps) -> Tensor",
    lambda x, weight, *, eps: x.new_empty(x.shape),
)(ops.rms_norm)
_register("swiglu(Tensor gate, Tensor up) -> Tensor", lambda gate, up: gate.new_empty(gate.shape))(
    ops.swiglu
)
