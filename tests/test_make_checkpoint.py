"""make_checkpoint: the folders are the published ones in form, equal values in every format, and never half written."""

from __future__ import annotations

import argparse
import base64
import errno
import functools
import itertools
import json
import math
import re

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from kimi_native import make_checkpoint as maker
from kimi_native import presets, random_tensors, tokenizer_files
from kimi_native.errors import ConfigError, KimiNativeError
from kimi_native.make_checkpoint import PRESETS, CheckpointWriteError, make_checkpoint
from kimi_native.quant import int4
from kimi_native.quant.fp8 import dequantize_block
from kimi_native.weights import Int4Weight

TINY_PRESETS = [name for name in PRESETS if name.startswith("tiny")]


def read_tensors(path) -> dict[str, torch.Tensor]:
    """Every tensor of a folder through the safetensors library, found by the index."""
    index = json.loads((path / "model.safetensors.index.json").read_text())
    tensors = {}
    for shard in sorted(set(index["weight_map"].values())):
        held = load_file(path / shard)
        assert {n for n, s in index["weight_map"].items() if s == shard} == set(held)
        tensors |= held
    return tensors


def read_bytes(path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in sorted(path.iterdir())}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """The tiny preset in the three formats, seed 0, in row chunks so small that most matrices have several."""
    root = tmp_path_factory.mktemp("tiny")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(random_tensors, "_CHUNK_ELEMENTS", 1 << 13)
        for format in ("int4", "bf16", "fp8"):
            make_checkpoint(root / format, format=format)
    return {p.name: p for p in root.iterdir()}


# ---- names, shapes, counts -------------------------------------------------------------------------------------------


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


# ---- files -----------------------------------------------------------------------------------------------------------


def test_folder_holds_the_published_files(folders):
    for path in folders.values():
        assert {p.name for p in path.iterdir()} == {
            "config.json",
            "generation_config.json",
            "model-00001-of-00001.safetensors",
            "model.safetensors.index.json",
            "tiktoken.model",
            "tokenizer_config.json",
        }


def test_summary_says_what_was_written(tmp_path):
    summary = make_checkpoint(tmp_path / "c", seed=3, shard_bytes=1 << 20)
    tensors = read_tensors(tmp_path / "c")
    assert summary["tensors"] == len(tensors)
    assert summary["bytes"] == sum(t.nbytes for t in tensors.values())
    assert summary["shards"] == sorted(p.name for p in (tmp_path / "c").glob("*.safetensors"))
    assert len(summary["shards"]) > 5
    assert (summary["preset"], summary["format"], summary["seed"]) == ("tiny", "int4", 3)
    config = presets.text_config("tiny", {})
    assert summary["parameters"] == sum(math.prod(w.shape) for w in presets.weights(config))


def test_index_names_every_tensor_and_the_total(folders):
    for path in folders.values():
        index = json.loads((path / "model.safetensors.index.json").read_text())
        tensors = read_tensors(path)
        assert set(index["weight_map"]) == set(tensors)
        assert index["metadata"]["total_size"] == sum(t.nbytes for t in tensors.values())


def test_shards_keep_to_their_size_and_tensors_to_their_alignment(tmp_path):
    make_checkpoint(tmp_path / "c", format="fp8", shard_bytes=300_000)
    largest = 2048 * 256 * 2  # the embedding has a shard of its own
    for shard in (tmp_path / "c").glob("*.safetensors"):
        raw = shard.read_bytes()
        length = int.from_bytes(raw[:8], "little")
        header = json.loads(raw[8 : 8 + length])
        assert length % 8 == 0
        header.pop("__metadata__")
        assert len(raw) - 8 - length <= (300_000 if len(header) > 1 else largest)
        for entry in header.values():
            assert entry["data_offsets"][0] % random_tensors.ITEM_BYTES[entry["dtype"]] == 0


def test_config_carries_the_published_quantization(folders):
    configs = {f: json.loads((p / "config.json").read_text()) for f, p in folders.items()}
    assert "quantization_config" not in configs["bf16"]
    assert configs["fp8"]["quantization_config"] == {
        "quant_method": "fp8",
        "fmt": "e4m3",
        "activation_scheme": "dynamic",
        "weight_block_size": [128, 128],
    }
    scheme = configs["int4"]["quantization_config"]
    assert scheme["quant_method"] == "compressed-tensors"
    assert scheme["format"] == "pack-quantized"
    assert scheme["config_groups"]["group_0"]["weights"]["group_size"] == 32
    for config in configs.values():
        assert config["model_type"] == "kimi_k2"
        assert config["bos_token_id"] == 2048 - 256
        assert config["eos_token_id"] == 2048 - 256 + 2
    assert len({json.dumps({**c, "quantization_config": 0}) for c in configs.values()}) == 1


def test_model_types_of_the_presets():
    types = {name: presets.text_config(name, {})["model_type"] for name in PRESETS}
    assert types == {
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


# ---- values ----------------------------------------------------------------------------------------------------------


def expert_names(tensors: dict[str, torch.Tensor]) -> list[str]:
    """Module names of the routed experts' matrices."""
    ends = (".weight", ".weight_packed")
    names = {n.rsplit(".", 1)[0] for n in tensors if ".experts." in n and n.endswith(ends)}
    assert len(names) == 3 * 16 * 3
    return sorted(names)


def test_int4_experts_mean_exactly_the_bf16_values(folders):
    packed, plain = read_tensors(folders["int4"]), read_tensors(folders["bf16"])
    experts = expert_names(packed)
    assert experts == expert_names(plain)
    for name in experts:
        weight = Int4Weight(packed[f"{name}.weight_packed"], packed[f"{name}.weight_scale"])
        exact = int4.dequantize(weight, torch.float32)
        assert packed[f"{name}.weight_shape"].tolist() == list(exact.shape)
        assert torch.equal(exact, plain[f"{name}.weight"].float())  # in float32: BF16 loses nothing
    others = {n for n in plain if ".experts." not in n}
    assert others == {n for n in packed if ".experts." not in n}
    for name in others:
        assert packed[name].dtype == plain[name].dtype
        assert torch.equal(packed[name], plain[name])


def test_int4_levels_are_minus_7_to_7_and_all_occur(folders):
    packed = read_tensors(folders["int4"])
    q = torch.cat(
        [int4.unpack(packed[f"{n}.weight_packed"]).flatten() for n in expert_names(packed)]
    )
    levels, counts = q.unique(return_counts=True)
    assert levels.tolist() == list(range(-7, 8))
    share = counts.double() / q.numel()
    expected = torch.full((15,), 1 / 16, dtype=torch.float64)
    expected[7] = 2 / 16
    # six standard deviations of a binomial share over 4.7 million draws
    assert (share - expected).abs().max() < 6 * math.sqrt(1 / 16 / q.numel() * 2)


def test_fp8_is_quantized_from_the_bf16_values(folders):
    fp8, plain = read_tensors(folders["fp8"]), read_tensors(folders["bf16"])
    quantized = 0
    for name, w in plain.items():
        scale_inv = fp8.get(f"{name}_scale_inv")
        if scale_inv is None:
            assert torch.equal(fp8[name], w)
            assert re.search(r"embed_tokens|lm_head|norm|mlp\.gate\.", name)
            continue
        quantized += 1
        assert fp8[name].dtype == torch.float8_e4m3fn
        values = dequantize_block(fp8[name], scale_inv)
        # quantize_block: s max(2^-4 |w8|, 2^-10), where s |w8| <= |w| / (1 - 2^-4) above the smallest steps and
        # otherwise |w| + s 2^-10; BF16 adds 2^-8 of s |w8|; 1 + 2^-10 for the roundings of the quotient
        rows, columns = w.shape
        s = scale_inv.double().repeat_interleave(128, 0)[:rows]
        s = s.repeat_interleave(128, 1)[:, :columns]
        nearest = torch.maximum(w.double().abs() / 15, s * 2**-10)
        bound = (nearest + 2**-8 * (w.double().abs() + nearest)) * (1 + 2**-10)
        error = (values.double() - w.double()).abs()
        assert (error <= bound).all(), f"{name}: worst is {(error / bound).max():.3f} of the bound"
    assert quantized == len(plain) - len([n for n in plain if f"{n}_scale_inv" not in fp8])
    assert quantized > 150


@pytest.mark.parametrize("format", ["int4", "bf16", "fp8"])
def test_same_seed_gives_the_same_bytes(format, tmp_path):
    for name in ("a", "b"):
        make_checkpoint(tmp_path / name, format=format, layers=2)
    assert read_bytes(tmp_path / "a") == read_bytes(tmp_path / "b")


def test_values_of_a_seed_are_pinned(tmp_path):
    """What a seed means outlives this version: measurements made on it stay comparable."""
    make_checkpoint(tmp_path / "c", layers=2)
    tensors = read_tensors(tmp_path / "c")
    expert = "model.layers.1.mlp.experts.0.up_proj.weight"
    pinned = {
        "model.embed_tokens.weight": [-0.66796875, -1.2890625, -0.111328125, 1.0703125],
        f"{expert}_packed": [-1633774741, -1997952214, -784841255, 506717432],
        f"{expert}_scale": [0.01953125, 0.0146484375, 0.0185546875, 0.0166015625],
    }
    first = {name: tensors[name].flatten()[:4].tolist() for name in pinned}
    assert first == pinned


def test_another_seed_changes_every_weight(tmp_path):
    for seed in (0, 1):
        make_checkpoint(tmp_path / str(seed), seed=seed, layers=2)
    first, second = read_tensors(tmp_path / "0"), read_tensors(tmp_path / "1")
    same = [n for n in first if torch.equal(first[n], second[n])]
    assert all(n.endswith("weight_shape") for n in same)


def test_no_two_weights_are_alike(folders):
    tensors = read_tensors(folders["bf16"])
    starts = {n: t.flatten()[:48].float().numpy().tobytes() for n, t in tensors.items()}
    assert len({len(s) for s in starts.values()}) <= 2  # the router bias has 16 values
    assert len(set(starts.values())) == len(starts)


@pytest.mark.parametrize("change", ["sharding", "layers"])
def test_values_depend_on_seed_and_name_alone(change, tmp_path):
    options = {"sharding": {"shard_bytes": 200_000}, "layers": {"layers": 2}}[change]
    make_checkpoint(tmp_path / "a")
    make_checkpoint(tmp_path / "b", **options)
    whole, other = read_tensors(tmp_path / "a"), read_tensors(tmp_path / "b")
    assert set(other) <= set(whole)
    assert change == "layers" or set(other) == set(whole)
    for name, tensor in other.items():
        assert torch.equal(tensor, whole[name])


def test_magnitudes_keep_activations_near_one(folders):
    for name, tensor in read_tensors(folders["bf16"]).items():
        x = tensor.double()
        if x.dim() == 1:
            mean, std = (0.0, 0.05) if "bias" in name else (1.0, 0.1)
        else:
            mean, std = 0.0, 1.0 if "embed" in name else x.shape[1] ** -0.5
        # six standard errors of a mean and a standard deviation, and BF16 rounding of values near 1
        slack = 6 / math.sqrt(x.numel())
        assert abs(x.mean().item() - mean) < std * slack + 2**-9, name
        assert abs(x.std().item() / std - 1) < slack + 0.01, name


def test_quantiles_are_those_of_the_normal_distribution():
    z = torch.from_numpy(random_tensors._quantiles().astype(np.float64))
    assert torch.equal(z, -z.flip(0))
    assert (z.diff() > 0).all()
    uniform = 0.5 * (1 + torch.erf(z / math.sqrt(2)))
    assert torch.allclose(uniform, (torch.arange(65536).double() + 0.5) / 65536, atol=1e-7)


# ---- other readers ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("preset", ["tiny", "tiny-noqlora", "tiny-yarn", "tiny-groups", "tiny-v2"])
def test_transformers_loads_every_tensor_and_gives_finite_varied_logits(preset, tmp_path):
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    make_checkpoint(tmp_path / "c", preset=preset, format="bf16")
    config = json.loads((tmp_path / "c/config.json").read_text())
    family = "V2" if config.pop("model_type") == "deepseek_v2" else "V3"  # kimi_k2 is unknown there
    config = getattr(transformers, f"Deepseek{family}Config")(**config)
    model, info = getattr(transformers, f"Deepseek{family}ForCausalLM").from_pretrained(
        tmp_path / "c", config=config, dtype=torch.float32, output_loading_info=True
    )
    assert {key: len(found) for key, found in info.items()} == dict.fromkeys(info, 0)
    assert {"missing_keys", "unexpected_keys", "mismatched_keys"} <= set(info)
    loaded = model.state_dict()["model.layers.1.self_attn.o_proj.weight"]
    stored = read_tensors(tmp_path / "c")["model.layers.1.self_attn.o_proj.weight"]
    assert torch.equal(loaded, stored.float())
    ids = torch.arange(0, 2048, 32)[None]
    with torch.no_grad():
        logits = model.eval()(ids).logits[0]
    assert torch.isfinite(logits).all()
    assert 0.5 < logits.std() < 2
    assert len(set(logits.argmax(-1).tolist())) > 32  # of 64 positions


def test_compressed_tensors_quantizes_the_same_modules_and_reads_the_same_values(folders):
    pytest.importorskip("compressed_tensors", reason="compressed-tensors is not installed")
    from compressed_tensors.compressors import PackedQuantizationCompressor
    from compressed_tensors.quantization import QuantizationConfig
    from compressed_tensors.utils import is_match

    config = json.loads((folders["int4"] / "config.json").read_text())
    scheme = QuantizationConfig.model_validate(config["quantization_config"])
    packed, plain = read_tensors(folders["int4"]), read_tensors(folders["bf16"])
    matrices = [n for n, t in plain.items() if t.dim() == 2]
    linears = [n for n in matrices if "embed_tokens" not in n and not n.endswith("mlp.gate.weight")]
    (group,) = scheme.config_groups.values()
    for name in linears:
        module = name.removesuffix(".weight")
        quantized = is_match(module, torch.nn.Linear(1, 1), group.targets, scheme.ignore)
        assert quantized == (f"{module}.weight_packed" in packed), module
        if quantized:
            parts = ("weight_packed", "weight_scale", "weight_shape")
            state = {part: packed[f"{module}.{part}"] for part in parts}
            values = PackedQuantizationCompressor.decompress(state, group)["weight"]
            assert torch.equal(values, plain[name])


def test_safetensors_lists_the_metadata_frameworks_expect(folders):
    with safe_open(folders["int4"] / "model-00001-of-00001.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"}


# ---- tokenizer -------------------------------------------------------------------------------------------------------

# The family's pattern, in its own spelling.
PATTERN = "|".join(
    [
        r"[\p{Han}]+",
        r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]*"
        r"[\p{Ll}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?",
        r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]+"
        r"[\p{Ll}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?",
        r"\p{N}{1,3}",
        r" ?[^\s\p{L}\p{N}]+[\r\n]*",
        r"\s*[\r\n]+",
        r"\s+(?!\S)",
        r"\s+",
    ]
)


def load_encoding(path):
    """tiktoken's Encoding of a folder, with its control tokens."""
    tiktoken = pytest.importorskip("tiktoken", reason="tiktoken is not installed")
    from tiktoken.load import load_tiktoken_bpe

    ranks = load_tiktoken_bpe(str(path / "tiktoken.model"))
    added = json.loads((path / "tokenizer_config.json").read_text())["added_tokens_decoder"]
    special = {entry["content"]: int(i) for i, entry in added.items()}
    return tiktoken.Encoding(
        "made", pat_str=PATTERN, mergeable_ranks=ranks, special_tokens=special
    ), ranks


TEXTS = [
    "",
    "Hello, world! I'll say it once: they've WON'T'd it.",
    "def f(x):\n    return x**2\n\n\n  # done\r\n",
    "1234567 and 3.14159",
    "月之暗面 一丁丂 你好，世界",
    "naïve café 🙂🚀 한국어 日本語テキスト",
    "\x00\x01\x7f \t \u3000\u00a0",
]


@pytest.mark.parametrize("text", TEXTS)
def test_tiktoken_round_trips_text(folders, text):
    encoding, _ = load_encoding(folders["int4"])
    ids = encoding.encode(text)
    assert encoding.decode_bytes(ids) == text.encode()


def test_tokenizer_compresses_text(folders):
    encoding, _ = load_encoding(folders["int4"])
    text = (
        "A router gives every expert a score, and the best eight answer.\n    return x + layer(x)\n"
    )
    assert len(encoding.encode(text)) < len(text) / 3


@pytest.mark.parametrize("vocab", [512, 1024, 2048, 32768, 163840])
def test_rank_file_has_one_line_per_plain_id(vocab):
    lines = tokenizer_files.tokenizer_files(vocab)["tiktoken.model"].decode().splitlines()
    assert len(lines) == vocab - 256
    tokens = [base64.b64decode(line.split()[0], validate=True) for line in lines]
    assert [int(line.split()[1]) for line in lines] == list(range(vocab - 256))
    assert len(set(tokens)) == len(tokens)
    assert {bytes([b]) for b in range(256)} == set(tokens[:256])
    assert max(map(len, tokens)) <= 32


def naive_merge(token: bytes, ranks: dict[bytes, int], below: int) -> list[bytes]:
    """Byte-pair merging of `token` with the ranks before `below` only, lowest rank first."""
    parts = [bytes([b]) for b in token]
    while True:
        best = min(
            (ranks.get(a + b, below), i) for i, (a, b) in enumerate(itertools.pairwise(parts))
        )
        if best[0] >= below:
            return parts
        parts[best[1] : best[1] + 2] = [parts[best[1]] + parts[best[1] + 1]]


def test_every_token_is_the_merge_of_two_earlier_ones():
    tokens = tokenizer_files.ranked_tokens(163840 - 256)
    ranks = {token: rank for rank, token in enumerate(tokens)}
    sample = [*range(256, 6000), *range(6000, len(tokens), 97)]
    for rank in sample:
        assert len(naive_merge(tokens[rank], ranks, rank)) == 2, tokens[rank]


def test_control_tokens_keep_the_published_offsets(folders):
    config = json.loads((folders["int4"] / "tokenizer_config.json").read_text())
    added = {int(i) - 1792: e for i, e in config["added_tokens_decoder"].items()}
    published = {
        0: ("[BOS]", True),
        1: ("[EOS]", True),
        2: ("<|im_end|>", True),
        3: ("<|im_user|>", True),
        4: ("<|im_assistant|>", True),
        10: ("<|im_system|>", True),
        11: ("<|tool_calls_section_begin|>", False),
        12: ("<|tool_calls_section_end|>", False),
        13: ("<|tool_call_begin|>", False),
        14: ("<|tool_call_argument_begin|>", False),
        15: ("<|tool_call_end|>", False),
        17: ("<|im_middle|>", True),
        22: ("<think>", False),
        23: ("</think>", False),
        255: ("[PAD]", True),
    }
    assert {o: (added[o]["content"], added[o]["special"]) for o in published} == published
    assert len({e["content"] for e in added.values()}) == len(added)
    generation = json.loads((folders["int4"] / "generation_config.json").read_text())
    assert generation["bos_token_id"] == 1792
    assert generation["eos_token_id"] == 1794
    encoding, _ = load_encoding(folders["int4"])
    assert encoding.encode("<|im_end|>", allowed_special="all") == [1794]
    assert len(encoding.encode("<|im_end|>", disallowed_special=())) > 1


def test_tokenizer_refuses_vocabularies_it_cannot_fill():
    with pytest.raises(ConfigError, match=r"256 bytes need as many ranks \(got 255\)"):
        tokenizer_files.ranked_tokens(255)
    with pytest.raises(ConfigError, match=r"at most \d+ ranks can be made \(got 2000000\)"):
        tokenizer_files.ranked_tokens(2_000_000)


# ---- arguments -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"preset": "huge"}, r"preset must be one of tiny, .* \(got huge\)"),
        ({"overrides": {"hiden_size": 64}}, r"overrides must be config keys .* \(got hiden_size\)"),
        ({"overrides": {"hidden_size": 100}}, r"multiple of 32 \(got hidden_size=100\)"),
        ({"overrides": {"hidden_size": "256"}}, r"must be an integer .* \(got hidden_size=256\)"),
        ({"overrides": {"moe_intermediate_size": 48}}, r"\(got moe_intermediate_size=48\)"),
        ({"overrides": {"qk_rope_head_dim": 15}}, r"even \(got qk_rope_head_dim=15\)"),
        ({"overrides": {"q_lora_rank": 0}}, r"\(got q_lora_rank=0\)"),
        ({"overrides": {"n_group": 3}}, r"n_group must divide .*n_group=3"),
        ({"overrides": {"topk_group": 2}}, r"must not exceed n_group .*topk_group=2"),
        ({"overrides": {"n_group": 8}}, r"num_experts_per_tok must not exceed .*n_group=8"),
        ({"experts": 2}, r"num_experts_per_tok must not exceed .*n_routed_experts=2"),
        ({"layers": 0}, r"at least 1 \(got num_hidden_layers=0\)"),
        ({"vocab": 511}, r"256 bytes and 256 reserved slots \(got vocab_size=511\)"),
        ({"layers": 2, "overrides": {"num_hidden_layers": 3}}, "must be given once"),
    ],
)
def test_wrong_configs_are_refused_before_anything_is_written(tmp_path, options, message):
    with pytest.raises(ConfigError, match=message):
        make_checkpoint(tmp_path / "c", **options)
    assert not (tmp_path / "c").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"format": "int3"}, r"format must be one of bf16, int4, fp8 \(got int3\)"),
        ({"seed": -1}, r"seed must not be negative \(got -1\)"),
        ({"shard_bytes": 0}, r"shard_bytes must be positive \(got 0\)"),
    ],
)
def test_wrong_arguments_are_refused_before_anything_is_written(tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        make_checkpoint(tmp_path / "c", **options)
    assert not (tmp_path / "c").exists()


def test_progress_ends_at_the_total(tmp_path):
    seen = []
    summary = make_checkpoint(
        tmp_path / "c", progress=lambda done, total: seen.append((done, total))
    )
    assert seen == sorted(seen)
    assert seen[-1] == (summary["bytes"], summary["bytes"])


# ---- the folder ------------------------------------------------------------------------------------------------------


def test_a_checkpoint_is_replaced_only_on_request(tmp_path):
    out = tmp_path / "c"
    make_checkpoint(out, shard_bytes=1 << 20)
    before = read_bytes(out)
    with pytest.raises(CheckpointWriteError, match=r"out_dir must be empty, or be overwritten"):
        make_checkpoint(out)
    assert read_bytes(out) == before
    make_checkpoint(out, overwrite=True)
    make_checkpoint(tmp_path / "fresh")
    assert read_bytes(out) == read_bytes(tmp_path / "fresh")  # no shard of the old one is left


def test_a_folder_with_other_files_is_never_touched(tmp_path):
    out = tmp_path / "c"
    make_checkpoint(out, layers=2)
    (out / "notes.txt").write_text("mine")
    before = read_bytes(out)
    with pytest.raises(CheckpointWriteError, match=r"hold no other files \(got notes.txt in "):
        make_checkpoint(out, overwrite=True)
    assert read_bytes(out) == before
    with pytest.raises(CheckpointWriteError, match=r"must be a folder \(got file "):
        make_checkpoint(out / "notes.txt")


def test_a_full_disk_is_seen_before_anything_is_written_or_removed(tmp_path, monkeypatch):
    out = tmp_path / "c"
    make_checkpoint(out, layers=2)
    before = read_bytes(out)
    usage = type("Usage", (), {"free": 1000})
    monkeypatch.setattr(maker.shutil, "disk_usage", lambda path: usage)
    with pytest.raises(
        CheckpointWriteError, match=r"needs 0\.\d+ GiB on the disk \(got 0\.\d+ GiB free\)"
    ):
        make_checkpoint(out, overwrite=True, format="bf16")
    assert read_bytes(out) == before
    with pytest.raises(CheckpointWriteError, match=r"\(got 0.000 GiB free\)"):
        make_checkpoint(tmp_path / "new" / "deeper")
    assert not (tmp_path / "new").exists()


def fail_after(monkeypatch, writes: int, error: BaseException) -> None:
    """The `writes`-th write of this run writes a part of its data, then raises."""
    write_bytes, count = maker._write_bytes, iter(range(10**9))

    def failing(file, data):
        if next(count) == writes:
            file.write(b"\0" * 100)
            raise error
        write_bytes(file, data)

    monkeypatch.setattr(maker, "_write_bytes", failing)


@pytest.mark.parametrize("writes", [0, 3, 40, 300, 484])
@pytest.mark.parametrize(
    "error", [OSError(errno.ENOSPC, "No space left on device"), KeyboardInterrupt()]
)
def test_an_interrupted_run_never_looks_complete(tmp_path, monkeypatch, writes, error):
    out = tmp_path / "c"
    make_checkpoint(out, seed=1, layers=2)  # an older checkpoint is being replaced
    with monkeypatch.context() as patch:
        fail_after(patch, writes, error)
        expected = CheckpointWriteError if isinstance(error, OSError) else KeyboardInterrupt
        with pytest.raises(expected) as caught:
            make_checkpoint(out, shard_bytes=1 << 20, overwrite=True)
    if isinstance(error, OSError):
        assert isinstance(caught.value, KimiNativeError)
        assert re.search(
            r"cannot write .*/c/\S+ \(got No space left on device, \d+\.\d+ GiB free\)",
            str(caught.value),
        )
    left = {p.name for p in out.iterdir()}
    assert not left & {"config.json", "model.safetensors.index.json"}
    assert not [n for n in left if n.endswith(".part")]
    make_checkpoint(out, shard_bytes=1 << 20, overwrite=True)
    make_checkpoint(tmp_path / "fresh", shard_bytes=1 << 20)
    assert read_bytes(out) == read_bytes(tmp_path / "fresh")


def test_leftover_temporaries_of_a_killed_run_can_be_overwritten(tmp_path):
    out = tmp_path / "c"
    out.mkdir()
    (out / "model-00001-of-00002.safetensors.part").write_bytes(b"half")
    with pytest.raises(CheckpointWriteError):
        make_checkpoint(out)
    make_checkpoint(out, overwrite=True)
    make_checkpoint(tmp_path / "fresh")
    assert read_bytes(out) == read_bytes(tmp_path / "fresh")


# ---- the command -----------------------------------------------------------------------------------------------------


def parse(*argv: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    maker.add_arguments(parser)
    return parser.parse_args(argv)


def test_run_prints_the_summary_as_json(tmp_path, capsys):
    out = str(tmp_path / "c")
    options = ("--preset", "tiny-groups", "--format", "bf16", "--seed", "7", "--layers", "2")
    sets = ("--experts", "32", "--vocab", "600", "--set", "rope_scaling=null")
    sizes = ("--set", "n_shared_experts=2", "--shard-gib", "0.001", "--json")
    assert maker.run(parse(*options, *sets, *sizes, out)) == 0
    captured = capsys.readouterr()
    summary = json.loads(captured.out)
    assert captured.err == ""
    assert summary["path"] == out
    assert (summary["preset"], summary["format"], summary["seed"]) == ("tiny-groups", "bf16", 7)
    assert len(summary["shards"]) > 1
    config = json.loads((tmp_path / "c/config.json").read_text())
    expected = {
        "num_hidden_layers": 2,
        "n_routed_experts": 32,
        "vocab_size": 600,
        "rope_scaling": None,
        "n_shared_experts": 2,
        "n_group": 4,
    }
    assert {key: config[key] for key in expected} == expected


def test_run_prints_one_line_and_needs_overwrite(tmp_path, capsys):
    out = str(tmp_path / "c")
    assert maker.run(parse(out)) == 0
    line = capsys.readouterr().out
    assert line.startswith(f"{out}: 0.007 B parameters, 489 tensors, 0.007 GB in 1 shard(s)")
    assert line.count("\n") == 1
    with pytest.raises(CheckpointWriteError):
        maker.run(parse(out))
    assert maker.run(parse(out, "--overwrite")) == 0


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (("--set", "n_group"), "must be KEY=JSON"),
        (("--set", "n_group=four"), "n_group must be JSON"),
        (("--shard-gib", "none"), "must be a size in GiB"),
        (("--shard-gib", "0"), "must be a size in GiB"),
        (("--preset", "huge"), "invalid choice"),
    ],
)
def test_bad_command_lines_are_refused(argv, message, capsys):
    with pytest.raises(SystemExit):
        parse("out", *argv)
    assert message in capsys.readouterr().err
