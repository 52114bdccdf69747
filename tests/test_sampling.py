"""One token from one row of logits, against a sort-and-loop reference in Python floats."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch

from kimi_native import sampling
from kimi_native.errors import ConfigError, NonFiniteLogitsError, RequestError
from kimi_native.sampling import SampledToken, SamplingParams, TokenHistory, sample

# ---- reference ------------------------------------------------------------------------------------------------------


def naive_uniform(seed: int, position: int) -> float:
    """The documented draw, through numpy's public double generator."""
    return np.random.Generator(np.random.Philox(key=seed, counter=position)).random()


def naive_softmax(logits: list[float]) -> list[float]:
    top = max(logits)
    weights = [math.exp(x - top) for x in logits]
    total = math.fsum(weights)
    return [w / total for w in weights]


def naive_probabilities(logits: torch.Tensor, params: SamplingParams) -> dict[int, float]:
    """Token id -> probability after temperature, min_p, top_k and top_p, each renormalised, by full sorts."""
    scaled = {i: x / params.temperature for i, x in enumerate(logits.double().tolist())}

    def ranked() -> list[tuple[int, float]]:
        p = naive_softmax(list(scaled.values()))
        return sorted(zip(scaled, p, strict=True), key=lambda ip: (-ip[1], ip[0]))

    def keep(ids: list[int]) -> None:
        for i in set(scaled) - set(ids):
            del scaled[i]

    best = ranked()
    keep([i for i, p in best if p >= params.min_p * best[0][1]])
    if params.top_k:
        keep([i for i, _ in ranked()[: params.top_k]])
    before, kept = 0.0, []
    for i, p in ranked():
        if before >= params.top_p:
            break
        kept.append(i)
        before += p
    keep(kept)
    return dict(zip(scaled, naive_softmax(list(scaled.values())), strict=True))


def naive_sample(logits: torch.Tensor, params: SamplingParams, seed: int, position: int) -> int:
    u, total = naive_uniform(seed, position), 0.0
    probabilities = naive_probabilities(logits, params)
    for i in sorted(probabilities):
        total += probabilities[i]
        if total > u:
            return i
    raise AssertionError("the reference's probabilities do not reach u")


def make_logits(vocab: int, seed: int = 0, scale: float = 3.0) -> torch.Tensor:
    return scale * torch.randn(vocab, generator=torch.Generator().manual_seed(seed))


# ---- the draw -------------------------------------------------------------------------------------------------------

FILTERS = [
    {},
    {"temperature": 0.3},
    {"temperature": 5.0},
    {"top_k": 1},
    {"top_k": 7},
    {"top_k": 10**6},
    {"top_p": 0.9},
    {"top_p": 0.001},
    {"top_p": 0.9999999, "temperature": 4.0},
    {"min_p": 0.05},
    {"min_p": 1.0},
    {"temperature": 2.0, "min_p": 0.01, "top_k": 200, "top_p": 0.8},
    {"temperature": 0.7, "min_p": 0.001, "top_k": 3, "top_p": 0.99},
]


@pytest.mark.parametrize("options", FILTERS, ids=str)
@pytest.mark.parametrize("vocab", [1, 2, 63, 65, 600])
def test_sample_matches_sort_based_reference(options, vocab):
    params = SamplingParams(**options)
    for position in range(8):
        logits = make_logits(vocab, seed=position)
        actual = sample(logits, params, seed=77, position=position).id
        assert actual == naive_sample(logits, params, 77, position)


@pytest.mark.parametrize("options", FILTERS, ids=str)
def test_sample_reaches_exactly_the_reference_survivors(options):
    """Many draws from a flat row: every survivor is met, nothing else is."""
    params = SamplingParams(**options)
    logits = make_logits(30, seed=5, scale=0.3)
    seen = {sample(logits, params, seed=1, position=p).id for p in range(2000)}
    expected = naive_probabilities(logits, params)
    assert seen <= set(expected)
    # Missing a token of probability p in 2000 draws has chance (1 - p)^2000 < 1e-6 for p >= 0.0069.
    assert {i for i, p in expected.items() if p >= 0.0069} <= seen


def test_sample_ties_are_kept_by_lowest_id():
    """Equal logits: top_k and top_p keep the lowest ids, whatever the selection algorithm meets first."""
    logits = torch.zeros(5000)
    logits[4000] = 1.0
    for options, expected in [
        ({"top_k": 4}, {4000, 0, 1, 2}),
        # p(4000) = e / (e + 4999); each other 1 / (e + 4999): three tokens reach 0.0009.
        ({"top_p": 0.0009}, {4000, 0, 1}),
    ]:
        params = SamplingParams(**options)
        assert {sample(logits, params, seed=3, position=p).id for p in range(200)} == expected


# ---- top_p without a full sort --------------------------------------------------------------------------------------


def sorted_top_p(scores: np.ndarray, weights: np.ndarray, top_p: float) -> list[int]:
    """The definition: all tokens sorted, whole steps of probability added up in integers."""
    steps = 2.0 ** (53 - len(weights).bit_length())
    counts = [round(w * steps) for w in weights.tolist()]
    order = sorted(range(len(counts)), key=lambda i: (-scores[i], i))
    bound, reached, kept = top_p * float(sum(counts)), 0, []
    for i in order:
        if reached >= bound:
            break
        kept.append(i)
        reached += counts[i]
    return sorted(kept)


def distributions(vocab: int) -> dict[str, np.ndarray]:
    """Rows of logits, float32, and float64 as penalties make them."""
    g = np.random.default_rng(vocab)
    normal = g.standard_normal(vocab)
    peaked = normal.copy()
    peaked[g.integers(vocab, size=5)] += 12
    steps = np.round(2 * normal) / 2  # many ties
    two = np.where(np.arange(vocab) % 3 == 1, 1.0, 0.0)
    flat = np.zeros(vocab)
    spread = 100 * normal  # most weights are 0
    rows = {"normal": 3 * normal, "peaked": peaked, "steps": steps, "two": two, "flat": flat}
    rows |= {
        "spread": spread,
        "nearly flat": 1e-6 * normal,
        "signed zeros": flat * -(1 ** (normal > 0)),
    }
    rows |= {"huge": np.where(normal > 1, 3e38, -3e38), "falling": -0.01 * np.arange(vocab)}
    return {n: x.astype(np.float32) for n, x in rows.items()} | {"float64": normal / 3}


@pytest.mark.parametrize("vocab", [1, 2, 7, 300, 5000])
@pytest.mark.parametrize("max_sorted", [0, 2048, 10**9])  # the histogram, as it is, the sort
def test_sample_top_p_keeps_what_a_full_sort_keeps(monkeypatch, vocab, max_sorted):
    monkeypatch.setattr(sampling, "_MAX_SORTED", max_sorted)
    for name, scores in distributions(vocab).items():
        for top_p in (1e-9, 0.1, 1 / 3, 0.5, 0.95, 0.999999, 1 - 2**-53):
            for temperature in (0.05, 0.6, 1.0, 30.0):
                params = SamplingParams(temperature=temperature, top_p=top_p)
                every, _ = sampling._surviving(scores, params.replace(top_p=1.0))
                weights, ids = sampling._surviving(scores, params)
                expected = sorted_top_p(scores, every, top_p)
                assert ids.tolist() == expected, (name, top_p, temperature)
                assert weights.tobytes() == every[expected].tobytes()


@pytest.mark.parametrize("options", [{"top_k": 500}, {"min_p": 0.01}, {"top_k": 90, "min_p": 0.2}])
def test_sample_top_p_after_other_filters_keeps_what_a_full_sort_keeps(options):
    for name, scores in distributions(3000).items():
        params = SamplingParams(temperature=0.8, **options)
        before, among = sampling._surviving(scores, params)
        _, ids = sampling._surviving(scores, params.replace(top_p=0.9))
        assert ids.tolist() == among[sorted_top_p(scores[among], before, 0.9)].tolist(), name


def test_sample_top_p_of_a_peaked_row_makes_no_histogram(monkeypatch):
    monkeypatch.setattr(sampling, "_kept_of_many", None)  # not called
    logits = make_logits(163_840)
    logits[[70_000, 9, 163_839]] += torch.tensor([30.0, 29.5, 29.0])
    params = SamplingParams(temperature=0.6, top_p=0.95)
    drawn = {sample(logits, params, seed=1, position=p).id for p in range(50)}
    assert drawn <= {70_000, 9, 163_839}
    assert len(drawn) > 1


@pytest.mark.parametrize("draws_over", ["position", "seed"])
@pytest.mark.parametrize(
    "options", [{}, {"temperature": 0.6, "top_p": 0.95}, {"top_k": 9, "min_p": 0.01}], ids=str
)
def test_sample_distribution_chi_square(draws_over, options):
    """Pearson's statistic of 5,000 draws against the exact probabilities, at the 0.1 % level."""
    params = SamplingParams(**options)
    logits = make_logits(12, seed=9, scale=1.0)
    expected = naive_probabilities(logits, params)
    n = 5_000
    counts = dict.fromkeys(range(12), 0)
    for i in range(n):
        where = (
            {"seed": 5, "position": i} if draws_over == "position" else {"seed": i, "position": 5}
        )
        counts[sample(logits, params, **where).id] += 1
    statistic = sum((counts[i] - n * p) ** 2 / (n * p) for i, p in expected.items())
    freedom = len(expected) - 1
    # 99.9 % quantile of chi-square by Wilson and Hilferty's cube (normal quantile 3.090).
    bound = freedom * (1 - 2 / (9 * freedom) + 3.090 * math.sqrt(2 / (9 * freedom))) ** 3
    assert statistic < bound, f"chi-square {statistic:.1f} of {bound:.1f}"


def test_sample_is_a_function_of_seed_and_position_only():
    logits, params = make_logits(1000), SamplingParams()
    first = [sample(logits, params, seed=11, position=p).id for p in range(40)]
    np.random.seed(0)
    torch.manual_seed(0)
    again = {p: sample(logits, params, seed=11, position=p).id for p in reversed(range(40))}
    assert first == [again[p] for p in range(40)]
    assert first != [sample(logits, params, seed=12, position=p).id for p in range(40)]
    assert len(set(first)) > 5


def test_sample_inactive_filters_change_nothing():
    """Survivors are visited in id order, so switching on a filter that removes nothing keeps every token."""
    logits = make_logits(3000, scale=1.0)
    plain, wide = SamplingParams(), SamplingParams(top_k=2999, top_p=1 - 1e-9, min_p=1e-12)
    for p in range(50):
        assert sample(logits, plain, seed=2, position=p) == sample(logits, wide, seed=2, position=p)


def test_sample_leaves_the_logits_unchanged():
    logits = make_logits(100)
    before = logits.clone()
    params = SamplingParams(
        temperature=0.5, top_k=5, top_p=0.9, min_p=0.1, repetition_penalty=2.0, logprobs=3
    )
    sample(logits, params, seed=0, position=0, history=TokenHistory([1, 2], [3, 3]))
    assert torch.equal(logits, before)


@pytest.mark.parametrize("row", [0, 1, 2])
def test_sample_row_of_a_batch_equals_the_row_alone(row):
    batch = torch.stack([make_logits(500, seed=i) for i in range(3)])
    params = SamplingParams(top_p=0.9, logprobs=4)
    together = sample(batch[row], params, seed=8, position=4)
    assert together == sample(batch[row].clone(), params, seed=8, position=4)


# ---- temperature 0, penalties, extremes -----------------------------------------------------------------------------


def test_sample_temperature_zero_takes_the_lowest_of_equal_maxima():
    logits = torch.tensor([0.0, 5.0, -1.0, 5.0])
    params = SamplingParams(temperature=0.0, top_k=2, top_p=0.1, min_p=0.5)
    assert {sample(logits, params, seed=s, position=s).id for s in range(20)} == {1}


@pytest.mark.parametrize("temperature", [5e-324, 1e-300, 1e-12])
def test_sample_tiny_temperature_takes_a_maximum(temperature):
    logits = torch.tensor([1.0, 3.0, 2.9999])
    params = SamplingParams(temperature=temperature)
    assert {sample(logits, params, seed=0, position=p).id for p in range(50)} == {1}


def test_sample_extreme_finite_logits():
    huge = torch.tensor([-3.4e38, 3.4e38, 0.0, 3.4e38])
    params = SamplingParams(top_p=0.9, logprobs=2)
    drawn = [sample(huge, params, seed=1, position=p) for p in range(60)]
    assert {d.id for d in drawn} == {1, 3}
    assert all(d.logprob == pytest.approx(-math.log(2)) for d in drawn)


def naive_penalties(logits, params, prompt, output):
    """The formulas token by token (vLLM's order: repetition, frequency, presence)."""
    out = []
    for i, x in enumerate(logits.double().tolist()):
        if i in prompt or i in output:
            x = x / params.repetition_penalty if x > 0 else x * params.repetition_penalty
        x -= params.frequency_penalty * output.count(i)
        x -= params.presence_penalty * (i in output)
        out.append(x)
    return torch.tensor(out, dtype=torch.float64)


@pytest.mark.parametrize(
    "options",
    [
        {"repetition_penalty": 1.7},
        {"repetition_penalty": 0.5},
        {"frequency_penalty": 0.8},
        {"presence_penalty": 2.0},
        {"presence_penalty": -2.0},
        {"repetition_penalty": 1.3, "frequency_penalty": -0.4, "presence_penalty": 1.1},
    ],
    ids=str,
)
def test_sample_penalties_match_reference(options):
    params = SamplingParams(**options)
    prompt, output = [3, 3, 5, 17], [5, 9, 9, 9, 0]
    history = TokenHistory(prompt, output)
    changed = 0
    for position in range(60):
        logits = make_logits(20, seed=position, scale=1.0)
        expected = naive_penalties(logits, params, prompt, output)
        actual = sample(logits, params, seed=4, position=position, history=history).id
        assert actual == naive_sample(expected, params, 4, position)
        greedy = params.replace(temperature=0)
        best = sample(logits, greedy, seed=4, position=position, history=history).id
        assert best == int(expected.argmax())
        changed += actual != sample(logits, params, seed=4, position=position).id
    assert changed > 0


def test_sample_repetition_penalty_of_an_empty_history_changes_nothing():
    params = SamplingParams(repetition_penalty=2.0, presence_penalty=1.0)
    logits = make_logits(40)
    plain = sample(logits, SamplingParams(), seed=1, position=1)
    assert sample(logits, params, seed=1, position=1, history=TokenHistory()) == plain


# ---- logprobs -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [0, 1, 5, 20])
def test_sample_logprobs_are_those_of_the_raw_logits(count):
    logits = make_logits(700, seed=2)
    logits[10] = logits[20] = logits.max() + 1  # a tie at the top: lowest id first
    params = SamplingParams(
        temperature=0.2, top_k=50, repetition_penalty=3.0, logprobs=count, presence_penalty=1.0
    )
    token = sample(logits, params, seed=6, position=0, history=TokenHistory([10], [20]))
    expected = torch.log_softmax(logits.double(), dim=-1).tolist()
    ranked = sorted(range(700), key=lambda i: (-expected[i], i))[:count]
    # Two float64 log-sum-exps of 700 terms near 1: a few hundred roundings of 2**-53.
    assert token.logprob == pytest.approx(expected[token.id], abs=1e-12)
    assert [i for i, _ in token.top_logprobs] == ranked
    assert [x for _, x in token.top_logprobs] == pytest.approx(
        [expected[i] for i in ranked], abs=1e-12
    )


def test_sample_without_logprobs_reports_none():
    token = sample(make_logits(8), SamplingParams(), seed=0, position=0)
    assert token == SampledToken(token.id, None, None)


# ---- bad input ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_sample_refuses_non_finite_logits(bad, temperature):
    logits = make_logits(50)
    logits[49] = bad
    with pytest.raises(NonFiniteLogitsError, match="position 123") as caught:
        sample(logits, SamplingParams(temperature=temperature), seed=0, position=123)
    assert ("1 NaN" in str(caught.value)) == math.isnan(bad)


ENDS = {
    "temperature": (5e-324, 100),
    "top_p": (5e-324, 1),
    "top_k": (0, 1, 2**31 - 1),
    "min_p": (0, 5e-324, 1),
    "presence_penalty": (-2, 2),
    "frequency_penalty": (-2, 2),
    "repetition_penalty": (1e-3, 10),
}


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("scale", [1.0, 3e37])
def test_sample_takes_the_ends_of_every_range(scale):
    logits = make_logits(11) * scale / make_logits(11).abs().max()
    prompt, output = [1, 2, 3], [4, 4, 5]
    history = TokenHistory(prompt, output)
    others = ({}, {"min_p": 0.1}, {"top_p": 0.9}, {"top_k": 5}, {"repetition_penalty": 1e-3})
    for name, values in ENDS.items():
        for value, other in itertools.product(values, others):
            params = SamplingParams(**other | {name: value})
            chosen = sample(logits, params, seed=1, position=9, history=history).id
            scores = naive_penalties(logits, params, prompt, output)
            greedy = params.temperature < 1e-300  # where the naive quotients are infinite
            expected = int(scores.argmax()) if greedy else naive_sample(scores, params, 1, 9)
            assert chosen == expected, (name, value, other)


def test_sample_refuses_other_dtypes_and_shapes():
    params = SamplingParams()
    with pytest.raises(TypeError, match=r"float32 \(got torch\.bfloat16\)"):
        sample(torch.zeros(4, dtype=torch.bfloat16), params, seed=0, position=0)
    with pytest.raises(ValueError, match=r"\[vocab\] \(got \[2, 4\]\)"):
        sample(torch.zeros(2, 4), params, seed=0, position=0)
    with pytest.raises(ValueError, match=r"\[vocab\] \(got \[0\]\)"):
        sample(torch.zeros(0), params, seed=0, position=0)


BAD_VALUES = [
    ("temperature", -0.1),
    ("temperature", 100.5),
    ("temperature", math.nan),
    ("temperature", math.inf),
    ("temperature", True),
    ("temperature", "1"),
    ("temperature", None),
    ("temperature", 10**400),
    ("top_p", 0),
    ("top_p", 1.01),
    ("top_p", math.nan),
    ("top_k", -1),
    ("top_k", 2.0),
    ("top_k", True),
    ("top_k", 2**31),
    ("min_p", -0.01),
    ("min_p", 1.5),
    ("presence_penalty", 2.1),
    ("frequency_penalty", -2.1),
    ("repetition_penalty", 0),
    ("repetition_penalty", 5e-324),
    ("repetition_penalty", 1e-308),
    ("repetition_penalty", 0.00099),
    ("repetition_penalty", 11),
    ("max_tokens", 0),
    ("max_tokens", 1.5),
    ("max_tokens", False),
    ("max_tokens", 2**31),
    ("stop", ""),
    ("stop", ["a", ""]),
    ("stop", [1]),
    ("stop", b"a"),
    ("stop", ["x"] * 17),
    ("stop", "x" * 1025),
    ("stop_token_ids", 5),
    ("stop_token_ids", [-1]),
    ("stop_token_ids", [True]),
    ("stop_token_ids", list(range(17))),
    ("seed", -1),
    ("seed", 2**64),
    ("seed", 1.0),
    ("logprobs", -1),
    ("logprobs", 21),
    ("logprobs", True),
    ("ignore_eos", 1),
]


@pytest.mark.parametrize(("name", "value"), BAD_VALUES, ids=lambda v: repr(v)[:20])
def test_sampling_params_refuse_bad_values(name, value):
    with pytest.raises(RequestError, match=rf"^sampling: {name} must be .*\(got "):
        SamplingParams(**{name: value})


def test_sampling_params_accept_the_ends_of_every_range():
    params = SamplingParams(
        temperature=0,
        top_p=1,
        top_k=np.int64(3),
        min_p=1,
        presence_penalty=-2,
        frequency_penalty=2,
        repetition_penalty=10,
        max_tokens=1,
        stop="END",
        stop_token_ids=[0, 2**31 - 1],
        seed=2**64 - 1,
        logprobs=20,
    )
    assert params.stop == ("END",)
    assert params.stop_token_ids == (0, 2**31 - 1)
    assert isinstance(params.top_k, int)
    assert isinstance(params.temperature, float)
    assert hash(params) == hash(params.replace())
    sample(make_logits(9), params.replace(temperature=1), seed=params.seed, position=2**40)


def test_from_generation_config_takes_only_what_the_file_holds():
    assert SamplingParams.from_generation_config({}) == SamplingParams()
    config = {
        "do_sample": True,
        "temperature": 0.6,
        "top_p": 0.95,
        "top_k": None,
        "max_length": 131072,
        "eos_token_id": [1, 2],
        "max_new_tokens": 100,
    }
    params = SamplingParams.from_generation_config(config, top_k=5, seed=3)
    assert params == SamplingParams(temperature=0.6, top_p=0.95, top_k=5, max_tokens=100, seed=3)


def test_from_generation_config_do_sample_false_is_greedy_unless_overridden():
    config = {"do_sample": False, "temperature": 0.6}
    assert SamplingParams.from_generation_config(config).temperature == 0
    assert SamplingParams.from_generation_config(config, temperature=0.3).temperature == 0.3


def test_from_generation_config_names_the_file_for_a_bad_value_in_it():
    with pytest.raises(ConfigError, match=r"^generation_config\.json: top_p must"):
        SamplingParams.from_generation_config({"top_p": 7})
    with pytest.raises(ConfigError, match="do_sample must be true or false"):
        SamplingParams.from_generation_config({"do_sample": "no"})
    assert SamplingParams.from_generation_config({"top_p": 7}, top_p=0.5).top_p == 0.5
    with pytest.raises(RequestError, match=r"^sampling: top_p must"):
        SamplingParams.from_generation_config({}, top_p=7)


@pytest.mark.parametrize(
    ("given", "meant"),
    [("temprature", "temperature"), ("max_new_tokens", "max_tokens"), ("Top_P", "top_p")],
)
def test_unknown_sampling_arguments_name_the_nearest(given, meant):
    with pytest.raises(RequestError, match=f"unknown argument '{given}', did you mean '{meant}'"):
        SamplingParams.from_generation_config({}, **{given: 1})
    with pytest.raises(RequestError, match=f"unknown argument '{given}', did you mean '{meant}'"):
        SamplingParams().replace(**{given: 1})


# ---- allowed tokens -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "params",
    [
        SamplingParams(temperature=0),
        SamplingParams(),
        SamplingParams(temperature=0.01, top_p=0.9),
        SamplingParams(top_k=3, min_p=0.05, logprobs=4),
        SamplingParams(top_p=0.5, repetition_penalty=1.3, presence_penalty=1.0),
    ],
)
def test_sample_with_allowed_tokens_equals_a_vocabulary_of_them(params):
    rng = np.random.default_rng(3)
    for seed in range(40):
        logits = torch.from_numpy(rng.normal(size=50).astype(np.float32)) * 4
        allowed = rng.random(50) < (0.02, 0.3, 0.9)[seed % 3]
        allowed[seed] = True
        history = TokenHistory([1, 2], [3, 4, 4])
        token = sample(logits, params, seed=seed, position=9, history=history, allowed=allowed)
        kept = np.flatnonzero(allowed)
        small = TokenHistory(np.flatnonzero(np.isin(kept, [1, 2])))
        for given in (3, 4, 4):
            for place in np.flatnonzero(kept == given):
                small.append(int(place))
        plain = params.replace(logprobs=None)
        expected = sample(logits[kept], plain, seed=seed, position=9, history=small)
        assert token.id == kept[expected.id]
        everything = sample(logits, SamplingParams(logprobs=4), seed=seed, position=9)
        if params.logprobs is not None:
            assert token.top_logprobs == everything.top_logprobs


@pytest.mark.parametrize("allowed", [np.zeros(5, dtype=bool), np.ones(4, dtype=bool)])
def test_sample_needs_an_allowed_token(allowed):
    with pytest.raises(ValueError, match="allowed must be True for at least one of 5 tokens"):
        sample(torch.zeros(5), SamplingParams(), seed=0, position=0, allowed=allowed)
