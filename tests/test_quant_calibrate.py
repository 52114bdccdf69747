"""Calibrated quantization of a graph: what is stored is what it computes with, and that is nearer than rounding."""

from __future__ import annotations

import copy

import pytest
import torch

from graphs import SHAPES, small_graph, small_values, some_documents
from kimi_native.checkpoint import Checkpoint
from kimi_native.loader import load_model
from kimi_native.nano.graph import Documents, KimiGraph
from kimi_native.nano.published import published_tensors, read_published
from kimi_native.quant.calibrate import calibrate_and_quantize
from kimi_native.quant.export import export_checkpoint
from kimi_native.quant.int4 import dequantize, quantize
from kimi_native.quant.qat import apply_qat, int4_values
from oracle import assert_same_bits

pytestmark = pytest.mark.usefixtures("one_thread")
LENGTHS = [60] * 20


def correlated_graph(name: str = "k2, yarn", **overrides) -> KimiGraph:
    """Hidden states in a few directions, as trained ones are: the embedding has rank 8."""
    preset, shape = SHAPES[name]
    graph = small_graph(preset, **shape, **overrides)
    with torch.no_grad():
        weight = graph.model.embed_tokens.weight
        generator = torch.Generator().manual_seed(3)
        few = torch.randn(weight.shape[0], 8, generator=generator)
        weight.copy_(few @ torch.randn(8, weight.shape[1], generator=generator))
    return graph


def nearest(graph: KimiGraph) -> KimiGraph:
    """A graph that multiplies by what plain rounding stores."""
    rounded = copy.deepcopy(graph)
    apply_qat(rounded)
    return rounded


@pytest.mark.parametrize("levels", [15, 16])
@pytest.mark.parametrize("name", SHAPES)
def test_calibrated_weights_are_what_the_checkpoint_holds(tmp_path, name, levels):
    graph = correlated_graph(name)
    calibrated = calibrate_and_quantize(graph, [some_documents(LENGTHS)], levels=levels)
    preset, overrides = SHAPES[name]
    values = small_values(preset, **overrides)
    export_checkpoint(calibrated.graph, tmp_path, values, weights=calibrated.weights)
    checkpoint = Checkpoint.open(tmp_path)
    read = KimiGraph(checkpoint.config, seed=9)
    read_published(read, checkpoint)
    pairs = zip(published_tensors(read), published_tensors(calibrated.graph), strict=True)
    for (stored, a), (_, b) in pairs:
        assert_same_bits(a, b)
        assert (f"{stored}_packed" in checkpoint.tensors) == (stored in calibrated.weights)
    model, _ = load_model(tmp_path, max_context=64)
    for index, layer in enumerate(model.model.layers):
        if hasattr(graph.model.layers[index].mlp, "experts"):
            experts = calibrated.graph.model.layers[index].mlp.experts
            for e in range(len(experts.down_proj)):
                native = dequantize(layer.mlp.experts.down.weights[e], torch.float32)
                assert_same_bits(native, experts.down_proj[e])


def test_calibrated_outputs_are_nearer_than_rounded_ones():
    """On the calibration rows each projection is; on other documents the logits are."""
    graph = correlated_graph()
    report = (calibrated := calibrate_and_quantize(graph, [some_documents(LENGTHS)])).report
    assert [(p.layer, p.projection) for p in report.projections] == [
        (layer, kind) for layer in (1, 2) for kind in ("gate_up", "down")
    ]
    for p in report.projections:
        print(f"layer {p.layer} {p.projection}: {p.error:.5f}, rounded {p.nearest:.5f}")
        assert 0 < p.error < 0.8 * p.nearest
    unseen = some_documents([50] * 4, seed=8)
    with torch.no_grad():
        true, ours, theirs = (g(unseen).logits for g in (graph, calibrated.graph, nearest(graph)))
    print(f"logits: {(ours - true).norm() / (theirs - true).norm():.3f} of rounding's error")
    assert (ours - true).norm() < (theirs - true).norm()


def test_calibrate_report_is_what_a_forward_pass_shows():
    """gate_up of the first layer with experts sees what the BF16 graph gives: its errors recomputed from rows."""
    graph, documents = correlated_graph(), some_documents(LENGTHS)
    calibrated = calibrate_and_quantize(graph, [documents], min_rows=1)
    seen = {}
    plain = copy.deepcopy(calibrated.graph)
    plain.model.layers[1].mlp.experts.register_forward_pre_hook(
        lambda m, a: seen.update(x=a[0].double(), ids=a[1])
    )
    with torch.no_grad():
        plain(documents)
    before, after = (
        g.model.layers[1].mlp.experts.gate_up_proj.detach().double() for g in (graph, plain)
    )
    rounded = int4_values(graph.model.layers[1].mlp.experts.gate_up_proj).double()
    sums = torch.zeros(3, dtype=torch.float64)
    for e in range(8):
        rows = seen["x"][(seen["ids"] == e).any(1)]
        for i, d in enumerate((before - after, before - rounded, before)):
            sums[i] += (rows @ d[e].flatten(0, 1).T).square().sum()
    report = calibrated.report.projections[0]
    assert report.error == pytest.approx(float(sums[0] / sums[2]), rel=1e-4)
    assert report.nearest == pytest.approx(float(sums[1] / sums[2]), rel=1e-4)


def test_calibrate_rounds_experts_with_too_few_rows_and_names_them():
    graph, documents = correlated_graph(), some_documents([20])
    calibrated = calibrate_and_quantize(graph, [documents], min_rows=11)
    with torch.no_grad():
        loads = calibrated.graph(documents).loads
    few = [(1 + i, e, int(n)) for i, load in enumerate(loads) for e, n in enumerate(load) if n < 11]
    assert 0 < len(few) < 16
    assert calibrated.report.rounded == few
    text = str(calibrated.report)
    assert text.startswith(f"{16 - len(few)} experts calibrated on 20 tokens, error 0.")
    assert f"layer {few[0][0]} expert {few[0][1]}: {few[0][2]} rows" in text
    weights = dict(published_tensors(graph))
    for layer, e, _ in few:
        for kind in ("gate", "up", "down"):
            name = f"model.layers.{layer}.mlp.experts.{e}.{kind}_proj.weight"
            expected = quantize(weights[name])
            assert torch.equal(calibrated.weights[name].weight_packed, expected.weight_packed)
            assert torch.equal(calibrated.weights[name].weight_scale, expected.weight_scale)


def test_calibrate_leaves_the_graph_alone_and_depends_on_no_cut():
    graph, documents = correlated_graph(), some_documents([60] * 4)
    apply_qat(graph)
    before = copy.deepcopy(graph.state_dict())
    whole = calibrate_and_quantize(graph, [documents], min_rows=20)
    parts = [
        Documents(i, p, [60])
        for i, p in zip(documents.ids.split(60), documents.positions.split(60), strict=True)
    ]
    cut = calibrate_and_quantize(graph, iter(parts), min_rows=20)
    for name, tensor in graph.state_dict().items():
        assert_same_bits(tensor, before[name])
    assert graph.model.norm.rounding is not None
    for name, tensor in whole.graph.state_dict().items():
        assert_same_bits(tensor, cut.graph.state_dict()[name])
    assert not any(m._forward_pre_hooks for m in whole.graph.modules())


def test_calibrate_refuses():
    graph, documents = correlated_graph(), some_documents()
    with pytest.raises(ValueError, match=r"calibrate: there must be documents to run \(got none"):
        calibrate_and_quantize(graph, [])
    with pytest.raises(ValueError, match=r"min_rows must be at least 1 \(got 0\)"):
        calibrate_and_quantize(graph, [documents], min_rows=0)
    with pytest.raises(ValueError, match=r"levels must be 15 or 16 \(got 8\)"):
        calibrate_and_quantize(graph, [documents], levels=8)
    with torch.no_grad():
        graph.model.layers[1].post_attention_layernorm.weight[3] = torch.inf
    with pytest.raises(
        ValueError, match=r"the inputs of model\.layers\.1\.mlp\.experts\.\d must be finite"
    ):
        calibrate_and_quantize(graph, [documents], min_rows=1)


def test_export_refuses_codes_that_are_not_the_graphs(tmp_path):
    graph = correlated_graph()
    calibrated = calibrate_and_quantize(graph, [some_documents(LENGTHS)])
    name = "model.layers.2.mlp.experts.3.down_proj.weight"
    with pytest.raises(ValueError, match=r"experts\.\d\.gate_proj\.weight must give the graph's"):
        export_checkpoint(graph, tmp_path, small_values(), weights=calibrated.weights)
    with pytest.raises(ValueError, match=r"must be of routed experts in int4 \(got lm_head"):
        export_checkpoint(
            graph, tmp_path, small_values(), weights={"lm_head.weight": calibrated.weights[name]}
        )
    with pytest.raises(ValueError, match="must be of routed experts in int4"):
        export_checkpoint(
            calibrated.graph, tmp_path, small_values(), format="bf16", weights=calibrated.weights
        )
    assert list(tmp_path.iterdir()) == []
