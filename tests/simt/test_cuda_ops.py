"""The small CUDA ops in the shim against float64, with the bounds of the CPU ops' tests and in every schedule.

Where an op's arithmetic is fixed to the bit on every device (rope_append, moe_dispatch), so is the comparison.
"""

from __future__ import annotations

import math

import pytest
import torch

import test_moe_route
from kimi_native import ops, reference
from op_args import args_type
from oracle_dense import TINY, U, assert_close, assert_same_bits, randn
from simt import SCHEDULES, Fault, simt_only
from simt_ops import run_op
from test_moe_combine import bound_combine
from test_moe_combine import make_case as make_combine
from test_moe_dispatch import make_ids
from test_moe_route import bound_weights
from test_rope_append import copies
from test_rope_append import make as make_rope
from test_swiglu import bound as bound_swiglu

BF16, FP32 = torch.bfloat16, torch.float32
EPS = 1e-6
schedules = pytest.mark.parametrize("schedule", SCHEDULES, ids=str)
dtypes = pytest.mark.parametrize("dtype", [BF16, FP32], ids=["bf16", "fp32"])


def nan(*shape, dtype):
    return torch.full(shape, math.nan, dtype=dtype)


# ---- rms_norm, add_rms_norm -----------------------------------------------------------------------------------------


def bound_block_norm(y, hidden, dtype):
    """A thread adds every 256th run of 8 squares, then 5 steps of a tree and 7 warps; half of that after the root;
    division, root, two products; twice rounded to dtype."""
    terms = 8 * math.ceil(hidden / 2048) + 5 + 7
    relative = (terms / 2 + 6) * U + 2 * (2**-8 if dtype == BF16 else U)
    return 1.01 * relative * y.abs() + TINY


def rms_norm(x, weight, **options):
    y = nan(*x.shape, dtype=x.dtype)
    run_op(
        "rms_norm",
        x=x,
        weight=weight,
        y=y,
        dtype=x.dtype,
        tokens=x.shape[0],
        hidden=x.shape[1],
        x_token_stride=x.stride(0),
        eps=EPS,
        **options,
    )
    return y


@schedules
@dtypes
@pytest.mark.parametrize("hidden", [1, 7, 8, 9, 512, 2047, 2049, 7168])
def test_cuda_rms_norm_matches_float64(hidden, dtype, schedule):
    x, weight = randn(3, hidden, dtype=dtype), randn(hidden, dtype=BF16, seed=1)
    expected = reference.rms_norm(x.double(), weight, eps=EPS)
    assert_close(
        rms_norm(x, weight, schedule=schedule), expected, bound_block_norm(expected, hidden, dtype)
    )


@dtypes
def test_cuda_rms_norm_has_the_same_bits_unaligned(dtype):
    # Rows of 40 values at a stride of 47: most of them start where no vector load can.
    wide = nan(5, 47, dtype=dtype)
    wide[:, 7:] = randn(5, 40, dtype=dtype)
    weight = randn(40, dtype=BF16, seed=1)
    together = rms_norm(wide[:, 7:], weight, flush="front")
    assert_same_bits(together, rms_norm(wide[:, 7:].contiguous(), weight))
    assert_same_bits(together[2:3], rms_norm(wide[2:3, 7:], weight))


@schedules
@dtypes
@pytest.mark.parametrize("in_place", [False, True])
@pytest.mark.parametrize("hidden", [1, 100, 2056])
def test_cuda_add_rms_norm_is_torch_add_then_rms_norm(hidden, in_place, dtype, schedule):
    x, residual = randn(4, hidden, dtype=dtype), randn(4, hidden, dtype=dtype, seed=2)
    weight = randn(hidden, dtype=BF16, seed=1)
    expected = x + residual
    y, total = nan(4, hidden, dtype=dtype), residual if in_place else nan(4, hidden, dtype=dtype)
    run_op(
        "add_rms_norm",
        x=x,
        residual=residual,
        weight=weight,
        y=y,
        sum=total,
        dtype=dtype,
        tokens=4,
        hidden=hidden,
        eps=EPS,
        schedule=schedule,
    )
    assert_same_bits(total, expected)
    assert_same_bits(y, rms_norm(expected, weight))


# ---- swiglu ---------------------------------------------------------------------------------------------------------


@schedules
@dtypes
@pytest.mark.parametrize(("tokens", "width"), [(0, 8), (1, 1), (3, 17), (2, 2048), (1, 2049)])
def test_cuda_swiglu_matches_float64(tokens, width, dtype, schedule):
    gate, up = 8 * randn(tokens, width, dtype=dtype), randn(tokens, width, dtype=dtype, seed=1)
    y = nan(tokens, width, dtype=dtype)
    run_op(
        "swiglu",
        gate=gate,
        up=up,
        y=y,
        dtype=dtype,
        tokens=tokens,
        width=width,
        schedule=schedule,
    )
    error = (y.double() - reference.swiglu(gate.double(), up.double())).abs()
    assert (error <= bound_swiglu(gate, up, dtype)).all()


# ---- rope_append ----------------------------------------------------------------------------------------------------


def rope_append(arguments, **options):
    a = arguments
    run_op(
        "rope_append",
        **{n: a[n] for n in ("q", "latent", "k_rope", "cos", "sin", "slots", "q_out", "cache")},
        dtype=a["q"].dtype,
        q_out_dtype=a["q_out"].dtype,
        cache_dtype=a["cache"].dtype,
        tokens=a["q"].shape[0],
        heads=a["q"].shape[1],
        kv_lora_rank=a["latent"].shape[1],
        qk_rope_head_dim=a["q"].shape[2],
        cache_rows=a["cache"].shape[0] * a["cache"].shape[1],
        q_token_stride=a["q"].stride(0),
        q_head_stride=a["q"].stride(1),
        q_out_token_stride=a["q_out"].stride(0),
        q_out_head_stride=a["q_out"].stride(1),
        latent_token_stride=a["latent"].stride(0),
        k_rope_token_stride=a["k_rope"].stride(0),
        **options,
    )


@schedules
@dtypes
@pytest.mark.parametrize("cache_dtype", [BF16, FP32])
@pytest.mark.parametrize("q_out_dtype", [BF16, FP32])
@pytest.mark.parametrize(
    ("tokens", "heads", "rank", "rope"), [(1, 1, 1, 2), (3, 2, 15, 14), (2, 64, 512, 64)]
)
def test_cuda_rope_append_has_the_bits_of_the_reference(
    tokens, heads, rank, rope, dtype, cache_dtype, q_out_dtype, schedule
):
    args = make_rope(
        tokens, heads, rank, rope, dtype=dtype, cache_dtype=cache_dtype, q_out_dtype=q_out_dtype
    )
    # latent and k_rope are views of one buffer; here each has a buffer of its own.
    args |= {"k_rope": args["k_rope"].clone()}
    expected = copies(args)
    reference.rope_append(**expected)
    rope_append(args, schedule=schedule)
    assert_same_bits(args["q_out"], expected["q_out"])
    assert_same_bits(args["cache"], expected["cache"])


@dtypes
def test_cuda_rope_append_may_rotate_in_place(dtype):
    args = make_rope(5, 3, 20, 38, dtype=dtype, q_out_dtype=dtype)
    expected = copies(args)
    reference.rope_append(**expected)
    rope_append(args | {"q_out": args["q"]})
    assert_same_bits(args["q"], expected["q_out"])


@simt_only
@pytest.mark.parametrize("slot", [-1, 64])
def test_cuda_rope_append_stops_at_a_slot_outside_the_cache(slot):
    args = make_rope(3, 2, 16, 8)
    args["slots"][2] = slot
    with pytest.raises(Fault, match="rope_append: slots must be 0 to cache_rows - 1"):
        rope_append(args)


# ---- the experts of a layer -----------------------------------------------------------------------------------------


def moe_route(logits, bias, options, **schedule):
    tokens, topk = logits.shape[0], options["topk"]
    ids, weights = torch.full((tokens, topk), -7, dtype=torch.int32), nan(tokens, topk, dtype=FP32)
    run_op(
        "moe_route",
        logits=logits,
        correction_bias=bias,
        topk_ids=ids,
        topk_weights=weights,
        tokens=tokens,
        experts=logits.shape[1],
        topk=topk,
        n_group=options.get("n_group", 1),
        topk_group=options.get("topk_group", 1),
        scoring=int(options.get("scoring") == "softmax"),
        group_score=int(options.get("group_score") == "max"),
        norm_topk_prob=options.get("norm_topk_prob", True),
        routed_scaling_factor=options.get("routed_scaling_factor", 1.0),
        **schedule,
    )
    return ids, weights


@schedules
@pytest.mark.parametrize("name", test_moe_route.CASES)
def test_cuda_moe_route_matches_float64(name, schedule):
    logits, bias, options = test_moe_route.make_case(name, 2 if name == "most_experts" else 5)
    ids, weights = moe_route(logits, bias, options, schedule=schedule)
    wide_bias = None if bias is None else bias.double()
    expected_ids, expected = reference.moe_route(logits.double(), wide_bias, **options)
    assert torch.equal(ids, expected_ids)
    assert ((weights - expected).abs() <= bound_weights(logits, expected, options)).all()


@pytest.mark.parametrize("name", ["k2", "v3", "v2", "groups_of_one"])
def test_cuda_moe_route_chooses_as_the_cpu_on_ties_and_specials(name):
    experts, has_bias, options = test_moe_route.CASES[name]
    generator = torch.Generator().manual_seed(3)
    values = torch.tensor([-math.inf, -2.0, -1.0, 0.0, 1.5, 3.0, math.inf, math.nan])
    logits = values[torch.randint(0, 8, (12, experts), generator=generator)]
    logits[:6] = logits[:6].nan_to_num(0.5)
    bias = torch.randn(experts, generator=generator).round() if has_bias else None
    ids, weights = moe_route(logits, bias, options)
    cpu_ids, cpu_weights = ops.moe_route(logits, bias, **options)
    assert torch.equal(ids, cpu_ids)
    assert torch.equal(weights.isnan(), cpu_weights.isnan())


@schedules
@pytest.mark.parametrize(
    ("tokens", "topk", "experts"),
    [(0, 8, 384), (1, 8, 384), (5, 5, 5), (37, 6, 64), (33, 1, 1000), (300, 8, 384), (40, 2, 4096)],
)
def test_cuda_moe_dispatch_is_a_stable_sort(tokens, topk, experts, schedule):
    ids = make_ids(tokens, topk, experts)
    rows = tokens * topk
    token_index, row_index = (torch.full((rows,), -7, dtype=torch.int32) for _ in range(2))
    offsets = torch.full((experts + 1,), -7, dtype=torch.int32)
    run_op(
        "moe_dispatch",
        topk_ids=ids,
        token_index=token_index,
        row_index=row_index,
        expert_offsets=offsets,
        tokens=tokens,
        topk=topk,
        experts=experts,
        schedule=schedule,
    )
    expected = ops.moe_dispatch(ids, experts)
    assert torch.equal(token_index, expected.token_index)
    assert torch.equal(row_index, expected.row_index.flatten())
    assert torch.equal(offsets, expected.expert_offsets)


@simt_only
@pytest.mark.parametrize("bad", [-1, 64])
def test_cuda_moe_dispatch_stops_at_an_id_out_of_range(bad):
    ids = make_ids(9, 6, 64)
    ids[4, 2] = bad
    out = {n: torch.zeros(100, dtype=torch.int32) for n in ("token_index", "row_index")}
    with pytest.raises(Fault, match=r"moe_dispatch: topk_ids must be in \[0, experts\)"):
        run_op(
            "moe_dispatch",
            topk_ids=ids,
            **out,
            expert_offsets=torch.zeros(65, dtype=torch.int32),
            tokens=9,
            topk=6,
            experts=64,
        )


def moe_combine(rows, row_index, weights, shared, out_dtype, **schedule):
    tokens, topk = row_index.shape
    out = nan(tokens, rows.shape[1], dtype=out_dtype)
    run_op(
        "moe_combine",
        rows=rows,
        row_index=row_index,
        topk_weights=weights,
        shared=shared,
        out=out,
        rows_dtype=rows.dtype,
        out_dtype=out_dtype,
        tokens=tokens,
        topk=topk,
        hidden=rows.shape[1],
        **schedule,
    )
    return out


@schedules
@pytest.mark.parametrize("with_shared", [False, True])
@pytest.mark.parametrize("out_dtype", [BF16, FP32], ids=["bf16", "fp32"])
@pytest.mark.parametrize("rows_dtype", [BF16, FP32], ids=["bf16", "fp32"])
@pytest.mark.parametrize("hidden", [1, 17, 1024, 1032])
def test_cuda_moe_combine_matches_float64(hidden, rows_dtype, out_dtype, with_shared, schedule):
    rows, dispatch, weights, shared = make_combine(5, 8, hidden, rows_dtype, out_dtype)
    shared = shared if with_shared else None
    out = moe_combine(rows, dispatch.row_index, weights, shared, out_dtype, schedule=schedule)
    expected = reference.moe_combine(
        rows.double(),
        dispatch.row_index,
        weights.double(),
        None if shared is None else shared.double(),
        out_dtype=torch.float64,
    )
    bound = bound_combine(rows, dispatch.row_index, weights, shared, out_dtype, expected)
    assert ((out.double() - expected).abs() <= bound).all()


@simt_only
@pytest.mark.parametrize("bad", [-1, 6])
def test_cuda_moe_combine_stops_at_a_row_out_of_range(bad):
    rows, dispatch, weights, _ = make_combine(3, 2, 8, FP32, FP32)
    dispatch.row_index[2, 1] = bad
    with pytest.raises(Fault, match="moe_combine: row_index must be in"):
        moe_combine(rows, dispatch.row_index, weights, None, FP32)


@pytest.mark.parametrize(
    ("name", "fields", "message"),
    [
        ("rms_norm", {"tokens": -1}, "rms_norm: need tokens >= 0"),
        ("rms_norm", {"tokens": 1, "hidden": 8, "x_token_stride": 8}, "must not be null"),
        ("add_rms_norm", {"tokens": 1}, "add_rms_norm: need tokens >= 0 and hidden >= 1"),
        ("swiglu", {"tokens": 2**62, "width": 4}, "fit in 64 bits"),
        ("rope_append", {"tokens": 1, "heads": 1, "kv_lora_rank": 1}, "must be even"),
        ("moe_route", {"experts": 5000}, "experts must be 1 to 4096"),
        ("moe_dispatch", {"experts": 5000, "topk": 1}, "experts must be 1 to 4096 on a GPU"),
        ("moe_combine", {"topk": 1, "hidden": 1, "rows_dtype": 3}, "dtype must be 0 or 1"),
        (
            "moe_combine",
            {"tokens": 2, "topk": 1, "hidden": 2**31},
            "too large for one launch",
        ),
    ],
)
def test_cuda_ops_refuse_bad_sizes(name, fields, message):
    with pytest.raises(ValueError, match=message):
        run_op(name, **fields)


SIZES = {"tokens": 1, "topk": 1, "experts": 1, "hidden": 8, "width": 8, "heads": 1}
SIZES |= {"n_group": 1, "topk_group": 1, "x_token_stride": 8, "eps": EPS, "cache_rows": 1}
SIZES |= {"kv_lora_rank": 8, "qk_rope_head_dim": 8, "q_token_stride": 8, "q_head_stride": 8}
SIZES |= {"q_out_token_stride": 8, "q_out_head_stride": 8, "latent_token_stride": 8}
SIZES |= {"k_rope_token_stride": 8, "rows": 1, "vocab": 8, "workspace": 64, "workspace_bytes": 4096}
TENSORS = {
    "rms_norm": {"x": 2, "weight": 2, "y": 2},
    "add_rms_norm": {"x": 2, "residual": 2, "weight": 2, "y": 2, "sum": 2},
    "swiglu": {"gate": 2, "up": 2, "y": 2},
    "rope_append": {"q": 2, "latent": 2, "k_rope": 2, "cos": 4, "sin": 4, "slots": 8, "q_out": 2}
    | {"cache": 2},
    "moe_route": {"logits": 4, "correction_bias": 4, "topk_ids": 4, "topk_weights": 4},
    "moe_dispatch": {"topk_ids": 4, "token_index": 4, "row_index": 4, "expert_offsets": 4},
    "moe_combine": {"rows": 2, "row_index": 4, "topk_weights": 4, "shared": 2, "out": 2},
    "sample": {"logits": 4, "options": 8, "top_k": 4, "ids": 4},
}


@pytest.mark.parametrize(
    ("name", "tensor"), [(name, tensor) for name, ts in TENSORS.items() for tensor in ts]
)
def test_cuda_ops_refuse_tensors_that_cut_their_elements(name, tensor):
    known = {field for field, _ in args_type(name)._fields_}
    fields = {field: size for field, size in SIZES.items() if field in known}
    fields |= dict.fromkeys(TENSORS[name], 64)
    nbytes = TENSORS[name][tensor]
    message = f"{name}: tensors must be aligned to their elements of {nbytes} bytes on a GPU"
    with pytest.raises(ValueError, match=message):
        run_op(name, **(fields | {tensor: 64 + nbytes // 2}))
