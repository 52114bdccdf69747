"""quantization_config: what the published schemes and ignore rules mean; any other scheme is a named error."""

from __future__ import annotations

import copy
import json

import pytest

from family_configs import DEEPSEEK_V3, parse
from kimi_native.config import KimiConfig, QuantizationConfig
from kimi_native.errors import ConfigError
from tiny_checkpoint import FP8, INT4, K2, TINY


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
    d = TINY | {"quantization_config": INT4 | {"ignore": ["re:" + pattern]}}
    with pytest.raises(
        ConfigError, match=r"^m/config\.json: quantization_config\.ignore: patterns"
    ):
        KimiConfig.from_dict(d, source="m/config.json")
    scheme = FP8 | {"modules_to_not_convert": ["re:" + pattern]}
    with pytest.raises(ConfigError, match=r"quantization_config\.modules_to_not_convert: patterns"):
        parse(TINY, quantization_config=scheme)
    with pytest.raises(ConfigError, match=r"^quantization_config\.ignore: patterns"):
        QuantizationConfig("int4", 32, ("re:" + pattern,))


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
