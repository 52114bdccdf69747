"""A prompt computed in several calls, and requests that continue what an earlier one left in the cache."""

from __future__ import annotations

import re
from typing import Literal

import pytest
import torch

import kimi_native as kn
from kimi_native.make_checkpoint import make_checkpoint
from kimi_native.prefixes import KeptPrefix
from kimi_native.sampling import SamplingParams
from oracle import assert_same_bits, threads


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("prefix") / "tiny"
    make_checkpoint(path, preset="tiny", format="int4")
    return path


def prefill_in(network, cache, ids, cuts):
    """Logits after the last id, and every layer's cache rows, with the ids given in pieces."""
    seq = cache.new_sequence()
    for start, stop in zip([0, *cuts], [*cuts, len(ids)], strict=True):
        logits = network.prefill(ids[start:stop], cache, seq)
    slots = cache.slots(seq, 0, len(ids))
    rows = torch.stack([cache.read(layer, slots) for layer in range(len(cache.data))])
    cache.free(seq)
    return logits, rows


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_prefill_gives_the_same_bits_however_a_prompt_is_cut(folder, dtype):
    model = kn.load(folder, max_context=2048, max_batch=1, dtype=dtype)
    network, cache = model._engine._model, model._engine._cache
    g = torch.Generator().manual_seed(0)
    for length in (2, 40, 200, 1500):  # all of them recorded, some of their pieces, none
        ids = torch.randint(0, 1900, (length,), generator=g)
        logits, rows = prefill_in(network, cache, ids, [])
        picked = torch.randperm(length - 1, generator=g)[:6].add(1).sort().values.tolist()
        for cuts in ([1], [length - 1], [length // 2], picked):
            actual = prefill_in(network, cache, ids, sorted(set(cuts)))
            assert_same_bits(actual[0], logits)
            assert_same_bits(actual[1], rows)


def test_prefill_of_several_sequences_gives_each_its_own_bits(folder):
    """In one pass, some of them after what they have in the cache; in two where they are too many tokens for one."""
    model = kn.load(folder, max_context=1500, max_batch=4)
    network, cache = model._engine._model, model._engine._cache
    g = torch.Generator().manual_seed(2)
    for lengths in ((1, 2, 70, 530), (700, 1, 400)):
        prompts = [torch.randint(0, 1900, (n,), generator=g) for n in lengths]
        seqs = [cache.new_sequence() for _ in prompts]
        network.prefill(prompts[2][:33], cache, seqs[2])
        rest = [*prompts[:2], prompts[2][33:], *prompts[3:]]
        logits = network.prefill_batch(rest, cache, seqs)
        for ids, seq, row in zip(prompts, seqs, logits, strict=True):
            assert seq.length == len(ids)
            expected, rows = prefill_in(network, cache, ids, [])
            assert_same_bits(row, expected)
            for layer, layer_rows in enumerate(rows):
                assert_same_bits(cache.read(layer, cache.slots(seq, 0, len(ids))), layer_rows)
            cache.free(seq)


def test_prefill_in_pieces_on_other_threads_gives_the_same_bits(folder):
    model = kn.load(folder, max_context=512, max_batch=1, dtype="float32")
    network, cache = model._engine._model, model._engine._cache
    ids = torch.arange(300)
    expected = prefill_in(network, cache, ids, [])
    for n in (1, 3):
        with threads(n):
            actual = prefill_in(network, cache, ids, [33, 34, 170])
        assert_same_bits(actual[0], expected[0])
        assert_same_bits(actual[1], expected[1])


@pytest.mark.parametrize("rows", ["exact", "fp8"])
def test_decode_gives_the_bits_of_prefill(folder, rows):
    """Token by token in a batch with others, recorded and not: the cache rows and logits of one prompt."""
    model = kn.load(folder, max_context=1024, max_batch=3, cache=rows)
    network, cache = model._engine._model, model._engine._cache
    assert network.decode_equals_prefill
    ids = torch.randint(0, 1900, (600,), generator=torch.Generator().manual_seed(1))
    for decoded in (network, network.model):
        seqs = [cache.new_sequence() for _ in range(3)]
        for seq, length in zip(seqs, (500, 3, 510), strict=True):
            network.prefill(ids[:length], cache, seq)
        for position in range(500, 530):  # into the next chunk of attention's
            three = torch.stack([ids[position], ids[0], ids[position + 10]])
            logits = decoded.decode(three, cache, seqs)
        expected, rows_of_prompt = prefill_in(network, cache, ids[:530], [])
        assert_same_bits(logits[0], expected)
        slots = cache.slots(seqs[0], 0, 530)
        for layer, prompt_rows in enumerate(rows_of_prompt):
            assert_same_bits(cache.read(layer, slots), prompt_rows)
        for seq in seqs:
            cache.free(seq)


@pytest.mark.parametrize("rows", ["exact", "fp8"])
def test_requests_with_a_prefix_equal_fresh_ones_to_the_last_bit(folder, rows):
    """logprobs are the logits' bits; the answers in between, which decode computed, are kept but for their last id."""
    options = {"max_context": 1024, "max_batch": 1, "dtype": "float32", "cache": rows}
    kept, fresh = (kn.load(folder, **options)._engine for _ in range(2))
    prefix, prompt = KeptPrefix(), [3] * 70
    params = SamplingParams(seed=5, max_tokens=20, ignore_eos=True, logprobs=3)
    for turn in range(5):
        engines = (kept, prefix), (fresh, None)
        tokens, reused = [], []
        for engine, handle in engines:
            request = engine.add(prompt, params, prefix=handle)
            report = engine.report(request)
            outputs = []
            while engine.is_active(request):
                outputs += [output.token for output in engine.step()]
            tokens.append(outputs)
            reused.append(report.reused_tokens)
        assert tokens[0] == tokens[1]
        assert reused == [len(prompt) - 14 if turn else 0, 0]
        prompt = prompt + [t.id for t in tokens[0]] + [turn] * 13


def test_chat_says_what_fresh_prompts_would(folder):
    """Answers, calls and results in one conversation that reuses the cache, against each prompt on its own."""

    def weather(city: Literal["Beijing", "Berlin"]) -> str:
        return f"clear in {city}"

    options = {"tools": [weather], "seed": 3, "max_tokens": 50, "thinking_budget": 9}
    choice = {"name": "weather"}
    model, fresh = (kn.load(folder, max_context=2048, max_batch=1) for _ in range(2))
    chat = model.chat(run_tools=["weather"], tool_choice=choice, **options)
    usages = [u for text in ("Hi", "And now?", "So?") for u in chat.send(text).finish.usages]
    answers = [i for i, m in enumerate(chat.messages) if m.role == "assistant"]
    assert sum(len(m.tool_calls) for m in chat.messages) == 3
    for index, usage in zip(answers, usages, strict=True):
        before, answer = list(chat.messages[:index]), chat.messages[index]
        asked = {"tool_choice": choice} if before[-1].role == "user" else {}
        result = fresh.generate(before, **options, **asked)
        assert (result.text, result.reasoning) == (answer.content, answer.reasoning_content)
        assert result.tool_calls == answer.tool_calls
        assert result.usage.prompt_tokens == usage.prompt_tokens
        assert (result.usage.reused_tokens, usage.reused_tokens > 0) == (0, index > 1)


def test_generate_with_prefixes_computes_what_is_new_and_says_the_same(folder):
    """A batch of conversations in two turns: equal to each alone, and only what is new is computed."""
    model = kn.load(folder, max_context=512, max_batch=3)
    handles = [KeptPrefix() for _ in range(3)]
    prompts = [list(range(10 * i, 10 * i + 100 + i)) for i in range(3)]
    options = {"max_tokens": 4, "temperature": 0.0, "ignore_eos": True}
    first = model.generate(prompts, prefixes=handles, **options)
    assert [g.usage.reused_tokens for g in first] == [0, 0, 0]
    longer = [p + g.ids + [7, 8, 9] for p, g in zip(prompts, first, strict=True)]
    second = model.generate(longer, prefixes=handles, **options)
    assert [g.usage.reused_tokens for g in second] == [103, 104, 105]
    assert [g.ids for g in second] == [model.generate(p, **options).ids for p in longer]
    model.forget(handles[1])
    third = model.generate(longer, prefixes=handles, **options)
    assert [g.usage.reused_tokens for g in third] == [106, 0, 108]  # the last id is always computed


@pytest.mark.parametrize(
    ("prefixes", "text"),
    [
        ([KeptPrefix()], "as many as the prompts (got 1 for 2)"),
        ([KeptPrefix(), "x"], "must be KeptPrefix (got str)"),
        ([KeptPrefix()] * 2, "a prefix of its own (got one twice)"),
    ],
)
def test_generate_bad_prefixes_are_named(folder, prefixes, text):
    model = kn.load(folder, max_context=64, max_batch=1)
    with pytest.raises(kn.RequestError, match="generate: .*" + re.escape(text)):
        model.generate([[1, 2], [3]], prefixes=prefixes)
