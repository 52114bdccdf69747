"""Fake quantization, and that what training saw is what the native kernels read."""

from __future__ import annotations

import copy
import json

import pytest
import torch

import kimi_native
from graphs import SHAPES, small_graph, small_values, some_documents
from kimi_native.cache import LatentCache
from kimi_native.checkpoint import Checkpoint
from kimi_native.errors import CheckpointWriteError
from kimi_native.loader import load_model
from kimi_native.nano.graph import Documents, Experts, KimiGraph
from kimi_native.nano.published import published_tensors, read_published
from kimi_native.quant.export import export_checkpoint
from kimi_native.quant.int4 import dequantize, quantize
from kimi_native.quant.qat import apply_qat, fake_bf16, fake_int4, int4_values, remove_qat
from kimi_native.tokenizer_files import tokenizer_files
from oracle import assert_same_bits

pytestmark = pytest.mark.usefixtures("one_thread")
IDS = torch.randint(0, 600, (41,), generator=torch.Generator().manual_seed(2))


def weights(*shape: int) -> torch.Tensor:
    """Groups of very different sizes, some zero."""
    generator = torch.Generator().manual_seed(sum(shape))
    w = torch.randn(shape, generator=generator).unflatten(-1, (-1, 32))
    return (w * 10 ** torch.randint(-6, 3, (*w.shape[:-1], 1), generator=generator)).flatten(-2)


@pytest.mark.parametrize("shape", [(3, 32), (64, 96), (5, 2, 32, 64), (1, 1, 1, 32)])
def test_int4_values_are_those_of_the_format(shape):
    w = weights(*shape)
    expected = [dequantize(quantize(m), torch.float32) for m in w.reshape(-1, *shape[-2:])]
    assert_same_bits(int4_values(w), torch.stack(expected).view(shape))


def test_int4_values_of_a_group_of_zeros():
    w = torch.zeros(2, 64)
    w[1, 40] = -7.0
    assert torch.equal(int4_values(w), w)


@pytest.mark.parametrize("fake", [fake_int4, fake_bf16])
def test_fake_quantization_passes_gradients_straight(fake):
    w = weights(8, 64).requires_grad_()
    grad = torch.randn(8, 64)
    out = fake(w)
    assert not torch.equal(out, w)
    out.backward(grad)
    assert torch.equal(w.grad, grad)


def test_fake_int4_is_idempotent():
    """Weights that are INT4 values already stay: amax is 7 steps of its scale, so the scale is found again."""
    once = int4_values(weights(16, 96))
    assert_same_bits(int4_values(once), once)


def test_fake_int4_names_what_is_not_finite():
    w = weights(4, 32)
    w[2, 3] = torch.inf
    with pytest.raises(ValueError, match=r"qat: w must be finite in float32 \(got 1 NaN"):
        fake_int4(w)


def test_apply_qat_changes_the_forward_and_remove_qat_restores_it():
    graph, documents = small_graph(), some_documents()
    before = graph(documents).logits
    apply_qat(graph)
    rounded = graph(documents).logits
    remove_qat(graph)
    assert torch.equal(graph(documents).logits, before)
    assert not torch.equal(rounded, before)


def test_apply_qat_gives_every_weight_a_gradient():
    graph = small_graph()
    apply_qat(graph)
    graph(some_documents([200])).logits.square().mean().backward()
    for name, p in graph.named_parameters():
        assert p.grad is not None, name
        assert p.grad.abs().sum() > 0, name


def test_apply_qat_refuses_rows_that_are_no_groups():
    graph = small_graph()
    experts = graph.model.layers[1].mlp.experts
    experts.down_proj = torch.nn.Parameter(torch.zeros(8, 64, 48))
    with pytest.raises(
        ValueError, match=r"qat: rows of model\.layers\.1\.mlp\.experts\.down_proj must be .*got 48"
    ):
        apply_qat(graph)


# ---- export ---------------------------------------------------------------------------------------------------------


def exported(tmp_path, name: str, format: str = "int4") -> KimiGraph:
    """A graph that sees rounded weights, and its checkpoint."""
    preset, overrides = SHAPES[name]
    graph = small_graph(preset, **overrides)
    apply_qat(graph)
    export_checkpoint(graph, tmp_path, small_values(preset, **overrides), format=format)
    return graph


def seen(graph: KimiGraph) -> KimiGraph:
    """A graph whose weights are what `graph` multiplies by."""
    rounded = copy.deepcopy(graph)
    with torch.no_grad():
        for module in rounded.modules():
            if getattr(module, "rounding", None) is not None:
                for p in module.parameters(recurse=False):
                    p.copy_(module.rounding(p))
    return rounded


@pytest.mark.parametrize("name", SHAPES)
def test_export_stores_the_bits_that_training_multiplied_by(tmp_path, name):
    graph = exported(tmp_path, name)
    checkpoint = Checkpoint.open(tmp_path)
    assert checkpoint.config.quantization.kind == "int4"
    read = KimiGraph(checkpoint.config, seed=9)
    read_published(read, checkpoint)
    pairs = zip(published_tensors(read), published_tensors(seen(graph)), strict=True)
    for (stored, a), (_, b) in pairs:
        assert_same_bits(a, b)
        assert (f"{stored}_packed" in checkpoint.tensors) == (".mlp.experts." in stored)


@pytest.mark.parametrize("name", SHAPES)
def test_native_kernels_read_the_bits_that_training_multiplied_by(tmp_path, name):
    """What the loader hands to the INT4 kernels, dequantized, and the matrices that stay BF16."""
    graph = seen(exported(tmp_path, name))
    model, _ = load_model(tmp_path, max_context=64)
    for index, layer in enumerate(model.model.layers):
        trained = graph.model.layers[index]
        assert_same_bits(layer.self_attn.o_proj.weight.float(), trained.self_attn.o_proj.weight)
        if not hasattr(trained.mlp, "experts"):
            continue
        native, experts = layer.mlp.experts, trained.mlp.experts
        assert isinstance(experts, Experts)
        for e in range(len(native.gate)):
            for stored, matrix in (
                (native.gate, experts.gate_up_proj[e, 0]),
                (native.up, experts.gate_up_proj[e, 1]),
                (native.down, experts.down_proj[e]),
            ):
                assert_same_bits(dequantize(stored.weights[e], torch.float32), matrix.detach())


def native_logits(path, dtype: str, ids: torch.Tensor = IDS) -> torch.Tensor:
    """[tokens, vocab]: the first token prefilled, the others decoded one by one."""
    model, _ = load_model(path, max_context=64, dtype=dtype)
    cache = LatentCache(model.config, max_tokens=64, dtype=model.dtype)
    seq = cache.new_sequence()
    rows = [model.prefill(ids[:1], cache, seq)]
    rows += [model.decode(ids[i : i + 1], cache, [seq])[0] for i in range(1, len(ids))]
    return torch.stack(rows)


@pytest.mark.parametrize("name", SHAPES)
def test_native_logits_equal_the_trained_forward(tmp_path, name):
    """In float32 activations, whose INT4 products carry 2^-15 of a group's largest: the bound of test_model."""
    graph = exported(tmp_path, name)
    expected = graph(Documents(IDS, torch.arange(len(IDS)), [len(IDS)])).logits
    actual = native_logits(tmp_path, "float32")
    assert (actual - expected).abs().max() <= 1e-4 * (expected.max() - expected.min())


def test_native_logits_of_a_bf16_export_equal_the_graphs(tmp_path):
    """What BF16 holds is computed in float32 on both sides."""
    export_checkpoint(small_graph(), tmp_path, small_values(), format="bf16")
    graph = KimiGraph(Checkpoint.open(tmp_path).config, seed=9)
    read_published(graph, Checkpoint.open(tmp_path))
    expected = graph(Documents(IDS, torch.arange(len(IDS)), [len(IDS)])).logits
    actual = native_logits(tmp_path, "float32")
    assert (actual - expected).abs().max() <= 1e-4 * (expected.max() - expected.min())


def test_native_bf16_logits_are_near_the_trained_forward(tmp_path):
    """BF16 activations round some 40 times between input and logits, 2^-9 each, like independent errors: 1.3 % rms.

    Every expert answers every token, so no choice can flip.
    """
    overrides = {"n_routed_experts": 4, "num_experts_per_tok": 4}
    graph = small_graph(**overrides)
    apply_qat(graph)
    export_checkpoint(graph, tmp_path, small_values(**overrides))
    expected = graph(Documents(IDS, torch.arange(len(IDS)), [len(IDS)])).logits
    error = (native_logits(tmp_path, "bfloat16") - expected).square().mean().sqrt()
    assert error <= 0.02 * expected.std()


def test_export_with_a_tokenizer_loads_and_generates(tmp_path):
    values = small_values()
    files = tokenizer_files(values["vocab_size"])
    summary = export_checkpoint(small_graph(), tmp_path, values, files=files)
    assert summary["format"] == "int4"
    assert summary["bytes"] == sum(i.nbytes for i in Checkpoint.open(tmp_path).tensors.values())
    model = kimi_native.load(tmp_path)
    assert len(model.generate("Hello", max_tokens=3, temperature=0).ids) <= 3


def test_export_bf16_has_no_quantization_config(tmp_path):
    exported(tmp_path, "k2, yarn", "bf16")
    assert "quantization_config" not in json.loads((tmp_path / "config.json").read_text())
    assert Checkpoint.open(tmp_path).config.quantization is None


def test_export_overwrites_on_request_only(tmp_path):
    export_checkpoint(small_graph(), tmp_path, small_values())
    with pytest.raises(CheckpointWriteError, match="out_dir must be empty, or be overwritten"):
        export_checkpoint(small_graph(), tmp_path, small_values())
    export_checkpoint(small_graph(seed=1), tmp_path, small_values(), overwrite=True)
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(CheckpointWriteError, match=r"must hold no other files \(got notes.txt"):
        export_checkpoint(small_graph(), tmp_path, small_values(), overwrite=True)


def test_export_refuses(tmp_path):
    graph = small_graph()
    with pytest.raises(ValueError, match=r"format must be int4 or bf16 \(got fp8\)"):
        export_checkpoint(graph, tmp_path, small_values(), format="fp8")
    with pytest.raises(ValueError, match=r"must be the config\.json of the graph's config"):
        export_checkpoint(graph, tmp_path, small_values(rms_norm_eps=1e-3))
    graph.model.layers[1].mlp.experts.down_proj.data[3, 2, 1] = torch.nan
    with pytest.raises(ValueError, match=r"experts\.3\.down_proj\.weight must be finite"):
        export_checkpoint(graph, tmp_path, small_values())
    assert list(tmp_path.iterdir()) == []
