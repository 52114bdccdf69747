"""config.json: published values give the published numbers; anything else is a named error."""

from __future__ import annotations

import copy
import json
import math
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kimi_native.config import KimiConfig, QuantizationConfig, load_config, load_generation_config
from kimi_native.errors import ConfigError
from tiny_checkpoint import FP8, INT4, K2, MOONLIGHT, TINY, V2_LITE

DATA = Path(os.environ.get("KIMI_NATIVE_TEST_DATA", Path(__file__).parents[2] / "shared" / "data"))
DEEPSEEK_V3 = K2 | {
    "model_type": "deepseek_v3",
    "num_attention_heads": 128,
    "num_key_value_heads": 128,
    "n_routed_experts": 256,
    "n_group": 8,
    "topk_group": 4,
    "first_k_dense_replace": 3,
    "rope_theta": 10000,
    "rope_scaling": K2["rope_scaling"] | {"factor": 40, "beta_fast": 32},
    "quantization_config": FP8,
}
GLM_FLASH = MOONLIGHT | {
    "model_type": "glm4_moe_lite",
    "num_attention_heads": 20,
    "num_key_value_heads": 20,
    "q_lora_rank": 768,
    "qk_nope_head_dim": 192,
    "v_head_dim": 256,
    "num_experts_per_tok": 4,
    "rope_theta": 1000000,
    "partial_rotary_factor": 1.0,
    "num_nextn_predict_layers": 1,
    "eos_token_id": [154820, 154827, 154829],
}
K2_0711 = K2 | {"rope_scaling": K2["rope_scaling"] | {"factor": 32.0}}
K2_6 = K2 | {"rope_scaling": K2["rope_scaling"] | {"beta_fast": 32.0}}


def parse(d: dict, **changes) -> KimiConfig:
    return KimiConfig.from_dict(d | changes)


def without(d: dict, *keys: str) -> dict:
    return {k: v for k, v in d.items() if k not in keys}


# ---- what published configs mean ------------------------------------------------------------------------------------


def test_config_of_k26_has_the_published_values():
    folder = DATA / "kimi-k2-tokenizer"
    if not (folder / "config.json").exists():
        pytest.skip(f"no config.json in {folder} (set KIMI_NATIVE_TEST_DATA)")
    c = load_config(folder)
    assert (c.model_type, c.tensor_prefix) == ("kimi_k25", "language_model.")
    assert (c.hidden_size, c.num_hidden_layers, c.num_attention_heads) == (7168, 61, 64)
    assert (c.q_lora_rank, c.kv_lora_rank, c.latent_width) == (1536, 512, 576)
    assert (c.n_routed_experts, c.num_experts_per_tok, c.n_shared_experts) == (384, 8, 1)
    assert (c.scoring_func, c.topk_method, c.routed_scaling_factor) == (
        "sigmoid",
        "noaux_tc",
        2.827,
    )
    assert (c.bos_token_id, c.eos_token_ids) == (163584, (163586,))
    assert (c.rms_norm_eps, c.max_position_embeddings) == (1e-5, 262144)
    assert (c.quantization.kind, c.quantization.group_size) == ("int4", 32)
    assert [c.is_moe_layer(i) for i in range(61)] == [False] + [True] * 60


# inv_freq[j] for j = 1, 8, 9, 14, 19, 20, 31, as printed in the specification
_THETA_50000 = [0.713111085, 0.0668740305, 0.0476886124, 0.00879428677, 0.00162175991]
_THETA_10000 = [
    0.749894209,
    0.1,
    0.0749894209,
    0.0124479559,
    1.37051364e-3,
    7.90569415e-4,
    3.33380358e-6,
]
INV_FREQ = {
    "K2 0711": (K2_0711, [*_THETA_50000, 3.61404677e-5, 8.76441291e-7]),
    "K2 Thinking": (K2, [*_THETA_50000, 1.80702339e-5, 4.38220646e-7]),
    "K2.6": (
        K2_6,
        [
            0.713111085,
            0.0668740305,
            0.0437766560,
            0.00446584875,
            1.58374991e-4,
            1.80702339e-5,
            4.38220646e-7,
        ],
    ),
    "V3": (DEEPSEEK_V3, _THETA_10000),
    "V2-Lite": (V2_LITE, _THETA_10000),
}


@pytest.mark.parametrize("model", INV_FREQ)
def test_config_rope_inv_freq_equals_the_published_values_to_all_digits(model):
    d, printed = INV_FREQ[model]
    frequencies = parse(d).rope_inv_freq()
    assert len(frequencies) == 32
    assert frequencies[0] == 1
    actual = [f"{frequencies[j]:.9g}" for j in (1, 8, 9, 14, 19, 20, 31)]
    assert actual == [f"{p:.9g}" for p in printed]


@pytest.mark.parametrize(
    ("d", "printed"),
    [
        (K2_0711, "0.1308607999629500"),
        (K2, "0.1446796258026892"),
        (K2_6, "0.1446796258026892"),
        (DEEPSEEK_V3, "0.1352337788608801"),
        (V2_LITE, "0.1147213867929261"),
        (MOONLIGHT, "0.0721687836487032"),
        (GLM_FLASH, "0.0625000000000000"),
    ],
)
def test_config_softmax_scale_equals_the_published_values_to_all_digits(d, printed):
    assert parse(d).softmax_scale() == pytest.approx(
        float(printed), abs=1e-16, rel=0
    )  # one unit of the last digit


@pytest.mark.parametrize(
    ("d", "low", "high"),
    [(K2_0711, 19, 20), (K2, 19, 20), (K2_6, 8, 20), (DEEPSEEK_V3, 10, 23), (V2_LITE, 10, 23)],
)
def test_config_yarn_ramp_begins_and_ends_at_the_published_pairs(d, low, high):
    scaled, plain = parse(d).rope_inv_freq(), parse(d, rope_scaling=None).rope_inv_freq()
    factor = d["rope_scaling"]["factor"]
    kept = [f / p for f, p in zip(scaled, plain, strict=True)]
    assert kept[: low + 1] == [1.0] * (low + 1)
    assert kept[high:] == pytest.approx([1 / factor] * (32 - high), rel=1e-12)
    between = kept[low : high + 1]
    assert between == sorted(between, reverse=True)
    assert len(set(between)) == len(between)


@pytest.mark.parametrize(
    ("d", "mscale", "squared"),
    [
        (K2_0711, "1.3465735903", "1.8132604340"),
        (K2, "1.4158883083", "2.0047397017"),
        (K2_6, "1.4158883083", "2.0047397017"),
        (DEEPSEEK_V3, "1.3688879454", "1.8738542071"),
        (V2_LITE, "1.2608037774", "1.5896261652"),
        (MOONLIGHT, "1.0000000000", "1.0000000000"),
        (GLM_FLASH, "1.0000000000", "1.0000000000"),
    ],
)
def test_config_softmax_scale_holds_the_published_temperature(d, mscale, squared):
    c = parse(d)
    temperature = c.softmax_scale() * c.qk_head_dim**0.5
    # one unit of the last printed digit
    assert temperature**0.5 == pytest.approx(float(mscale), abs=1e-10, rel=0)
    assert temperature == pytest.approx(float(squared), abs=1e-10, rel=0)


@pytest.mark.parametrize("d", [K2_0711, K2, K2_6, DEEPSEEK_V3, V2_LITE, MOONLIGHT, GLM_FLASH])
def test_config_rope_magnitude_is_one_for_published_models(d):
    assert parse(d).rope_magnitude() == 1.0


@pytest.mark.parametrize("d", [K2_0711, K2_6, DEEPSEEK_V3, V2_LITE, MOONLIGHT])
@pytest.mark.parametrize("rope_dim", [16, 64])
def test_config_rope_matches_the_published_implementation(d, rope_dim):
    from transformers import DeepseekV3Config
    from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3RotaryEmbedding

    rope = {"rope_scaling": d["rope_scaling"]} if d["rope_scaling"] else {}
    published = DeepseekV3RotaryEmbedding(
        DeepseekV3Config(
            qk_rope_head_dim=rope_dim,
            rope_theta=d["rope_theta"],
            max_position_embeddings=d["max_position_embeddings"],
            **copy.deepcopy(rope),
        )
    )
    ours = parse(d, qk_rope_head_dim=rope_dim)
    # published: fp32 powers and products, a handful of roundings of 2**-24 each; an exponent error of 2**-24 in
    # base ** x shows as ln(base) * 2**-24
    assert ours.rope_inv_freq() == pytest.approx(published.inv_freq.tolist(), rel=2e-6)
    assert ours.rope_magnitude() == pytest.approx(published.attention_scaling, rel=1e-12)


def test_config_yarn_ramp_of_zero_width_is_a_step():
    yarn = K2["rope_scaling"] | {"original_max_position_embeddings": 7}  # both ends fall to pair 0
    frequencies = parse(K2, rope_scaling=yarn).rope_inv_freq()
    plain = parse(K2, rope_scaling=None).rope_inv_freq()
    assert frequencies == pytest.approx([plain[0]] + [f / 64 for f in plain[1:]])


def test_config_without_published_values_uses_the_family_defaults():
    optional = ("n_group", "topk_group", "scoring_func", "topk_method", "norm_topk_prob")
    more = (
        "routed_scaling_factor",
        "rms_norm_eps",
        "rope_theta",
        "rope_scaling",
        "eos_token_id",
        "bos_token_id",
    )
    v2 = KimiConfig.from_dict(without(V2_LITE, *optional, *more))
    assert (v2.scoring_func, v2.topk_method, v2.norm_topk_prob) == ("softmax", "greedy", False)
    assert (v2.n_group, v2.topk_group, v2.routed_scaling_factor) == (1, 1, 1.0)
    assert (v2.rms_norm_eps, v2.rope_theta, v2.rope_scaling) == (1e-6, 10000.0, None)
    assert (v2.bos_token_id, v2.eos_token_ids) == (None, ())
    v3 = KimiConfig.from_dict(without(DEEPSEEK_V3, *optional, *more))
    assert (v3.scoring_func, v3.topk_method, v3.norm_topk_prob) == ("sigmoid", "noaux_tc", True)
    assert (v3.n_group, v3.topk_group, v3.routed_scaling_factor) == (8, 4, 2.5)
    glm = KimiConfig.from_dict(without(GLM_FLASH, *optional, *more))
    assert (glm.n_group, glm.topk_group, glm.routed_scaling_factor) == (1, 1, 1.8)
    assert glm.rms_norm_eps == 1e-5


SIZES = ["hidden_size", "q_lora_rank", "n_routed_experts", "first_k_dense_replace", "vocab_size"]


@pytest.mark.parametrize("key", SIZES)
def test_config_sizes_are_never_guessed(key):
    with pytest.raises(ConfigError, match=rf"{key} (is missing|must be .* \(got no such key\))"):
        KimiConfig.from_dict(without(TINY, key))


# ---- spellings ------------------------------------------------------------------------------------------------------


def test_config_both_rope_spellings_mean_the_same():
    yarn = without(K2["rope_scaling"], "type")
    old = KimiConfig.from_dict(K2)
    new_keys = yarn | {"rope_type": "yarn", "rope_theta": 50000.0}
    new = KimiConfig.from_dict(
        without(K2, "rope_scaling", "rope_theta") | {"rope_parameters": new_keys}
    )
    assert new == old
    both = KimiConfig.from_dict(K2 | {"rope_parameters": new_keys | {"type": "yarn"}})
    assert both == old


def test_config_default_rope_parameters_are_no_scaling():
    c = parse(
        without(MOONLIGHT, "rope_scaling", "rope_theta"),
        rope_parameters={"rope_type": "default", "rope_theta": 50000.0},
    )
    assert c == parse(MOONLIGHT)


@pytest.mark.parametrize(
    "changes",
    [
        {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}},
        {"rope_parameters": K2["rope_scaling"] | {"factor": 32.0}},
        {"rope_parameters": K2["rope_scaling"] | {"rope_theta": 10000.0}},
    ],
)
def test_config_rope_spellings_that_disagree_are_an_error(changes):
    with pytest.raises(
        ConfigError, match="rope_theta, rope_scaling and rope_parameters must agree"
    ):
        parse(K2, **changes)


def test_config_mlp_layer_types_replace_first_k_dense_replace():
    types = ["dense", "dense", "sparse"]
    c = parse(without(TINY, "first_k_dense_replace", "moe_layer_freq"), mlp_layer_types=types)
    assert [c.is_moe_layer(i) for i in range(3)] == [False, False, True]
    assert c.first_k_dense_replace == 2
    mixed = parse(
        without(TINY, "first_k_dense_replace", "moe_layer_freq"),
        mlp_layer_types=["sparse", "dense", "sparse"],
    )
    assert [mixed.is_moe_layer(i) for i in range(3)] == [True, False, True]


def test_config_moe_layer_freq_skips_layers():
    c = parse(TINY, num_hidden_layers=6, first_k_dense_replace=1, moe_layer_freq=2)
    assert [c.is_moe_layer(i) for i in range(6)] == [False, False, True, False, True, False]


def test_config_without_experts_is_dense_everywhere():
    keys = (
        "n_shared_experts",
        "num_experts_per_tok",
        "moe_intermediate_size",
        "first_k_dense_replace",
    )
    c = parse(without(TINY, *keys), n_routed_experts=None)
    assert not any(c.is_moe_layer(i) for i in range(3))
    assert c.n_routed_experts is None


def test_config_greedy_routing_knows_no_groups():
    c = parse(V2_LITE, n_group=8, topk_group=3)
    assert (c.n_group, c.topk_group) == (1, 1)
    limited = parse(V2_LITE, n_group=8, topk_group=3, topk_method="group_limited_greedy")
    assert (limited.n_group, limited.topk_group) == (8, 3)


@pytest.mark.parametrize(("value", "ids"), [(7, (7,)), ([7, 9, 7], (7, 9)), (None, ()), ([], ())])
def test_config_eos_may_be_one_a_list_or_absent(value, ids):
    assert parse(TINY, eos_token_id=value).eos_token_ids == ids


_CLASS_KNOWS_NOT = ("scoring_func", "topk_method", "moe_layer_freq")
SMALL = without(TINY, *_CLASS_KNOWS_NOT, "model_type", "torch_dtype", "rope_scaling", "rope_theta")
YARN = {"rope_theta": 50000.0} | K2["rope_scaling"]


@pytest.mark.parametrize("rope", [None, YARN], ids=["default", "yarn"])
@pytest.mark.parametrize("family", ["DeepseekV3", "DeepseekV2", "Glm4MoeLite"])
def test_config_reads_what_the_published_library_writes(tmp_path, family, rope):
    import transformers

    values = SMALL | ({"rope_parameters": dict(rope)} if rope else {})
    if family == "DeepseekV2":
        values |= {"norm_topk_prob": False, "routed_scaling_factor": 1.0}
    if family == "Glm4MoeLite":
        values = without(values, "first_k_dense_replace")
    published = getattr(transformers, f"{family}Config")(**values)
    published.save_pretrained(tmp_path)
    for c in (load_config(tmp_path), KimiConfig.from_dict(published.to_dict())):
        for key in set(SMALL) - {"eos_token_id", "num_key_value_heads", "first_k_dense_replace"}:
            assert getattr(c, key) == getattr(published, key), key
        assert [c.is_moe_layer(i) for i in range(3)] == [False, True, True]
        assert c.eos_token_ids == (2,)
        assert c.rope_theta == published.rope_parameters["rope_theta"]
        assert (c.rope_scaling is None) == (rope is None)
        assert c.scoring_func == ("softmax" if family == "DeepseekV2" else "sigmoid")
        assert c.num_nextn_predict_layers == getattr(published, "num_nextn_predict_layers", 0)


@pytest.mark.parametrize("family", ["DeepseekV3", "DeepseekV2", "Glm4MoeLite"])
def test_config_reads_the_published_class_defaults(family):
    import transformers

    d = getattr(transformers, f"{family}Config")().to_dict()
    if family == "DeepseekV2":
        d["num_experts_per_tok"] = 6  # null by default
    c = KimiConfig.from_dict(d)
    assert c.hidden_size == d["hidden_size"]


# ---- the multimodal wrapper -----------------------------------------------------------------------------------------

WRAPPED = {
    "model_type": "kimi_k25",
    "text_config": without(K2, "quantization_config"),
    "vision_config": {"anything": [1, {"at": "all"}]},
    "media_placeholder_token_id": 163605,
    "eos_token_id": 163586,
    "tie_word_embeddings": False,
}


def test_config_wrapper_reads_the_text_model():
    c = KimiConfig.from_dict(WRAPPED)
    assert (c.model_type, c.tensor_prefix, c.hidden_size) == ("kimi_k25", "language_model.", 7168)
    assert c.eos_token_ids == (163585, 163586)  # a stop token of either level stops
    assert c.quantization is None


@pytest.mark.parametrize("places", [("top",), ("text",), ("top", "text")])
def test_config_wrapper_takes_quantization_from_either_level(places):
    d = copy.deepcopy(WRAPPED)
    if "top" in places:
        d["quantization_config"] = INT4
    if "text" in places:
        d["text_config"]["quantization_config"] = copy.deepcopy(INT4)
    assert KimiConfig.from_dict(d).quantization.kind == "int4"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"text_config": None}, "text_config must be an object"),
        ({"text_config": [1]}, "text_config must be an object"),
        ({"text_config": TINY | {"model_type": "llama"}}, "text_config.model_type must be"),
        ({"text_config": TINY | {"what": 1}}, r"ignore_keys=\('text_config.what',\)"),
        ({"tie_word_embeddings": True}, "tie_word_embeddings must be false"),
        ({"what": 1}, "what is not a key"),
        (
            {"quantization_config": FP8, "text_config": TINY | {"quantization_config": INT4}},
            "quantization_config must be the same",
        ),
    ],
)  # fmt: skip
def test_config_wrapper_errors_name_the_key(changes, message):
    with pytest.raises(ConfigError, match=message):
        KimiConfig.from_dict(WRAPPED | changes)


def test_config_of_a_model_not_supported_yet_says_so():
    with pytest.raises(NotImplementedError, match="model_type kimi_vl is not supported yet"):
        KimiConfig.from_dict({"model_type": "kimi_vl", "text_config": TINY})


# ---- keys -----------------------------------------------------------------------------------------------------------


def test_config_unknown_key_is_an_error_that_names_the_way_out():
    d = TINY | {"index_topk": 2048}
    with pytest.raises(
        ConfigError, match=r"config.json: index_topk is not a key .*ignore_keys=\('index_topk',\)"
    ):
        KimiConfig.from_dict(d)
    assert KimiConfig.from_dict(d, ignore_keys=("index_topk",)) == parse(TINY)


@pytest.mark.parametrize(
    "path",
    [
        "rope_scaling.what",
        "quantization_config.what",
        "quantization_config.config_groups.group_0.weights.what",
    ],
)
def test_config_unknown_nested_key_is_an_error_that_names_the_way_out(path):
    d = copy.deepcopy(K2)
    inner = d
    *parents, key = path.split(".")
    for parent in parents:
        inner = inner[parent]
    inner[key] = 1
    with pytest.raises(ConfigError, match=rf"{path} is not a key .*ignore_keys=\('{path}',\)"):
        KimiConfig.from_dict(d)
    assert KimiConfig.from_dict(d, ignore_keys=(path,)) == parse(K2)


def test_config_ignoring_a_needed_key_does_not_help():
    with pytest.raises(ConfigError, match="hidden_size"):
        KimiConfig.from_dict(TINY, ignore_keys=("hidden_size",))


BAD_VALUES = {
    "model_type": ["llama", None, 3, [], "kimi_k3", "kimi_linear_2"],
    "vocab_size": [0, -1, 1.5, "96", None, True, 10**18, 1e308, math.nan],
    "hidden_size": [0, -64, 64.0, 2**40, None, [64]],
    "intermediate_size": [0, -1, 10**18],
    "moe_intermediate_size": [0, None, 10**18],
    "num_hidden_layers": [0, -3, 10**6, 3.0, None],
    "num_attention_heads": [0, -2, 10**6],
    "num_key_value_heads": [1, 3, 0, "2"],
    "q_lora_rank": [0, -1, 1.5, 10**18],
    "kv_lora_rank": [0, None, -1],
    "qk_nope_head_dim": [0, 10**9],
    "qk_rope_head_dim": [0, 7, -8, 10**9],
    "v_head_dim": [0, None],
    "qk_head_dim": [1],
    "head_dim": [1],
    "n_routed_experts": [0, -4, 1.5, 10**18, 60000],
    "num_local_experts": [8],
    "n_shared_experts": [-1, 1.0, 10**9],
    "num_experts_per_tok": [0, 5, -1, None, 1.5],
    "n_group": [0, 3, -1, 4, 1.0],
    "topk_group": [0, 2, -1],
    "scoring_func": ["softplus", None, 1, "softmax"],
    "topk_method": ["greedy", "noaux", None],
    "norm_topk_prob": [None, 1, "true"],
    "routed_scaling_factor": [0, -1.0, math.nan, math.inf, 1e308, "2", None],
    "first_k_dense_replace": [-1, 1.0, None, 10**9],
    "moe_layer_freq": [0, [1], -1, 1.5],
    "mlp_layer_types": [
        "sparse",
        ["dense"],
        ["dense", "sparse", "both"],
        ["sparse"] * 3,
        [1, 2, 3],
    ],
    "rms_norm_eps": [0, -1e-6, math.nan, 1.0, "1e-6", None],
    "rope_theta": [0, 1, -1, math.nan, math.inf, 1e308, "x"],
    "rope_scaling": [[], 3, {}.keys(), {"type": "linear", "factor": 2}, {"type": "yarn"}],
    "max_position_embeddings": [0, -1, 1.5, 10**18, None],
    "bos_token_id": [-1, 1.5, "1", 10**18, True],
    "eos_token_id": [-1, 1.5, "1", [1, None], [True], {"a": 1}, 10**18, list(range(300))],
    "tie_word_embeddings": [None, 0, "false"],
    "num_nextn_predict_layers": [-1, 1.5, 10**9],
    "attention_bias": [True, 1],
    "mlp_bias": [True],
    "hidden_act": ["gelu", None],
    "rope_interleave": [False],
    "pretraining_tp": [2],
    "partial_rotary_factor": [0.5],
    "sliding_window": [4096],
    "torch_dtype": ["float8", 16],
    "is_encoder_decoder": [True],
    "quantization_config": [3, [], "int4", {}],
}


@pytest.mark.parametrize(
    ("key", "value"), [(k, v) for k, values in BAD_VALUES.items() for v in values]
)
def test_config_bad_value_is_an_error_naming_the_key(key, value):
    with pytest.raises(ConfigError, match=key) as error:
        parse(TINY, **{key: value})
    assert len(str(error.value)) < 1000


BAD_YARN = {
    "factor": [0.5, 0, -1, math.nan, 1e308, None, "64"],
    "original_max_position_embeddings": [0, -1, 4096.0, 10**18, None],
    "beta_fast": [0, -1, math.nan, 0.5, "32"],
    "beta_slow": [0, 2, math.nan],
    "mscale": [0, -1, math.nan],
    "mscale_all_dim": [-1, math.nan, 1e308],
    "attention_factor": [1.0],
    "truncate": [False],
    "partial_rotary_factor": [0.5],
    "type": ["linear", "dynamic", None, 3],
    "rope_type": ["default"],
    "rope_theta": [math.nan, "x", 1],
    "short_factor": [[1.0]],
}


@pytest.mark.parametrize(
    ("key", "value"), [(k, v) for k, values in BAD_YARN.items() for v in values]
)
def test_config_bad_rope_value_is_an_error_naming_the_key(key, value):
    with pytest.raises(ConfigError, match=key):
        parse(K2, rope_scaling=K2["rope_scaling"] | {key: value})


@pytest.mark.parametrize("keys", [{"mscale": 0.707}, {"mscale_all_dim": 1.0}])
def test_config_one_mscale_alone_is_an_error(keys):
    # the published implementations derive different magnitudes from it
    yarn = without(K2["rope_scaling"], "mscale", "mscale_all_dim") | keys
    with pytest.raises(ConfigError, match="mscale must be given together with mscale_all_dim"):
        parse(K2, rope_scaling=yarn)


def test_config_yarn_without_mscale_follows_both_published_implementations():
    c = parse(K2, rope_scaling=without(K2["rope_scaling"], "mscale", "mscale_all_dim"))
    assert c.rope_magnitude() == pytest.approx(0.1 * math.log(64) + 1, rel=1e-15)
    assert c.softmax_scale() == pytest.approx(192**-0.5, rel=1e-15)


def test_config_renormalised_and_scaled_softmax_routing_is_an_error():
    with pytest.raises(ConfigError, match="routed_scaling_factor must be 1 with softmax"):
        parse(V2_LITE, norm_topk_prob=True, routed_scaling_factor=16.0)


# ---- quantization ---------------------------------------------------------------------------------------------------


def test_config_int4_quantizes_routed_experts_only():
    q = parse(K2).quantization
    expected = {
        "model.layers.0.mlp.gate_proj": False,
        "model.layers.7.mlp.experts.12.gate_proj": True,
        "model.layers.7.mlp.experts.12.down_proj": True,
        "model.layers.7.mlp.shared_experts.up_proj": False,
        "model.layers.7.self_attn.q_a_proj": False,
        "model.layers.7.mlp.gate": False,
        "model.layers.7.input_layernorm": False,
        "model.embed_tokens": False,
        "lm_head": False,
    }
    assert {name: q.is_quantized(name) for name in expected} == expected
    prefixed = {"language_model." + name: value for name, value in expected.items()}
    assert {name: q.is_quantized(name) for name in prefixed} == prefixed


def test_config_fp8_quantizes_every_matrix_but_head_router_and_embedding():
    q = parse(DEEPSEEK_V3).quantization
    assert (q.kind, q.group_size) == ("fp8", 128)
    assert q.is_quantized("model.layers.0.mlp.gate_proj")
    assert q.is_quantized("model.layers.9.self_attn.kv_a_proj_with_mqa")
    assert not q.is_quantized("lm_head")
    assert not q.is_quantized("model.layers.9.mlp.gate")
    assert not q.is_quantized("model.embed_tokens")


def test_config_fp8_modules_to_not_convert_stay():
    q = parse(
        TINY,
        quantization_config=FP8
        | {"modules_to_not_convert": ["lm_head", "o_proj", "model.layers.1.self_attn.q_a_proj"]},
    ).quantization
    assert not q.is_quantized("model.layers.2.self_attn.o_proj")
    assert not q.is_quantized("model.layers.1.self_attn.q_a_proj")
    assert q.is_quantized("model.layers.2.self_attn.q_a_proj")


def test_config_ignore_patterns_match_at_the_start_only():
    q = QuantizationConfig(
        "int4", 32, ("re:mlp", "re:model\\.layers\\.0\\.", "model.layers.1.mlp.up_proj")
    )
    assert q.is_quantized("model.layers.3.mlp.up_proj")  # "mlp" is not at the start
    assert not q.is_quantized("model.layers.0.mlp.up_proj")
    assert not q.is_quantized("model.layers.1.mlp.up_proj")
    assert q.is_quantized("model.layers.1.mlp.up_proj_2.up_proj")  # plain entries are whole names


def test_config_ignore_patterns_agree_with_the_published_library():
    from compressed_tensors.utils.match import match_name

    names = [
        "lm_head",
        "model.layers.0.mlp.gate_proj",
        "model.layers.7.mlp.experts.12.gate_proj",
        "model.layers.7.self_attn.o_proj",
    ]
    for pattern in [
        *INT4["ignore"],
        "re:model",
        "re:layers",
        "re:.*[0-4]\\.mlp.*",
        "re:.*(gate|up)_proj$",
        "re:lm_hea?d",
    ]:
        q = QuantizationConfig("int4", 32, (pattern,))
        assert [q.is_ignored(n) for n in names] == [match_name(n, pattern) for n in names], pattern


@pytest.mark.parametrize(
    "pattern",
    ["(", "[", "*a", "a**", "(a+)+b", "(a*)*", "(.|.)*x", r"(a)\1", "(?=a)", "(?<name>a)", "a{1,1000}",
     "(a{1,1000}){1,1000}", ".*.*.*.*.*x", "a?" * 60 + "x", "(a|a)" * 40, "x" * 300, "\\", "a\x00", "(?i)a"],
)  # fmt: skip
def test_config_hostile_ignore_pattern_is_an_error(pattern):
    with pytest.raises(ConfigError, match=r"quantization_config\.ignore"):
        parse(TINY, quantization_config=INT4 | {"ignore": ["re:" + pattern]})


def test_config_too_many_ignore_patterns_are_an_error():
    with pytest.raises(ConfigError, match="at most 32 patterns"):
        parse(TINY, quantization_config=INT4 | {"ignore": [f"re:a{i}" for i in range(33)]})


INT4_CHANGES = [
    (("quant_method",), "gptq"),
    (("format",), "marlin-24"),
    (("format",), None),
    (("quantization_status",), "frozen"),
    (("kv_cache_scheme",), {"num_bits": 8}),
    (("sparsity_config",), {"format": "sparse-24"}),
    (("transform_config",), {"config_groups": {}}),
    (("what",), 1),
    (("ignore",), "lm_head"),
    (("ignore",), [1]),
    (("config_groups",), {}),
    (("config_groups",), None),
    (("config_groups", "group_0"), None),
    (("config_groups", "group_1"), INT4["config_groups"]["group_0"]),
    (("config_groups", "group_0", "targets"), ["Linear", "Embedding"]),
    (("config_groups", "group_0", "targets"), ["re:.*experts.*"]),
    (("config_groups", "group_0", "input_activations"), {"num_bits": 8}),
    (("config_groups", "group_0", "output_activations"), {"num_bits": 8}),
    (("config_groups", "group_0", "format"), "nvfp4"),
    (("config_groups", "group_0", "what"), 1),
    (("config_groups", "group_0", "weights"), None),
    (("config_groups", "group_0", "weights", "num_bits"), 8),
    (("config_groups", "group_0", "weights", "num_bits"), 4.5),
    (("config_groups", "group_0", "weights", "type"), "float"),
    (("config_groups", "group_0", "weights", "symmetric"), False),
    (("config_groups", "group_0", "weights", "strategy"), "channel"),
    (("config_groups", "group_0", "weights", "group_size"), 64),
    (("config_groups", "group_0", "weights", "group_size"), 128),
    (("config_groups", "group_0", "weights", "dynamic"), True),
    (("config_groups", "group_0", "weights", "actorder"), "group"),
    (("config_groups", "group_0", "weights", "block_structure"), [128, 128]),
    (("config_groups", "group_0", "weights", "what"), 1),
]


@pytest.mark.parametrize(
    ("path", "value"), INT4_CHANGES, ids=lambda v: ".".join(v) if isinstance(v, tuple) else None
)
def test_config_other_int4_scheme_is_an_error_naming_the_field(path, value):
    scheme = copy.deepcopy(INT4)
    inner = scheme
    for key in path[:-1]:
        inner = inner[key]
    inner[path[-1]] = value
    named = path[-1] if path[-1] not in ("group_0", "group_1") else "config_groups"
    with pytest.raises(ConfigError, match=rf"quantization_config\.(.*\.)?{named}"):
        parse(TINY, quantization_config=scheme)


@pytest.mark.parametrize(
    ("key", "value"),
    [("fmt", "e5m2"), ("activation_scheme", "static"), ("activation_scheme", None), ("weight_block_size", [64, 64]),
     ("weight_block_size", None), ("weight_block_size", [128]), ("what", 1), ("modules_to_not_convert", "lm_head"),
     ("dequantize", True), ("scale_fmt", "other"), ("modules_to_convert", ["x"])],
)  # fmt: skip
def test_config_other_fp8_scheme_is_an_error_naming_the_field(key, value):
    with pytest.raises(ConfigError, match=rf"quantization_config\.{key}"):
        parse(TINY, quantization_config=FP8 | {key: value})


def test_config_reads_the_quantization_configs_that_libraries_write():
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
    from compressed_tensors.quantization import QuantizationConfig as Published
    from transformers import FineGrainedFP8Config

    weights = QuantizationArgs(
        num_bits=4, type="int", symmetric=True, strategy="group", group_size=32
    )
    written = Published(
        config_groups={"group_0": QuantizationScheme(targets=["Linear"], weights=weights)},
        ignore=["lm_head"],
        format="pack-quantized",
        quantization_status="compressed",
    )
    c = parse(TINY, quantization_config=json.loads(written.model_dump_json()))
    assert c.quantization == QuantizationConfig("int4", 32, ("lm_head",))
    fp8 = json.loads(json.dumps(FineGrainedFP8Config().to_dict(), default=str))
    fp8["quant_method"] = "fp8"  # an enum in the library, this string in the file
    assert parse(TINY, quantization_config=fp8).quantization.kind == "fp8"


# ---- files ----------------------------------------------------------------------------------------------------------


def write(folder: Path, text: str | bytes, name: str = "config.json") -> Path:
    (folder / name).write_bytes(text.encode() if isinstance(text, str) else text)
    return folder


DEEP = '{"a":' * 10_000 + "1" + "}" * 10_000


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (DEEP, "nests too deep"),
        (DEEP.replace("{", "[").replace('"a":', "").replace("}", "]"), "nests too deep"),
        ('{"a":' * 200 + "1" + "}" * 200, "at most 64 deep"),
        ("", "must be valid JSON"),
        ("[1]", "must hold a JSON object"),
        ("{", "must be valid JSON"),
        (b"\xff\xfe{}", "must be valid JSON"),
        ('{"rope_theta": NaN}', "must be finite"),
        ('{"rope_theta": -Infinity}', "must be finite"),
        ('{"model_type": "kimi_k2", "model_type": "kimi_k2"}', "must appear once"),
        ('{"vocab_size": ' + "9" * 5000 + "}", "must be valid JSON"),
        ('{"\\u001b[31m": 1, "model_type": "deepseek_v3"}', "vocab_size is missing"),
    ],
)
def test_config_malformed_file_is_a_named_error(tmp_path, text, message):
    with pytest.raises(ConfigError, match=message) as error:
        load_config(write(tmp_path, text))
    assert "config.json" in str(error.value)
    assert len(str(error.value)) < 1000


def test_config_huge_number_is_a_named_error(tmp_path):
    text = json.dumps(TINY).replace('"rope_theta": 10000.0', '"rope_theta": 1e999')
    with pytest.raises(ConfigError, match="rope_theta"):
        load_config(write(tmp_path, text))


def test_config_unprintable_key_is_printed_escaped(tmp_path):
    with pytest.raises(ConfigError) as error:
        load_config(write(tmp_path, json.dumps(TINY | {"\x1b[31m\ud800": 1})))
    assert "\x1b" not in str(error.value)
    str(error.value).encode()


def test_config_oversized_file_is_a_named_error(tmp_path):
    with pytest.raises(ConfigError, match="at most 16777216 bytes"):
        load_config(write(tmp_path, " " * ((16 << 20) + 1)))


def test_config_missing_file_is_a_named_error(tmp_path):
    for folder in (tmp_path, tmp_path / "nowhere", write(tmp_path, "") / "config.json"):
        with pytest.raises(ConfigError, match=r"config\.json"):
            load_config(folder)


def test_config_link_out_of_the_folder_is_refused(tmp_path):
    outside = tmp_path / "outside.json"
    outside.write_text(json.dumps(TINY))
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").symlink_to(outside)
    with pytest.raises(ConfigError, match="must stay inside the model folder"):
        load_config(folder)


def test_config_pipe_is_refused(tmp_path):
    os.mkfifo(tmp_path / "config.json")
    with pytest.raises(ConfigError, match="must be a regular file"):
        load_config(tmp_path)


def test_config_imports_no_torch():
    code = "import kimi_native.config, sys; assert 'torch' not in sys.modules"
    subprocess.run(
        [sys.executable, "-c", code],
        check=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )


# ---- generation_config.json -----------------------------------------------------------------------------------------


def test_generation_config_is_returned_as_it_is(tmp_path):
    assert load_generation_config(tmp_path) == {}
    values = {
        "eos_token_id": [1, 2],
        "temperature": 0.6,
        "max_length": 131072,
        "anything": {"a": 1},
    }
    write(tmp_path, json.dumps(values), "generation_config.json")
    assert load_generation_config(tmp_path) == values


@pytest.mark.parametrize(
    ("key", "value"),
    [("eos_token_id", "1"), ("eos_token_id", [-1]), ("bos_token_id", 1.5), ("temperature", "hot"), ("temperature", -1),
     ("top_p", 2), ("top_k", 1.5), ("top_k", -1), ("max_length", 10**18), ("do_sample", 1), ("repetition_penalty", [])],
)  # fmt: skip
def test_generation_config_bad_value_is_an_error_naming_the_key(tmp_path, key, value):
    write(tmp_path, json.dumps({key: value}), "generation_config.json")
    with pytest.raises(ConfigError, match=rf"generation_config\.json: {key}"):
        load_generation_config(tmp_path)


# ---- anything -------------------------------------------------------------------------------------------------------

JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8)
    | st.sampled_from([0, -1, 1, 2**31, 2**63, 10**18, 1e308, "yarn", "default", "re:(a+)+", "greedy"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=5,
)  # fmt: skip


def check_anything(d: dict) -> bool:
    """Parses or raises a named error; what parses gives finite numbers."""
    try:
        c = KimiConfig.from_dict(d)
    except (ConfigError, NotImplementedError) as e:
        return len(str(e)) > 2000
    numbers = [*c.rope_inv_freq(), c.rope_magnitude(), c.softmax_scale()]
    assert all(math.isfinite(x) and x > 0 for x in numbers)
    return False


@settings(max_examples=150, deadline=None, derandomize=True)
@given(st.data())
def test_config_any_value_at_any_key_parses_or_is_a_named_error(data):
    d = copy.deepcopy(data.draw(st.sampled_from([TINY, K2, WRAPPED, V2_LITE])))
    for _ in range(data.draw(st.integers(1, 3))):
        inner = d
        while True:
            key = data.draw(st.sampled_from(sorted(inner)))
            if not (isinstance(inner[key], dict) and inner[key]) or data.draw(st.booleans()):
                break
            inner = inner[key]
        inner[key] = data.draw(JSON_VALUES)
    assert not check_anything(d)


def test_config_mutated_text_parses_or_is_a_named_error(tmp_path):
    rng = random.Random(7)
    text = json.dumps(WRAPPED | {"text_config": K2})
    parsed = 0
    for _ in range(800):
        content = bytearray(text.encode())
        for _ in range(rng.randint(1, 3)):
            at = rng.randrange(len(content))
            new = rng.choices(b'{}[],:"0123456789.-eaN\x00\xff', k=rng.randint(0, 2))
            content[at : at + rng.randint(0, 2)] = bytes(new)
        write(tmp_path, bytes(content))
        try:
            load_config(tmp_path)
            parsed += 1
        except (ConfigError, NotImplementedError):
            continue
    print(f"800 inputs, {parsed} parsed, {800 - parsed} named errors, 0 others")
    assert 0 < parsed < 800
