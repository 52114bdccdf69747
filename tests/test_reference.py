"""The specification itself: reference.py against hand-computed cases and independent formulations.

Everything here runs in float64, so two right formulas agree to about 1e-12 and nothing needs a wider tolerance.
"""

from __future__ import annotations

import math

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention, silu

from kimi_native import reference

F64 = torch.float64


def randn(*shape, seed=0):
    return torch.randn(*shape, dtype=F64, generator=torch.Generator().manual_seed(seed))


def assert_equal_float64(actual, expected):
    assert actual.dtype == F64
    torch.testing.assert_close(actual, expected, rtol=1e-11, atol=1e-12)


# ---- quantized formats ----------------------------------------------------------------------------------------------


def test_dequantize_int4_worked_examples():
    """Two published words: the lowest nibble is the lowest column, and a word may be negative."""
    words = torch.tensor([[1605994256], [-405270620]], dtype=torch.int32)
    one = torch.ones(2, 1, dtype=torch.bfloat16)
    assert reference.dequantize_int4(words, one).tolist() == [
        [-8, -7, -1, 0, 1, 3, 7, -3],
        [-4, 2, 7, -8, 0, 5, -1, 6],
    ]
    scale = torch.tensor([[0.0123291015625]], dtype=torch.bfloat16)
    assert reference.dequantize_int4(words[:1], scale).tolist() == [
        [
            -0.0986328125,
            -0.0863037109375,
            -0.0123291015625,
            0.0,
            0.0123291015625,
            0.0369873046875,
            0.0863037109375,
            -0.0369873046875,
        ]
    ]


def test_dequantize_int4_reads_the_bytes_low_nibble_first():
    data = torch.tensor([0x10, 0x87, 0xB9, 0x5F], dtype=torch.uint8)
    one = torch.ones(1, 1, dtype=torch.bfloat16)
    values = reference.dequantize_int4(data.view(torch.int32)[None], one)
    assert values.tolist() == [[-8, -7, -1, 0, 1, 3, 7, -3]]


def test_dequantize_int4_scale_covers_32_columns():
    words = torch.full((1, 8), 0x11111111 * 9 - 2**32, dtype=torch.int32)  # every nibble 9: q = 1
    values = reference.dequantize_int4(words, torch.tensor([[0.5, -2.0]], dtype=torch.bfloat16))
    assert values.tolist() == [[0.5] * 32 + [-2.0] * 32]


def test_dequantize_int8_scale_covers_32_columns():
    weight = torch.arange(-32, 32, dtype=torch.int8)[None]
    values = reference.dequantize_int8(weight, torch.tensor([[0.5, 2.0]], dtype=torch.bfloat16))
    assert values.tolist() == [[0.5 * q for q in range(-32, 0)] + [2.0 * q for q in range(32)]]


def make_int4(out, in_, seed):
    generator = torch.Generator().manual_seed(seed)
    words = torch.randint(-(2**31), 2**31, (out, in_ // 8), generator=generator).to(torch.int32)
    return words, randn(out, in_ // 32, seed=seed)


def entry(weight, o, i):
    """One dequantized entry in plain Python."""
    words, scale = weight
    return ((int(words[o, i // 8]) >> 4 * (i % 8) & 15) - 8) * float(scale[o, i // 32])


def test_int4_gemm_is_a_sum_of_products():
    x, weight = randn(2, 64), make_int4(3, 64, seed=1)
    expected = [
        [sum(float(x[t, i]) * entry(weight, o, i) for i in range(64)) for o in range(3)]
        for t in range(2)
    ]
    actual = reference.int4_gemm(x, *weight, out_dtype=F64)
    assert_equal_float64(actual, torch.tensor(expected, dtype=F64))


def test_int8_gemm_hand_case():
    weight = torch.tensor([[1] * 32, [-2] * 32], dtype=torch.int8)
    scale = torch.tensor([[0.5], [0.25]], dtype=torch.bfloat16)
    y = reference.int8_gemm(torch.full((1, 32), 3.0), weight, scale, out_dtype=torch.float32)
    assert y.tolist() == [[48.0, -48.0]]


def test_int4_quantize_hand_case():
    """The largest is 14, so the scale is 2: halves of it go to the even neighbor, whole ones are kept."""
    w = torch.zeros(1, 32, dtype=torch.bfloat16)
    w[0, :8] = torch.tensor([14.0, -14.0, 1.0, 3.0, -5.0, 0.99, -2.0, 8.0])
    packed, scale = reference.int4_quantize(w)
    assert scale.tolist() == [[2.0]]
    q = [7, -7, 0, 2, -2, 0, -1, 4]
    assert int(packed[0, 0]) % 2**32 == sum((v + 8) << 4 * k for k, v in enumerate(q))
    assert packed[0, 1:].tolist() == [0x88888888 - 2**32] * 3
    with pytest.raises(ValueError, match=r"must be finite \(got .* in 1 groups of 32\)"):
        reference.int4_quantize(torch.tensor([[1.0] * 63 + [torch.nan]]))


def test_bf16_gemm_per_head_is_an_einsum():
    x, weight = randn(3, 4, 8), randn(4, 5, 8, seed=1)
    expected = torch.einsum("thi,hoi->tho", x, weight)
    assert_equal_float64(reference.bf16_gemm(x, weight, out_dtype=F64), expected)
    flat = reference.bf16_gemm(x[:, 0], weight[0], out_dtype=F64)
    assert_equal_float64(flat, expected[:, 0])


def test_int4_grouped_ops_apply_each_rows_expert():
    experts, x = 4, randn(5, 32)
    topk_ids = torch.tensor([[0, 3], [3, 0], [0, 1], [3, 1], [1, 0]])  # nobody chooses expert 2
    token_index, row_index, offsets = reference.moe_dispatch(topk_ids, experts)
    gate, up = ([make_int4(32, 32, seed=10 * s + e) for e in range(experts)] for s in (1, 2))
    down = [make_int4(6, 32, seed=30 + e) for e in range(experts)]
    hidden = reference.int4_grouped_swiglu(x, token_index, offsets, gate, up, out_dtype=F64)
    y = reference.int4_grouped_gemm(hidden, offsets, down, out_dtype=F64)
    for t in range(5):
        for slot in range(2):
            e = int(topk_ids[t, slot])
            dense = [reference.dequantize_int4(*w[e]) for w in (gate, up, down)]
            h = silu(x[t] @ dense[0].T) * (x[t] @ dense[1].T)
            assert_equal_float64(hidden[row_index[t, slot]], h)
            assert_equal_float64(y[row_index[t, slot]], h @ dense[2].T)


def test_int4_grouped_ops_without_rows():
    none = torch.empty(0, dtype=torch.int32)
    offsets = torch.zeros(3, dtype=torch.int32)
    weights = [make_int4(6, 32, seed=e) for e in range(2)]
    y = reference.int4_grouped_gemm(randn(0, 32), offsets, weights, out_dtype=F64)
    assert y.shape == (0, 6)
    y = reference.int4_grouped_swiglu(randn(4, 32), none, offsets, weights, weights, out_dtype=F64)
    assert y.shape == (0, 6)


# ---- experts --------------------------------------------------------------------------------------------------------


def test_moe_route_hand_case():
    logits = torch.tensor([[0.0, math.log(3.0), -math.log(3.0), 0.0]], dtype=F64)
    bias = torch.tensor([0.0, 0.0, 1.0, 0.0])
    ids, weights = reference.moe_route(logits, bias, topk=2, routed_scaling_factor=2.0)
    assert ids.tolist() == [[2, 1]]  # scores 1/2 3/4 1/4 1/2; the bias lifts expert 2 to 1.25
    assert_equal_float64(weights, torch.tensor([[0.5, 1.5]], dtype=F64))  # 1/4 and 3/4, times two


def test_moe_route_softmax_hand_case():
    logits = torch.tensor([[1.0, 2.0, 3.0, 4.0]], dtype=F64).log()  # probabilities 0.1 0.2 0.3 0.4
    options = {"scoring": "softmax", "norm_topk_prob": False}
    ids, weights = reference.moe_route(logits, None, topk=3, **options)
    assert ids.tolist() == [[3, 2, 1]]
    assert_equal_float64(weights, torch.tensor([[0.4, 0.3, 0.2]], dtype=F64))


def test_moe_route_group_hand_case():
    # Biased scores: group 0 = (0.9, 0.1), group 1 = (0.6, 0.5): the best entry is in 0, the best pair in 1.
    scores = torch.tensor([[0.9, 0.1, 0.6, 0.5]], dtype=F64)
    options = {"topk": 2, "n_group": 2, "topk_group": 1, "norm_topk_prob": False}
    ids, _ = reference.moe_route(scores.logit(), None, group_score="top2_sum", **options)
    assert ids.tolist() == [[2, 3]]
    ids, _ = reference.moe_route(scores.logit(), None, group_score="max", **options)
    assert ids.tolist() == [[0, 1]]


def test_moe_route_weights_are_differentiable():
    logits = randn(3, 6).requires_grad_()
    bias = randn(6, seed=1)
    assert torch.autograd.gradcheck(
        lambda x: reference.moe_route(x, bias, topk=2, routed_scaling_factor=2.5)[1], (logits,)
    )


def test_moe_dispatch_hand_case():
    token_index, row_index, offsets = reference.moe_dispatch(
        torch.tensor([[2, 0], [0, 3], [2, 3]]), 5
    )
    assert offsets.tolist() == [0, 2, 2, 4, 6, 6]
    assert token_index.tolist() == [0, 1, 0, 2, 1, 2]
    assert row_index.tolist() == [[2, 0], [1, 4], [3, 5]]


@pytest.mark.parametrize("bad", [-1, 5])
def test_moe_dispatch_refuses_an_id_out_of_range(bad):
    with pytest.raises(ValueError, match="topk_ids must be in"):
        reference.moe_dispatch(torch.tensor([[0, bad]]), 5)


def test_moe_combine_hand_case():
    rows = torch.tensor([[1.0, 2.0], [10.0, 20.0], [100.0, 200.0], [1000.0, 2000.0]])
    row_index, weights = torch.tensor([[3, 0], [1, 2]]), torch.tensor([[0.5, 2.0], [1.0, 0.25]])
    shared = torch.tensor([[0.0, 1.0], [2.0, 3.0]])
    out = reference.moe_combine(rows, row_index, weights, shared, out_dtype=torch.float32)
    assert out.tolist() == [[502.0, 1005.0], [37.0, 73.0]]


def test_moe_layer_equals_the_dense_sum():
    """Dispatch, experts and combine against: every expert on every token, times a dense weight matrix."""
    tokens, experts, topk = 7, 5, 3
    x, logits = randn(tokens, 32), randn(tokens, experts, seed=1)
    ids, weights = reference.moe_route(logits, None, topk=topk)
    token_index, row_index, offsets = reference.moe_dispatch(ids, experts)
    down = [make_int4(4, 32, seed=e) for e in range(experts)]
    rows = reference.int4_grouped_gemm(x[token_index.long()], offsets, down, out_dtype=F64)
    out = reference.moe_combine(rows, row_index, weights, out_dtype=F64)
    share = torch.zeros(tokens, experts, dtype=F64).scatter(1, ids.long(), weights)
    every = torch.stack([x @ reference.dequantize_int4(*w).T for w in down], dim=1)
    assert_equal_float64(out, (share[..., None] * every).sum(1))


# ---- attention and norms --------------------------------------------------------------------------------------------


def test_rms_norm_hand_case():
    x, weight = torch.tensor([[3.0, 4.0]], dtype=F64), torch.tensor([2.0, -1.0], dtype=F64)
    expected = torch.tensor([[6.0, -4.0]], dtype=F64) / math.sqrt(12.5 + 0.5)
    assert_equal_float64(reference.rms_norm(x, weight, eps=0.5), expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_rms_norm_rounds_where_the_published_model_does(dtype):
    from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3RMSNorm

    x, weight = randn(4, 96).to(dtype), randn(96, seed=1).to(torch.bfloat16)
    norm = DeepseekV3RMSNorm(96, eps=1e-5).to(dtype)
    with torch.no_grad():
        norm.weight.copy_(weight)
        assert torch.equal(reference.rms_norm(x, weight, eps=1e-5), norm(x))


def test_add_rms_norm_is_the_norm_of_the_sum():
    x, residual, weight = randn(3, 5), randn(3, 5, seed=1), randn(5, seed=2)
    y, total = reference.add_rms_norm(x, residual, weight, eps=1e-5)
    assert_equal_float64(total, x + residual)
    assert_equal_float64(y, reference.rms_norm(x + residual, weight, eps=1e-5))


def test_rope_append_rotates_as_apply_rope_and_fills_the_cache():
    q, latent, k_rope = randn(3, 2, 8), randn(3, 5, seed=1), randn(3, 8, seed=2)
    positions, inv_freq = torch.tensor([4, 0, 70]), torch.tensor([1.0, 0.3, 0.1, 0.01], dtype=F64)
    angle = positions.double()[:, None] * inv_freq
    cache, q_out = torch.zeros(2, 4, 13, dtype=F64), torch.empty(3, 2, 8, dtype=F64)
    slots = torch.tensor([6, 1, 0])
    reference.rope_append(q, latent, k_rope, angle.cos(), angle.sin(), slots, cache, q_out)
    assert_equal_float64(q_out, reference.apply_rope(q, positions, inv_freq))
    rows = torch.cat([latent, reference.apply_rope(k_rope, positions, inv_freq)], dim=-1)
    assert_equal_float64(cache.view(8, 13)[slots], rows)
    assert (cache.view(8, 13)[[2, 3, 4, 5, 7]] == 0).all()


def test_swiglu_is_silu_times_up():
    gate, up = randn(3, 7), randn(3, 7, seed=1)
    assert_equal_float64(reference.swiglu(gate, up), silu(gate) * up)


INV_FREQ = 50000.0 ** (-torch.arange(0, 8, dtype=F64) / 8)
POSITIONS = torch.tensor([0, 1, 7, 4095, 262143])


def test_apply_rope_turns_complex_numbers():
    x = randn(5, 3, 16)
    turn = torch.polar(torch.full((5, 8), 1.25, dtype=F64), POSITIONS[:, None] * INV_FREQ)
    pairs = torch.view_as_complex(x.view(5, 3, 8, 2)) * turn[:, None]
    expected = torch.view_as_real(pairs).flatten(-2)
    assert_equal_float64(reference.apply_rope(x, POSITIONS, INV_FREQ, 1.25), expected)


def test_apply_rope_hand_case():
    """A quarter turn takes (1, 0) to (0, 1), in adjacent pairs; position 0 changes nothing."""
    x = torch.tensor([[1.0, 0.0, 0.0, 1.0]] * 2, dtype=F64)
    quarter = torch.tensor([math.pi / 2, math.pi / 2], dtype=F64)
    turned = reference.apply_rope(x, torch.tensor([0, 1]), quarter)
    assert_equal_float64(turned, torch.tensor([[1.0, 0, 0, 1], [0, 1, -1, 0]], dtype=F64))


def test_apply_rope_is_the_published_rotation_regrouped():
    from transformers.models.deepseek_v3.modeling_deepseek_v3 import apply_rotary_pos_emb_interleave

    q, k = randn(5, 3, 16), randn(5, 1, 16, seed=1)
    angle = torch.cat([POSITIONS[:, None] * INV_FREQ] * 2, dim=-1)[None]
    q_out, k_out = apply_rotary_pos_emb_interleave(
        q.transpose(0, 1)[None], k.transpose(0, 1)[None], angle.cos(), angle.sin()
    )
    for ours, theirs in ((q, q_out), (k, k_out)):
        turned = reference.apply_rope(ours, POSITIONS, INV_FREQ)
        regrouped = torch.cat([turned[..., 0::2], turned[..., 1::2]], dim=-1)
        assert_equal_float64(regrouped, theirs[0].transpose(0, 1))


def make_attention(queries, tokens, heads=3, nope=8, rope=4, value=6, latent=10):
    return {
        "q": randn(queries, heads, nope + rope),
        "latent": randn(tokens, latent, seed=1),
        "k_rope": randn(tokens, rope, seed=2),
        "kv_b": randn(heads * (nope + value), latent, seed=3),
    }


@pytest.mark.parametrize(("queries", "tokens"), [(1, 1), (5, 5), (1, 9), (3, 9)])
def test_mla_expanded_is_scaled_dot_product_attention(queries, tokens):
    a = make_attention(queries, tokens)
    kv = torch.einsum("tl,hol->hto", a["latent"], a["kv_b"].view(3, 14, 10))
    key = torch.cat([kv[..., :8], a["k_rope"].expand(3, tokens, 4)], dim=-1)
    position = torch.arange(tokens - queries, tokens)[:, None]
    expected = scaled_dot_product_attention(
        a["q"].transpose(0, 1),
        key,
        kv[..., 8:],
        attn_mask=torch.arange(tokens)[None] <= position,
        scale=0.3,
    ).transpose(0, 1)
    actual = reference.mla_expanded(**a, qk_nope_head_dim=8, softmax_scale=0.3)
    assert_equal_float64(actual, expected)


def make_pages(cache, page_size, page_table):
    """The rows of `cache` in pages that page_table names; everything else is NaN."""
    pages = torch.full((max(page_table) + 2, page_size, cache.shape[1]), math.nan, dtype=F64)
    for i, page in enumerate(page_table):
        rows = cache[i * page_size : (i + 1) * page_size]
        pages[page, : len(rows)] = rows
    return pages


@pytest.mark.parametrize("tokens", [1, 3, 4, 5, 11])
def test_mla_decode_absorbed_equals_expanded(tokens):
    """Key rows absorbed into the query, value rows applied to the latent result, give the expanded attention."""
    a = make_attention(1, tokens)
    expected = reference.mla_expanded(**a, qk_nope_head_dim=8, softmax_scale=0.3)
    w_uk, w_uv = a["kv_b"].view(3, 14, 10).split([8, 6], dim=1)
    q_nope, q_rope = a["q"].split([8, 4], dim=-1)
    q = torch.cat([torch.einsum("bhn,hnl->bhl", q_nope, w_uk), q_rope], dim=-1)
    page_table = [4, 1, 2][: -(-tokens // 4)]
    out = reference.mla_decode(
        q,
        make_pages(torch.cat([a["latent"], a["k_rope"]], dim=-1), 4, page_table),
        torch.tensor([page_table + [2**31 - 1] * 2], dtype=torch.int32),  # past the end: never read
        torch.tensor([tokens], dtype=torch.int32),
        kv_lora_rank=10,
        softmax_scale=0.3,
    )
    assert_equal_float64(torch.einsum("bhl,hvl->bhv", out, w_uv), expected)


def test_mla_decode_of_no_tokens_is_zero():
    table = torch.full((2, 1), 2**31 - 1, dtype=torch.int32)
    lengths = torch.zeros(2, dtype=torch.int32)
    cache = torch.full((1, 4, 6), math.nan, dtype=F64)
    options = {"kv_lora_rank": 4, "softmax_scale": 1.0}
    out = reference.mla_decode(randn(2, 3, 6), cache, table, lengths, **options)
    assert torch.equal(out, torch.zeros(2, 3, 4, dtype=F64))


# ---- gradients: training runs the specification ---------------------------------------------------------------------


def check_gradient(f, *inputs):
    assert torch.autograd.gradcheck(f, [x.clone().requires_grad_() for x in inputs])


def test_bf16_gemm_is_differentiable():
    check_gradient(
        lambda x, w: reference.bf16_gemm(x, w, out_dtype=F64), randn(2, 3), randn(4, 3, seed=1)
    )
    check_gradient(
        lambda x, w: reference.bf16_gemm(x, w, out_dtype=F64), randn(2, 3, 4), randn(3, 2, 4)
    )


def test_int4_gemm_is_differentiable_in_x_and_scale():
    words, scale = make_int4(3, 32, seed=1)
    check_gradient(
        lambda x, s: reference.int4_gemm(x, words, s, out_dtype=F64), randn(2, 32), scale
    )


def test_rms_norm_is_differentiable():
    check_gradient(lambda x, w: reference.rms_norm(x, w, eps=1e-5), randn(3, 5), randn(5, seed=1))


def test_swiglu_is_differentiable():
    check_gradient(reference.swiglu, randn(2, 3), randn(2, 3, seed=1))


def test_apply_rope_is_differentiable():
    check_gradient(lambda x: reference.apply_rope(x, POSITIONS[:2], INV_FREQ[:2]), randn(2, 2, 4))


def test_mla_expanded_is_differentiable():
    a = make_attention(2, 3, heads=2, nope=3, rope=2, value=2, latent=4)
    check_gradient(
        lambda *inputs: reference.mla_expanded(*inputs, qk_nope_head_dim=3, softmax_scale=0.5),
        *a.values(),
    )


def test_moe_combine_is_differentiable():
    row_index = torch.tensor([[2, 0], [1, 3]])
    check_gradient(
        lambda rows, weights, shared: reference.moe_combine(
            rows, row_index, weights, shared, out_dtype=F64
        ),
        randn(4, 3),
        randn(2, 2, seed=1),
        randn(2, 3, seed=2),
    )
