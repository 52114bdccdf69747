"""INT4, FP8, BF16, F16 and F32 in one checkpoint, through the whole model, against its BF16 twin."""

from __future__ import annotations

import json
import math

import pytest
import torch
from safetensors.torch import load_file, save_file

from kimi_native import reference
from kimi_native.cache import LatentCache
from kimi_native.checkpoint import Checkpoint
from kimi_native.loader import load_model
from kimi_native.model import Experts, Linear
from kimi_native.quant.fp8 import quantize_block
from kimi_native.quant.modules import Int4Experts, Int4Linear, Int8Linear
from made_checkpoints import make_tiny_folders, read_tensors
from oracle import GROUP, Quantized
from published import oracle_logits, read_oracle

IDS = torch.randint(0, 1700, (90,), generator=torch.Generator().manual_seed(3))
PROMPT = 70
FP8 = (
    "layers.0.mlp.up_proj",
    "layers.1.self_attn.kv_b_proj",
    "layers.2.self_attn.q_a_proj",
    "layers.2.mlp.experts.3.down_proj",
    "layers.2.mlp.shared_experts.gate_proj",
    "lm_head",
)
F16 = ("layers.3.self_attn.o_proj", "layers.1.mlp.gate", "layers.0.input_layernorm")
F32 = ("embed_tokens", "layers.3.mlp.experts.5.gate_proj", "model.norm")


def fp8_meaning(weight, scale_inv):
    """w8 * scale of its block, element by element in float64, rounded to BF16."""
    rows = torch.arange(weight.shape[0])[:, None] // 128
    columns = torch.arange(weight.shape[1])[None] // 128
    return (weight.double() * scale_inv.double()[rows, columns]).to(torch.bfloat16)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """(mixed, twin): the same weights, in all formats and in BF16 alone. Layer 1 has INT4 experts only."""
    root = tmp_path_factory.mktemp("mixed")
    made = make_tiny_folders(root)
    int4, plain = read_tensors(made["int4"]), read_tensors(made["bf16"])
    mixed, twin = dict(int4), dict(plain)
    for name, tensor in plain.items():
        module = name.removesuffix(".weight")
        if module.endswith(FP8):
            weight, scale_inv = quantize_block(tensor)
            stored = {name: weight, f"{name}_scale_inv": scale_inv}
            twin[name] = fp8_meaning(weight, scale_inv)
        elif module.endswith(F16):
            # What is normal in F16 it holds exactly: three digits more than BF16.
            twin[name] = tensor.masked_fill(tensor.abs() < 2**-14, 0)
            stored = {name: twin[name].half()}
        elif module.endswith(F32):
            stored = {name: tensor.float()}
        else:
            continue
        for part in ("", "_packed", "_scale", "_shape"):
            mixed.pop(name + part, None)
        mixed |= stored
    for tensors, source in ((mixed, "int4"), (twin, "bf16")):
        folder = root / ("mixed" if tensors is mixed else "twin")
        folder.mkdir()
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        (folder / "config.json").write_text((made[source] / "config.json").read_text())
    return root / "mixed", root / "twin"


def logits(path, **options):
    """After the prompt and after each further token."""
    model, _ = load_model(path, max_context=128, **options)
    cache = LatentCache(model.config, max_tokens=128, dtype=model.dtype)
    seq = cache.new_sequence()
    rows = [model.prefill(IDS[:PROMPT], cache, seq)]
    rows += [model.decode(IDS[i : i + 1], cache, [seq])[0] for i in range(PROMPT, len(IDS))]
    return torch.stack(rows), model


def assert_close(actual, expected, limit=1e-4):
    assert (actual - expected).abs().max() <= limit * (expected.max() - expected.min())


def test_mixed_formats_are_all_there(folders):
    checkpoint = Checkpoint.open(folders[0])
    assert set(checkpoint.summary()["bytes_by_dtype"]) == {"BF16", "F16", "F32", "F8_E4M3", "I32"}
    assert set(checkpoint.forms.values()) == {"int4", "fp8", "plain"}
    assert json.loads((folders[0] / "config.json").read_text())["model_type"] == "kimi_k2"


def test_mixed_formats_give_the_logits_of_published_and_twin(folders):
    mixed, twin = folders
    actual, model = logits(mixed, dtype="float32")
    kinds = [type(model.model.layers[i].mlp.experts) for i in (1, 2, 3)]
    assert kinds == [
        Int4Experts,
        Experts,
        Experts,
    ]  # one expert that is not INT4 takes its layer along
    assert_close(actual, logits(twin, dtype="float32")[0])
    assert_close(actual, oracle_logits(read_oracle(twin), IDS)[PROMPT - 1 :])


def test_mixed_formats_lose_no_more_in_bf16_than_the_twin(folders):
    mixed, twin = folders
    exact = logits(mixed, dtype="float32")[0]
    ours, theirs = ((logits(f)[0] - exact).abs().amax(-1).median() for f in (mixed, twin))
    assert 0 < ours <= 1.2 * theirs


# ---- dense matrices with few bits -----------------------------------------------------------------------------------


def on_grid(name, tensor, low, high):
    """A matrix like this one that 4 or 8 bits hold exactly: its integers, and the power of two they count.

    Integer times power of two is exact in BF16. Every group reaches `high`, so that quantizing finds the same grid.
    """
    g = torch.Generator().manual_seed(len(name))
    q = torch.randint(low, high + 1, tensor.shape, generator=g)
    q[:, ::GROUP] = high
    exponent = round(math.log2(tensor.shape[1] ** -0.5 / q.double().std().item()))
    scale = torch.full((tensor.shape[0], tensor.shape[1] // GROUP), 2.0**exponent).bfloat16()
    return Quantized(q, scale)


def is_dense(name):
    module = name.removesuffix(".weight")
    return (
        module.endswith("_proj") and ".experts." not in module
    ) or "kv_a_proj_with_mqa" in module


def write(folder, tensors, config):
    folder.mkdir()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def test_dense_int4_matrices_run_as_they_are_stored(tmp_path, folders):
    """A scheme that ignores nothing but the head: kv_b_proj, which decoding takes apart, becomes BF16 again."""
    mixed, twin = folders
    stored, plain = {}, load_file(twin / "model.safetensors")
    for name, tensor in plain.items():
        if not is_dense(name):
            stored[name] = tensor
            continue
        quantized = on_grid(name, tensor, -8, 7)
        module = name.removesuffix(".weight")
        weight = quantized.int4()
        stored[f"{module}.weight_packed"] = weight.weight_packed
        stored[f"{module}.weight_scale"] = weight.weight_scale
        stored[f"{module}.weight_shape"] = torch.tensor(tensor.shape)
        plain[name] = quantized.dequantized().bfloat16()
    config = json.loads((mixed / "config.json").read_text())
    config["quantization_config"]["ignore"] = ["lm_head"]
    actual, model = logits(write(tmp_path / "int4", stored, config), dtype="float32")
    del config["quantization_config"]
    assert_close(actual, logits(write(tmp_path / "plain", plain, config), dtype="float32")[0])
    kinds = {n.rpartition(".")[2]: type(m) for n, m in model.model.layers[1].named_modules()}
    assert (kinds["o_proj"], kinds["up_proj"], kinds["kv_b_proj"]) == (
        Int4Linear,
        Int4Linear,
        Linear,
    )


def test_dense_int8_replaces_the_dense_matrices_only(tmp_path, folders):
    config = json.loads((folders[1] / "config.json").read_text())
    plain = load_file(folders[1] / "model.safetensors")
    for name, tensor in plain.items():
        if is_dense(name) or name == "lm_head.weight":
            plain[name] = on_grid(name, tensor, -127, 127).dequantized().bfloat16()
    folder = write(tmp_path / "grid", plain, config)
    actual, model = logits(folder, dtype="float32", dense="int8")
    # Activations in 16 bits a group: 1.8e-5 rms a product, some 25 products one after another, the largest of 36,000
    # logits at 4.5 rms, the range at 9: 0.5e-4 if no layer amplifies it, and norms do. With one limb: 256 times.
    assert_close(actual, logits(folder, dtype="float32")[0], limit=2e-4)
    replaced = {n.rpartition(".")[2] for n, m in model.named_modules() if isinstance(m, Int8Linear)}
    assert replaced == {
        *("q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "o_proj", "lm_head"),
        *("gate_proj", "up_proj", "down_proj"),
    }
    assert all(isinstance(model.model.layers[i].mlp.experts, Experts) for i in (1, 2, 3))


@torch.no_grad()
def test_dense_int4_gives_the_logits_of_the_published_model_with_rounded_weights(folders):
    """The oracle's own dense matrices are rounded and multiplied out in float64, by the specification of the format."""
    mixed, twin = folders
    oracle = read_oracle(twin).double()
    oracle.set_experts_implementation("eager")  # the other ways know no float64
    unrounded = oracle_logits(oracle, IDS)[PROMPT - 1 :]
    for name, parameter in oracle.named_parameters():
        if (is_dense(name) or name == "lm_head.weight") and "kv_b_proj" not in name:
            packed, scale = reference.int4_quantize(parameter.bfloat16())
            parameter.copy_(reference.dequantize_int4(packed, scale.double()))
    expected = oracle_logits(oracle, IDS)[PROMPT - 1 :]
    actual, model = logits(mixed, dtype="float32", dense="int4")
    assert_close(actual, expected)
    assert (expected - unrounded).abs().max() > 0.01 * (expected.max() - expected.min())
    kinds = {n.rpartition(".")[2]: type(m) for n, m in model.named_modules()}
    assert {k for k, kind in kinds.items() if kind is Int4Linear} == {
        *("q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "o_proj", "lm_head"),
        *("gate_proj", "up_proj", "down_proj"),
    }
