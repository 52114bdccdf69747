"""torch.ops.kimi_native.<op>: the ops as torch operators, for torch.compile. Importing this module registers them.

Each is an alias of the function of the same name in ops.py: same meaning, same bits, same errors. Operators take plain
tensors and numbers, so a quantized matrix is its tensors, a MoeDispatch is its members, and the matrices of all experts
are the number that `expert_handle` gives: a graph with every expert's tensors as inputs would be too large to compile.
For inference: no gradients are registered. On a GPU INT4 matrices are tiles (quant.tiles): those of experts have a
handle as others do, int4_gemm's operator has no form of them.
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


def _register(schema: str, function: Callable, fake: Callable) -> None:
    """Defines kimi_native::<schema>: `function` computes it, `fake` gives the results' shapes and dtypes."""
    name, arguments = schema.split("(", 1)
    torch.library.define(f"kimi_native::{name}", f"({arguments}")
    torch.library.impl(f"kimi_native::{name}", ("cpu", "cuda"), function)
    torch.library.register_fake(f"kimi_native::{name}", fake)


def _like(x: Tensor, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
    return x.new_empty(shape, dtype=dtype or x.dtype)


# ---- experts --------------------------------------------------------------------------------------------------------

_register(
    "moe_route(Tensor logits, Tensor? correction_bias, *, int topk, str scoring='sigmoid', int n_group=1, "
    "int topk_group=1, str group_score='top2_sum', bool norm_topk_prob=True, float routed_scaling_factor=1.0) "
    "-> (Tensor, Tensor)",
    ops.moe_route,
    lambda logits, correction_bias, *, topk, **_: (
        _like(logits, logits.shape[0], topk, dtype=torch.int32),
        _like(logits, logits.shape[0], topk),
    ),
)


def _moe_dispatch(topk_ids: Tensor, experts: int) -> tuple[Tensor, Tensor, Tensor]:
    d = ops.moe_dispatch(topk_ids, experts)
    return d.token_index, d.row_index, d.expert_offsets


_register(
    "moe_dispatch(Tensor topk_ids, int experts) -> (Tensor, Tensor, Tensor)",
    _moe_dispatch,
    lambda topk_ids, experts: (
        _like(topk_ids, topk_ids.shape[0] * topk_ids.shape[1]),
        _like(topk_ids, *topk_ids.shape),
        _like(topk_ids, experts + 1),
    ),
)
_register(
    "moe_combine(Tensor rows, Tensor row_index, Tensor topk_weights, Tensor? shared=None, *, "
    "ScalarType? out_dtype=None) -> Tensor",
    # Of a dispatch, moe_combine reads row_index alone.
    lambda rows, row_index, topk_weights, shared=None, *, out_dtype=None: ops.moe_combine(
        rows, MoeDispatch(*[row_index] * 3), topk_weights, shared, out_dtype=out_dtype
    ),
    lambda rows, row_index, topk_weights, shared=None, *, out_dtype=None: _like(
        rows if shared is None else shared, row_index.shape[0], rows.shape[1], dtype=out_dtype
    ),
)
_register(
    "int4_grouped_swiglu(Tensor x, Tensor token_index, Tensor expert_offsets, int gate, int up, *, "
    "ScalarType? out_dtype=None) -> Tensor",
    lambda x, token_index, expert_offsets, gate, up, *, out_dtype=None: ops.int4_grouped_swiglu(
        x,
        MoeDispatch(token_index, token_index, expert_offsets),
        _of_handle("int4_grouped_swiglu", gate),
        _of_handle("int4_grouped_swiglu", up),
        out_dtype=out_dtype,
    ),
    lambda x, token_index, expert_offsets, gate, up, *, out_dtype=None: _like(
        x,
        token_index.shape[0],
        _of_handle("int4_grouped_swiglu", gate).out_features,
        dtype=out_dtype,
    ),
)
_register(
    "int4_grouped_gemm(Tensor x, Tensor token_index, Tensor expert_offsets, int weights, *, "
    "ScalarType? out_dtype=None) -> Tensor",
    lambda x, token_index, expert_offsets, weights, *, out_dtype=None: ops.int4_grouped_gemm(
        x,
        MoeDispatch(token_index, token_index, expert_offsets),
        _of_handle("int4_grouped_gemm", weights),
        out_dtype=out_dtype,
    ),
    lambda x, token_index, expert_offsets, weights, *, out_dtype=None: _like(
        x, x.shape[0], _of_handle("int4_grouped_gemm", weights).out_features, dtype=out_dtype
    ),
)


# ---- matrices -------------------------------------------------------------------------------------------------------

_register(
    "int4_gemm(Tensor x, Tensor weight_packed, Tensor weight_scale, *, ScalarType? out_dtype=None) -> Tensor",
    lambda x, packed, scale, *, out_dtype=None: ops.int4_gemm(
        x, Int4Weight(packed, scale), out_dtype=out_dtype
    ),
    lambda x, packed, scale, *, out_dtype=None: _like(
        x, x.shape[0], packed.shape[0], dtype=out_dtype
    ),
)
_register(
    "int8_gemm(Tensor x, Tensor weight, Tensor weight_scale, *, ScalarType? out_dtype=None) -> Tensor",
    lambda x, weight, scale, *, out_dtype=None: ops.int8_gemm(
        x, Int8Weight(weight, scale), out_dtype=out_dtype
    ),
    lambda x, weight, scale, *, out_dtype=None: _like(
        x, x.shape[0], weight.shape[0], dtype=out_dtype
    ),
)


def _int4_quantize(w: Tensor) -> tuple[Tensor, Tensor]:
    weight = ops.int4_quantize(w)
    return weight.weight_packed, weight.weight_scale


_register(
    "int4_quantize(Tensor w) -> (Tensor, Tensor)",
    _int4_quantize,
    lambda w: (
        _like(w, w.shape[0], w.shape[1] // 8, dtype=torch.int32),
        _like(w, w.shape[0], w.shape[1] // 32),
    ),
)
_register(
    "bf16_gemm(Tensor x, Tensor weight, *, ScalarType? out_dtype=None) -> Tensor",
    ops.bf16_gemm,
    lambda x, weight, *, out_dtype=None: _like(x, *x.shape[:-1], weight.shape[-2], dtype=out_dtype),
)


# ---- attention and small ops ----------------------------------------------------------------------------------------

_register(
    "mla_decode(Tensor q, Tensor cache, Tensor page_table, Tensor seq_lens, *, int kv_lora_rank, "
    "float softmax_scale) -> Tensor",
    ops.mla_decode,
    lambda q, cache, page_table, seq_lens, *, kv_lora_rank, softmax_scale: _like(
        q, *q.shape[:2], kv_lora_rank
    ),
)
_register(
    "rms_norm(Tensor x, Tensor weight, *, float eps) -> Tensor",
    ops.rms_norm,
    lambda x, weight, *, eps: _like(x, *x.shape),
)
_register(
    "add_rms_norm(Tensor x, Tensor residual, Tensor weight, *, float eps) -> (Tensor, Tensor)",
    ops.add_rms_norm,
    lambda x, residual, weight, *, eps: (_like(x, *x.shape), _like(x, *x.shape)),
)
_register(
    "swiglu(Tensor gate, Tensor up) -> Tensor",
    ops.swiglu,
    lambda gate, up: _like(gate, *gate.shape),
)


def _rope_append(*tensors: Tensor) -> None:
    ops.rope_append(*tensors)  # a torch operator may not return what it was given


_register(
    "rope_append(Tensor q, Tensor latent, Tensor k_rope, Tensor cos, Tensor sin, Tensor slots, Tensor(a!) cache, "
    "Tensor(b!) q_out) -> ()",
    _rope_append,
    lambda *tensors: None,
)
