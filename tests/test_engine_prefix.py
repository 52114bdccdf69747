"""Requests that start from the rows an earlier one left: same tokens, fewer computed, pages for whoever needs them."""

from __future__ import annotations

import random

import pytest
import torch

from fakes import EOS, FakeCache, FakeModel
from kimi_native.engine import Engine
from kimi_native.errors import NonFiniteLogitsError
from kimi_native.prefixes import KeptPrefix, common_length
from kimi_native.sampling import SamplingParams


def make_engine(
    model=None, *, cache_tokens=256, max_batch=4, decode_equals_prefill=False, **options
):
    model = model or FakeModel(decode_equals_prefill=decode_equals_prefill, **options)
    cache = FakeCache(max_tokens=cache_tokens)
    return Engine(model, cache, max_batch=max_batch, eos_ids=(EOS,)), model, cache


def run(engine, prompt, prefix=None, **params):
    """(tokens, finish reason, report) of one request on an engine with nothing else to do."""
    request = engine.add(
        prompt, SamplingParams(**{"seed": 1, "max_tokens": 3} | params), prefix=prefix
    )
    report, tokens = engine.report(request), []
    while engine.is_active(request):
        for output in engine.step():
            tokens.append(None if output.token is None else output.token.id)
    return tokens, output.finish_reason, report


@pytest.mark.parametrize("keeps_answers", [True, False])
def test_prefix_gives_the_tokens_of_a_fresh_request_and_computes_the_rest_alone(keeps_answers):
    engine, model, cache = make_engine(decode_equals_prefill=keeps_answers)
    fresh, _, _ = make_engine()
    prefix, prompt, before, rng = KeptPrefix(), [], 0, random.Random(2)
    for turn in range(8):
        prompt += [rng.randrange(200) for _ in range(rng.randint(1, 9))]
        tokens, reason, report = run(engine, prompt, prefix)
        assert (tokens, reason) == run(fresh, prompt)[:2], turn
        assert report.reused_tokens == before
        assert model.prefills[-1] == len(prompt) - before
        computed = prompt + tokens[:-1] if keeps_answers else prompt
        assert prefix.ids == computed
        before = len(computed)
        prompt += tokens
    assert len(cache.sequences) == 1
    engine.drop(prefix)
    assert cache.free_tokens == 256


@pytest.mark.parametrize(
    ("first", "second", "reused"),
    [
        ([1, 2, 3, 4, 5], [1, 2, 9, 4, 5, 6], 2),
        ([1, 2, 3, 4, 5], [1, 2, 3], 2),  # the last id is computed for its logits
        ([1, 2, 3, 4, 5], [1, 2, 3, 4, 5], 4),
        ([1, 2, 3, 4, 5], [7], 0),
        ([1], [1, 2], 1),
        ([1], [1], 0),
    ],
)
def test_prefix_reuses_what_the_prompts_share(first, second, reused):
    engine, model, _ = make_engine()
    fresh, _, _ = make_engine()
    prefix = KeptPrefix()
    run(engine, first, prefix)
    tokens, _, report = run(engine, second, prefix)
    assert report.reused_tokens == reused
    assert model.prefills[-1] == len(second) - reused
    assert tokens == run(fresh, second)[0]
    assert prefix.ids == second


def test_prefix_gives_way_to_others_the_quietest_first():
    engine, _, cache = make_engine(cache_tokens=32)  # 8 pages of 4
    prefixes = [KeptPrefix() for _ in range(3)]
    for prefix in prefixes:
        run(engine, [1] * 8, prefix)  # 2 pages each stay
    run(engine, [1] * 8, prefixes[0])
    assert cache.free_tokens == 8
    assert run(engine, [2] * 12, max_tokens=3, ignore_eos=True)[1] == "length"  # needs 4 pages
    assert [len(p.ids) for p in prefixes] == [8, 0, 8]
    tokens, _, report = run(engine, [1] * 9, prefixes[1])
    assert report.reused_tokens == 0
    assert tokens == run(make_engine()[0], [1] * 9)[0]


def test_prefix_of_a_request_that_fills_the_cache_is_its_own_room():
    engine, _, _ = make_engine(cache_tokens=32)
    prefix = KeptPrefix()
    run(engine, [1] * 20, prefix)
    tokens, reason, report = run(engine, [1] * 24, prefix, max_tokens=8, ignore_eos=True)
    assert (len(tokens), reason, report.reused_tokens) == (8, "length", 20)


def test_prefix_is_kept_for_a_waiting_request_and_given_back_when_it_is_canceled():
    engine, _, cache = make_engine(cache_tokens=32)
    prefix = KeptPrefix()
    run(engine, [1] * 8, prefix)
    long = engine.add([2] * 8, SamplingParams(max_tokens=13))
    engine.step()
    waiting = engine.add([1] * 9, SamplingParams(max_tokens=16), prefix=prefix)
    engine.step()
    assert engine.num_waiting == 1
    assert engine.cancel(waiting)
    assert prefix.ids == [1] * 8
    assert engine.cancel(long)
    engine.drop(prefix)
    assert cache.free_tokens == 32
    assert not cache.sequences


def test_prefix_of_a_canceled_request_serves_the_next():
    engine, _, _ = make_engine()
    prefix = KeptPrefix()
    request = engine.add([1, 2, 3], SamplingParams(max_tokens=9), prefix=prefix)
    engine.step()
    engine.step()
    engine.cancel(request)
    assert run(engine, [1, 2, 3, 4], prefix)[2].reused_tokens == 3


def test_prefix_of_two_requests_at_once_serves_one_and_keeps_the_last():
    engine, _, cache = make_engine()
    prefix = KeptPrefix()
    run(engine, [1, 2, 3], prefix)
    requests = [
        engine.add([1, 2, 3, n], SamplingParams(max_tokens=n), prefix=prefix) for n in (2, 4)
    ]
    reports = [engine.report(r) for r in requests]
    while engine.num_waiting or engine.num_running:
        engine.step()
    assert [r.reused_tokens for r in reports] == [3, 0]
    assert prefix.ids == [1, 2, 3, 4]
    engine.drop(prefix)
    engine.drop(prefix)  # nothing is left to free
    assert cache.free_tokens == 256


@pytest.mark.parametrize("kind", ["prefill", "decode"])
def test_prefix_is_not_kept_from_a_failed_pass(kind):
    engine, _, cache = make_engine(FakeModel(fail={(kind, 3): RuntimeError("broken")}))
    prefix = KeptPrefix()
    run(engine, [1, 2], prefix)
    if kind == "prefill":
        run(engine, [1, 2], prefix)
    with pytest.raises(RuntimeError, match="broken"):
        run(engine, [1, 2], prefix)
    assert prefix.seq is None
    assert cache.free_tokens == 256
    assert run(engine, [1, 2, 3], prefix)[2].reused_tokens == 0


def test_prefix_is_not_kept_from_non_finite_logits():
    engine, _, cache = make_engine(FakeModel(spoil=lambda ids: True))
    prefix = KeptPrefix()
    request = engine.add([1, 2], SamplingParams(), prefix=prefix)
    (output,) = engine.step()
    assert (output.request_id, output.finish_reason) == (request, "error")
    assert isinstance(output.error, NonFiniteLogitsError)
    assert prefix.seq is None
    assert cache.free_tokens == 256


def test_prefixes_at_random_change_no_token():
    rng = random.Random(5)
    engine, _, cache = make_engine(cache_tokens=64, max_batch=3)
    fresh, _, _ = make_engine()
    prefixes = [KeptPrefix() for _ in range(4)]
    prompts = [[rng.randrange(9)] for _ in prefixes]
    for _ in range(60):
        asked = {}
        for i in rng.sample(range(4), rng.randint(1, 4)):
            prompts[i] = prompts[i][: rng.randint(1, 20)] + [rng.randrange(9) for _ in range(3)]
            params = SamplingParams(seed=i, max_tokens=rng.randint(1, 9))
            asked[engine.add(prompts[i], params, prefix=prefixes[i])] = (list(prompts[i]), params)
        tokens = {request: [] for request in asked}
        while engine.num_waiting or engine.num_running:
            for output in engine.step():
                tokens[output.request_id].append(output.token.id)
        for request, (prompt, params) in asked.items():
            expected = run(fresh, prompt, seed=params.seed, max_tokens=params.max_tokens)[0]
            assert tokens[request] == expected
        if rng.random() < 0.2:
            engine.drop(rng.choice(prefixes))
    for prefix in prefixes:
        engine.drop(prefix)
    assert cache.free_tokens == 64
    assert not cache.sequences
    assert torch.all(cache.storage == -1)


def test_common_length_counts_equal_ids():
    for a, b, n in [([], [1], 0), ([1], [1, 2], 1), ([1, 2, 3], [1, 2, 4], 2), ([5], [6], 0)]:
        assert common_length(a, b) == common_length(b, a) == n
