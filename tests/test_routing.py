"""Measured choices against the reference router and the engine, on small random checkpoints."""

from __future__ import annotations

import contextlib
import threading

import numpy as np
import pytest
import torch

import kimi_native as kn
from kimi_native import reference, routing
from kimi_native.cache import LatentCache
from kimi_native.config import KimiConfig
from kimi_native.errors import NonFiniteLogitsError, RequestError
from kimi_native.make_checkpoint import make_checkpoint
from kimi_native.model import MoE
from kimi_native.routing import measure_routing, watched_routers
from kimi_native.token_roles import CHARACTERS, ROLES
from tiny_checkpoint import TINY

FORMS = {  # preset, format
    "sigmoid, int4": ("tiny", "int4"),
    "sigmoid, groups, bf16": ("tiny-groups", "bf16"),
    "softmax, bf16": ("tiny-v2", "bf16"),
}
TEXT = "In 1492 the answer was 17 * 23 = 391."
OTHER = [5, 9, 5, 700, 3]


@pytest.fixture(scope="module", params=FORMS)
def model(request, tmp_path_factory):
    preset, format = FORMS[request.param]
    path = tmp_path_factory.mktemp("made") / "tiny"
    make_checkpoint(path, preset=preset, format=format)
    return kn.load(path, max_context=2048, threads=1)


@pytest.fixture(scope="module")
def k2(tmp_path_factory):
    path = tmp_path_factory.mktemp("made") / "tiny"
    make_checkpoint(path)
    return kn.load(path, max_context=2048, threads=1)


def router_inputs(model, ids):
    """Layer -> the rows that its router saw, of one prefill without any watching."""
    seen = {}
    with model.held_network() as network:
        removers = [
            block.mlp.register_forward_pre_hook(lambda _, x, i=i: seen.update({i: x[0].clone()}))
            for i, block in enumerate(network.model.layers)
            if isinstance(block.mlp, MoE)
        ]
        cache = LatentCache(network.config, max_tokens=len(ids), dtype=network.dtype)
        network.prefill(torch.tensor(ids), cache, cache.new_sequence())
        for remover in removers:
            remover.remove()
        gates = {i: network.model.layers[i].mlp.gate for i in seen}
    return seen, gates


def test_choices_are_the_reference_routers(model):
    """reference.moe_route in float64 on what the router was given; close calls of the last digits may differ."""
    found = measure_routing(model, [TEXT, OTHER], raw_prompt=True)
    assert found.layers == tuple(range(1, model.config.num_hidden_layers))
    assert (found.num_experts, found.topk) == (16, model.config.num_experts_per_tok)
    for text in found.texts:
        seen, gates = router_inputs(model, text.ids)
        for i, layer in enumerate(found.layers):
            gate = gates[layer]
            logits = seen[layer].double() @ gate.weight.double().T
            bias = gate.e_score_correction_bias
            ids, weights = reference.moe_route(logits, bias, **gate.options)
            same = (ids.numpy() == text.experts[:, i]).all(axis=1)
            assert same.mean() > 0.95
            close = np.isclose(weights.numpy(), text.weights[:, i], rtol=1e-3)
            assert close[same].all()


def test_counts_are_those_of_the_choices(model):
    found = measure_routing(model, [TEXT, OTHER], raw_prompt=True)
    assert found.num_tokens == sum(len(t.ids) for t in found.texts)
    for i, layer in enumerate(found.statistics(shuffles=2)):
        loads = [0] * 16
        for text in found.texts:
            for row in text.experts[:, i].tolist():
                assert len(set(row)) == found.topk
                for expert in row:
                    loads[expert] += 1
        assert layer.layer == found.layers[i]
        assert layer.counts.tolist() == loads
        assert sum(loads) == found.num_tokens * found.topk


def test_answer_is_the_engines_greedy_one(model):
    answer = model.generate(TEXT, raw_prompt=True, temperature=0, max_tokens=12)
    found = measure_routing(model, TEXT, raw_prompt=True, max_tokens=12)
    (text,) = found.texts
    assert text.ids == answer.prompt_ids + answer.ids
    assert text.prompt_tokens == len(answer.prompt_ids)
    assert text.experts.shape == (len(text.ids), len(found.layers), found.topk)
    assert text.weights.dtype == np.float32
    for i, token in zip(text.ids, text.tokens, strict=True):
        data = model.tokenizer.decode_bytes([i])
        assert token == data.decode("utf-8", errors="backslashreplace")
    without = measure_routing(model, TEXT, raw_prompt=True)
    assert (without.texts[0].experts == text.experts[: text.prompt_tokens]).all()
    assert without.texts[0].ids == answer.prompt_ids


def test_answer_ends_with_an_end_token_and_its_choices(k2, monkeypatch):
    whole = measure_routing(k2, TEXT, raw_prompt=True, max_tokens=12).texts[0]
    end = whole.ids[whole.prompt_tokens + 3]
    monkeypatch.setattr(k2, "eos_ids", frozenset([end]))
    ended = measure_routing(k2, TEXT, raw_prompt=True, max_tokens=12).texts[0]
    stop = whole.ids.index(end, whole.prompt_tokens) + 1
    assert ended.ids == whole.ids[:stop]
    assert (ended.experts == whole.experts[:stop]).all()


def test_answer_ends_with_the_context(k2):
    ids = [7] * (k2.max_context - 3)
    assert len(measure_routing(k2, ids, max_tokens=10).texts[0].ids) == k2.max_context


def test_long_prompts_are_measured_over_several_passes(k2):
    """More than one chunk of prefill; choices do not depend on where it is cut."""
    ids = [(7 * i) % 1500 for i in range(1100)]
    text = measure_routing(k2, ids).texts[0]
    assert text.experts.shape[0] == 1100
    assert (measure_routing(k2, ids[:1050]).texts[0].experts == text.experts[:1050]).all()


def test_measuring_leaves_the_model_as_it_was(k2):
    before = k2.generate(TEXT, raw_prompt=True, temperature=0, max_tokens=8).ids
    measure_routing(k2, TEXT, raw_prompt=True, max_tokens=3)
    with k2.held_network() as network:
        assert not any(m._forward_hooks for m in network.modules())
        with contextlib.suppress(KeyError), watched_routers(network, lambda *_: None):
            assert any(m._forward_hooks for m in network.modules())
            raise KeyError
        assert not any(m._forward_hooks for m in network.modules())
    assert k2.generate(TEXT, raw_prompt=True, temperature=0, max_tokens=8).ids == before


def test_measuring_beside_requests_sees_its_own_tokens_alone(k2):
    expected = measure_routing(k2, TEXT, raw_prompt=True, max_tokens=4).texts[0]
    threads = [
        threading.Thread(target=k2.generate, args=(OTHER,), kwargs={"max_tokens": 40, "seed": 1})
        for _ in range(2)
    ]
    for thread in threads:
        thread.start()
    found = measure_routing(k2, TEXT, raw_prompt=True, max_tokens=4).texts[0]
    for thread in threads:
        thread.join()
    assert found.ids == expected.ids
    assert (found.experts == expected.experts).all()


def test_labels_of_prompts(k2):
    messages = [{"role": "user", "content": "17"}]
    found = measure_routing(k2, messages)
    assert found.label_names == ROLES
    assert [found.label_names[i] for i in found.labels()] == found.texts[0].labels
    assert found.texts[0].labels[-1] == "special"
    raw = measure_routing(k2, TEXT, raw_prompt=True)
    assert raw.label_names == CHARACTERS
    assert {"digits", "words", "punctuation"} <= set(raw.texts[0].labels)
    asked = measure_routing(k2, messages, labels="characters", tools=[])
    assert asked.label_names == CHARACTERS


# ---- what is wrong --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("prompt", "options", "message"),
    [
        ("", {"raw_prompt": True}, r"prompt must hold at least one token \(got none\)"),
        ([], {}, "prompt must hold at least one token"),
        ([1, 5000], {}, "prompt ids must be integers from 0 to 2047"),
        ([1] * 2048, {}, "must fit the context of 2048 tokens"),
        ("a", {"max_tokens": -1}, r"max_tokens must be an integer of at least 0 \(got -1\)"),
        ("a", {"max_tokens": True}, r"max_tokens must be an integer of at least 0 \(got True\)"),
        ("a", {"labels": "kinds"}, "labels must be one of auto, roles, characters"),
        (7, {}, "prompt must be a text, messages, or ids"),
        ("a", {"raw_prompt": True, "tools": [print]}, "tools needs a prompt that the chat format"),
    ],
)
def test_bad_requests_are_refused_before_any_compute(k2, monkeypatch, prompt, options, message):
    monkeypatch.setattr(routing, "_routed", None)
    with pytest.raises(RequestError, match=message):
        measure_routing(k2, prompt, **options)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"n_routed_experts": None}, "n_routed_experts null in config.json"),
        ({"first_k_dense_replace": 3}, "first_k_dense_replace=3 of 3 layers in config.json"),
    ],
)
def test_models_without_experts_are_refused(values, message):
    with pytest.raises(RequestError, match=message):
        routing.check_experts(KimiConfig.from_dict(TINY | values))


def test_truncated_weights_end_the_measurement(tmp_path):
    path = make_checkpoint(tmp_path / "tiny", format="bf16")["path"]
    model = kn.load(path, threads=1)
    (shard,) = tmp_path.glob("tiny/*.safetensors")
    with open(shard, "r+b") as file:
        file.truncate(shard.stat().st_size // 2)
    with pytest.raises(kn.ModelFormatError, match=shard.name):
        measure_routing(model, TEXT, raw_prompt=True)


def test_weights_that_are_no_numbers_are_named(k2, monkeypatch):
    def spoiled(network, ids, max_tokens, eos_ids):
        layer = next(b.mlp.gate for b in network.model.layers if isinstance(b.mlp, MoE))
        layer(torch.full((len(ids), network.config.hidden_size), torch.nan, dtype=network.dtype))
        return []

    monkeypatch.setattr(routing, "_answer", spoiled)
    with pytest.raises(NonFiniteLogitsError, match="weights of experts must be finite"):
        measure_routing(k2, OTHER)
