"""config.json: published values give the published numbers; a wrong key or value is a named error."""

from __future__ import annotations

import copy
import math
import os
from pathlib import Path

import pytest

from family_configs import DEEPSEEK_V3, GLM_FLASH, K2_0711, K2_6, WRAPPED, parse, without
from kimi_native.config import KimiConfig, load_config
from kimi_native.errors import ConfigError
from tiny_checkpoint import FP8, INT4, K2, MOONLIGHT, TINY, V2_LITE

DATA = Path(os.environ.get("KIMI_NATIVE_TEST_DATA", Path(__file__).parents[2] / "shared" / "data"))


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


def test_config_wrapper_reads_the_text_model():
    c = KimiConfig.from_dict(WRAPPED)
    assert (c.model_type, c.tensor_prefix, c.hidden_size) == ("kimi_k25", "language_model.", 7168)
    assert c.eos_token_ids == (163585, 163586)  # a stop token of either level stops
    assert c.quantization is None


def test_config_wrapper_end_tokens_lie_in_the_text_models_vocabulary():
    assert KimiConfig.from_dict(WRAPPED | {"eos_token_id": 163839}).eos_token_ids[-1] == 163839
    with pytest.raises(ConfigError, match=r"eos_token_id must be .* 163840.*\(got 163840\)"):
        KimiConfig.from_dict(WRAPPED | {"eos_token_id": 163840})


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
        ({"text_config": TINY | {"what": 1}, "eos_token_id": 2}, r"got text_config.what = 1\)"),
        ({"tie_word_embeddings": True}, "tie_word_embeddings must be false"),
        ({"what": 1}, r"keys must be known .*got what = 1\)"),
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
    with pytest.raises(ConfigError, match=r"config.json: .*got index_topk = 2048\).*") as error:
        KimiConfig.from_dict(d)
    assert "ignore_config_keys" in str(error.value)
    assert "--ignore-config-key" in str(error.value)
    assert KimiConfig.from_dict(d, ignore_keys=("index_topk",)) == parse(TINY)


def test_config_unknown_keys_are_named_together():
    d = K2 | {"rope_scaling": K2["rope_scaling"] | {"what": 1}, "b": 2, "a": [3]}
    with pytest.raises(ConfigError, match=r"got rope_scaling\.what = 1, a = \[3\], b = 2\)"):
        KimiConfig.from_dict(d)
    with pytest.raises(ConfigError, match=r"got b = 2\)"):
        KimiConfig.from_dict(d, ignore_keys=("a", "rope_scaling.what"))
    assert KimiConfig.from_dict(d, ignore_keys=("a", "b", "rope_scaling.what")) == parse(K2)
    with pytest.raises(ConfigError, match="k19 = 0 and 80 more") as error:
        KimiConfig.from_dict(TINY | {f"k{i:02}": 0 for i in range(100)})
    assert len(str(error.value)) < 1000


@pytest.mark.parametrize(
    "path",
    [
        "rope_scaling.what",
        "quantization_config.what",
        "quantization_config.config_groups.group_0.weights.what",
    ],
)
def test_config_unknown_nested_key_is_named_as_it_is_ignored(path):
    d = copy.deepcopy(K2)
    inner = d
    *parents, key = path.split(".")
    for parent in parents:
        inner = inner[parent]
    inner[key] = 1
    with pytest.raises(ConfigError, match=rf"got {path} = 1\)"):
        KimiConfig.from_dict(d)
    assert KimiConfig.from_dict(d, ignore_keys=(path,)) == parse(K2)


KNOWN_KEYS = [
    "hidden_size", "rope_scaling", "rope_scaling.factor", "norm_topk_prob", "rms_norm_eps", "topk_method",
    "quantization_config", "quantization_config.ignore", "attention_bias", "use_cache", "mlp_layer_types",
]  # fmt: skip


@pytest.mark.parametrize("key", KNOWN_KEYS)
def test_config_known_key_cannot_be_ignored(key):
    # without the key this would be another model
    d = K2 | {"attention_bias": False, "use_cache": True}
    with pytest.raises(
        ConfigError, match=rf"ignore_config_keys must name .*got {key}, which it reads"
    ):
        KimiConfig.from_dict(d, ignore_keys=(key,))


@pytest.mark.parametrize("key", ["what", "rope_scaling.what", "text_config.hidden_size", ""])
def test_config_ignored_key_must_be_in_the_file(key):
    with pytest.raises(ConfigError, match=rf"config.json: .*got {key}, which it does not hold"):
        KimiConfig.from_dict(K2, ignore_keys=(key,))


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
    "n_routed_experts": [0, -4, 1.5, 10**18, 4097],
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
    "eos_token_id": [
        -1,
        1.5,
        "1",
        [1, None],
        [True],
        {"a": 1},
        10**18,
        list(range(300)),
        96,
        [2, 96],
    ],
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


def test_config_takes_as_many_experts_as_the_router():
    assert parse(TINY, n_routed_experts=4096).n_routed_experts == 4096
    with pytest.raises(
        ConfigError, match="n_routed_experts must be at most 100000 over all layers"
    ):
        parse(TINY, n_routed_experts=4096, num_hidden_layers=26)


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
