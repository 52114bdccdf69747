"""A checkpoint folder: which tensors the config promises, and that they are the bytes in the files."""

from __future__ import annotations

import json

import pytest
import torch

import tiny_checkpoint
from family_configs import GLM_FLASH, parse
from kimi_native.checkpoint import Checkpoint, Expected, expected_tensors, summarize
from kimi_native.errors import ConfigError, ModelFormatError
from tiny_checkpoint import FP8, INT4, K2, MOONLIGHT, TINY, V2_LITE, write_checkpoint

TINY_INT4 = TINY | {"quantization_config": INT4}
TINY_FP8 = TINY | {"quantization_config": FP8}
VARIANTS = {
    "bf16": TINY,
    "int4": TINY_INT4,
    "fp8": TINY_FP8,
    "no q_lora": TINY | {"q_lora_rank": None},
    "softmax": TINY
    | {
        "model_type": "deepseek_v2",
        "scoring_func": "softmax",
        "topk_method": "greedy",
        "norm_topk_prob": False,
        "routed_scaling_factor": 1.0,
    },
    "tied": TINY | {"tie_word_embeddings": True},
    "all dense": TINY | {"first_k_dense_replace": 3},
}
EXPERT = "model.layers.1.mlp.experts.2.up_proj"


# ---- what the config promises ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("d", "count"),
    [
        (K2, 208_215),
        (K2 | {"quantization_config": FP8}, 139_583),
        (MOONLIGHT, 5_317),
        (V2_LITE, 5_291),
    ],
    ids=["K2 INT4", "K2 FP8", "Moonlight", "V2-Lite"],
)
def test_checkpoint_expects_the_published_number_of_tensors(d, count):
    assert len(expected_tensors(parse(d))) == count


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("model.embed_tokens.weight", ("BF16", (163840, 7168))),
        ("model.layers.60.self_attn.q_a_proj.weight", ("BF16", (1536, 7168))),
        ("model.layers.60.self_attn.q_b_proj.weight", ("BF16", (12288, 1536))),
        ("model.layers.60.self_attn.kv_a_proj_with_mqa.weight", ("BF16", (576, 7168))),
        ("model.layers.60.self_attn.kv_b_proj.weight", ("BF16", (16384, 512))),
        ("model.layers.60.self_attn.o_proj.weight", ("BF16", (7168, 8192))),
        ("model.layers.0.mlp.down_proj.weight", ("BF16", (7168, 18432))),
        ("model.layers.1.mlp.gate.e_score_correction_bias", ("F32", (384,))),
        ("model.layers.1.mlp.shared_experts.down_proj.weight", ("BF16", (7168, 2048))),
        ("model.layers.1.mlp.experts.383.gate_proj.weight_packed", ("I32", (2048, 896))),
        ("model.layers.1.mlp.experts.383.gate_proj.weight_scale", ("BF16", (2048, 224))),
        ("model.layers.1.mlp.experts.383.gate_proj.weight_shape", ("I32", (2,))),
        ("model.layers.1.mlp.experts.383.down_proj.weight_packed", ("I32", (7168, 256))),
    ],
)
def test_checkpoint_expects_the_published_k2_shapes(name, expected):
    found = expected_tensors(parse(K2))[name]
    assert (found.dtypes[0], found.shape) == expected


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("model.layers.2.self_attn.q_a_proj.weight_scale_inv", (12, 56)),
        ("model.layers.2.self_attn.q_b_proj.weight_scale_inv", (96, 12)),
        ("model.layers.2.self_attn.kv_a_proj_with_mqa.weight_scale_inv", (5, 56)),
        ("model.layers.2.self_attn.kv_b_proj.weight_scale_inv", (128, 4)),
        ("model.layers.2.self_attn.o_proj.weight_scale_inv", (56, 64)),
        ("model.layers.0.mlp.up_proj.weight_scale_inv", (144, 56)),
        ("model.layers.0.mlp.down_proj.weight_scale_inv", (56, 144)),
        ("model.layers.2.mlp.experts.7.gate_proj.weight_scale_inv", (16, 56)),
        ("model.layers.2.mlp.experts.7.down_proj.weight_scale_inv", (56, 16)),
    ],
)
def test_checkpoint_expects_the_published_fp8_blocks(name, shape):
    found = expected_tensors(parse(K2 | {"quantization_config": FP8}))
    assert found[name] == Expected(shape, ("F32",))
    assert found[name.removesuffix("_scale_inv")].dtypes == ("F8_E4M3",)
    assert found["lm_head.weight"].dtypes[0] == "BF16"


@pytest.mark.parametrize("variant", VARIANTS)
def test_checkpoint_expects_what_the_naive_table_lists(variant):
    found = expected_tensors(parse(VARIANTS[variant]))
    listed = tiny_checkpoint.tensors(VARIANTS[variant])
    assert {n: (e.dtypes[0], e.shape) for n, e in found.items()} == listed


def test_checkpoint_int4_needs_whole_groups():
    d = TINY_INT4 | {"moe_intermediate_size": 48}
    with pytest.raises(ConfigError, match=r"down_proj: INT4 needs in_features .* multiple of 32"):
        expected_tensors(parse(d))


def test_checkpoint_k2_sizes_are_the_published_ones():
    config = parse(K2)
    s = summarize(config, expected_tensors(config))
    kinds = s["bytes_by_kind"]
    one_expert = (kinds["routed experts"] - 60 * 384 * 3 * 8) / (60 * 384)  # without weight_shape
    assert one_expert == 24_772_608
    assert round(kinds["routed experts"] / 1e9, 1) == 570.8
    assert round((s["bytes"] - kinds["routed experts"]) / 1e9, 1) == 23.4
    assert round(s["bytes"] / 1e9, 1) == 594.2
    per_token = s["bytes_per_decoded_token"]
    assert round(per_token["routed_experts"] / 1e9, 1) == 11.9
    assert round(per_token["dense"] / 1e9, 1) == 21.1
    assert per_token["total"] == per_token["routed_experts"] + per_token["dense"]
    assert s["cache_bytes_per_token"] == 70_272
    assert round(s["parameters"]["total"] / 1e12, 4) == 1.0264
    assert round(s["parameters"]["active_per_token"] / 1e9, 1) == 32.9


@pytest.mark.parametrize(
    ("d", "billions", "gigabytes", "cache"),
    [
        (MOONLIGHT, 15.96, 31.9, 31_104),
        (V2_LITE, 15.71, 31.4, 31_104),
        (GLM_FLASH, 29.94, 59.9, 54_144),
    ],
    ids=["Moonlight", "V2-Lite", "GLM-4.7-Flash"],
)
def test_checkpoint_small_model_sizes_are_the_published_ones(d, billions, gigabytes, cache):
    config = parse(d)
    s = summarize(config, expected_tensors(config))
    assert round(s["parameters"]["total"] / 1e9, 2) == billions
    assert round(s["bytes"] / 1e9, 1) == gigabytes
    assert s["cache_bytes_per_token"] == cache


# ---- opening --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shards", [1, 5])
@pytest.mark.parametrize("variant", VARIANTS)
def test_checkpoint_opens_and_its_tensors_are_the_bytes_in_the_files(tmp_path, variant, shards):
    d = VARIANTS[variant]
    checkpoint = Checkpoint.open(write_checkpoint(tmp_path, d, shards=shards))
    listed = tiny_checkpoint.tensors(d)
    assert set(checkpoint.tensors) == set(listed)
    assert len(checkpoint.files) == shards
    for name, (dtype, shape) in listed.items():
        tensor = checkpoint.tensor(name)
        assert tuple(tensor.shape) == shape
        assert checkpoint.tensors[name].dtype == dtype
        if not name.endswith("weight_shape"):
            data = tensor.reshape(-1).view(torch.uint8).numpy().tobytes()
            assert data == tiny_checkpoint.content(name, dtype, shape)
    quantized = {"int4": "int4", "fp8": "fp8"}.get(variant, "plain")
    assert (
        checkpoint.form(EXPERT if variant != "all dense" else "model.layers.1.mlp.up_proj")
        == quantized
    )


def test_checkpoint_all_files_of_a_folder_without_an_index(tmp_path):
    write_checkpoint(tmp_path, TINY, shards=3)
    (tmp_path / "model.safetensors.index.json").unlink()
    assert len(Checkpoint.open(tmp_path).files) == 3


@pytest.mark.parametrize("quantized", [None, INT4])
def test_checkpoint_of_a_wrapper_has_prefixed_names_and_skips_the_vision_side(tmp_path, quantized):
    text = (
        TINY | {"model_type": "kimi_k2"} | ({"quantization_config": quantized} if quantized else {})
    )
    d = {"model_type": "kimi_k25", "text_config": text, "vision_config": {}}
    vision = {
        "vision_tower.patch_embed.proj.weight": ("BF16", (4, 3)),
        "mm_projector.proj.0.weight": ("F32", (4,)),
        "multi_modal_projector.linear_1.bias": ("F16", (4,)),
    }
    table = tiny_checkpoint.tensors(text) | vision
    write_checkpoint(tmp_path, d, table, prefix="language_model.", shards=2)
    checkpoint = Checkpoint.open(tmp_path)
    assert set(checkpoint.tensors) == {"language_model." + n for n in tiny_checkpoint.tensors(text)}
    short, full = "model.norm.weight", "language_model.model.norm.weight"
    assert checkpoint.tensor(short).data_ptr() == checkpoint.tensor(full).data_ptr()
    assert checkpoint.form(EXPERT) == ("int4" if quantized else "plain")
    assert checkpoint.form("language_model." + EXPERT) == checkpoint.form(EXPERT)


def test_checkpoint_without_a_wrapper_takes_no_vision_tensor(tmp_path):
    table = tiny_checkpoint.tensors(TINY) | {"vision_tower.x.weight": ("BF16", (4,))}
    write_checkpoint(tmp_path, TINY, table)
    with pytest.raises(
        ModelFormatError,
        match=r"no place in the model \(got 1: vision_tower\.x\.weight in model\.safetensors\)$",
    ):
        Checkpoint.open(tmp_path)


@pytest.mark.parametrize("shards", [1, 2])
def test_checkpoint_skips_frequencies_and_mtp_layers(tmp_path, shards):
    extra = {
        "model.layers.0.self_attn.rotary_emb.inv_freq": ("F32", (4,)),
        "model.layers.3.eh_proj.weight": ("BF16", (64, 128)),
        "model.layers.3.mlp.experts.0.up_proj.weight": ("BF16", (32, 64)),
    }
    d = TINY | {"num_nextn_predict_layers": 1}
    write_checkpoint(tmp_path, d, tiny_checkpoint.tensors(d) | extra, shards=shards)
    checkpoint = Checkpoint.open(tmp_path)
    assert set(checkpoint.tensors) == set(tiny_checkpoint.tensors(TINY))
    with pytest.raises(
        ModelFormatError, match=r"the model has no tensor model\.layers\.3\.eh_proj"
    ):
        checkpoint.tensor("model.layers.3.eh_proj.weight")


def test_checkpoint_with_more_layers_than_configured_is_an_error(tmp_path):
    write_checkpoint(tmp_path, TINY | {"num_hidden_layers": 2}, tiny_checkpoint.tensors(TINY))
    with pytest.raises(
        ModelFormatError, match=r"no place in the model \(got \d+: model\.layers\.2\..* more\)$"
    ):
        Checkpoint.open(tmp_path)


def test_checkpoint_reads_what_the_published_library_saves(tmp_path):
    from transformers import DeepseekV3Config, DeepseekV3ForCausalLM

    keys = (
        "model_type",
        "scoring_func",
        "topk_method",
        "moe_layer_freq",
        "torch_dtype",
        "rope_scaling",
    )
    published = DeepseekV3ForCausalLM(
        DeepseekV3Config(**{k: v for k, v in TINY.items() if k not in keys})
    )
    published.to(torch.bfloat16).save_pretrained(tmp_path, max_shard_size="60KB")
    checkpoint = Checkpoint.open(tmp_path)
    assert len(checkpoint.files) > 1
    assert checkpoint.generation_config["eos_token_id"] == 2
    weights = published.state_dict()
    assert torch.equal(checkpoint.tensor("model.norm.weight"), weights["model.norm.weight"])
    stacked = weights[
        "model.layers.1.mlp.experts.gate_up_proj"
    ]  # in memory one tensor, in the file one per expert
    assert torch.equal(checkpoint.tensor(EXPERT + ".weight"), stacked[2, 32:])


def test_checkpoint_ignore_keys_reach_the_config(tmp_path):
    write_checkpoint(tmp_path, TINY | {"future": 1})
    with pytest.raises(ConfigError, match="future"):
        Checkpoint.open(tmp_path)
    Checkpoint.open(tmp_path, ignore_keys=("future",))


def test_checkpoint_weight_shape_may_be_64_bits(tmp_path):
    table = tiny_checkpoint.tensors(TINY_INT4)
    table |= {n: ("I64", s) for n, (_, s) in table.items() if n.endswith("weight_shape")}
    checkpoint = Checkpoint.open(write_checkpoint(tmp_path, TINY_INT4, table))
    assert checkpoint.check_weight_shapes(all=True) == 2 * 4 * 3


def test_checkpoint_summary_counts_what_the_files_hold(tmp_path):
    summary = Checkpoint.open(write_checkpoint(tmp_path, TINY_INT4, shards=3)).summary()
    table = tiny_checkpoint.tensors(TINY_INT4)
    sizes = {n: tiny_checkpoint.nbytes(*t) for n, t in table.items()}
    assert summary["tensors"] == len(table)
    assert summary["bytes"] == sum(sizes.values()) == sum(summary["bytes_by_dtype"].values())
    assert summary["bytes_by_kind"]["routed experts"] == sum(
        s for n, s in sizes.items() if ".experts." in n
    )
    assert summary["bytes_by_kind"]["lm_head"] == 96 * 64 * 2
    assert summary["bytes_by_dtype"]["F32"] == 2 * 4 * 4
    assert summary["matrices_by_form"] == {"int4": 24, "plain": 3 * 5 + 3 + 2 * 3 + 1}
    assert summary["files"] == 3
    assert summary["quantization"] == "int4, groups of 32"
    assert summary["architecture"]["moe_layers"] == 2
    json.dumps(summary)
