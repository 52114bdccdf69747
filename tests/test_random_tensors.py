"""random_tensors: equal values in every format, from the seed alone, read by other libraries."""

from __future__ import annotations

import json
import math
import re

import numpy as np
import pytest
import torch
from safetensors import safe_open

from kimi_native import random_tensors
from kimi_native.make_checkpoint import make_checkpoint
from kimi_native.quant import int4
from kimi_native.quant.fp8 import dequantize_block
from kimi_native.weights import Int4Weight
from made_checkpoints import make_tiny_folders, read_bytes, read_tensors


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    return make_tiny_folders(tmp_path_factory.mktemp("tiny"))


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


@pytest.mark.parametrize("format", ["int4", "bf16"])
def test_no_two_rows_of_a_matrix_are_alike(folders, format):
    """Each row chunk has random bits of its own; the folder's matrices have several chunks."""
    for name, tensor in read_tensors(folders[format]).items():
        if (
            tensor.dim() == 2 and tensor.nbytes // tensor.shape[0] > 64
        ):  # short rows of scales may coincide
            rows = {row.tobytes() for row in tensor.view(torch.int16).numpy()}
            assert len(rows) == tensor.shape[0], name


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
