"""torch.ops.kimi_native: what an operator must fulfil for torch.compile, and an MoE layer compiled as one graph."""

from __future__ import annotations

import gc

import pytest
import torch

from kimi_native import ops
from kimi_native.torch_ops import expert_handle
from oracle import assert_same_bits, make_int4, make_int8, make_x

BF16, FP32 = torch.bfloat16, torch.float32
EXPERTS, TOKENS, TOPK, HIDDEN, WIDTH = 4, 5, 2, 96, 64


def make_experts(out, in_, seed):
    weights = [make_int4(out, in_, seed=10 * seed + e).int4() for e in range(EXPERTS)]
    return ops.Int4ExpertWeights(weights)


@pytest.fixture(scope="module")
def experts():
    """gate, up and down of all experts"""
    return [
        make_experts(out, in_, seed)
        for seed, (out, in_) in enumerate([(WIDTH, HIDDEN), (WIDTH, HIDDEN), (HIDDEN, WIDTH)])
    ]


@pytest.fixture(scope="module")
def routed():
    logits = torch.randn(TOKENS, EXPERTS, generator=torch.Generator().manual_seed(1))
    ids, weights = ops.moe_route(logits, None, topk=TOPK)
    return logits, ids, weights, ops.moe_dispatch(ids, EXPERTS)


def calls(experts, routed):
    """op name -> (operator's arguments, the same call of ops)"""
    logits, ids, weights, d = routed
    gate, up, down = experts
    x, rows = make_x(TOKENS, HIDDEN), make_x(TOKENS * TOPK, HIDDEN)
    inner = make_x(TOKENS * TOPK, WIDTH, FP32)
    int4, int8 = make_int4(7, HIDDEN).int4(), make_int8(7, HIDDEN).int8()
    quantized = ops.int4_quantize(x)
    bias, weight, heads = (
        torch.rand(EXPERTS),
        make_x(7, HIDDEN),
        make_x(9, HIDDEN).view(3, 3, HIDDEN),
    )
    q, cache = torch.randn(2, 3, 48), make_x(12, 48).view(3, 4, 48)
    table = torch.tensor([[2, 0], [1, 0]], dtype=torch.int32)
    lens = torch.tensor([7, 3], dtype=torch.int32)
    route = {"topk": TOPK, "scoring": "softmax", "routed_scaling_factor": 2.5}
    latent = {"kv_lora_rank": 32, "softmax_scale": 0.125}
    index, offsets = d.token_index, d.expert_offsets
    wide = {"out_dtype": FP32}
    return {
        "moe_route": ((logits, bias), route, ops.moe_route(logits, bias, **route)),
        "moe_dispatch": ((ids, EXPERTS), {}, (index, d.row_index, offsets)),
        "moe_combine": ((rows, d.row_index, weights, x), {}, ops.moe_combine(rows, d, weights, x)),
        "int4_grouped_swiglu": (
            (x, index, offsets, expert_handle(gate), expert_handle(up)),
            wide,
            ops.int4_grouped_swiglu(x, d, gate, up, **wide),
        ),
        "int4_grouped_gemm": (
            (inner, index, offsets, expert_handle(down)),
            {"out_dtype": BF16},
            ops.int4_grouped_gemm(inner, d, down, out_dtype=BF16),
        ),
        "int4_gemm": (
            (x, int4.weight_packed, int4.weight_scale),
            wide,
            ops.int4_gemm(x, int4, **wide),
        ),
        "int4_quantize": ((x,), {}, (quantized.weight_packed, quantized.weight_scale)),
        "int8_gemm": ((x, int8.weight, int8.weight_scale), {}, ops.int8_gemm(x, int8)),
        "bf16_gemm": ((heads, heads), wide, ops.bf16_gemm(heads, heads, **wide)),
        "mla_decode": (
            (q, cache, table, lens),
            latent,
            ops.mla_decode(q, cache, table, lens, **latent),
        ),
        "rms_norm": ((x, weight[0]), {"eps": 1e-6}, ops.rms_norm(x, weight[0], eps=1e-6)),
        "swiglu": ((x, x), {}, ops.swiglu(x, x)),
        "add_rms_norm": (
            (x, x, weight[0]),
            {"eps": 1e-6},
            ops.add_rms_norm(x, x, weight[0], eps=1e-6),
        ),
        "rope_append": (rope_arguments(), {}, ()),  # what it writes has a test of its own
    }


def rope_arguments():
    """q, latent, k_rope, cos, sin, slots, cache, q_out"""
    g = torch.Generator().manual_seed(5)
    q, latent, k_rope = (torch.randn(*s, generator=g) for s in ((2, 3, 8), (2, 16), (2, 8)))
    angle = torch.rand(2, 4, generator=g)
    slots = torch.tensor([7, 2])
    return (
        q,
        latent,
        k_rope,
        angle.cos(),
        angle.sin(),
        slots,
        torch.zeros(3, 4, 24),
        torch.zeros(2, 3, 8),
    )


@pytest.mark.parametrize("name", ops.__all__)
def test_operator_is_its_op_and_tells_the_compiler_the_truth(name, experts, routed):
    args, kwargs, expected = calls(experts, routed)[name]
    operator = getattr(torch.ops.kimi_native, name).default
    actual = operator(*args, **kwargs)
    single = isinstance(actual, torch.Tensor)
    pairs = [(actual, expected)] if single else zip(actual or (), expected, strict=True)
    for a, e in pairs:
        assert a.dtype == e.dtype
        assert torch.equal(a, e)
    # schema (nothing written or aliased), fake shapes and dtypes, and a trace with symbolic sizes
    report = torch.library.opcheck(operator, args, kwargs)
    assert set(report.values()) == {"SUCCESS"}


@pytest.mark.parametrize("device", ["CPU", "CUDA"])
@pytest.mark.parametrize("name", ops.__all__)
def test_operator_is_there_for_the_tensors_of(name, device):
    assert torch._C._dispatch_has_kernel_for_dispatch_key(f"kimi_native::{name}", device)


def test_rope_append_operator_writes_cache_and_queries_compiled_too():
    expected, eager, compiled = (rope_arguments() for _ in range(3))
    ops.rope_append(*expected)
    assert torch.ops.kimi_native.rope_append(*eager) is None
    run = torch.compile(torch.ops.kimi_native.rope_append, fullgraph=True, backend="aot_eager")
    run(*compiled)
    for tensors in (eager, compiled):
        for a, e in zip(tensors, expected, strict=True):
            assert torch.equal(a, e)
    assert expected[6].count_nonzero() == 2 * 24


def test_operators_raise_the_errors_of_their_ops():
    with pytest.raises(ValueError, match=r"swiglu: up must be \[2, 4\]"):
        torch.ops.kimi_native.swiglu(torch.zeros(2, 4), torch.zeros(2, 5))
    with pytest.raises(TypeError, match="Int4Weight: weight_packed must be"):
        torch.ops.kimi_native.int4_gemm(torch.zeros(1, 32), torch.zeros(4, 4), torch.zeros(4, 1))


def test_handle_is_one_per_object_and_dies_with_it(routed):
    down = make_experts(HIDDEN, WIDTH, 9)
    handle = expert_handle(down)
    assert expert_handle(down) == handle
    other = make_experts(HIDDEN, WIDTH, 9)
    assert expert_handle(other) != handle
    del down
    gc.collect()
    x, d = make_x(TOKENS * TOPK, WIDTH), routed[3]
    call = torch.ops.kimi_native.int4_grouped_gemm
    call(x, d.token_index, d.expert_offsets, expert_handle(other))
    with pytest.raises(
        ValueError, match=rf"int4_grouped_gemm: a handle must be .*\(got {handle}\)"
    ):
        call(x, d.token_index, d.expert_offsets, handle)


def test_moe_layer_compiles_to_one_graph_with_the_same_bits(experts):
    gate, up, down = map(expert_handle, experts)
    router = make_x(EXPERTS, HIDDEN, seed=3)
    kn = torch.ops.kimi_native

    def layer(x):
        logits = kn.bf16_gemm(x, router, out_dtype=FP32)
        ids, weights = kn.moe_route(logits, None, topk=TOPK)
        token_index, row_index, offsets = kn.moe_dispatch(ids, EXPERTS)
        inner = kn.int4_grouped_swiglu(x, token_index, offsets, gate, up)
        rows = kn.int4_grouped_gemm(inner, token_index, offsets, down, out_dtype=FP32)
        return x + kn.moe_combine(rows, row_index, weights, out_dtype=x.dtype)

    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager", dynamic=True)
    for tokens in (3, 8):
        x = make_x(tokens, HIDDEN, seed=tokens)
        assert_same_bits(compiled(x), layer(x))
