"""A step's rows on the device against sampling.sample on each, and the engine with draws made by the CUDA kernel."""

from __future__ import annotations

import contextlib
import math

import numpy as np
import pytest
import torch

import gpu
from kimi_native import native
from kimi_native.device_sampling import Draw, sample_rows
from kimi_native.errors import NonFiniteLogitsError
from kimi_native.sampling import SamplingParams, TokenHistory, sample
from simt import library_path, simt_only
from test_engine import make_engine, make_requests, run
from test_sampling import FILTERS, make_logits

VOCAB = 1003


@contextlib.contextmanager
def device():
    """Where the op takes tensors: a GPU, or the CPU's to the kernels in the shim."""
    with contextlib.nullcontext() if gpu.ON_GPU else native.cuda_on_host(library_path()):
        yield torch.device("cuda" if gpu.ON_GPU else "cpu")


@contextlib.contextmanager
def counted(monkeypatch):
    """The rows of each call of the op, and the number of tokens sampled on the CPU, inside the with-block."""
    from kimi_native import device_sampling

    calls, here = [], []
    op, on_cpu = native.call_with_workspace, sample
    with monkeypatch.context() as m:
        m.setattr(
            device_sampling.ops,
            "call_with_workspace",
            lambda name, tensors, *sizes: (calls.append(sizes[0]), op(name, tensors, *sizes)),
        )
        m.setattr(
            device_sampling, "sample", lambda *a, **k: (here.append(a[0].shape), on_cpu(*a, **k))[1]
        )
        yield calls, here


def draws_of_every_kind():
    """Filters, then a mask, penalties, logprobs, temperature 0."""
    draws = [Draw(SamplingParams(**o), 7, position) for position, o in enumerate(FILTERS)]
    history = TokenHistory([3, 4], [5, 5])
    allowed = np.arange(VOCAB) % 31 == 7
    draws.append(Draw(SamplingParams(top_p=0.9), 7, 50, history, allowed))
    draws.append(Draw(SamplingParams(frequency_penalty=1.5), 7, 51, history))
    draws.append(Draw(SamplingParams(logprobs=3), 7, 52, history))
    draws.append(Draw(SamplingParams(temperature=0.0), 7, 53, history, allowed))
    return draws


def expected_of(row, draw):
    return sample(
        row,
        draw.params,
        seed=draw.seed,
        position=draw.position,
        history=draw.history,
        allowed=draw.allowed,
    )


def test_cuda_device_sampling_gives_the_tokens_of_the_cpu(monkeypatch):
    draws = draws_of_every_kind()
    logits = torch.stack([make_logits(VOCAB, seed=i) for i in range(len(draws))])
    expected = {row: expected_of(logits[row], draw) for row, draw in enumerate(draws)}
    with device() as where, counted(monkeypatch) as (calls, here):
        assert sample_rows(logits.to(where), dict(enumerate(draws))) == expected
    assert calls == [len(draws)]
    assert len(here) == 2  # the row with penalties, and the one with logprobs


def test_cuda_device_sampling_leaves_out_rows_without_a_draw():
    logits = torch.stack([make_logits(VOCAB, seed=i) for i in range(3)])
    logits[1] = math.nan
    with device() as where:
        assert sample_rows(logits.to(where), {}) == {}
        tokens = sample_rows(logits.to(where), {2: Draw(SamplingParams(), 1, 1)})
    assert tokens == {2: expected_of(logits[2], Draw(SamplingParams(), 1, 1))}


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_cuda_device_sampling_names_the_row_that_is_not_finite(bad, temperature):
    logits = torch.stack([make_logits(VOCAB, seed=i) for i in range(3)])
    logits[1, 900] = bad
    draws = {row: Draw(SamplingParams(temperature=temperature), 1, row + 40) for row in range(3)}
    with device() as where:
        tokens = sample_rows(logits.to(where), draws)
    assert isinstance(tokens[1], NonFiniteLogitsError)
    kind = "1 NaN and 0 infinite" if math.isnan(bad) else "0 NaN and 1 infinite"
    assert f"{kind} of {VOCAB} at position 41" in str(tokens[1])
    assert [tokens[row] for row in (0, 2)] == [expected_of(logits[r], draws[r]) for r in (0, 2)]


@pytest.mark.parametrize(
    "allowed", [np.zeros(VOCAB, bool), np.ones(VOCAB - 1, bool)], ids=["none", "short"]
)
def test_cuda_device_sampling_refuses_impossible_masks(allowed):
    draw = Draw(SamplingParams(), 1, 1, None, allowed)
    with device() as where:
        logits = make_logits(VOCAB)[None].to(where)
        with pytest.raises(ValueError, match="allowed must be True for at least"):
            sample_rows(logits, {0: draw})


@simt_only
def test_cuda_device_sampling_makes_the_engine_say_what_it_says_on_the_cpu(monkeypatch):
    tokens = []
    for context in (contextlib.nullcontext(), native.cuda_on_host(library_path())):
        engine, _, _ = make_engine(max_batch=3)
        for prompt, params in make_requests(10):
            engine.add(prompt, params)
        with context, counted(monkeypatch) as (calls, _):
            tokens.append(run(engine))
    assert calls
    assert tokens[0] == tokens[1]
