"""quantize: what it writes is the published format, means what the source meant, and is read by three readers."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

import kimi_native as kn
from kimi_native import checkpoint_writer, safetensors_file
from kimi_native.cache import LatentCache
from kimi_native.checkpoint import Checkpoint
from kimi_native.errors import ModelFormatError
from kimi_native.loader import load_model
from kimi_native.make_checkpoint import make_checkpoint
from kimi_native.quant import ptq_tensors
from kimi_native.quant.ptq import quantize_checkpoint
from made_checkpoints import make_tiny_folders, read_bytes, read_tensors
from published import make_oracle, oracle_logits, save_published

SMALL_SHARDS = 1 << 20
PARTS = ("weight_packed", "weight_scale", "weight_shape")


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    """The tiny preset in three formats, seed 0."""
    return make_tiny_folders(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def quantized(sources, tmp_path_factory):
    """(source format, levels) -> folder, in several shards."""
    root = tmp_path_factory.mktemp("quantized")
    found = {}
    for format in ("bf16", "fp8"):
        for levels in (15, 16):
            out = root / f"{format}-{levels}"
            quantize_checkpoint(sources[format], out, levels=levels, shard_bytes=SMALL_SHARDS)
            found[format, levels] = out
    return found


def rewrite(folder: Path, change, shards: int = 1) -> None:
    """Replaces a folder's tensors by change(tensors), dealt out one by one to so many files, with an index."""
    tensors = change(read_tensors(folder))
    for old in folder.glob("*.safetensors"):
        old.unlink()
    names, weight_map = sorted(tensors), {}
    for s in range(shards):
        file = f"model-{s + 1:05d}-of-{shards:06d}.safetensors"
        part = {n: tensors[n].contiguous() for n in names[s::shards]}
        save_file(part, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(part, file)
    index = {"metadata": {"total_size": 0}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def edit_config(folder: Path, **changes) -> None:
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def experts_of(tensors: dict[str, torch.Tensor]) -> list[str]:
    """Modules stored as INT4."""
    return [n.removesuffix(".weight_packed") for n in tensors if n.endswith(".weight_packed")]


def naive_fp8(weight: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """w8 times the multiplier of its block, element by block, rounded to BF16."""
    values = weight.float()
    for i in range(scale.shape[0]):
        for j in range(scale.shape[1]):
            values[128 * i : 128 * (i + 1), 128 * j : 128 * (j + 1)] *= scale[i, j]
    return values.bfloat16()


def plain_values(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """A source's tensors as BF16, by the test's own reading of FP8."""
    return {
        name: naive_fp8(t, tensors[f"{name}_scale_inv"]) if t.dtype == torch.float8_e4m3fn else t
        for name, t in tensors.items()
        if not name.endswith("_scale_inv")
    }


# ---- the format ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("format", ["bf16", "fp8"])
def test_quantize_writes_the_tensors_of_the_published_format(sources, quantized, format):
    """Names, dtypes (weight_shape I32, the router's bias F32) and shapes are those of an INT4 checkpoint."""
    found, expected = read_tensors(quantized[format, 15]), read_tensors(sources["int4"])
    assert {n: (t.dtype, t.shape) for n, t in found.items()} == {
        n: (t.dtype, t.shape) for n, t in expected.items()
    }
    for module in experts_of(found):
        rows, words = found[f"{module}.weight_packed"].shape
        assert found[f"{module}.weight_shape"].tolist() == [rows, words * 8]


def test_quantize_writes_the_published_config_and_the_rule(sources, quantized):
    for (format, levels), folder in quantized.items():
        found = json.loads((folder / "config.json").read_text())
        expected = json.loads((sources["int4"] / "config.json").read_text())
        weights = expected["quantization_config"]["config_groups"]["group_0"]["weights"]
        weights["observer_kwargs"] = {"levels": levels}
        assert found == expected, format


def test_quantize_writes_shards_of_the_published_layout(quantized):
    folder = quantized["bf16", 15]
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    shards = sorted(p.name for p in folder.glob("*.safetensors"))
    assert len(shards) > 5
    assert shards == [
        f"model-{i:05d}-of-{len(shards):05d}.safetensors" for i in range(1, len(shards) + 1)
    ]
    tensors = read_tensors(folder)
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in tensors.values())
    largest = 2048 * 256 * 2  # the embedding
    for shard in shards:
        assert (folder / shard).stat().st_size < max(SMALL_SHARDS, largest) + 64_000
        with safe_open(folder / shard, "pt") as file:
            assert file.metadata() == {"format": "pt"}


@pytest.mark.parametrize("format", ["bf16", "fp8"])
def test_quantize_leaves_everything_but_experts_as_it_is(sources, quantized, format):
    source, found = plain_values(read_tensors(sources[format])), read_tensors(quantized[format, 16])
    kept = found.keys() - {f"{m}.{part}" for m in experts_of(found) for part in PARTS}
    assert kept == {n for n in source if ".experts." not in n}
    for name in kept:
        assert found[name].dtype == source[name].dtype
        assert torch.equal(found[name], source[name]), name
    for name in ("generation_config.json", "tiktoken.model", "tokenizer_config.json"):
        assert (quantized[format, 16] / name).read_bytes() == (sources[format] / name).read_bytes()


@pytest.mark.parametrize("levels", [15, 16])
@pytest.mark.parametrize("format", ["bf16", "fp8"])
def test_quantize_packs_the_bits_of_compressed_tensors(sources, quantized, format, levels):
    """The same scales from the rule in plain torch, the same words from the library's own compressor, and back."""
    pytest.importorskip("compressed_tensors", reason="compressed-tensors is not installed")
    from compressed_tensors.compressors import PackedQuantizationCompressor
    from compressed_tensors.quantization import QuantizationConfig

    folder = quantized[format, levels]
    config = json.loads((folder / "config.json").read_text())["quantization_config"]
    (scheme,) = QuantizationConfig.model_validate(config).config_groups.values()
    assert scheme.weights.observer_kwargs == {"levels": levels}
    source, found = plain_values(read_tensors(sources[format])), read_tensors(folder)
    experts = experts_of(found)
    assert len(experts) == 3 * 16 * 3
    for module in experts:
        w = source[f"{module}.weight"].float()
        amax = w.unflatten(1, (-1, 32)).abs().amax(2)
        scale = (amax / {15: 7.0, 16: 7.5}[levels]).bfloat16()
        assert torch.equal(found[f"{module}.weight_scale"], scale)
    for module in experts[::7]:  # the library takes its time
        w = source[f"{module}.weight"].float()
        scale = found[f"{module}.weight_scale"]
        theirs = PackedQuantizationCompressor.compress({"weight": w, "weight_scale": scale}, scheme)
        assert torch.equal(found[f"{module}.weight_packed"], theirs["weight_packed"])
        assert found[f"{module}.weight_shape"].tolist() == theirs["weight_shape"].tolist()
        stored = {part: found[f"{module}.{part}"] for part in PARTS}
        values = PackedQuantizationCompressor.decompress(stored, scheme)["weight"].float()
        # half a step, for 16 levels and a clamped group 8 / 7.5 of it more; BF16 rounds the product
        step = scale.float().repeat_interleave(32, dim=1)
        assert ((values - w).abs() <= step * {15: 0.55, 16: 0.6}[levels]).all()


def test_quantize_writer_and_reader_know_the_same_dtypes():
    """Any tensor that a source may hold can be copied."""
    assert checkpoint_writer.ITEM_BYTES == safetensors_file.DTYPE_BYTES


def test_quantize_levels_differ_in_range(quantized):
    for levels, low in ((15, 1), (16, 0)):
        tensors = read_tensors(quantized["bf16", levels])
        octets = torch.cat([tensors[f"{m}.weight_packed"].flatten() for m in experts_of(tensors)])
        octets = octets.view(torch.uint8)
        assert min(int((octets & 15).min()), int((octets >> 4).min())) == low
        assert max(int((octets & 15).max()), int((octets >> 4).max())) == 15


# ---- readers ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("levels", [15, 16])
def test_quantize_gives_the_logits_of_a_model_with_dequantized_weights(tmp_path, levels):
    """Against transformers in float32 with q * scale for weights.

    The kernel's activations have 16 bits per group of 32 (error 2**-15 of the largest): over two expert layers that
    stays below 1e-3 of the logits' range. Rounding the weights to INT4 changes them by far more, as is checked too.
    """
    oracle = make_oracle("deepseek_v3", {}, seed=3)
    save_published(oracle, tmp_path / "source", model_type="kimi_k2")
    quantize_checkpoint(tmp_path / "source", tmp_path / "out", levels=levels)
    ids = torch.randint(2, 320, (48,), generator=torch.Generator().manual_seed(7))
    before = oracle_logits(oracle, ids)
    found = read_tensors(tmp_path / "out")
    state = oracle.state_dict()
    for module in experts_of(found):
        q = found[f"{module}.weight_packed"].view(torch.uint8)
        q = torch.stack([q & 15, q >> 4], dim=2).flatten(1).float() - 8
        w = q * found[f"{module}.weight_scale"].float().repeat_interleave(32, dim=1)
        _, _, layer, _, _, expert, projection = module.split(".")
        fused = f"model.layers.{layer}.mlp.experts."
        if projection == "down_proj":
            state[fused + "down_proj"][int(expert)] = w
        else:
            half = state[fused + "gate_up_proj"][int(expert)].chunk(2)[projection == "up_proj"]
            half.copy_(w)
    expected = oracle_logits(oracle, ids)
    model, checkpoint = load_model(tmp_path / "out", max_context=64, dtype="float32")
    assert set(checkpoint.forms.values()) == {"plain", "int4"}
    cache = LatentCache(model.config, max_tokens=64, dtype=model.dtype)
    sequence = cache.new_sequence()
    rows = [model.prefill(ids[:40], cache, sequence)]
    rows += [model.decode(ids[i : i + 1], cache, [sequence])[0] for i in range(40, 48)]
    actual = torch.stack(rows)
    span = expected.max() - expected.min()
    error = float((actual - expected[39:]).abs().max() / span)
    rounding = float((before - expected)[39:].abs().max() / span)
    print(f"levels {levels}: error {error:.2e} of the range, INT4 itself {rounding:.2e}")
    assert error < 1e-3
    assert rounding > 0.02


@pytest.mark.filterwarnings("ignore:You passed `quantization_config`")
def test_quantize_output_loads_in_transformers(tmp_path):
    """from_pretrained dequantizes every expert to the values that compressed-tensors decompresses."""
    pytest.importorskip("compressed_tensors", reason="compressed-tensors is not installed")
    from transformers import CompressedTensorsConfig, DeepseekV3ForCausalLM

    oracle = make_oracle("deepseek_v3", {}, seed=5)
    save_published(oracle, tmp_path / "source")
    quantize_checkpoint(tmp_path / "source", tmp_path / "out")
    model, info = DeepseekV3ForCausalLM.from_pretrained(
        tmp_path / "out",
        quantization_config=CompressedTensorsConfig(dequantize=True),
        output_loading_info=True,
    )
    assert {key: len(names) for key, names in info.items()} == dict.fromkeys(info, 0)
    found, state = read_tensors(tmp_path / "out"), model.state_dict()
    for expert in range(16):
        module = f"model.layers.1.mlp.experts.{expert}.down_proj"
        q = found[f"{module}.weight_packed"].view(torch.uint8)
        q = torch.stack([q & 15, q >> 4], dim=2).flatten(1).float() - 8
        w = q * found[f"{module}.weight_scale"].float().repeat_interleave(32, dim=1)
        loaded = state["model.layers.1.mlp.experts.down_proj"][expert]
        assert torch.equal(loaded, w.to(loaded.dtype))
    ids = torch.arange(2, 300, 7)
    quantized, exact = oracle_logits(model.float(), ids), oracle_logits(oracle, ids)
    assert torch.nn.functional.cosine_similarity(quantized, exact, dim=-1).min() > 0.9


def test_quantize_output_answers(quantized):
    model = kn.load(quantized["fp8", 15], max_context=64)
    answer = model.generate("Hello", raw_prompt=True, max_tokens=8, seed=1)
    assert answer.usage.completion_tokens == 8


# ---- what must survive -----------------------------------------------------------------------------------------------


@pytest.fixture(params=["bf16", "fp8"])
def whole(request, tmp_path):
    """A K2.5-like folder: prefix, MTP layer, vision side, frequencies, the parts of a matrix in different files."""
    source = tmp_path / "source"
    make_checkpoint(
        source,
        preset="tiny-k25",
        format=request.param,
        layers=2,
        overrides={"num_nextn_predict_layers": 1},
    )
    extra = {
        "vision_tower.blocks.0.weight": torch.randn(7, 5),
        "vision_tower.blocks.0.bias": torch.full((3,), float("nan")).half(),
        "mm_projector.linear.weight": torch.randn(4, 6).bfloat16(),
        "language_model.model.layers.1.self_attn.rotary_emb.inv_freq": torch.rand(8),
        "language_model.model.layers.2.mlp.counter": torch.tensor([1, 2], dtype=torch.int64),
    }
    rewrite(source, lambda tensors: tensors | extra, shards=3)
    return source


def test_quantize_keeps_prefix_mtp_layers_vision_and_split_matrices(whole, tmp_path):
    out = tmp_path / "out"
    report = quantize_checkpoint(whole, out, shard_bytes=SMALL_SHARDS)
    source, found = plain_values(read_tensors(whole)), read_tensors(out)
    experts = [n for n in source if ".layers.1.mlp.experts." in n]
    assert len(experts) == 48
    assert report["quantized"] == 48
    assert {f"{m}.weight" for m in experts_of(found)} == set(experts)
    kept = source.keys() - set(experts)
    assert kept == {n for n in found if not n.endswith(PARTS)}
    for name in kept:
        assert found[name].dtype == source[name].dtype
        same = found[name].flatten().view(torch.uint8), source[name].flatten().view(torch.uint8)
        assert torch.equal(*same), name
    assert any(".layers.2.mlp.experts." in n for n in kept)
    checkpoint = Checkpoint.open(out)
    assert checkpoint.config.tensor_prefix == "language_model."
    assert not any(".layers.2." in n or "vision" in n for n in checkpoint.tensors)


def test_quantize_tells_other_readers_what_is_not_quantized(whole, tmp_path):
    pytest.importorskip("compressed_tensors", reason="compressed-tensors is not installed")
    from compressed_tensors.quantization import QuantizationConfig
    from compressed_tensors.utils import is_match

    out = tmp_path / "out"
    quantize_checkpoint(whole, out)
    config = json.loads((out / "config.json").read_text())
    assert "quantization_config" not in config
    scheme = QuantizationConfig.model_validate(config["text_config"]["quantization_config"])
    (group,) = scheme.config_groups.values()
    found = read_tensors(out)
    linears = {n.rpartition(".")[0] for n, t in found.items() if t.dim() == 2}
    not_linear = ("embed_tokens", "mlp.gate")  # an Embedding and a plain parameter
    for module in linears:
        if module.endswith(not_linear) or module.endswith(
            "lm_head"
        ):  # published: lm_head, unprefixed
            continue
        hit = is_match(module, torch.nn.Linear(1, 1), group.targets, scheme.ignore)
        assert hit == (f"{module}.weight_packed" in found), module


def test_quantize_keeps_the_dtype_of_the_routers_bias(tmp_path):
    for model_type, dtype in (("kimi_k2", torch.float32), ("deepseek_v3", torch.bfloat16)):
        source, out = tmp_path / model_type, tmp_path / f"{model_type}-out"
        make_checkpoint(source, format="bf16", layers=2, overrides={"model_type": model_type})
        quantize_checkpoint(source, out)
        name = "model.layers.1.mlp.gate.e_score_correction_bias"
        assert read_tensors(source)[name].dtype == dtype
        assert torch.equal(read_tensors(out)[name], read_tensors(source)[name])
        assert read_tensors(out)[name].dtype == dtype


def test_quantize_copies_side_files_and_says_what_it_leaves(sources, tmp_path):
    source, out = tmp_path / "source", tmp_path / "out"
    shutil.copytree(sources["bf16"], source)
    kept = {
        "chat_template.jinja",
        "tokenizer.json",
        "tokenization_kimi.py",
        "LICENSE",
        "merges.txt",
    }
    left = {"README.md", "pytorch_model.bin", ".gitattributes", "pytorch_model.bin.index.json"}
    for name in kept | left:
        (source / name).write_text(f"{name}\n")
    (source / "figures").mkdir()
    report = quantize_checkpoint(source, out)
    made = {"generation_config.json", "tiktoken.model", "tokenizer_config.json"}
    assert set(report["copied"]) == kept | made
    assert set(report["left_out"]) == left | {"figures"}
    for name in kept:
        assert (out / name).read_text() == f"{name}\n"
    assert not left & {p.name for p in out.iterdir()}


# ---- other dtypes ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_quantize_takes_wider_dtypes_where_bf16_is_exact(sources, tmp_path, dtype):
    """Rounded to what both dtypes hold, the wide source and the BF16 one give the same folder."""
    for name, kind in (("plain", torch.bfloat16), ("wide", dtype)):
        shutil.copytree(sources["bf16"], tmp_path / name)

        def convert(tensors, kind=kind):
            return {
                n: t if n.endswith("bias") else t.to(dtype).bfloat16().to(kind)
                for n, t in tensors.items()
            }

        rewrite(tmp_path / name, convert)
        edit_config(tmp_path / name, torch_dtype=str(kind).removeprefix("torch."))
        quantize_checkpoint(tmp_path / name, tmp_path / f"{name}-out")
    assert read_bytes(tmp_path / "wide-out") == read_bytes(tmp_path / "plain-out")


@pytest.mark.parametrize(
    "name", ["model.layers.1.mlp.experts.3.up_proj.weight", "model.layers.0.input_layernorm.weight"]
)
def test_quantize_refuses_values_that_bf16_would_round(sources, tmp_path, name):
    source = tmp_path / "source"
    shutil.copytree(sources["bf16"], source)

    def widen(tensors):
        wide = tensors[name].float()
        wide.view(-1)[-1] = 1 + 2**-9
        return tensors | {name: wide}

    rewrite(source, widen)
    with pytest.raises(ModelFormatError, match=rf"tensor {name}: .*BF16 .*\(got F32 values"):
        quantize_checkpoint(source, tmp_path / "out")


# ---- the work's division ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("format", ["bf16", "fp8"])
@pytest.mark.parametrize(("threads", "piece"), [(1, 1), (4, 1 << 14), (2, 1 << 30)])
def test_quantize_bytes_depend_on_neither_threads_nor_pieces(
    sources, quantized, tmp_path, monkeypatch, format, threads, piece
):
    monkeypatch.setattr(ptq_tensors, "PIECE_BYTES", piece)
    before = torch.get_num_threads()
    out = tmp_path / "out"
    quantize_checkpoint(sources[format], out, threads=threads, shard_bytes=SMALL_SHARDS)
    assert read_bytes(out) == read_bytes(quantized[format, 15])
    assert torch.get_num_threads() == before


def test_quantize_reports_what_it_did(sources, tmp_path):
    seen = []
    report = quantize_checkpoint(
        sources["bf16"],
        tmp_path / "out",
        shard_bytes=SMALL_SHARDS,
        progress=lambda done, total: seen.append((done, total)),
    )
    total = sum(t.nbytes for t in read_tensors(sources["bf16"]).values())
    written = read_tensors(tmp_path / "out")
    assert seen == sorted(seen)
    assert seen[-1] == (total, total)
    assert report["source_bytes"] == total
    assert report["bytes"] == sum(t.nbytes for t in written.values())
    assert (report["tensors"], report["quantized"]) == (len(written), 144)
    assert report["shards"] == sorted(p.name for p in (tmp_path / "out").glob("*.safetensors"))
    assert (report["levels"], report["resumed_shards"]) == (15, 0)
    assert report["gb_per_s"] == pytest.approx(total / report["seconds"] / 1e9, rel=0.05, abs=2e-3)
