"""Arguments of a type that no op takes: each is a one-line TypeError naming the op and the argument."""

from __future__ import annotations

import pytest
import torch

from kimi_native import ops
from kimi_native.weights import Int4ExpertWeights, Int4Weight, Int8Weight, MoeDispatch

BF16, I32 = torch.bfloat16, torch.int32


def of(dtype: torch.dtype, *shape: int) -> torch.Tensor:
    return torch.zeros(shape, dtype=dtype)


X = of(BF16, 2, 32)
INT4 = Int4Weight(of(I32, 8, 4), of(BF16, 8, 1))
INT8 = Int8Weight(of(torch.int8, 8, 32), of(BF16, 8, 1))
EXPERTS = Int4ExpertWeights([INT4, INT4])
DISPATCH = MoeDispatch(*(torch.tensor(t, dtype=I32) for t in ([0, 1], [[0], [1]], [0, 1, 2])))
ONE = of(torch.float32, 2, 1)
MLA = (of(BF16, 1, 2, 8), of(BF16, 1, 4, 8), of(I32, 1, 1), of(I32, 1))
ROPE = (of(BF16, 2, 1, 4), of(BF16, 2, 4), of(BF16, 2, 4), of(torch.float32, 2, 2),
        of(torch.float32, 2, 2), torch.arange(2), of(BF16, 1, 2, 8), of(BF16, 2, 1, 4))  # fmt: skip
# op: its arguments, and those of them to replace by something else
CALLS = {
    "moe_route": ((of(torch.float32, 2, 8), of(torch.float32, 8)), {"topk": 2, "n_group": 2, "topk_group": 1,
                  "norm_topk_prob": True, "routed_scaling_factor": 1.0}, ["logits", "correction_bias"]),
    "moe_dispatch": ((of(I32, 2, 1),), {"experts": 2}, ["topk_ids"]),
    "moe_combine": ((X, DISPATCH, ONE, X), {}, ["rows", "dispatch", "topk_weights", "shared"]),
    "int4_gemm": ((X, INT4), {}, ["x", "weight"]),
    "int4_grouped_gemm": ((X, DISPATCH, EXPERTS), {}, ["x", "dispatch", "weights"]),
    "int4_grouped_swiglu": ((X, DISPATCH, EXPERTS, EXPERTS), {}, ["x", "dispatch", "gate", "up"]),
    "int4_quantize": ((X,), {"out": Int4Weight(of(I32, 2, 4), of(BF16, 2, 1))}, ["w"]),
    "int8_gemm": ((X, INT8), {}, ["x", "weight"]),
    "bf16_gemm": ((X, of(BF16, 8, 32)), {"out": of(BF16, 2, 8)}, ["x", "weight"]),
    "mla_decode": (MLA, {"kv_lora_rank": 4, "softmax_scale": 0.1}, ["q", "cache", "page_table", "seq_lens"]),
    "rms_norm": ((X, of(BF16, 32)), {"eps": 1e-6}, ["x", "weight"]),
    "add_rms_norm": ((X, X, of(BF16, 32)), {"eps": 1e-6}, ["x", "residual", "weight"]),
    "rope_append": (ROPE, {}, ["q", "latent", "k_rope", "cos", "sin", "slots", "cache", "q_out"]),
    "swiglu": ((X, X), {}, ["gate", "up"]),
}  # fmt: skip


def test_every_op_is_called_here():
    assert set(CALLS) == set(ops.__all__)


@pytest.mark.parametrize("op", CALLS)
def test_op_takes_what_the_other_tests_replace(op):
    tensors, options, _ = CALLS[op]
    getattr(ops, op)(*tensors, **options)


def named_type_error(op: str, name: str, *tensors: object, **options: object) -> None:
    with pytest.raises(TypeError, match=rf"^{op}: {name} must be ") as error:
        getattr(ops, op)(*tensors, **options)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("bad", [[1], "a", 1.5], ids=repr)
@pytest.mark.parametrize("op", CALLS)
def test_op_refuses_what_is_no_tensor_by_name(op, bad):
    tensors, options, names = CALLS[op]
    for i, name in enumerate(names):
        named_type_error(op, name, *tensors[:i], bad, *tensors[i + 1 :], **options)


@pytest.mark.parametrize("bad", [[1], "a", None], ids=repr)
@pytest.mark.parametrize("op", CALLS)
def test_op_refuses_a_bad_option_by_name(op, bad):
    tensors, options, _ = CALLS[op]
    for name in options.keys() - ({"out"} if bad is None else set()):
        named_type_error(op, name, *tensors, **options | {name: bad})


@pytest.mark.parametrize(
    ("function", "name", "bad"),
    [("set_num_threads", "n", "a"), ("set_num_threads", "n", 1.5), ("force_isa", "name", None)],
)
def test_setting_refuses_another_type_by_name(function, name, bad):
    named_type_error(function, name, bad)
