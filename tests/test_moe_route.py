"""moe_route against the naive reference in float64, hand cases and the published model's own routers."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kimi_native import _native, ops, reference

K2 = {"topk": 8, "routed_scaling_factor": 2.827}
MOONLIGHT = {"topk": 6, "routed_scaling_factor": 2.446}
V3 = {"topk": 8, "n_group": 8, "topk_group": 4, "routed_scaling_factor": 2.5}
V2_LITE = {"topk": 6, "scoring": "softmax", "norm_topk_prob": False}
V2 = {
    "topk": 6,
    "scoring": "softmax",
    "norm_topk_prob": False,
    "n_group": 8,
    "topk_group": 3,
    "group_score": "max",
    "routed_scaling_factor": 16.0,
}
CASES = {
    "k2": (384, True, K2),
    "moonlight": (64, True, MOONLIGHT),
    "v3": (256, True, V3),
    "v2_lite": (64, False, V2_LITE),
    "v2": (160, False, V2),
    "softmax_norm": (64, False, {"topk": 4, "scoring": "softmax"}),
    "one_expert": (1, True, {"topk": 1}),
    "every_expert": (37, True, {"topk": 37}),
    "top1_is_not_normalised": (9, True, {"topk": 1, "routed_scaling_factor": 3.0}),
    "groups_of_one": (8, True, {"topk": 3, "n_group": 8, "topk_group": 3}),
    "every_group": (12, True, {"topk": 5, "n_group": 3, "topk_group": 3}),
    "most_experts": (4096, True, {"topk": 16}),
}


def clear_rows(logits, bias, options):
    """Which rows' choice cannot depend on fp32 rounding: no two scores, or group scores, nearly equal in float64."""
    scores = (
        torch.softmax(logits.double(), -1)
        if options.get("scoring") == "softmax"
        else torch.sigmoid(logits.double())
    )
    choice = scores if bias is None else scores + bias.double()
    n_group, topk = options.get("n_group", 1), options["topk"]

    def clear(x, k):
        top = x.sort(dim=-1, descending=True).values[:, : k + 1]
        return ((top[:, :-1] - top[:, 1:]) > 2e-6 * top.abs().amax(-1, keepdim=True)).all(-1)

    if n_group == 1:
        return clear(choice, topk)
    groups = choice.view(len(choice), n_group, -1)
    best = groups.topk(
        min(2, groups.shape[-1]) if options.get("group_score") != "max" else 1
    ).values
    return clear(choice, choice.shape[1]) & clear(best.sum(-1), n_group)


def make_case(name, tokens, seed=0):
    experts, has_bias, options = CASES[name]
    generator = torch.Generator().manual_seed(seed)
    bias = 0.1 * torch.randn(experts, generator=generator) if has_bias else None
    logits = 1.5 * torch.randn(8 * tokens + 64, experts, generator=generator)
    logits = logits[clear_rows(logits, bias, options)][:tokens]
    assert len(logits) == tokens, "too few rows are clear of rounding"
    return logits, bias, options


def bound_weights(logits, weights, options):
    """|error| of fp32 weights (weights in float64).

    A score: exp to 2**-23 of itself, its argument to 2**-24 of the row's range (softmax), and up to 4 operations of
    2**-24. The sum adds topk operations; quotient and scaling two more; scores enter twice. Below the normal range the
    error is absolute.
    """
    spread = float(logits.max() - logits.min()) if options.get("scoring") == "softmax" else 0.0
    operations = 2 * (6 + spread) + options["topk"] + 2
    return operations * 2**-24 * weights.abs() + 2**-126


def assert_routes_alike(logits, bias, options):
    ids, weights = ops.moe_route(logits, bias, **options)
    expected_ids, expected = reference.moe_route(
        logits.double(), None if bias is None else bias.double(), **options
    )
    assert ids.dtype == torch.int32
    assert torch.equal(ids, expected_ids)
    error, bound = (weights.double() - expected).abs(), bound_weights(logits, expected, options)
    assert (error <= bound).all(), f"worst {(error / bound).max():.2f} of the bound"


@pytest.mark.parametrize("tokens", [1, 15, 16, 17, 40])
@pytest.mark.parametrize("name", CASES)
def test_moe_route_matches_reference(name, tokens):
    if name == "most_experts" and tokens > 17:
        tokens = 17
    assert_routes_alike(*make_case(name, tokens))


@pytest.mark.parametrize(("experts", "topk", "factor"), [(384, 8, 2.827), (64, 6, 2.446)])
def test_moe_route_weights_sum_to_the_scaling_factor(experts, topk, factor):
    logits = torch.randn(32, experts, generator=torch.Generator().manual_seed(1))
    _, weights = ops.moe_route(logits, None, topk=topk, routed_scaling_factor=factor)
    torch.testing.assert_close(
        weights.double().sum(-1), torch.full((32,), factor, dtype=torch.float64), rtol=1e-6, atol=0
    )


def test_moe_route_hand_case():
    logits = torch.tensor([[0.0, math.log(3.0), -math.log(3.0), 0.0]])  # scores 1/2, 3/4, 1/4, 1/2
    bias = torch.tensor([0.0, 0.0, 1.0, 0.0])
    ids, weights = ops.moe_route(logits, bias, topk=2, routed_scaling_factor=2.0)
    assert ids.tolist() == [[2, 1]]  # biased 1.25 and 0.75
    torch.testing.assert_close(weights, torch.tensor([[0.5, 1.5]]))  # unbiased 1/4 and 3/4


# ---- ties, infinities, NaN ------------------------------------------------------------------------------------------


def test_moe_route_ties_go_to_the_lowest_index():
    logits = torch.zeros(3, 50)
    logits[1, [7, 20, 33, 49]] = 1.0
    logits[2, 3:] = -0.0  # the same score as +0
    ids, _ = ops.moe_route(logits, None, topk=6)
    assert ids.tolist() == [[0, 1, 2, 3, 4, 5], [7, 20, 33, 49, 0, 1], [0, 1, 2, 3, 4, 5]]


def test_moe_route_tied_groups_go_to_the_lowest_index():
    options = {"topk": 3, "n_group": 4, "topk_group": 2}
    logits = torch.zeros(2, 8)
    logits[1, 6:] = 1.0
    ids, _ = ops.moe_route(logits, None, **options)
    assert ids.tolist() == [[0, 1, 2], [6, 7, 0]]


def test_moe_route_bias_of_minus_infinity_switches_an_expert_off():
    logits, bias, options = make_case("k2", 20)
    bias[::2] = -math.inf
    ids, weights = ops.moe_route(logits, bias, **options)
    assert (ids % 2 == 1).all()
    assert weights.isfinite().all()
    assert torch.equal(ids, reference.moe_route(logits.double(), bias.double(), **options)[0])


def test_moe_route_bias_of_plus_infinity_always_wins():
    logits, bias, options = make_case("k2", 20)
    bias[[300, 17]] = math.inf
    ids, weights = ops.moe_route(logits, bias, **options)
    assert (ids[:, :2] == torch.tensor([17, 300])).all()
    assert weights.isfinite().all()


@pytest.mark.parametrize("scoring", ["sigmoid", "softmax"])
@pytest.mark.parametrize("norm", [True, False])
def test_moe_route_takes_huge_logits(scoring, norm):
    logits = torch.tensor(
        [
            [1e30, -1e30, 50.0, 60.0, -87.0, -100.0, 0.0],
            [-1e38, 3e38, 2e38, 1e38, -3e38, 0.0, 1.0],
            [-95.0, -90.0, -85.0, -80.0, -100.0, -89.0, -91.0],
            [-math.inf, 5.0, -math.inf, 4.0, 3.0, -200.0, -300.0],
        ]
    )
    options = {"topk": 4, "scoring": scoring, "norm_topk_prob": norm}
    ids, weights = ops.moe_route(logits, None, **options)
    expected_ids, expected = reference.moe_route(logits.double(), None, **options)
    # fp32 cannot tell scores below 2**-149 from zero; float64 can. Above that the choice must agree.
    chosen = torch.where(expected > 1e-44, expected_ids, -1)
    assert torch.equal(torch.where(expected > 1e-44, ids, -1), chosen)
    assert weights.isfinite().all()
    # A subnormal score carries an absolute error of 2**-149, which 1 / 1e-20 may magnify.
    torch.testing.assert_close(weights.double(), expected, rtol=2e-5, atol=1e-24)


@pytest.mark.parametrize("name", ["k2", "v3", "v2_lite", "v2"])
def test_moe_route_nan_row_gets_nan_weights_and_valid_ids(name):
    logits, bias, options = make_case(name, 20)
    clean_ids, clean_weights = ops.moe_route(logits, bias, **options)
    logits[3, 5] = math.nan
    logits[4] = math.nan
    ids, weights = ops.moe_route(logits, bias, **options)
    assert weights[3:5].isnan().all()
    assert ((ids >= 0) & (ids < logits.shape[1])).all()
    assert all(len(set(row)) == options["topk"] for row in ids.tolist())
    others = [t for t in range(20) if t not in (3, 4)]
    assert torch.equal(ids[others], clean_ids[others])
    assert torch.equal(weights[others], clean_weights[others])


def test_moe_route_nan_ranks_below_every_number():
    logits = torch.tensor([[math.nan, -50.0, math.nan, 2.0, -math.inf]])
    ids, _ = ops.moe_route(logits, None, topk=5)
    assert ids.tolist() == [[3, 1, 4, 0, 2]]


VALUES = [-math.inf, -2.0, -1.0, 0.0, 1.5, 3.0, math.inf, math.nan]


@settings(max_examples=300, deadline=None)
@given(
    st.lists(st.sampled_from(VALUES), min_size=12, max_size=12),
    st.lists(st.sampled_from([0.0, math.inf, -math.inf]), min_size=12, max_size=12),
    st.sampled_from([(1, 1, 12), (2, 1, 6), (3, 2, 5), (4, 3, 9), (6, 1, 2), (12, 4, 3)]),
    st.sampled_from(["sigmoid", "softmax"]),
    st.sampled_from(["top2_sum", "max"]),
)
def test_moe_route_chooses_as_the_reference_on_ties_and_specials(
    logits, bias, groups, scoring, group_score
):
    n_group, topk_group, topk = groups
    options = {
        "topk": topk,
        "n_group": n_group,
        "topk_group": topk_group,
        "scoring": scoring,
        "group_score": group_score,
    }
    logits, bias = torch.tensor([logits]), torch.tensor(bias)
    ids, weights = ops.moe_route(logits, bias, **options)
    expected_ids, expected = reference.moe_route(logits, bias, **options)
    assert torch.equal(ids, expected_ids)
    torch.testing.assert_close(weights, expected, rtol=1e-5, atol=0, equal_nan=True)


# ---- the published model's routers ----------------------------------------------------------------------------------


def assert_same_choice(ids, weights, expected_ids, expected_weights):
    """The same experts with the same weights, in any order."""
    ids, order = ids.long().sort(dim=-1)
    expected_ids, expected_order = expected_ids.sort(dim=-1)
    assert torch.equal(ids, expected_ids)
    torch.testing.assert_close(
        weights.gather(1, order), expected_weights.gather(1, expected_order), rtol=5e-6, atol=0
    )


@pytest.mark.parametrize("name", ["k2", "moonlight", "v3"])
def test_moe_route_agrees_with_the_published_v3_router(name):
    from transformers.models.deepseek_v3 import configuration_deepseek_v3, modeling_deepseek_v3

    logits, bias, options = make_case(name, 32)
    experts = logits.shape[1]
    router = modeling_deepseek_v3.DeepseekV3TopkRouter(
        configuration_deepseek_v3.DeepseekV3Config(
            hidden_size=experts,
            n_routed_experts=experts,
            num_experts_per_tok=options["topk"],
            n_group=options.get("n_group", 1),
            topk_group=options.get("topk_group", 1),
            norm_topk_prob=True,
            routed_scaling_factor=options["routed_scaling_factor"],
        )
    )
    with torch.no_grad():
        router.weight.copy_(torch.eye(experts))  # the hidden state is the logits
        router.e_score_correction_bias.copy_(bias)
        router_logits, expected_weights, expected_ids = router(logits)
    assert torch.equal(router_logits, logits)
    assert_same_choice(*ops.moe_route(logits, bias, **options), expected_ids, expected_weights)


@pytest.mark.parametrize("name", ["v2_lite", "v2"])
def test_moe_route_agrees_with_the_published_v2_router(name):
    from transformers.models.deepseek_v2 import configuration_deepseek_v2, modeling_deepseek_v2

    logits, bias, options = make_case(name, 32)
    experts = logits.shape[1]
    router = modeling_deepseek_v2.DeepseekV2TopkRouter(
        configuration_deepseek_v2.DeepseekV2Config(
            hidden_size=experts,
            n_routed_experts=experts,
            num_experts_per_tok=options["topk"],
            n_group=options.get("n_group", 1),
            topk_group=options.get("topk_group", 1),
            topk_method="group_limited_greedy" if "n_group" in options else "greedy",
            routed_scaling_factor=options.get("routed_scaling_factor", 1.0),
        )
    )
    with torch.no_grad():
        router.weight.copy_(torch.eye(experts))
        _, expected_weights, expected_ids = router(logits)
    assert_same_choice(*ops.moe_route(logits, bias, **options), expected_ids, expected_weights)


# ---- promises -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["k2", "v3", "v2"])
def test_moe_route_row_depends_on_itself_only(name):
    logits, bias, options = make_case(name, 50)
    before = ops.num_threads()
    try:
        results = []
        for threads in (1, 2, 5):
            ops.set_num_threads(threads)
            results.append(ops.moe_route(logits, bias, **options))
    finally:
        ops.set_num_threads(before)
    alone = [ops.moe_route(logits[t : t + 1], bias, **options) for t in range(50)]
    results.append((torch.cat([a[0] for a in alone]), torch.cat([a[1] for a in alone])))
    for ids, weights in results[1:]:
        assert torch.equal(ids, results[0][0])
        assert torch.equal(weights, results[0][1])


def test_moe_route_is_the_same_on_every_tier(isa):
    logits, bias, options = make_case("v3", 20)
    ids, weights = ops.moe_route(logits, bias, **options)
    ops.force_isa("generic")
    generic_ids, generic_weights = ops.moe_route(logits, bias, **options)
    assert torch.equal(ids, generic_ids)
    assert torch.equal(weights, generic_weights)


def test_moe_route_no_tokens():
    ids, weights = ops.moe_route(torch.empty(0, 384), torch.zeros(384), **K2)
    assert ids.shape == weights.shape == (0, 8)


def native_route(
    logits,
    ids,
    weights,
    *,
    tokens=2,
    experts=6,
    topk=2,
    n_group=1,
    topk_group=1,
    scoring=0,
    score=0,
):
    _native.cpu.moe_route(
        logits.data_ptr(),
        0,
        ids.data_ptr(),
        weights.data_ptr(),
        tokens,
        experts,
        topk,
        n_group,
        topk_group,
        scoring,
        score,
        True,
        1.0,
    )


def test_moe_route_writes_its_own_rows_only():
    logits, ids = torch.randn(3, 6), torch.full((4, 2), -7, dtype=torch.int32)
    weights = torch.full((4, 2), math.nan)
    native_route(logits, ids[1:], weights[1:])
    assert (ids[[0, 3]] == -7).all()
    assert weights[[0, 3]].isnan().all()
    assert (ids[1:3] >= 0).all()
    assert weights[1:3].isfinite().all()


BAD_OPTIONS = {
    "topk must be 1 to 6 (got 0)": {"topk": 0},
    "topk must be 1 to 6 (got 7)": {"topk": 7},
    "n_group must divide experts (got n_group=4, experts=6)": {"n_group": 4},
    "n_group must divide experts (got n_group=0, experts=6)": {"n_group": 0},
    "n_group must divide experts (got n_group=12, experts=6)": {"n_group": 12},
    "topk_group must be 1 to 3 (got 4)": {"n_group": 3, "topk_group": 4},
    "topk_group must be 1 to 3 (got 0)": {"n_group": 3, "topk_group": 0},
    "the kept groups must hold at least topk experts (got topk=3, topk_group=1 groups of 2)": {
        "n_group": 3,
        "topk": 3,
    },
    "experts must be 1 to 4096 (got 4097)": {"experts": 4097},
    "experts must be 1 to 4096 (got 0)": {"experts": 0},
    "tokens must be at least 0 (got -1)": {"tokens": -1},
    "scoring must be 0 or 1 (got 2)": {"scoring": 2},
    "group_score must be 0 or 1 (got -1)": {"score": -1},
    "sizes must be non-negative and fit in 64 bits (got 4611686018427387904 * 24)": {
        "tokens": 2**62
    },
}


@pytest.mark.parametrize("message", BAD_OPTIONS)
def test_moe_route_refuses_a_bad_option(message):
    ids, weights = torch.full((2, 2), -7, dtype=torch.int32), torch.full((2, 2), math.nan)
    with pytest.raises(ValueError) as error:  # noqa: PT011 (compared whole below)
        native_route(torch.randn(2, 6), ids, weights, **BAD_OPTIONS[message])
    assert str(error.value) == "moe_route: " + message
    assert (ids == -7).all()


def test_moe_route_refuses_bad_tensors():
    logits = torch.randn(2, 6)
    with pytest.raises(TypeError, match=r"logits must be torch\.float32"):
        ops.moe_route(logits.double(), None, topk=2)
    with pytest.raises(ValueError, match="correction_bias must be"):
        ops.moe_route(logits, torch.zeros(5), topk=2)
    with pytest.raises(ValueError, match="logits must be contiguous"):
        ops.moe_route(torch.randn(6, 2).T, None, topk=2)
    with pytest.raises(ValueError, match="scoring must be sigmoid or softmax"):
        ops.moe_route(logits, None, topk=2, scoring="relu")
    with pytest.raises(ValueError, match="routed_scaling_factor must be finite"):
        ops.moe_route(logits, None, topk=2, routed_scaling_factor=math.inf)
