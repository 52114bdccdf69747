"""presets: names, shapes and counts of the published models."""

from __future__ import annotations

import functools
import json
import math

import pytest
import torch

from kimi_native import presets, random_tensors
from kimi_native.make_checkpoint import PRESETS, make_checkpoint
from made_checkpoints import read_tensors


@functools.cache
def stored_of(preset: str, format: str) -> dict[str, random_tensors.StoredTensor]:
    config = presets.text_config(preset, {})
    stored = [
        t
        for w in presets.weights(config, presets.tensor_prefix(preset))
        for t in random_tensors.stored_tensors(w, format, "F32")
    ]
    assert len({t.name for t in stored}) == len(stored)
    return {t.name: t for t in stored}


@pytest.mark.parametrize(
    ("preset", "format", "count"),
    [("k2", "int4", 208_215), ("k2", "fp8", 139_583), ("moonlight-16b", "bf16", 5_317)],
)
def test_tensor_counts_are_the_published_ones(preset, format, count):
    assert len(stored_of(preset, format)) == count


@pytest.mark.parametrize(("preset", "parameters"), [("k2", 1.0264e12), ("moonlight-16b", 15.96e9)])
def test_parameter_counts_are_the_published_ones(preset, parameters):
    config = presets.text_config(preset, {})
    count = sum(math.prod(w.shape) for w in presets.weights(config))
    assert count == pytest.approx(parameters, rel=5e-4)


def test_k2_bytes_are_the_published_ones():
    stored = stored_of("k2", "int4")
    expert = sum(t.nbytes for n, t in stored.items() if ".layers.7.mlp.experts.12." in n)
    assert expert == 24_772_608 + 3 * 8  # and three shapes
    assert sum(t.nbytes for t in stored.values()) / 1e9 == pytest.approx(594.2, abs=0.05)


K2_SHAPES = {
    "model.embed_tokens.weight": ("BF16", (163840, 7168)),
    "model.layers.0.mlp.gate_proj.weight": ("BF16", (18432, 7168)),
    "model.layers.0.mlp.down_proj.weight": ("BF16", (7168, 18432)),
    "model.layers.3.input_layernorm.weight": ("BF16", (7168,)),
    "model.layers.3.self_attn.q_a_proj.weight": ("BF16", (1536, 7168)),
    "model.layers.3.self_attn.q_a_layernorm.weight": ("BF16", (1536,)),
    "model.layers.3.self_attn.q_b_proj.weight": ("BF16", (12288, 1536)),
    "model.layers.3.self_attn.kv_a_proj_with_mqa.weight": ("BF16", (576, 7168)),
    "model.layers.3.self_attn.kv_a_layernorm.weight": ("BF16", (512,)),
    "model.layers.3.self_attn.kv_b_proj.weight": ("BF16", (16384, 512)),
    "model.layers.3.self_attn.o_proj.weight": ("BF16", (7168, 8192)),
    "model.layers.3.mlp.gate.weight": ("BF16", (384, 7168)),
    "model.layers.3.mlp.gate.e_score_correction_bias": ("F32", (384,)),
    "model.layers.3.mlp.experts.383.up_proj.weight_packed": ("I32", (2048, 896)),
    "model.layers.3.mlp.experts.383.up_proj.weight_scale": ("BF16", (2048, 224)),
    "model.layers.3.mlp.experts.383.up_proj.weight_shape": ("I32", (2,)),
    "model.layers.3.mlp.experts.0.down_proj.weight_packed": ("I32", (7168, 256)),
    "model.layers.3.mlp.experts.0.down_proj.weight_scale": ("BF16", (7168, 64)),
    "model.layers.60.mlp.shared_experts.gate_proj.weight": ("BF16", (2048, 7168)),
    "model.layers.60.mlp.shared_experts.down_proj.weight": ("BF16", (7168, 2048)),
    "model.norm.weight": ("BF16", (7168,)),
    "lm_head.weight": ("BF16", (163840, 7168)),
}
K2_SCALE_INV_SHAPES = {
    "model.layers.3.self_attn.kv_a_proj_with_mqa.weight_scale_inv": ("F32", (5, 56)),
    "model.layers.3.self_attn.kv_b_proj.weight_scale_inv": ("F32", (128, 4)),
    "model.layers.0.mlp.down_proj.weight_scale_inv": ("F32", (56, 144)),
    "model.layers.3.mlp.experts.5.gate_proj.weight_scale_inv": ("F32", (16, 56)),
    "model.layers.3.mlp.experts.5.gate_proj.weight": ("F8_E4M3", (2048, 7168)),
    "model.layers.3.mlp.gate.weight": ("BF16", (384, 7168)),
    "lm_head.weight": ("BF16", (163840, 7168)),
}


@pytest.mark.parametrize(
    ("format", "expected"), [("int4", K2_SHAPES), ("fp8", K2_SCALE_INV_SHAPES)]
)
def test_k2_shapes_are_the_published_ones(format, expected):
    stored = stored_of("k2", format)
    assert {n: (stored[n].dtype, stored[n].shape) for n in expected} == expected


def test_moonlight_has_a_direct_q_projection_and_wide_shared_experts():
    stored = stored_of("moonlight-16b", "bf16")
    assert stored["model.layers.5.self_attn.q_proj.weight"].shape == (3072, 2048)
    assert stored["model.layers.5.mlp.shared_experts.up_proj.weight"].shape == (2816, 2048)
    assert not [n for n in stored if "q_a_" in n or "q_b_" in n]


def test_router_bias_has_the_published_dtype_of_each_family(tmp_path):
    for preset, dtype in (("tiny", torch.float32), ("moonlight-small", torch.bfloat16)):
        small = {"hidden_size": 64, "moe_intermediate_size": 32, "intermediate_size": 64}
        make_checkpoint(
            tmp_path / preset, preset=preset, overrides=small, layers=2, experts=8, vocab=512
        )
        tensors = read_tensors(tmp_path / preset)
        bias = tensors["model.layers.1.mlp.gate.e_score_correction_bias"]
        assert bias.dtype == dtype
        assert 0 < bias.float().abs().max() < 0.3


def test_mtp_layers_follow_the_others(tmp_path):
    make_checkpoint(tmp_path / "c", overrides={"num_nextn_predict_layers": 1}, layers=2, experts=4)
    extra = {n for n in read_tensors(tmp_path / "c") if n.startswith("model.layers.2.")}
    for name in ("eh_proj", "enorm", "hnorm", "embed_tokens", "shared_head.head"):
        assert f"model.layers.2.{name}.weight" in extra
    assert "model.layers.2.mlp.experts.3.up_proj.weight_packed" in extra


def test_wrapped_preset_nests_the_config_and_prefixes_the_names(tmp_path):
    make_checkpoint(tmp_path / "c", preset="tiny-k25")
    config = json.loads((tmp_path / "c/config.json").read_text())
    assert config["model_type"] == "kimi_k25"
    assert "quantization_config" not in config
    assert config["text_config"]["model_type"] == "kimi_k2"
    assert config["text_config"]["quantization_config"] == presets.QUANTIZATION["int4"]
    assert all(n.startswith("language_model.") for n in read_tensors(tmp_path / "c"))


def test_model_types_of_the_presets():
    types = {name: presets.text_config(name, {})["model_type"] for name in PRESETS}
    assert types == {
        "nano": "kimi_k2",
        "tiny": "kimi_k2",
        "tiny-noqlora": "kimi_k2",
        "tiny-yarn": "kimi_k2",
        "tiny-groups": "kimi_k2",
        "tiny-v2": "deepseek_v2",
        "tiny-k25": "kimi_k2",
        "moonlight-small": "deepseek_v3",
        "moonlight-16b": "deepseek_v3",
        "k2-slice": "kimi_k2",
        "k2-layer": "kimi_k2",
        "k2": "kimi_k2",
    }
