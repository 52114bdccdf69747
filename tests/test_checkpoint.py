"""A checkpoint folder: what the config promises is there, exactly, or a named error says what is not."""

from __future__ import annotations

import json
import os
import shutil

import numpy as np
import pytest
import torch

import tiny_checkpoint
from kimi_native.checkpoint import Checkpoint, Expected, expected_tensors, summarize
from kimi_native.config import KimiConfig
from kimi_native.errors import ConfigError, KimiNativeError, ModelFormatError
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
GLM_FLASH = MOONLIGHT | {
    "model_type": "glm4_moe_lite",
    "num_hidden_layers": 47,
    "intermediate_size": 10240,
    "moe_intermediate_size": 1536,
    "num_attention_heads": 20,
    "num_key_value_heads": 20,
    "q_lora_rank": 768,
    "qk_nope_head_dim": 192,
    "v_head_dim": 256,
    "num_experts_per_tok": 4,
    "n_shared_experts": 1,
    "vocab_size": 154880,
    "num_nextn_predict_layers": 1,
}
EXPERT = "model.layers.1.mlp.experts.2.up_proj"


def parse(d: dict) -> KimiConfig:
    return KimiConfig.from_dict(d)


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
        ModelFormatError, match=r"1 tensor: has no place in this model: vision_tower"
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
        ModelFormatError, match=r"tensors: has no place in this model: model\.layers\.2\..* more$"
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


# ---- how single matrices are stored ---------------------------------------------------------------------------------


def with_forms(d: dict, forms: dict[str, str]) -> dict[str, tuple[str, tuple]]:
    return tiny_checkpoint.tensors(d, forms)


@pytest.mark.parametrize("d", [TINY_INT4, TINY_FP8], ids=["int4", "fp8"])
@pytest.mark.parametrize("dtype", ["BF16", "F16", "F32"])
def test_checkpoint_matrix_may_be_plain_where_the_config_quantizes(tmp_path, d, dtype):
    checkpoint = Checkpoint.open(write_checkpoint(tmp_path, d, with_forms(d, {EXPERT: dtype})))
    assert checkpoint.form(EXPERT) == "plain"
    assert checkpoint.form(EXPERT.replace("up", "down")) != "plain"


@pytest.mark.parametrize(
    ("d", "module", "form"),
    [
        (TINY, EXPERT, "int4"),
        (TINY, EXPERT, "fp8"),
        (TINY_FP8, EXPERT, "int4"),
        (TINY_INT4, "model.layers.0.mlp.up_proj", "int4"),
        (TINY_INT4, "model.layers.1.self_attn.q_a_proj", "int4"),
        (TINY_INT4, "lm_head", "int4"),
        (TINY_FP8, "lm_head", "fp8"),
    ],
)
def test_checkpoint_matrix_quantized_against_the_config_is_an_error(tmp_path, d, module, form):
    write_checkpoint(tmp_path, d, with_forms(d, {module: form}))
    with pytest.raises(
        ModelFormatError, match=f"{module} is stored as {form}, but config.json keeps it"
    ):
        Checkpoint.open(tmp_path)


@pytest.mark.parametrize("module", [EXPERT, "model.layers.0.mlp.up_proj", "lm_head"])
def test_checkpoint_matrix_may_be_fp8_beside_int4(tmp_path, module):
    table = with_forms(TINY_INT4, {module: "fp8"})
    checkpoint = Checkpoint.open(write_checkpoint(tmp_path, TINY_INT4, table))
    assert checkpoint.form(module) == "fp8"
    assert set(checkpoint.forms.values()) == {"int4", "fp8", "plain"}
    del table[module + ".weight_scale_inv"]
    write_checkpoint(tmp_path, TINY_INT4, table)
    with pytest.raises(ModelFormatError, match=f"is missing: {module}.weight_scale_inv"):
        Checkpoint.open(tmp_path)


def test_checkpoint_matrix_stored_twice_is_an_error(tmp_path):
    table = tiny_checkpoint.tensors(TINY_INT4) | {EXPERT + ".weight": ("BF16", (32, 64))}
    write_checkpoint(tmp_path, TINY_INT4, table)
    with pytest.raises(ModelFormatError, match=f"{EXPERT} must be stored once"):
        Checkpoint.open(tmp_path)


@pytest.mark.parametrize(
    ("d", "name", "dtype", "message"),
    [
        (TINY, "model.norm.weight", "F8_E4M3", "dtype must be BF16 or F16 or F32"),
        (TINY, "model.norm.weight", "I32", "dtype must be BF16"),
        (TINY, EXPERT + ".weight", "F64", "dtype must be BF16"),
        (
            TINY,
            "model.layers.1.mlp.gate.e_score_correction_bias",
            "F64",
            "dtype must be F32 or BF16",
        ),
        (TINY_INT4, EXPERT + ".weight_packed", "U8", "dtype must be I32"),
        (TINY_INT4, EXPERT + ".weight_scale", "F16", "dtype must be BF16"),
        (TINY_INT4, EXPERT + ".weight_shape", "F32", "dtype must be I32 or I64"),
        (TINY_FP8, EXPERT + ".weight", "F8_E5M2", "dtype must be F8_E4M3"),
        (
            TINY_FP8,
            EXPERT + ".weight",
            "BF16",
            "dtype must be F8_E4M3",
        ),  # its weight_scale_inv is there
        (TINY_FP8, EXPERT + ".weight_scale_inv", "BF16", "dtype must be F32"),
    ],
)
def test_checkpoint_wrong_dtype_is_an_error_naming_the_tensor(tmp_path, d, name, dtype, message):
    table = tiny_checkpoint.tensors(d)
    table[name] = (dtype, table[name][1])
    write_checkpoint(tmp_path, d, table)
    with pytest.raises(
        ModelFormatError, match=f"model.safetensors: tensor {name}: {message}.*got {dtype}"
    ):
        Checkpoint.open(tmp_path)


def each_tensor_once(d: dict) -> dict[str, tuple[str, tuple]]:
    """One layer of each kind and one expert stand for the others."""
    names = [n for n in tiny_checkpoint.tensors(d) if "layers.2" not in n]
    names = [n for n in names if ".experts." not in n or ".experts.2." in n]
    return {n: tiny_checkpoint.tensors(d)[n] for n in names}


@pytest.mark.parametrize("d", [TINY, TINY_INT4, TINY_FP8], ids=["bf16", "int4", "fp8"])
def test_checkpoint_wrong_shape_is_an_error_naming_the_tensor(tmp_path, d):
    for name, (dtype, shape) in each_tensor_once(d).items():
        if name.endswith("weight_shape"):
            continue
        for wrong in ((*shape, 1), (shape[0] + 1, *shape[1:])):
            table = tiny_checkpoint.tensors(d) | {name: (dtype, wrong)}
            write_checkpoint(tmp_path, d, table)
            with pytest.raises(ModelFormatError, match=f"tensor {name}: shape must be"):
                Checkpoint.open(tmp_path)


@pytest.mark.parametrize("d", [TINY, TINY_INT4, TINY_FP8], ids=["bf16", "int4", "fp8"])
def test_checkpoint_each_missing_tensor_is_an_error_naming_it(tmp_path, d):
    for name in each_tensor_once(d):
        table = tiny_checkpoint.tensors(d)
        del table[name]
        write_checkpoint(tmp_path, d, table)
        with pytest.raises(KimiNativeError) as error:
            Checkpoint.open(tmp_path)
        module = name.rpartition(".")[0]
        assert name in str(error.value) or module in str(error.value)


def test_checkpoint_missing_and_unexpected_tensors_are_counted(tmp_path):
    table = {n: t for n, t in tiny_checkpoint.tensors(TINY).items() if ".experts." not in n}
    write_checkpoint(tmp_path / "less", TINY, table)
    with pytest.raises(
        ModelFormatError, match=r"24 tensors: is missing: model\.layers\.1\..* and 19 more"
    ):
        Checkpoint.open(tmp_path / "less")
    extra = {f"model.layers.0.self_attn.q_a_proj.bias{i}": ("BF16", (32,)) for i in range(7)}
    write_checkpoint(tmp_path / "more", TINY, tiny_checkpoint.tensors(TINY) | extra)
    with pytest.raises(
        ModelFormatError, match=r"7 tensors: has no place .*q_a_proj\.bias0, .* and 2 more"
    ):
        Checkpoint.open(tmp_path / "more")


@pytest.mark.parametrize("values", [[64, 32], [32, 65], [0, 0], [-1, 64]])
def test_checkpoint_wrong_weight_shape_is_an_error(tmp_path, values):
    path = write_checkpoint(tmp_path, TINY_INT4) / "model.safetensors"
    info = Checkpoint.open(tmp_path).tensors[EXPERT + ".weight_shape"]
    content = bytearray(path.read_bytes())
    content[info.start : info.start + 8] = np.array(values, np.int32).tobytes()
    path.write_bytes(content)
    checkpoint = Checkpoint.open(tmp_path)
    with pytest.raises(ModelFormatError, match=rf"{EXPERT}.weight_shape: must hold \[32, 64\]"):
        checkpoint.check_weight_shapes(all=True)


def test_checkpoint_reads_one_weight_shape_of_a_layer_if_not_all(tmp_path):
    path = write_checkpoint(tmp_path, TINY_INT4) / "model.safetensors"
    info = Checkpoint.open(tmp_path).tensors[EXPERT + ".weight_shape"]
    content = bytearray(path.read_bytes())
    content[info.start : info.start + 8] = bytes(8)
    path.write_bytes(content)
    checkpoint = Checkpoint.open(tmp_path)
    assert checkpoint.check_weight_shapes(all=False) == 2 * 3
    with pytest.raises(ModelFormatError, match="weight_shape"):
        checkpoint.check_weight_shapes(all=True)


# ---- index and files ------------------------------------------------------------------------------------------------


@pytest.fixture
def sharded(tmp_path):
    return write_checkpoint(tmp_path / "model", TINY, shards=3)


def edit_index(folder, edit):
    path = folder / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    edit(index)
    path.write_text(json.dumps(index))


FIRST, SECOND = "model-00001-of-000003.safetensors", "model-00002-of-000003.safetensors"


def swap(index):
    names = [n for n, f in index["weight_map"].items() if f == FIRST]
    index["weight_map"][names[3]] = SECOND


BAD_INDEX = {
    "no weight_map": (lambda i: i.pop("weight_map"), "weight_map must map"),
    "list": (lambda i: i.update(weight_map=[]), "weight_map must map"),
    "number": (lambda i: i["weight_map"].update({"lm_head.weight": 1}), "weight_map must map"),
    "empty": (lambda i: i.update(weight_map={}), "must name 1 to 1000000 tensors"),
    "missing shard": (lambda i: i["weight_map"].update({"x": "y.safetensors"}), "y.safetensors: the file is missing"),
    "wrong shard": (swap, f"{SECOND}: tensor .* must be in this file according to"),
    "unknown tensor": (lambda i: i["weight_map"].update({"x": FIRST}), "tensor x must be in this file"),
    "tensor left out": (lambda i: i["weight_map"].pop("lm_head.weight"), "lm_head.weight must be in model.safe"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD_INDEX)
def test_checkpoint_bad_index_is_a_named_error(sharded, case):
    edit, message = BAD_INDEX[case]
    edit_index(sharded, edit)
    with pytest.raises(ModelFormatError, match=message):
        Checkpoint.open(sharded)


@pytest.mark.parametrize(
    "name",
    [
        "../outside.safetensors",
        "/etc/passwd",
        "sub/x.safetensors",
        "..",
        ".",
        "",
        "a\\b",
        "a\0b",
        "x" * 300,
    ],
)
def test_checkpoint_shard_name_with_a_folder_is_refused(sharded, name):
    shutil.copy(sharded / FIRST, sharded.parent / "outside.safetensors")
    edit_index(sharded, lambda i: i["weight_map"].update({"lm_head.weight": name}))
    with pytest.raises(ModelFormatError, match="a file name must be plain"):
        Checkpoint.open(sharded)


@pytest.mark.parametrize("name", [FIRST, "model.safetensors.index.json"])
def test_checkpoint_link_out_of_the_folder_is_refused(sharded, name):
    shutil.move(sharded / name, sharded.parent / name)
    (sharded / name).symlink_to(sharded.parent / name)
    with pytest.raises(ModelFormatError, match="must stay inside the model folder"):
        Checkpoint.open(sharded)


def test_checkpoint_links_into_the_blobs_of_a_hub_cache_are_followed(tmp_path):
    repository = tmp_path / "models--a--b"
    snapshot, blobs = repository / "snapshots" / "0123abc", repository / "blobs"
    write_checkpoint(snapshot, TINY, shards=3)
    blobs.mkdir()
    for i, file in enumerate(sorted(snapshot.iterdir())):
        shutil.move(file, blobs / f"{i:040x}")
        file.symlink_to(os.path.join("..", "..", "blobs", f"{i:040x}"))
    assert len(Checkpoint.open(snapshot).files) == 3
    elsewhere = tmp_path / "models--c--d" / "blobs"  # another repository's blobs are not ours
    elsewhere.mkdir(parents=True)
    target = (snapshot / FIRST).resolve()
    shutil.move(target, elsewhere / "x")
    (snapshot / FIRST).unlink()
    (snapshot / FIRST).symlink_to(elsewhere / "x")
    with pytest.raises(ModelFormatError, match="must stay inside the model folder"):
        Checkpoint.open(snapshot)


def test_checkpoint_linked_folder_is_fine(sharded):
    link = sharded.parent / "link"
    link.symlink_to(sharded)
    assert len(Checkpoint.open(link).files) == 3


@pytest.mark.parametrize("name", [FIRST, "model.safetensors.index.json"])
def test_checkpoint_dangling_link_is_a_named_error(sharded, name):
    (sharded / name).unlink()
    (sharded / name).symlink_to(sharded / "gone")
    with pytest.raises(
        ModelFormatError, match=r"a link must lead to a file \(got .*/gone: No such"
    ):
        Checkpoint.open(sharded)


def test_checkpoint_tensor_in_two_files_is_an_error(sharded):
    (sharded / "model.safetensors.index.json").unlink()
    shutil.copy(sharded / FIRST, sharded / "model-copy.safetensors")
    with pytest.raises(
        ModelFormatError, match=r"must be in one file \(got .* and model-copy\.safetensors\)"
    ):
        Checkpoint.open(sharded)


def test_checkpoint_index_in_two_files_is_an_error(sharded):
    entries = {
        "lm_head.weight": ("BF16", (96, 64), bytes(96 * 64 * 2)),
        "extra.rotary_emb.inv_freq": ("F32", (1,), bytes(4)),
    }
    tiny_checkpoint.write_safetensors(sharded / "model-extra.safetensors", entries)
    edit_index(
        sharded,
        lambda i: i["weight_map"].update({"extra.rotary_emb.inv_freq": "model-extra.safetensors"}),
    )
    with pytest.raises(
        ModelFormatError, match=r"model-extra\.safetensors: tensor lm_head.weight must be in"
    ):
        Checkpoint.open(sharded)


def test_checkpoint_index_beside_a_whole_model_is_an_error(sharded):
    shutil.copy(sharded / FIRST, sharded / "model.safetensors")
    with pytest.raises(ModelFormatError, match=r"of its own \(got both\)"):
        Checkpoint.open(sharded)


@pytest.mark.parametrize("content", [b"", b"{}", b"[]", b"\xff"])
def test_checkpoint_malformed_shard_is_a_named_error(sharded, content):
    (sharded / SECOND).write_bytes(content)
    with pytest.raises(ModelFormatError, match=SECOND):
        Checkpoint.open(sharded)


def test_checkpoint_without_weights_or_folder_is_a_named_error(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(TINY))
    (tmp_path / "pytorch_model.bin").write_bytes(b"x")
    with pytest.raises(ModelFormatError, match=r"holds no \.safetensors file"):
        Checkpoint.open(tmp_path)
    with pytest.raises(ModelFormatError, match="must be a model folder"):
        Checkpoint.open(tmp_path / "nowhere")


def test_checkpoint_of_k2_size_opens_from_headers_alone(tmp_path):
    """Three of K2's layers at full size in sparse files: 24 GB that are never read."""
    config = K2 | {"num_hidden_layers": 3}
    table = tiny_checkpoint.tensors(config)
    (tmp_path / "config.json").write_text(json.dumps(config))
    shards: dict[str, list[str]] = {}
    for name in table:
        layer = name.split(".")[2] if name.startswith("model.layers.") else "0"
        shards.setdefault(f"model-{int(layer) + 1:05d}-of-000003.safetensors", []).append(name)
    weight_map = {}
    for file, names in shards.items():
        header, position = {}, 0
        for name in names:
            dtype, shape = table[name]
            end = position + tiny_checkpoint.nbytes(dtype, shape)
            header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [position, end]}
            position, weight_map[name] = end, file
        text = json.dumps(header).encode()
        with open(tmp_path / file, "wb") as f:
            f.write(len(text).to_bytes(8, "little") + text)
            f.truncate(8 + len(text) + position)
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    checkpoint = Checkpoint.open(tmp_path)
    assert len(checkpoint.tensors) == 12 + 2 * 3470 + 3
    assert checkpoint.summary()["bytes"] > 24e9
    allocated = sum(f.path.stat().st_blocks * 512 for f in checkpoint.files)
    assert allocated < 100e6
