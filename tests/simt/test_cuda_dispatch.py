"""ops.py on the CUDA kernels: what a GPU's tensors would take, with the shim's library and CPU tensors in their place.

The numbers are the other tests' business; here every op must hand the same arguments to the same kernel.
"""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

import test_cuda_bf16_gemm
import test_cuda_int4_gemm
import test_cuda_int4_grouped
import test_cuda_ops
from grouped import make_dispatch, make_experts
from kimi_native import native, ops, reference
from kimi_native.quant.tiles import tile_int4
from kimi_native.weights import Int4ExpertWeights
from oracle import make_int4, make_x
from oracle_dense import assert_same_bits, randn
from simt import library_path, simt_only
from simt_ops import run_op

BF16, FP32 = torch.bfloat16, torch.float32
pytestmark = simt_only


@pytest.fixture(autouse=True)
def on_host():
    with native.cuda_on_host(library_path()):
        yield


def test_cuda_dispatch_small_ops():
    x, residual, weight = (
        randn(3, 96, dtype=BF16),
        randn(3, 96, seed=1, dtype=BF16),
        randn(96, seed=2, dtype=BF16),
    )
    expected = test_cuda_ops.rms_norm(x + residual, weight)
    y, total = ops.add_rms_norm(x, residual, weight, eps=test_cuda_ops.EPS)
    assert_same_bits(y, expected)
    assert_same_bits(ops.rms_norm(total, weight, eps=test_cuda_ops.EPS), expected)
    gate, up = randn(3, 40, dtype=BF16), randn(3, 40, seed=1, dtype=BF16)
    expected = torch.empty_like(gate)
    run_op("swiglu", gate=gate, up=up, y=expected, dtype=BF16, tokens=3, width=40)
    assert_same_bits(ops.swiglu(gate, up), expected)


def test_cuda_dispatch_routing():
    logits, bias = randn(5, 16, dtype=FP32), randn(16, dtype=FP32, seed=1)
    ids, weights = ops.moe_route(logits, bias, topk=3, n_group=4, topk_group=2)
    rows = randn(15, 24, dtype=FP32, seed=3)
    dispatch = ops.moe_dispatch(ids, 16)
    combined = ops.moe_combine(rows, dispatch, weights, out_dtype=BF16)
    with ops.backend("reference"):
        expected_ids, expected_weights = ops.moe_route(
            logits, bias, topk=3, n_group=4, topk_group=2
        )
        expected_dispatch = ops.moe_dispatch(ids, 16)
    expected = reference.moe_combine(
        rows.double(), dispatch.row_index, weights, None, out_dtype=torch.float64
    )
    assert torch.equal(ids, expected_ids)
    assert_same_bits(dispatch.token_index, expected_dispatch.token_index)
    assert_same_bits(dispatch.row_index, expected_dispatch.row_index)
    assert_same_bits(dispatch.expert_offsets, expected_dispatch.expert_offsets)
    assert (weights - expected_weights).abs().max() < 2**-20
    assert ((combined - expected).abs() <= 2**-8 * expected.abs() + 1e-5).all()


def test_cuda_dispatch_matrices():
    x, w = make_x(3, 160, BF16), make_int4(35, 160)
    y = ops.int4_gemm(x, tile_int4(w.int4(), "cpu"), out_dtype=FP32)
    packed = test_cuda_int4_gemm.int4_pack(w)
    assert_same_bits(y, test_cuda_int4_gemm.int4_gemm(x, packed, 35, y_dtype=FP32))
    x, w = randn(5, 3, 72, dtype=BF16), randn(3, 17, 72, seed=1, dtype=BF16)
    assert_same_bits(ops.bf16_gemm(x, w, out_dtype=FP32), test_cuda_bf16_gemm.bf16_gemm(x, w))
    dense, matrix = x[:, 0], w[0]
    out = torch.zeros(5, 40)[:, 3:20]
    assert_same_bits(
        ops.bf16_gemm(dense, matrix, out=out),
        test_cuda_bf16_gemm.bf16_gemm(dense[:, None], matrix[None])[:, 0],
    )


def test_cuda_dispatch_experts():
    counts, out, in_ = (0, 5, 1, 0, 9), 35, 160
    experts = make_experts(len(counts), out, in_)
    x, dispatch = make_x(11, in_, BF16), make_dispatch(counts, 11)
    weights = Int4ExpertWeights([tile_int4(w.int4(), "cpu") for w in experts])
    packed = [test_cuda_int4_gemm.int4_pack(w) for w in experts]
    tiles, scales = [p[0] for p in packed], [p[1] for p in packed]
    run = test_cuda_int4_grouped.run_grouped
    halves = {"gate_packed": tiles, "gate_scale": scales, "up_packed": tiles, "up_scale": scales}
    expected = run("int4_grouped_swiglu", x, dispatch, halves, out, y_dtype=BF16)
    assert_same_bits(ops.int4_grouped_swiglu(x, dispatch, weights, weights), expected)
    rows = x[dispatch.token_index.long()].contiguous()
    down = {"weight_packed": tiles, "weight_scale": scales}
    expected = run("int4_grouped_gemm", rows, dispatch, down, out, y_dtype=FP32, indexed=False)
    assert_same_bits(ops.int4_grouped_gemm(rows, dispatch, weights, out_dtype=FP32), expected)


def test_cuda_dispatch_refuses_the_layout_of_the_cpu():
    w = make_int4(16, 64).int4()
    with pytest.raises(ValueError, match=r"int4_gemm: weights must be tiles on this device"):
        ops.int4_gemm(make_x(1, 64, BF16), w)


def test_cuda_dispatch_says_which_kernel_is_missing():
    with pytest.raises(RuntimeError, match="int4_quantize: there is no CUDA kernel yet"):
        ops.int4_quantize(randn(4, 32, dtype=BF16))


def test_cuda_dispatch_leaves_the_package_with_its_own_library():
    inside = ops.cuda_library()
    with native.cuda_on_host(library_path()):
        assert ops.cuda_library() == {"architectures": ["none"], "error": ""}
    assert ops.cuda_library() != inside


def test_cuda_dispatch_passes_the_kernels_error_on():
    with pytest.raises(ValueError, match="moe_dispatch: experts must be 1 to 4096 on a GPU"):
        ops.moe_dispatch(torch.zeros(1, 1, dtype=torch.int32), 5000)


def test_cuda_dispatch_refuses_tensors_of_two_devices():
    here, there = randn(3, 96, dtype=BF16), SimpleNamespace(device=torch.device("cuda:1"))
    with pytest.raises(
        RuntimeError, match=r"rms_norm: tensors must be on one device \(got cpu and cuda:1\)"
    ):
        native.call("rms_norm", (here, None, there))
