"""Small checkpoints for the tests of the reading side, written by naive code that shares nothing with the package."""

from __future__ import annotations

import json
import struct
from pathlib import Path

import numpy as np

ITEM_BYTES = {
    "BOOL": 1,
    "I8": 1,
    "U8": 1,
    "F8_E4M3": 1,
    "F8_E5M2": 1,
    "I16": 2,
    "F16": 2,
    "BF16": 2,
    "I32": 4,
    "F32": 4,
    "I64": 8,
    "F64": 8,
}

TINY = {
    "model_type": "deepseek_v3",
    "vocab_size": 96,
    "hidden_size": 64,
    "intermediate_size": 96,
    "moe_intermediate_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "q_lora_rank": 32,
    "kv_lora_rank": 32,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8,
    "v_head_dim": 16,
    "n_routed_experts": 4,
    "n_shared_experts": 2,
    "num_experts_per_tok": 2,
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 1,
    "moe_layer_freq": 1,
    "scoring_func": "sigmoid",
    "topk_method": "noaux_tc",
    "norm_topk_prob": True,
    "routed_scaling_factor": 2.5,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "rope_scaling": None,
    "max_position_embeddings": 512,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
}

INT4 = {
    "quant_method": "compressed-tensors",
    "format": "pack-quantized",
    "quantization_status": "compressed",
    "kv_cache_scheme": None,
    "ignore": [
        "lm_head",
        "re:.*self_attn.*",
        "re:.*shared_experts.*",
        "re:.*mlp\\.(gate|up|gate_up|down)_proj.*",
    ],
    "config_groups": {
        "group_0": {
            "targets": ["Linear"],
            "input_activations": None,
            "output_activations": None,
            "weights": {
                "num_bits": 4,
                "type": "int",
                "symmetric": True,
                "strategy": "group",
                "group_size": 32,
                "dynamic": False,
                "actorder": None,
                "block_structure": None,
                "observer": "minmax",
                "observer_kwargs": {},
            },
        }
    },
}

FP8 = {
    "quant_method": "fp8",
    "fmt": "e4m3",
    "activation_scheme": "dynamic",
    "weight_block_size": [128, 128],
}

K2 = {
    "model_type": "kimi_k2",
    "vocab_size": 163840,
    "hidden_size": 7168,
    "intermediate_size": 18432,
    "moe_intermediate_size": 2048,
    "num_hidden_layers": 61,
    "num_attention_heads": 64,
    "num_key_value_heads": 64,
    "q_lora_rank": 1536,
    "kv_lora_rank": 512,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "v_head_dim": 128,
    "n_routed_experts": 384,
    "n_shared_experts": 1,
    "num_experts_per_tok": 8,
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 1,
    "scoring_func": "sigmoid",
    "topk_method": "noaux_tc",
    "norm_topk_prob": True,
    "routed_scaling_factor": 2.827,
    "rms_norm_eps": 1e-5,
    "rope_theta": 50000.0,
    "rope_scaling": {
        "type": "yarn",
        "factor": 64.0,
        "original_max_position_embeddings": 4096,
        "beta_fast": 1.0,
        "beta_slow": 1.0,
        "mscale": 1.0,
        "mscale_all_dim": 1.0,
    },
    "max_position_embeddings": 262144,
    "bos_token_id": 163584,
    "eos_token_id": 163585,
    "quantization_config": INT4,
}

MOONLIGHT = K2 | {
    "model_type": "deepseek_v3",
    "hidden_size": 2048,
    "num_hidden_layers": 27,
    "intermediate_size": 11264,
    "moe_intermediate_size": 1408,
    "num_attention_heads": 16,
    "num_key_value_heads": 16,
    "q_lora_rank": None,
    "n_routed_experts": 64,
    "num_experts_per_tok": 6,
    "n_shared_experts": 2,
    "routed_scaling_factor": 2.446,
    "rope_scaling": None,
    "max_position_embeddings": 8192,
    "quantization_config": None,
}

V2_LITE = MOONLIGHT | {
    "model_type": "deepseek_v2",
    "intermediate_size": 10944,
    "vocab_size": 102400,
    "scoring_func": "softmax",
    "topk_method": "greedy",
    "norm_topk_prob": False,
    "routed_scaling_factor": 1.0,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000,
    "rope_scaling": K2["rope_scaling"]
    | {"factor": 40, "beta_fast": 32, "mscale": 0.707, "mscale_all_dim": 0.707},
    "max_position_embeddings": 163840,
    "bos_token_id": 100000,
    "eos_token_id": 100001,
}


def matrices(c: dict) -> dict[str, tuple[int, int]]:
    """Linear module -> [out, in], as the published implementation creates them."""
    h, n = c["hidden_size"], c["num_attention_heads"]
    qk = c["qk_nope_head_dim"] + c["qk_rope_head_dim"]
    found = {}
    for i in range(c["num_hidden_layers"]):
        a, m = f"model.layers.{i}.self_attn.", f"model.layers.{i}.mlp."
        if c["q_lora_rank"] is None:
            found[a + "q_proj"] = (n * qk, h)
        else:
            found[a + "q_a_proj"] = (c["q_lora_rank"], h)
            found[a + "q_b_proj"] = (n * qk, c["q_lora_rank"])
        found[a + "kv_a_proj_with_mqa"] = (c["kv_lora_rank"] + c["qk_rope_head_dim"], h)
        found[a + "kv_b_proj"] = (n * (c["qk_nope_head_dim"] + c["v_head_dim"]), c["kv_lora_rank"])
        found[a + "o_proj"] = (h, n * c["v_head_dim"])
        mlps = {m: c["intermediate_size"]}
        if i >= c["first_k_dense_replace"]:
            w = c["moe_intermediate_size"]
            mlps = {f"{m}experts.{e}.": w for e in range(c["n_routed_experts"])}
            mlps[m + "shared_experts."] = w * c["n_shared_experts"]
        for prefix, width in mlps.items():
            found[prefix + "gate_proj"] = (width, h)
            found[prefix + "up_proj"] = (width, h)
            found[prefix + "down_proj"] = (h, width)
    if not c.get("tie_word_embeddings"):
        found["lm_head"] = (c["vocab_size"], h)
    return found


def stored(module: str, shape: tuple[int, int], form: str) -> dict[str, tuple[str, tuple]]:
    """Tensor name -> (dtype, shape) of one matrix."""
    out, in_ = shape
    if form == "int4":
        return {
            module + ".weight_packed": ("I32", (out, in_ // 8)),
            module + ".weight_scale": ("BF16", (out, in_ // 32)),
            module + ".weight_shape": ("I32", (2,)),
        }
    if form == "fp8":
        return {
            module + ".weight": ("F8_E4M3", (out, in_)),
            module + ".weight_scale_inv": ("F32", ((out + 127) // 128, (in_ + 127) // 128)),
        }
    return {module + ".weight": (form, shape)}


def published_form(c: dict, module: str) -> str:
    """How the published checkpoints store a matrix: INT4 experts only; FP8 everything but lm_head."""
    method = (c.get("quantization_config") or {}).get("quant_method")
    if method == "fp8":
        return "BF16" if module == "lm_head" else "fp8"
    return "int4" if method and ".experts." in module else "BF16"


def tensors(c: dict, forms: dict[str, str] | None = None) -> dict[str, tuple[str, tuple]]:
    """Tensor name -> (dtype, shape) of a whole checkpoint; `forms` overrides how single matrices are stored."""
    h = c["hidden_size"]
    found = {
        "model.embed_tokens.weight": ("BF16", (c["vocab_size"], h)),
        "model.norm.weight": ("BF16", (h,)),
    }
    for i in range(c["num_hidden_layers"]):
        p = f"model.layers.{i}."
        found[p + "input_layernorm.weight"] = ("BF16", (h,))
        found[p + "post_attention_layernorm.weight"] = ("BF16", (h,))
        found[p + "self_attn.kv_a_layernorm.weight"] = ("BF16", (c["kv_lora_rank"],))
        if c["q_lora_rank"] is not None:
            found[p + "self_attn.q_a_layernorm.weight"] = ("BF16", (c["q_lora_rank"],))
        if i >= c["first_k_dense_replace"]:
            found[p + "mlp.gate.weight"] = ("BF16", (c["n_routed_experts"], h))
            if c["topk_method"] == "noaux_tc":
                bias = ("F32", (c["n_routed_experts"],))
                found[p + "mlp.gate.e_score_correction_bias"] = bias
    for module, shape in matrices(c).items():
        form = (forms or {}).get(module) or published_form(c, module)
        found |= stored(module, shape, form)
    return found


def nbytes(dtype: str, shape: tuple) -> int:
    return int(np.prod(shape, dtype=object)) * ITEM_BYTES[dtype]


def content(name: str, dtype: str, shape: tuple, packed_shape: tuple | None = None) -> bytes:
    """Bytes that depend on the name alone; weight_shape holds what weight_packed says."""
    if packed_shape is not None:
        values = [packed_shape[0], packed_shape[1] * 8]
        return np.array(values, np.int64 if dtype == "I64" else np.int32).tobytes()
    seed = np.random.default_rng(list(name.encode()))
    return seed.integers(0, 128, nbytes(dtype, shape), dtype=np.uint8).tobytes()


def write_safetensors(path: Path, entries: dict[str, tuple[str, tuple, bytes]]) -> None:
    header, position = {"__metadata__": {"format": "pt"}}, 0
    for name, (dtype, shape, data) in entries.items():
        header[name] = {
            "dtype": dtype,
            "shape": list(shape),
            "data_offsets": [position, position + len(data)],
        }
        position += len(data)
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    path.write_bytes(struct.pack("<Q", len(text)) + text + b"".join(e[2] for e in entries.values()))


def write_checkpoint(
    folder: Path,
    config: dict,
    table: dict[str, tuple[str, tuple]] | None = None,
    *,
    shards: int = 1,
    prefix: str = "",
) -> Path:
    """A folder with config.json, the tensors of `table` (default: as published) and, with shards, an index."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    table = tensors(config.get("text_config", config)) if table is None else table
    entries = {}
    for name, (dtype, shape) in table.items():
        packed_shape = None
        if name.endswith("weight_shape"):
            _, packed_shape = table.get(name.replace("weight_shape", "weight_packed"), ("", ()))
            packed_shape = (*packed_shape, 0, 0)[:2]
        text_tensor = name.startswith(("model.", "lm_head"))
        full = prefix + name if text_tensor else name
        entries[full] = (dtype, shape, content(full, dtype, shape, packed_shape))
    if shards == 1:
        write_safetensors(folder / "model.safetensors", entries)
        return folder
    names = list(entries)
    weight_map = {}
    for s in range(shards):
        file = f"model-{s + 1:05d}-of-{shards:06d}.safetensors"
        part = names[s::shards]  # so that the parts of one matrix lie in different files
        write_safetensors(folder / file, {n: entries[n] for n in part})
        weight_map |= dict.fromkeys(part, file)
    (folder / "model.safetensors.index.json").write_text(
        json.dumps({"metadata": {"total_size": 0}, "weight_map": weight_map})
    )
    return folder
