"""Load and information of experts against naive formulas and distributions whose numbers are known."""

from __future__ import annotations

import math
from collections import Counter
from itertools import pairwise

import numpy as np
import pytest

from kimi_native.routing_statistics import (
    entropy_bits,
    information_bits,
    layer_statistics,
    mutual_information,
)


def statistics(experts, *, num_experts, labels=None, weights=None, num_labels=3, **options):
    experts = np.asarray(experts, dtype=np.int32)
    weights = np.ones(experts.shape, np.float32) if weights is None else weights
    labels = np.zeros(len(experts), np.int64) if labels is None else labels
    sizes = {"num_experts": num_experts, "num_labels": num_labels}
    return layer_statistics(7, experts, weights, labels, **sizes, **options)


def random_choices(generator, tokens, topk, num_experts):
    return np.stack([generator.permutation(num_experts)[:topk] for _ in range(tokens)])


def naive_information(pairs):
    """Sum over the cells of p(x, y) log2(p(x, y) / (p(x) p(y)))."""
    n = len(pairs)
    both, xs, ys = Counter(pairs), Counter(x for x, _ in pairs), Counter(y for _, y in pairs)
    return sum(c / n * math.log2(c * n / (xs[x] * ys[y])) for (x, y), c in both.items())


def naive_pairs(experts, labels):
    return [
        (e, label)
        for row, label in zip(experts.tolist(), labels.tolist(), strict=True)
        for e in row
    ]


@pytest.mark.parametrize(
    ("tokens", "topk", "num_experts"), [(1, 1, 1), (1, 2, 5), (17, 3, 8), (200, 8, 64)]
)
def test_statistics_equal_naive_formulas(tokens, topk, num_experts):
    generator = np.random.default_rng(tokens)
    experts = random_choices(generator, tokens, topk, num_experts)
    weights = generator.random((tokens, topk)).astype(np.float32)
    labels = generator.integers(0, 3, tokens)
    got = statistics(experts, num_experts=num_experts, labels=labels, weights=weights)
    loads = [sum(e in row for row in experts.tolist()) for e in range(num_experts)]
    mean = tokens * topk / num_experts
    assert got.layer == 7
    assert got.counts.tolist() == loads
    assert got.shares == pytest.approx([load / mean for load in loads], rel=1e-12)
    assert got.max_over_mean == pytest.approx(max(loads) / mean, rel=1e-12)
    deviation = math.sqrt(sum((load - mean) ** 2 for load in loads) / num_experts)
    assert got.variation == pytest.approx(deviation / mean, rel=1e-9, abs=1e-12)
    assert got.never == [e for e in range(num_experts) if loads[e] == 0]
    p = [load / sum(loads) for load in loads if load]
    entropy = -sum(x * math.log(x) for x in p) / math.log(num_experts) if num_experts > 1 else 1
    assert got.entropy == pytest.approx(entropy, rel=1e-9, abs=1e-12)
    for e in range(num_experts):
        chosen = weights[experts == e].tolist()
        if chosen:
            assert got.mean_weights[e] == pytest.approx(np.mean(chosen, dtype=np.float64), rel=1e-9)
        else:
            assert math.isnan(got.mean_weights[e])
    expected = naive_information(naive_pairs(experts, labels))
    assert got.plug_in == pytest.approx(expected, rel=1e-9, abs=1e-12)
    assert got.information == got.plug_in - got.shuffled
    for label in range(3):
        row = [sum(e in r for r in experts[labels == label].tolist()) for e in range(num_experts)]
        assert got.label_counts[label].tolist() == row


def test_statistics_of_a_uniform_load():
    got = statistics(np.arange(32).reshape(8, 4) % 16, num_experts=16)
    assert got.counts.tolist() == [2] * 16
    assert (got.max_over_mean, got.variation, got.entropy) == (1.0, 0.0, 1.0)
    assert got.never == []


def test_statistics_of_one_expert_for_all():
    got = statistics(np.full((50, 1), 3), num_experts=16)
    assert (got.max_over_mean, got.entropy) == (16.0, 0.0)
    assert got.variation == pytest.approx(math.sqrt(15))
    assert got.never == [e for e in range(16) if e != 3]


def test_statistics_of_half_of_the_experts():
    got = statistics(np.arange(8)[:, None], num_experts=16)
    assert got.entropy == pytest.approx(3 / 4)
    assert (got.max_over_mean, got.variation) == (2.0, 1.0)


def test_information_of_dependent_labels_is_their_entropy():
    labels = np.arange(4000) % 4
    experts = labels[:, None] * 2 + np.array([[0, 1]])
    plug_in, shuffled = mutual_information(experts, labels, num_experts=8, num_labels=4)
    assert plug_in == pytest.approx(math.log2(4), abs=1e-12)
    assert 0 < shuffled < 0.01
    uneven = (np.arange(4000) % 4 == 0).astype(int)
    plug_in, _ = mutual_information(uneven[:, None], uneven, num_experts=2, num_labels=2)
    assert plug_in == pytest.approx(-(0.25 * math.log2(0.25) + 0.75 * math.log2(0.75)))


def test_information_of_independent_labels_is_near_zero_once_the_bias_is_subtracted():
    """200 tokens, 64 experts, 5 labels: the plug-in estimate finds a fifth of a bit where there is none."""
    corrected, plug_ins = [], []
    for seed in range(20):
        generator = np.random.default_rng(seed)
        experts = random_choices(generator, 200, 4, 64)
        labels = generator.integers(0, 5, 200)
        plug_in, shuffled = mutual_information(
            experts, labels, num_experts=64, num_labels=5, seed=seed
        )
        plug_ins.append(plug_in)
        corrected.append(plug_in - shuffled)
    bias = 63 * 4 / (2 * 200 * 4 * math.log(2))
    assert np.mean(plug_ins) == pytest.approx(bias, rel=0.15)
    error = np.std(corrected, ddof=1) / math.sqrt(len(corrected))
    assert abs(np.mean(corrected)) < 4 * error
    assert abs(np.mean(corrected)) < 0.03 * bias


def test_information_approaches_the_truth_from_a_noisy_channel():
    """Labels 0 and 1 choose expert 0 with probability 0.9 and 0.1: 1 - H(0.1) = 0.531 bits."""
    generator = np.random.default_rng(0)
    labels = generator.integers(0, 2, 20_000)
    experts = np.where(generator.random(20_000) < 0.9, labels, 1 - labels)[:, None]
    plug_in, shuffled = mutual_information(experts, labels, num_experts=2, num_labels=2)
    assert plug_in - shuffled == pytest.approx(0.531, abs=0.01)


def test_information_shuffles_keep_a_tokens_experts_together():
    """A second choice that repeats the first adds nothing; shuffled by itself it would halve the bias."""
    generator = np.random.default_rng(1)
    experts = np.repeat(generator.integers(0, 8, 400)[:, None], 2, axis=1)
    labels = generator.integers(0, 4, 400)
    _, together = mutual_information(experts, labels, num_experts=8, num_labels=4, shuffles=100)
    assert together == pytest.approx(7 * 3 / (2 * 400 * math.log(2)), rel=0.1)


def test_information_is_the_same_for_the_same_seed():
    generator = np.random.default_rng(2)
    experts, labels = random_choices(generator, 50, 2, 8), generator.integers(0, 3, 50)
    sizes = {"num_experts": 8, "num_labels": 3}
    runs = [mutual_information(experts, labels, **sizes, seed=seed)[1] for seed in (0, 0, 1)]
    assert runs[0] == runs[1] != runs[2]
    assert mutual_information(experts, labels, **sizes, shuffles=0)[1] == 0.0
    kept = labels.copy()
    mutual_information(experts, labels, **sizes)
    assert (labels == kept).all()


def test_information_of_one_label_is_zero():
    assert information_bits(np.array([[3, 4, 0, 9], [0, 0, 0, 0]])) == pytest.approx(0, abs=1e-12)
    got = statistics([[0, 1], [2, 3]], num_experts=4)
    assert got.information == pytest.approx(0, abs=1e-12)


def test_entropy_of_known_tables():
    assert entropy_bits([1] * 8) == pytest.approx(3)
    assert entropy_bits([5, 0, 0]) == 0
    assert entropy_bits([2, 1, 1]) == pytest.approx(1.5)
    grown = [entropy_bits([1] * n) for n in (1, 2, 3, 100)]
    assert all(a < b for a, b in pairwise(grown))
    with pytest.raises(ValueError, match="counts must not all be 0"):
        entropy_bits([0, 0])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"experts": np.zeros((0, 2), int)}, r"experts must be \[tokens, topk\], not empty"),
        ({"experts": np.zeros(4, int)}, r"experts must be \[tokens, topk\], not empty"),
        ({"experts": np.array([[0, 4]])}, r"experts must be in \[0, 4\) \(got 0 to 4\)"),
        ({"experts": np.array([[-1, 2]])}, r"experts must be in \[0, 4\) \(got -1 to 2\)"),
        ({"labels": np.array([3])}, r"labels must be in \[0, 3\) \(got 3 to 3\)"),
        ({"labels": np.array([0, 0])}, r"weights and labels must be as long as experts"),
        ({"weights": np.ones((1, 3))}, r"weights and labels must be as long as experts"),
    ],
)
def test_statistics_refuse_what_is_wrong(change, message):
    given = {"experts": np.array([[0, 1]]), "num_experts": 4, **change}
    with pytest.raises(ValueError, match=message):
        statistics(**given)
