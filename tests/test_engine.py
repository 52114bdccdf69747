"""The scheduler over a fake model and a fake paged cache."""

from __future__ import annotations

import random
import re
import time

import pytest
import torch

from fakes import EOS, VOCAB, FakeCache, FakeModel
from kimi_native.engine import DEFAULT_MAX_TOKENS, Engine
from kimi_native.errors import NonFiniteLogitsError, RequestError
from kimi_native.sampling import SamplingParams, TokenHistory, sample


def make_engine(model=None, *, cache_tokens=256, max_batch=4, eos_ids=(EOS,), **options):
    model = model or FakeModel()
    cache = FakeCache(max_tokens=cache_tokens)
    return Engine(model, cache, max_batch=max_batch, eos_ids=eos_ids, **options), model, cache


def run(engine) -> tuple[dict[int, list], dict[int, str]]:
    """Steps until idle: tokens and finish reason of every request."""
    tokens: dict[int, list] = {}
    reasons: dict[int, str] = {}
    while engine.num_waiting or engine.num_running:
        for output in engine.step():
            assert output.request_id not in reasons, "an ended request produced output"
            if output.token is not None:
                tokens.setdefault(output.request_id, []).append(output.token)
            if output.finish_reason is not None:
                reasons[output.request_id] = output.finish_reason
    return tokens, reasons


def naive_generate(model, prompt, params, *, limit, eos=EOS):
    """One request, no cache: logits of the whole sequence every time."""
    ids, tokens = list(prompt), []
    history = TokenHistory(prompt)
    while len(tokens) < limit:
        token = sample(
            model.logits(ids), params, seed=params.seed, position=len(ids), history=history
        )
        tokens.append(token)
        ids.append(token.id)
        history.append(token.id)
        if token.id == eos:
            return tokens, "stop"
    return tokens, "length"


def make_requests(n: int) -> list[tuple[list[int], SamplingParams]]:
    rng = random.Random(4)
    return [
        (
            [rng.randrange(256) for _ in range(rng.randint(1, 20))],
            SamplingParams(
                temperature=rng.choice([0, 0.7, 1.5]),
                top_p=rng.choice([1, 0.9]),
                repetition_penalty=rng.choice([1, 1.2]),
                max_tokens=rng.randint(1, 15),
                seed=rng.randrange(1000),
                logprobs=rng.choice([None, 2]),
            ),
        )
        for _ in range(n)
    ]


def assert_idle(engine, cache, tokens=256):
    assert engine.num_waiting == engine.num_running == 0
    assert cache.free_tokens == tokens
    assert not cache.sequences
    assert sorted(cache.free_pages) == list(range(cache.storage.shape[0]))


@pytest.mark.parametrize("max_batch", [1, 3, 16])
@pytest.mark.parametrize("cache_tokens", [64, 256])
def test_engine_equals_one_request_at_a_time_without_a_cache(max_batch, cache_tokens):
    engine, model, cache = make_engine(max_batch=max_batch, cache_tokens=cache_tokens)
    requests = make_requests(12)
    expected = {
        engine.add(prompt, params): naive_generate(model, prompt, params, limit=params.max_tokens)
        for prompt, params in requests
    }
    tokens, reasons = run(engine)
    assert {i: (tokens[i], reasons[i]) for i in expected} == expected
    assert_idle(engine, cache, cache_tokens)


def test_engine_result_does_not_depend_on_when_neighbours_come_and_go():
    prompt, params = [1, 2, 3], SamplingParams(seed=9, max_tokens=20, top_p=0.95)
    engine, model, cache = make_engine()
    expected, _ = naive_generate(model, prompt, params, limit=20)
    for seed in range(5):
        rng = random.Random(seed)
        mine = engine.add(prompt, params)
        others, tokens = [], []
        while engine.is_active(mine):
            if rng.random() < 0.5:
                others.append(engine.add([rng.randrange(256)], SamplingParams(max_tokens=9)))
            if others and rng.random() < 0.3:
                engine.cancel(others.pop(rng.randrange(len(others))))
            tokens += [o.token for o in engine.step() if o.request_id == mine]
        assert tokens == expected
        run(engine)
    assert_idle(engine, cache)


# ---- scheduling -----------------------------------------------------------------------------------------------------


def test_engine_decodes_everything_that_runs_in_one_call():
    engine, model, _ = make_engine(max_batch=3, eos_ids=())
    for tokens in (2, 4, 4, 3):
        engine.add([1], SamplingParams(max_tokens=tokens))
    run(engine)
    # Three prefills, decode of 3 (one ends at its 2nd token), the fourth's prefill, then 3, 3 and its last row.
    assert model.prefills == [1, 1, 1, 1]
    assert model.batches == [3, 3, 3]


def test_engine_computes_prompts_together_while_they_fit_into_a_pass(monkeypatch):
    monkeypatch.setattr("kimi_native.engine.BATCHED_PREFILL", 10)
    engine, model, _ = make_engine(max_batch=5, eos_ids=())
    for length in (12, 1, 5, 4, 1, 2):
        engine.add([1] * length, SamplingParams(max_tokens=2))
    run(engine)
    # The first is too long for company, the next three fill a pass; the last finds a place when they have ended.
    assert model.passes == [1, 3, 1, 1]
    engine, model, _ = make_engine(FakeModel(decode_equals_prefill=False))
    for _ in range(3):
        engine.add([1], SamplingParams(max_tokens=2))
    run(engine)
    assert model.passes == [1, 1, 1]


def test_engine_never_runs_more_than_max_batch():
    engine, model, _ = make_engine(max_batch=2)
    for _ in range(7):
        engine.add([5, 6], SamplingParams(max_tokens=5, ignore_eos=True))
    run(engine)
    assert max(model.batches) == 2
    assert len(model.prefills) == 7


def test_engine_is_first_come_first_served_even_when_a_later_request_would_fit():
    # Pages of 4, 16 tokens in all: the first takes 8, the second needs 12 and waits, the third would fit beside both.
    engine, model, _ = make_engine(cache_tokens=16, eos_ids=())
    for prompt, new in ((4, 4), (6, 6), (1, 1)):
        engine.add([1] * prompt, SamplingParams(max_tokens=new))
    run(engine)
    assert model.prefills == [4, 6, 1]


def test_engine_reserves_the_whole_request_before_it_starts():
    engine, _, cache = make_engine(cache_tokens=64, eos_ids=())
    engine.add([1] * 10, SamplingParams(max_tokens=11))
    engine.step()
    assert cache.free_tokens == 64 - 20  # 10 + 11 - 1 tokens: five pages of 4


def test_engine_waits_for_pages_instead_of_failing():
    engine, _, cache = make_engine(cache_tokens=32, max_batch=8, eos_ids=())
    for _ in range(10):
        engine.add([1] * 8, SamplingParams(max_tokens=9))
    tokens, reasons = run(engine)
    assert [len(t) for t in tokens.values()] == [9] * 10
    assert set(reasons.values()) == {"length"}
    assert_idle(engine, cache, 32)


def test_engine_step_without_requests_does_nothing():
    engine, model, _ = make_engine()
    assert engine.step() == []
    assert model.prefills == model.batches == []


def test_engine_says_when_someone_else_holds_its_pages():
    engine, _, cache = make_engine(cache_tokens=16)
    cache.reserve(cache.new_sequence(), 12)
    engine.add([1] * 8, SamplingParams(max_tokens=4))
    with pytest.raises(RuntimeError, match=r"11 tokens \(got 4 free"):
        engine.step()


# ---- the end of a request -------------------------------------------------------------------------------------------


def count_up(ids: list[int]) -> int:
    return (ids[-1] + 1) % VOCAB


@pytest.mark.parametrize(
    ("options", "expected", "reason"),
    [
        ({}, [254, 255, 256], "stop"),
        ({"max_tokens": 3}, [254, 255, 256], "stop"),
        ({"max_tokens": 2}, [254, 255], "length"),
        ({"max_tokens": 5, "ignore_eos": True}, [254, 255, 256, 257, 258], "length"),
        ({"stop_token_ids": [255]}, [254, 255], "stop"),
        ({"stop_token_ids": [258], "ignore_eos": True}, [254, 255, 256, 257, 258], "stop"),
    ],
    ids=str,
)
def test_engine_finish_reasons(options, expected, reason):
    engine, _, cache = make_engine(FakeModel(script=count_up))
    request = engine.add([253], SamplingParams(**options))
    tokens, reasons = run(engine)
    assert [t.id for t in tokens[request]] == expected
    assert reasons[request] == reason
    assert_idle(engine, cache)


def test_engine_stops_at_the_end_of_the_context():
    engine, _, cache = make_engine(FakeModel(context=20), eos_ids=())
    request = engine.add([1] * 15, SamplingParams(max_tokens=100))
    tokens, reasons = run(engine)
    assert (len(tokens[request]), reasons[request]) == (5, "length")
    assert_idle(engine, cache)


def test_engine_default_max_tokens():
    engine, _, _ = make_engine(FakeModel(context=10**6), cache_tokens=16384, eos_ids=())
    engine.add([1], SamplingParams())
    engine.step()
    assert engine._running[0].limit == DEFAULT_MAX_TOKENS == 2048


def test_engine_cancel_frees_waiting_and_running_requests_at_once():
    engine, model, cache = make_engine(max_batch=2, eos_ids=())
    ids = [engine.add([1, 2], SamplingParams(max_tokens=20)) for _ in range(4)]
    for _ in range(5):
        engine.step()
    assert engine.cancel(ids[0])
    assert engine.cancel(ids[3])
    assert not engine.cancel(ids[0])
    assert not engine.is_active(ids[0])
    produced = {o.request_id for _ in range(10) for o in engine.step()}
    assert produced == {ids[1], ids[2]}
    engine.cancel(ids[1])
    engine.cancel(ids[2])
    calls = len(model.batches)
    assert engine.step() == []
    assert len(model.batches) == calls
    assert_idle(engine, cache)


# ---- failures -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("spoiled_length", [3, 4, 7])
def test_engine_non_finite_logits_end_that_request_only(spoiled_length):
    def spoil(ids):
        return ids[0] == 99 and len(ids) == spoiled_length

    good, bad = [1, 2, 3], [99, 2, 3]
    params = SamplingParams(seed=1, max_tokens=10, ignore_eos=True)
    engine, model, cache = make_engine(FakeModel(spoil=spoil))
    expected, _ = naive_generate(model, good, params, limit=10, eos=None)
    before, failing, after = (engine.add(p, params) for p in (good, bad, good))
    tokens, errors = {before: [], failing: [], after: []}, []
    while engine.num_running or engine.num_waiting:
        for output in engine.step():
            if output.finish_reason == "error":
                errors.append(output)
            else:
                tokens[output.request_id].append(output.token)
    assert tokens[before] == tokens[after] == expected
    assert len(tokens[failing]) == spoiled_length - 3
    (error,) = errors
    assert (error.request_id, error.token) == (failing, None)
    assert isinstance(error.error, NonFiniteLogitsError)
    assert f"position {spoiled_length}" in str(error.error)
    assert_idle(engine, cache)


@pytest.mark.parametrize("error", [RuntimeError("op failed"), KeyboardInterrupt()], ids=repr)
@pytest.mark.parametrize("together", [True, False])
def test_engine_failed_prefill_ends_its_requests_and_passes_the_error_on(together, error):
    model = FakeModel(fail={("prefill", 2): error}, decode_equals_prefill=together)
    engine, _, cache = make_engine(model, eos_ids=())
    kept = engine.add([0], SamplingParams(max_tokens=4))
    engine.step()
    lost, later = (engine.add([i], SamplingParams(max_tokens=4)) for i in (1, 2))
    with pytest.raises(type(error)):
        engine.step()
    assert [engine.is_active(i) for i in (kept, lost, later)] == [True, False, not together]
    tokens, _ = run(engine)
    assert len(tokens[kept]) == 3
    assert together or len(tokens[later]) == 4
    assert_idle(engine, cache)


@pytest.mark.parametrize("error", [RuntimeError("op failed"), KeyboardInterrupt()], ids=repr)
def test_engine_failed_decode_ends_its_batch_and_passes_the_error_on(error):
    engine, _, cache = make_engine(FakeModel(fail={("decode", 2): error}), max_batch=2, eos_ids=())
    first, second, waiting = (engine.add([i], SamplingParams(max_tokens=4)) for i in range(3))
    for _ in range(2):  # both prompts, then their first decode
        engine.step()
    with pytest.raises(type(error)):
        engine.step()
    assert [engine.is_active(i) for i in (first, second, waiting)] == [False, False, True]
    tokens, _ = run(engine)
    assert len(tokens[waiting]) == 4
    assert_idle(engine, cache)


@pytest.mark.parametrize(
    ("step", "message"),
    [
        (
            "prefill",
            "prefill: what it computes must fit into the memory of cpu (got 3 tokens): full",
        ),
        (
            "decode",
            "decode: what it computes must fit into the memory of cpu (got 1 sequences): full",
        ),
    ],
)
def test_engine_says_which_step_a_full_memory_ended(step, message):
    """Of a GPU: torch's own operations say only how much they wanted."""
    model = FakeModel(fail={(step, 1): torch.OutOfMemoryError("full")})
    engine, _, cache = make_engine(model, eos_ids=())
    engine.add([0, 1, 2], SamplingParams(max_tokens=4))
    with pytest.raises(torch.OutOfMemoryError, match=re.escape(message)):
        run(engine)
    assert_idle(engine, cache)


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ([], r"at least one token \(got none\)"),
        ([1] * 64, r"context of 64 tokens \(got a prompt of 64 tokens\)"),
        ([1] * 1000, r"context of 64 tokens \(got a prompt of 1000 tokens\)"),
        ([1, VOCAB], rf"0 to {VOCAB - 1} \(got {VOCAB} at position 1\)"),
        ([-1], r"\(got -1 at position 0\)"),
        ([1, 2.0], r"\(got 2\.0 at position 1\)"),
        ([True], r"\(got True at position 0\)"),
    ],
)
def test_engine_refuses_a_bad_prompt_before_any_compute(prompt, message):
    engine, model, _ = make_engine()
    with pytest.raises(RequestError, match=message):
        engine.add(prompt, SamplingParams())
    assert engine.step() == []
    assert model.prefills == []


@pytest.mark.parametrize(
    ("options", "expected"),
    [({"max_context": 32}, 32), ({"max_context": 1000}, 64), ({"cache_tokens": 40}, 40), ({}, 64)],
    ids=str,
)
def test_engine_context_is_the_least_of_model_cache_and_setting(options, expected):
    engine, _, _ = make_engine(**options)
    assert engine.max_context == expected
    engine.add([1] * (expected - 1), SamplingParams(max_tokens=50))
    with pytest.raises(RequestError, match=f"context of {expected} tokens"):
        engine.add([1] * expected, SamplingParams())
    tokens, _ = run(engine)
    assert len(tokens[0]) == 1


def test_engine_names_the_setting_under_which_a_prompt_would_fit():
    engine, _, _ = make_engine(max_context=32)
    with pytest.raises(
        RequestError, match=r"\(got a prompt of 40 tokens\); max_context may be up to 64"
    ):
        engine.add([1] * 40, SamplingParams())
    with pytest.raises(RequestError, match=r"\(got a prompt of 64 tokens\)$"):
        engine.add([1] * 64, SamplingParams())


def test_engine_draws_a_seed_when_none_is_given():
    engine, _, _ = make_engine()
    requests = [engine.add([1], SamplingParams()) for _ in range(2)]
    seeds = [engine.report(i).seed for i in requests]
    assert seeds[0] != seeds[1]
    assert all(0 <= s < 2**53 for s in seeds)
    assert engine.report(engine.add([1], SamplingParams(seed=5))).seed == 5


def test_engine_reports_where_the_time_went():
    engine, _, _ = make_engine(eos_ids=())
    started = time.perf_counter()
    report = engine.report(engine.add([1], SamplingParams(max_tokens=3)))
    time.sleep(0.02)
    run(engine)
    elapsed = time.perf_counter() - started
    assert report.prefill_s > 0
    assert report.decode_s > 0
    assert report.waiting_s >= 0.02
    assert report.waiting_s + report.prefill_s + report.decode_s <= elapsed
