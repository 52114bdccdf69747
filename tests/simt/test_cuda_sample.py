"""sample in the shim: against a sort and a running sum in extended precision, and against sampling.sample.

A draw is checked id for id, except where uniform * total is so close to a running sum, or top_p to the probability of a
set, that rounding decides (`candidates`): there each id on the edge will do.
"""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch

from kimi_native import sampling
from kimi_native.sampling import SamplingParams
from simt import SCHEDULES
from simt_ops import run_op
from test_sampling import FILTERS, distributions, make_logits

schedules = pytest.mark.parametrize("schedule", SCHEDULES, ids=str)
GREEDY = SamplingParams(temperature=0.0)
K2_VOCAB = 163_840


def sample(logits, params, uniforms, allowed=None, **options):
    """The ids of rows of logits; one SamplingParams, uniform and mask (or None) for each row."""
    rows, vocab = logits.shape
    numbers = [(p.temperature, p.top_p, p.min_p, u) for p, u in zip(params, uniforms, strict=True)]
    if allowed is not None:
        bits = np.packbits(np.stack(allowed), axis=1, bitorder="little")
        allowed = torch.from_numpy(bits)
    ids = torch.full((rows,), -7, dtype=torch.int32)
    run_op(
        "sample",
        logits=logits,
        allowed=allowed,
        options=torch.tensor(numbers, dtype=torch.float64),
        top_k=torch.tensor([min(p.top_k, 2**31 - 1) for p in params], dtype=torch.int32),
        ids=ids,
        rows=rows,
        vocab=vocab,
        **options,
    )
    return ids.tolist()


def kept_sets(scores, weights, params):
    """What the filters leave, by full sorts: once as rounded, and with weights that are a little off either way.

    exp is off by 2 ulp at most in each of two implementations, so a weight by less than 2**-50 of itself, and a whole
    number of steps (each below 2**53) by at most one, where rounding it goes either way."""
    sets = []
    for off in (0, -1, 1):
        order = sorted(range(len(scores)), key=lambda i: (-scores[i], i))
        best = scores[order[0]]  # weighs 1 exactly
        order = [
            i for i in order if scores[i] == best or weights[i] * (1 + off * 2**-50) >= params.min_p
        ]
        if params.top_k:
            order = order[: params.top_k]
        if params.top_p < 1:
            scale = 2.0 ** (53 - len(order).bit_length())
            counts = [round(weights[i] * scale) for i in order]
            bound = params.top_p * float(sum(counts)) + off * sum(c > 0 for c in counts)
            before = itertools.accumulate(counts, initial=0)
            order = [i for i, b in zip(order, before, strict=False) if b < bound or b == 0]
        sets.append(sorted(order))
    return sets


def candidates(row, params, uniform, allowed=None):
    """The ids that rounding may choose from; nearly always one.

    A sum of n terms in any order is within n 2**-53 of itself, a weight within 2**-50; the total errs too."""
    scores = row.numpy().astype(np.float64)
    if allowed is not None:
        scores = np.where(allowed, scores, -np.inf)
    with np.errstate(over="ignore", under="ignore"):
        weights = np.exp((scores - scores.max()) / params.temperature)
    found = set()
    for kept in kept_sets(scores.tolist(), weights.tolist(), params):
        sums = np.cumsum(weights[kept].astype(np.longdouble))
        target = uniform * sums[-1]
        slack = 2 * (len(kept) * 2.0**-53 + 2.0**-50) * float(sums[-1])
        first = np.searchsorted(sums, target - slack, side="right")
        last = min(np.searchsorted(sums, target + slack, side="right"), len(kept) - 1)
        found |= {kept[i] for i in range(first, last + 1) if weights[kept[i]] > 0}
    return found


def uniforms_of(count, seed=0):
    return np.random.default_rng(seed).random(count).tolist()


def check(logits, params, uniforms, allowed=None, **options):
    """Every row's id is a candidate; returns how many had one candidate only."""
    ids = sample(logits, params, uniforms, allowed, **options)
    alone = 0
    for i, (chosen, p, u) in enumerate(zip(ids, params, uniforms, strict=True)):
        expected = candidates(logits[i], p, u, None if allowed is None else allowed[i])
        assert chosen in expected, (i, p, u)
        alone += len(expected) == 1
    return alone


# ---- temperature 0 --------------------------------------------------------------------------------------------------


@schedules
@pytest.mark.parametrize("vocab", [1, 2, 255, 2048, 2049, 6001])
def test_cuda_sample_takes_the_lowest_of_equal_maxima(vocab, schedule):
    logits = torch.stack([make_logits(vocab, seed=i).round() for i in range(5)])
    logits[3] = -3.4e38
    logits[4] = torch.tensor([-0.0, 0.0])[torch.arange(vocab) % 2]
    ids = sample(logits, [GREEDY] * 5, [0.9] * 5, schedule=schedule)
    assert ids == [int(np.argmax(row)) for row in logits.numpy()]


def test_cuda_sample_at_temperature_zero_looks_at_no_filter():
    params = SamplingParams(temperature=0.0, top_k=2, top_p=0.1, min_p=0.5)
    logits = torch.tensor([[0.0, 5.0, -1.0, 5.0]])
    assert sample(logits, [params], [0.999]) == [1]


@schedules
def test_cuda_sample_takes_the_best_of_what_is_allowed(schedule):
    logits = torch.stack([make_logits(3001, seed=i) for i in range(4)])
    allowed = np.random.default_rng(1).random((4, 3001)) < 0.01
    allowed[3] = False
    allowed[3, 2999] = True
    ids = sample(logits, [GREEDY] * 4, [0.0] * 4, list(allowed), schedule=schedule)
    assert ids == [
        int(np.where(a, x, -np.inf).argmax()) for a, x in zip(allowed, logits.numpy(), strict=True)
    ]


# ---- the draw -------------------------------------------------------------------------------------------------------


@schedules
@pytest.mark.parametrize("vocab", [1, 2, 9, 255, 2049, 5000])
def test_cuda_sample_matches_full_sorts(vocab, schedule):
    """Every set of filters, each row with its own."""
    params = [SamplingParams(**options) for options in FILTERS]
    logits = torch.stack([make_logits(vocab, seed=i) for i in range(len(params))])
    alone = check(logits, params, uniforms_of(len(params), vocab), schedule=schedule)
    assert alone >= len(params) - 1  # `candidates` is no loophole


@pytest.mark.parametrize("name", distributions(2))
def test_cuda_sample_matches_full_sorts_on_awkward_rows(name):
    row = torch.from_numpy(distributions(2100)[name].astype(np.float32))
    others = ({"top_k": 700}, {"top_k": 1}, {"min_p": 0.3}, {"top_k": 300, "min_p": 1e-3})
    params = [
        SamplingParams(temperature=t, top_p=p, **o)
        for t, p, o in itertools.product((0.05, 1.0), (0.5, 0.999999), ({}, *others))
    ]
    params += [SamplingParams(temperature=30.0), SamplingParams(top_p=1e-9)]
    check(row.expand(len(params), -1).contiguous(), params, uniforms_of(len(params), 3))


def test_cuda_sample_matches_full_sorts_at_the_size_of_k2():
    options = [{}, {"top_p": 0.95}, {"temperature": 0.6, "min_p": 0.01}]
    options += [{"temperature": 2.0, "top_p": 0.9, "min_p": 1e-3, "top_k": 5000}]
    params = [SamplingParams(**o) for o in options]
    logits = torch.stack([make_logits(K2_VOCAB, seed=i, scale=4.0) for i in range(len(params))])
    check(logits, params, uniforms_of(len(params)))


def test_cuda_sample_rounds_equal_scores_of_a_whole_row_exactly():
    """All weights are 1: every sum is exact, and the id is floor(uniform * what top_p or top_k leaves)."""
    vocab, uniforms = 20_000, [0.0, 0.25, 0.5, 0.9999, 1 - 2**-53]
    logits = torch.full((5, vocab), 7.5)
    for options, left in (({}, vocab), ({"top_p": 0.5}, 10_000), ({"top_k": 1234}, 1234)):
        params = [SamplingParams(**options)] * 5
        assert sample(logits, params, uniforms) == [int(u * left) for u in uniforms]


def test_cuda_sample_takes_more_chunks_than_a_block_has_threads():
    vocab = 2**20 + 5
    params = [SamplingParams(), SamplingParams(top_k=3000), GREEDY]
    assert sample(torch.zeros(3, vocab), params, [0.75] * 3) == [int(0.75 * vocab), 2250, 0]


@pytest.mark.parametrize("options", [{}, {"top_k": 6}, {"top_p": 0.8}, {"min_p": 0.2}], ids=str)
def test_cuda_sample_is_the_inverse_of_the_running_sum(options):
    """Equally spaced uniforms: each id is drawn as often as its probability says, to one."""
    n, logits = 160, make_logits(12, seed=9, scale=1.0)
    params = SamplingParams(**options)
    uniforms = [(i + 0.5) / n for i in range(n)]
    ids = sample(logits.expand(n, -1).contiguous(), [params] * n, uniforms)
    weights = np.exp(logits.double().numpy())
    left = kept_sets(logits.tolist(), (weights / weights.max()).tolist(), params)[0]
    assert ids == sorted(ids)
    assert set(ids) == set(left)
    for i in left:
        assert abs(ids.count(i) - n * weights[i] / weights[left].sum()) <= 1


def test_cuda_sample_draws_as_the_cpu_does():
    """The same seed and position, the same id: rows of several requests, one mask among them."""
    rows, vocab = 40, 3000
    logits = torch.stack([make_logits(vocab, seed=i) for i in range(rows)])
    params = [SamplingParams(**FILTERS[i % len(FILTERS)]) for i in range(rows)]
    allowed = [np.ones(vocab, bool) for _ in range(rows)]
    allowed[7] = np.arange(vocab) % 97 == 3
    uniforms = [sampling.uniform(5, i) for i in range(rows)]
    expected = [
        sampling.sample(logits[i], params[i], seed=5, position=i, allowed=allowed[i]).id
        for i in range(rows)
    ]
    alone = [
        len(candidates(logits[i], params[i], uniforms[i], allowed[i])) == 1 for i in range(rows)
    ]
    ids = sample(logits, params, uniforms, allowed)
    assert sum(alone) >= rows - 2
    for i in range(rows):
        assert ids[i] == expected[i] or not alone[i], i


def test_cuda_sample_with_filters_that_remove_nothing_sums_as_without():
    """Targets on the sums themselves, where any other order of summation would show."""
    logits = make_logits(5000, scale=1.0)
    weights = np.exp(logits.double().numpy() - float(logits.max()))
    sums = np.cumsum(weights)
    uniforms = (sums[::250] / sums[-1]).tolist()
    rows = logits.expand(len(uniforms), -1).contiguous()
    plain, wide = SamplingParams(), SamplingParams(top_k=4999, top_p=1 - 1e-12, min_p=1e-12)
    least = int(logits.argmin())  # the one that top_k removes
    ids = sample(rows, [plain] * len(uniforms), uniforms)
    other = sample(rows, [SamplingParams(min_p=1e-12)] * len(uniforms), uniforms)
    assert ids == other
    assert least not in sample(rows, [wide] * len(uniforms), uniforms)


@pytest.mark.parametrize("temperature", [5e-324, 1e-300, 1e-12])
def test_cuda_sample_at_a_tiny_temperature_takes_a_maximum(temperature):
    logits = torch.tensor([[1.0, 3.0, 2.9999, 3.0]]).repeat(4, 1)
    params = [SamplingParams(temperature=temperature, top_p=p) for p in (1.0, 0.9, 0.4, 1.0)]
    assert sample(logits, params, [0.0, 0.75, 0.75, 0.75]) == [1, 3, 1, 3]


def test_cuda_sample_never_draws_what_has_no_weight():
    """The largest uniform there is, with ids of weight 0 behind the last that has some."""
    logits = make_logits(5000)
    allowed = np.arange(5000) < 3000
    params = [SamplingParams(**o) for o in ({}, {"top_p": 1 - 2**-53}, {"top_k": 4000})]
    ids = sample(logits.repeat(3, 1), params, [1 - 2**-53] * 3, [allowed] * 3)
    assert all(allowed[i] for i in ids)
    assert ids[0] > 2990


# ---- rows that cannot be answered -----------------------------------------------------------------------------------


@schedules
@pytest.mark.parametrize("params", [GREEDY, SamplingParams(), SamplingParams(top_p=0.9)], ids=str)
def test_cuda_sample_reports_rows_that_are_not_finite(params, schedule):
    logits = torch.stack([make_logits(4099, seed=i) for i in range(5)])
    clean = sample(logits, [params] * 5, uniforms_of(5), schedule=schedule)
    spoiled = logits.clone()
    spoiled[0, 4098], spoiled[2, 2050], spoiled[3, 0] = math.nan, math.inf, -math.inf
    ids = sample(spoiled, [params] * 5, uniforms_of(5), schedule=schedule)
    assert ids == [-1, clean[1], -1, -1, clean[4]]


@pytest.mark.parametrize("params", [GREEDY, SamplingParams(), SamplingParams(top_k=3)], ids=str)
def test_cuda_sample_reports_rows_with_nothing_allowed(params):
    logits = torch.stack([make_logits(70, seed=i) for i in range(2)])
    ids = sample(logits, [params] * 2, [0.5] * 2, [np.zeros(70, bool), np.ones(70, bool)])
    assert ids[0] == -1
    assert ids[1] >= 0


def test_cuda_sample_of_no_rows_does_nothing():
    assert sample(torch.empty(0, 5), [], []) == []


def test_cuda_sample_row_depends_on_nothing_else():
    logits = torch.stack([make_logits(2500, seed=i) for i in range(5)])
    params = [SamplingParams(**FILTERS[i]) for i in (0, 4, 6, 9, 11)]
    uniforms = uniforms_of(5)
    together = sample(logits, params, uniforms)
    alone = [
        sample(logits[i : i + 1].clone(), params[i : i + 1], uniforms[i : i + 1], flush="front")[0]
        for i in range(5)
    ]
    assert together == alone


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"vocab": 0}, "vocab must be 1 to 4194304"),
        ({"vocab": 2**22 + 1}, "vocab must be 1 to 4194304"),
        ({"rows": -1}, "rows must be 0 to 65535"),
        ({"ids": None}, "must not be null"),
        ({"workspace": None, "workspace_bytes": 0}, "workspace must have 460 bytes"),
    ],
)
def test_cuda_sample_refuses_impossible_arguments(fields, message):
    good = {
        "logits": torch.zeros(1, 8),
        "allowed": None,
        "options": torch.tensor([[1.0, 1.0, 0.0, 0.5]], dtype=torch.float64),
        "top_k": torch.zeros(1, dtype=torch.int32),
        "ids": torch.zeros(1, dtype=torch.int32),
        "rows": 1,
        "vocab": 8,
    }
    with pytest.raises(ValueError, match=f"sample: .*{message}"):
        run_op("sample", **(good | fields))
