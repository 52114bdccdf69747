"""The graph to train: its values against a naive float64 pass, its gradients against the published implementation's."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch

from graphs import LENGTHS, SHAPES, SMALL, naive_logits, small_graph, small_values, some_documents
from kimi_native.checkpoint import Checkpoint
from kimi_native.config import KimiConfig
from kimi_native.errors import ModelFormatError
from kimi_native.make_checkpoint import make_checkpoint
from kimi_native.nano import graph as graph_module
from kimi_native.nano.experts import GroupedExperts, sort_rows
from kimi_native.nano.graph import Documents, KimiGraph
from kimi_native.nano.published import published_tensors, read_published
from kimi_native.quant.export import export_checkpoint
from kimi_native.tensor_table import expected_tensors
from published import read_oracle

pytestmark = pytest.mark.usefixtures("one_thread")


def span(x: torch.Tensor) -> float:
    return (x.max() - x.min()).item()


@pytest.fixture(params=SHAPES, ids=lambda name: name.replace(" ", "-"))
def shape(request):
    return SHAPES[request.param]


def test_graph_float64_equals_the_naive_pass(shape):
    graph = small_graph(shape[0], **shape[1]).double()
    documents = some_documents()
    out = graph(documents)
    expected, largest = naive_logits(graph, documents)
    assert out.logits.dtype == torch.float64
    assert (out.logits - expected).abs().max() <= 1e-11 * span(expected)
    assert (out.max_logits.double() - largest).abs().max() <= 1e-6 * largest.abs().max()


def test_graph_float32_error_is_rounding(shape):
    """float32 differs from float64 by rounding, some 10 sums of 64 terms a layer: within 1e-5 of the span."""
    graph = small_graph(shape[0], **shape[1])
    documents = some_documents()
    expected, _ = naive_logits(graph, documents)
    actual = graph(documents).logits
    assert (actual.double() - expected).abs().max() <= 1e-5 * span(expected)


def test_graph_bfloat16_error_is_rounding():
    """2^-9 relative in each of some 40 products between input and logits, adding like independent errors: 1.3 % rms."""
    graph = small_graph(
        n_routed_experts=4, num_experts_per_tok=4
    )  # no choice that rounding could change
    half = copy.deepcopy(graph)
    half.dtype = torch.bfloat16
    documents = some_documents()
    expected, actual = graph(documents).logits, half(documents).logits
    assert actual.dtype == torch.float32
    error = (actual - expected).square().mean().sqrt() / expected.std()
    assert 1e-4 < error < 0.02


def test_graph_rows_choose_logits():
    graph, documents = small_graph(), some_documents()
    rows = torch.tensor([36, 0, 7, 7])
    assert torch.allclose(graph(documents, rows).logits, graph(documents).logits[rows], atol=1e-6)


def test_graph_documents_are_independent():
    """A document's logits are those that it has alone."""
    graph, documents = small_graph().double(), some_documents()
    together = graph(documents).logits.split(LENGTHS)
    parts = zip(documents.ids.split(LENGTHS), documents.positions.split(LENGTHS), strict=True)
    for expected, (ids, positions) in zip(together, parts, strict=True):
        alone = graph(Documents(ids, positions, [len(ids)])).logits
        assert torch.allclose(alone, expected, atol=1e-12)


def test_graph_temperatures_divide_the_logits_of_their_document():
    """As does a query that is smaller by so much; the largest logits are told as they are at temperature 1."""
    graph, documents = small_graph().double(), some_documents()
    plain = graph(documents)
    temperatures = [1.0, 2.5, 1.25, *[1.0] * (len(LENGTHS) - 3)]
    cooled = graph(replace(documents, temperatures=temperatures))
    assert torch.equal(cooled.max_logits[0], plain.max_logits[0])
    ends = torch.tensor(LENGTHS).cumsum(0).tolist()
    for temperature, start, stop in zip(temperatures, [0, *ends], ends, strict=False):
        scaled = small_graph().double()
        for layer in scaled.model.layers:
            layer.self_attn.query_proj().weight.data /= temperature
        expected = scaled(documents).logits[start:stop]
        assert torch.allclose(cooled.logits[start:stop], expected, atol=1e-12)
    assert not torch.allclose(cooled.logits, plain.logits, atol=1e-3)


@pytest.mark.parametrize("temperatures", [[1.0], [1.0] * (len(LENGTHS) - 1) + [0.0]])
def test_graph_refuses_temperatures_that_are_not_one_a_document(temperatures):
    with pytest.raises(ValueError, match="temperatures must be positive, one a document"):
        small_graph()(replace(some_documents(), temperatures=temperatures))


def test_graph_loads_count_every_choice():
    graph, documents = small_graph(), some_documents()
    loads = graph(documents).loads
    assert loads.shape == (2, SMALL["n_routed_experts"])
    assert loads.sum(1).tolist() == [sum(LENGTHS) * SMALL["num_experts_per_tok"]] * 2


def test_graph_balance_loss_is_the_sequence_wise_term():
    """sum over experts of f_i P_i per document, from the router's own scores, documents averaged, layers summed."""
    graph, documents = small_graph().double(), some_documents()
    seen = []
    for layer in graph.model.layers[1:]:
        layer.mlp.gate.register_forward_hook(lambda m, args, out: seen.append((m, args[0], out[0])))
    out = graph(documents)
    expected = 0.0
    for gate, x, ids in seen:
        scores = torch.sigmoid(x @ gate.weight.T)
        for s, chosen in zip(scores.split(LENGTHS), ids.split(LENGTHS), strict=True):
            for i in range(SMALL["n_routed_experts"]):
                f = 8 / (3 * len(s)) * int((chosen == i).sum())
                p = sum(s[t, i] / s[t].sum() for t in range(len(s))) / len(s)
                expected += f * p / len(LENGTHS)
    assert out.balance_loss.item() == pytest.approx(expected.item(), rel=1e-12)


def test_graph_balance_loss_of_a_balanced_router_is_one():
    graph = small_graph(num_hidden_layers=2, n_routed_experts=3, num_experts_per_tok=3)
    assert graph(some_documents()).balance_loss.item() == pytest.approx(1.0, rel=1e-5)


def test_graph_max_logits_are_bounded_below_the_limit_and_exact_above():
    graph, documents = small_graph(), some_documents()
    exact = graph(documents).max_logits
    graph.logit_limit = 1e9
    bound = graph(documents).max_logits
    assert (bound >= exact).all()
    assert (bound > exact).any()
    graph.logit_limit = 1e-3
    assert torch.equal(graph(documents).max_logits, exact)


def test_max_logits_in_blocks_are_those_of_all_pairs(monkeypatch):
    """Exact wherever they exceed the limit, and never below what is there; only blocks left open are multiplied."""
    monkeypatch.setattr(graph_module, "LOGIT_BLOCK", 8)
    g = torch.Generator().manual_seed(2)
    lengths, scale = [29, 1, 16], 0.25
    q, k = (torch.randn(46, 3, 5, generator=g) * 4 for _ in range(2))
    q[:, 2] /= 8  # a head far below the limit
    visible = torch.block_diag(*(torch.ones(n, n) for n in lengths)).tril().bool()
    logits = torch.einsum("ihd,jhd->hij", q, k) * scale
    exact = logits.masked_fill(~visible, -torch.inf).amax((1, 2))
    blocks = []
    largest = graph_module._largest
    monkeypatch.setattr(
        graph_module, "_largest", lambda *a, **o: blocks.append(1) or largest(*a, **o)
    )
    assert torch.allclose(graph_module.max_logits(q, k, scale, lengths, None), exact, atol=1e-5)
    assert len(blocks) == 4 * 5 // 2 + 1 + 3
    blocks.clear()
    limit = float(exact[:2].min()) - 0.01
    found = graph_module.max_logits(q, k, scale, lengths, limit)
    assert torch.allclose(found[:2], exact[:2], atol=1e-5)
    assert exact[2] <= found[2] <= limit
    assert 0 < len(blocks) < 14


@pytest.mark.parametrize("lengths", [[64], [0, 65], [66, -1], []])
def test_graph_refuses_lengths_that_are_not_the_tokens(lengths):
    ids = torch.zeros(65, dtype=torch.int64)
    with pytest.raises(ValueError, match="lengths must be positive and add up to the tokens"):
        small_graph()(Documents(ids, ids, lengths))


def test_graph_gradients_on_two_threads_are_the_same_every_time():
    """Few ids, many tokens: sums of many gradients to one row of the embedding, shared out to both threads."""
    graph, documents = small_graph(num_hidden_layers=2), some_documents([1500], vocab=5)
    torch.set_num_threads(2)
    found = []
    for _ in range(4):
        graph.zero_grad()
        graph(documents).logits.square().mean().backward()
        found.append([p.grad.clone() for p in graph.parameters()])
    for name, first, *others in zip([n for n, _ in graph.named_parameters()], *found, strict=True):
        assert all(torch.equal(first, other) for other in others), name


# ---- against the published implementation ---------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["k2, yarn", "no q_lora, 2 shared, no yarn", "groups"])
def test_graph_gradients_equal_the_published(tmp_path, name):
    """Export, build the published model from the folder, and compare loss and every parameter's gradient."""
    preset, overrides = SHAPES[name]
    graph = small_graph(preset, **overrides)
    export_checkpoint(graph, tmp_path, small_values(preset, **overrides), format="bf16")
    oracle = read_oracle(tmp_path).double()
    oracle.config._experts_implementation = "eager"  # the grouped one knows no float64
    graph = graph.double()
    read_published(graph, Checkpoint.open(tmp_path))
    ids = torch.randint(0, 600, (50,), generator=torch.Generator().manual_seed(3))
    logits = graph(Documents(ids, torch.arange(50), [50])).logits
    loss = torch.nn.functional.cross_entropy(logits[:-1], ids[1:])
    loss.backward()
    theirs = torch.nn.functional.cross_entropy(oracle(ids[None]).logits[0, :-1].double(), ids[1:])
    theirs.backward()
    assert loss.item() == pytest.approx(theirs.item(), rel=1e-6)
    expected = dict(oracle.named_parameters())
    for name, p in graph.named_parameters():
        grad = expected[name].grad.view(
            p.shape
        )  # stacked experts are called alike: gate's rows, then up's
        assert (p.grad - grad).abs().max() <= 2e-6 * grad.abs().max(), (
            name
        )  # its norms and softmax are float32


def test_grouped_experts_gradients_are_right():
    """gradcheck in float64, with an expert that no token chooses and one that all choose."""
    ids = torch.tensor([[0, 2], [0, 3], [2, 0], [0, 3], [3, 0]])
    rows, loads = sort_rows(ids, 5)
    assert loads.tolist() == [5, 0, 2, 3, 0]
    g = torch.Generator().manual_seed(0)
    shapes = [(5, 6), (5, 2), (5, 8, 6), (5, 6, 4)]
    inputs = [torch.randn(s, generator=g, dtype=torch.float64, requires_grad=True) for s in shapes]
    assert torch.autograd.gradcheck(lambda *a: GroupedExperts.apply(*a, rows), inputs)


def test_grouped_experts_of_no_tokens():
    rows, loads = sort_rows(torch.zeros(0, 2, dtype=torch.int64), 3)
    x = torch.zeros(0, 6, requires_grad=True)
    weights = (torch.ones(3, 8, 6, requires_grad=True), torch.ones(3, 6, 4, requires_grad=True))
    out = GroupedExperts.apply(x, torch.zeros(0, 2), *weights, rows)
    out.sum().backward()
    assert loads.tolist() == [0, 0, 0]
    assert all(w.grad.abs().sum() == 0 for w in weights)


# ---- names ----------------------------------------------------------------------------------------------------------


def test_published_tensors_are_those_of_the_config(shape):
    graph = small_graph(shape[0], **shape[1])
    found = {name: tuple(t.shape) for name, t in published_tensors(graph)}
    assert found == {n: e.shape for n, e in expected_tensors(graph.config).items()}


@pytest.mark.parametrize("format", ["bf16", "int4", "fp8"])
def test_read_published_takes_every_format(tmp_path, format):
    """The three formats of one seed mean the same values, fp8 up to its rounding."""
    make_checkpoint(tmp_path / "bf16", format="bf16")
    expected = KimiGraph(Checkpoint.open(tmp_path / "bf16").config)
    read_published(expected, Checkpoint.open(tmp_path / "bf16"))
    if format != "bf16":
        make_checkpoint(tmp_path / format, format=format)
    graph = KimiGraph(expected.config, seed=1)
    read_published(graph, Checkpoint.open(tmp_path / format))
    for (name, a), (_, b) in zip(
        published_tensors(graph), published_tensors(expected), strict=True
    ):
        if format == "fp8":
            assert (a - b).abs().max() <= 2**-4 * b.abs().max(), name
        else:
            assert torch.equal(a, b), name


def test_read_published_names_a_tensor_that_is_not_finite(tmp_path):
    graph = small_graph()
    export_checkpoint(graph, tmp_path, small_values(), format="bf16")
    file = tmp_path / "model-00001-of-00001.safetensors"
    content = file.read_bytes()
    checkpoint = Checkpoint.open(tmp_path)
    info = checkpoint.tensors["model.layers.1.mlp.gate.weight"]
    file.write_bytes(content[: info.start] + b"\xff\xff" + content[info.start + 2 :])
    with pytest.raises(
        ModelFormatError, match=r"model.layers.1.mlp.gate.weight: values must be fin"
    ):
        read_published(KimiGraph(KimiConfig.from_dict(small_values())), Checkpoint.open(tmp_path))
