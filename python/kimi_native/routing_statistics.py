"""How evenly the tokens of one layer load its experts, and how much an expert says about what a token is.

All of it from the choices alone; float64, and the same numbers for the same seed.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

SHUFFLES = 20


@dataclass(frozen=True)
class LayerStatistics:
    """One layer with experts.

    layer               its index in the model, dense layers counted
    counts              [experts] int: (token, slot) pairs, as many as tokens * topk together
    shares              [experts] load over the mean load; 1 for each in balance
    max_over_mean       the largest share
    variation           coefficient of variation: standard deviation of the loads over their mean; 0 is balance
    never               experts that no token chose
    entropy             of the load, over log(experts): 1 is balance, 0 one expert for all; 1 for a single expert
    mean_weights        [experts] mean weight of the tokens that chose it, nan where there is none
    label_counts        [labels, experts] int: the counts by label of the token
    information         bits that the expert of a random (token, slot) pair tells about the token's label: plug_in less
                        shuffled
    plug_in, shuffled   see mutual_information
    """

    layer: int
    counts: np.ndarray
    shares: np.ndarray
    max_over_mean: float
    variation: float
    never: list[int]
    entropy: float
    mean_weights: np.ndarray
    label_counts: np.ndarray
    information: float
    plug_in: float
    shuffled: float


def layer_statistics(
    layer: int,
    experts: np.ndarray,
    weights: np.ndarray,
    labels: np.ndarray,
    *,
    num_experts: int,
    num_labels: int,
    shuffles: int = SHUFFLES,
    seed: int = 0,
) -> LayerStatistics:
    """The numbers of one layer.

    experts  [tokens, topk] int, in [0, num_experts)
    weights  [tokens, topk] float
    labels   [tokens] int, in [0, num_labels)

    Raises ValueError on a shape, no token, or a number out of range.
    """
    _check(experts, weights, labels, num_experts, num_labels)
    counts = np.bincount(experts.ravel(), minlength=num_experts)
    sums = np.bincount(experts.ravel(), weights=weights.ravel(), minlength=num_experts)
    mean_weights = np.divide(sums, counts, out=np.full(num_experts, np.nan), where=counts > 0)
    shares = counts * (num_experts / counts.sum())
    plug_in, shuffled = mutual_information(
        experts,
        labels,
        num_experts=num_experts,
        num_labels=num_labels,
        shuffles=shuffles,
        seed=seed,
    )
    return LayerStatistics(
        layer=layer,
        counts=counts,
        shares=shares,
        max_over_mean=float(shares.max()),
        variation=float(shares.std()),  # the mean of the shares is 1
        never=np.flatnonzero(counts == 0).tolist(),
        entropy=entropy_bits(counts) / math.log2(num_experts) if num_experts > 1 else 1.0,
        mean_weights=mean_weights,
        label_counts=joint_counts(experts, labels, num_experts, num_labels),
        information=plug_in - shuffled,
        plug_in=plug_in,
        shuffled=shuffled,
    )


def mutual_information(
    experts: np.ndarray,
    labels: np.ndarray,
    *,
    num_experts: int,
    num_labels: int,
    shuffles: int = SHUFFLES,
    seed: int = 0,
) -> tuple[float, float]:
    """Bits that the expert of a random (token, slot) pair tells about the token's label: (plug_in, shuffled).

    The plug-in estimate takes observed frequencies for probabilities. It is never negative, so on few tokens it finds
    information where there is none: about (experts - 1) * (labels - 1) / (2 * pairs * ln 2) bits if pairs were
    independent. `shuffled` is the mean of the same estimate over `shuffles` permutations of the labels among the
    tokens, each token keeping its experts together; subtract it. The difference is near 0 for independent labels, and
    may be below; where labels are predictable it is too small by up to `shuffled`. It is at most the entropy of the
    labels.

    Arguments as of layer_statistics. Source: Panzeri et al., J. Neurophysiol. 98 (2007) 1064.
    """
    plug_in = information_bits(joint_counts(experts, labels, num_experts, num_labels))
    generator = np.random.default_rng(seed)
    found = [
        information_bits(
            joint_counts(experts, generator.permutation(labels), num_experts, num_labels)
        )
        for _ in range(shuffles)
    ]
    return plug_in, float(np.mean(found)) if found else 0.0


def joint_counts(
    experts: np.ndarray, labels: np.ndarray, num_experts: int, num_labels: int
) -> np.ndarray:
    """[labels, experts] int: the (token, slot) pairs of each label and expert."""
    cells = labels.astype(np.int64)[:, None] * num_experts + experts
    return np.bincount(cells.ravel(), minlength=num_labels * num_experts).reshape(num_labels, -1)


def information_bits(joint: np.ndarray) -> float:
    """Mutual information of the two axes of a table of counts, its frequencies taken as probabilities."""
    return entropy_bits(joint.sum(axis=0)) + entropy_bits(joint.sum(axis=1)) - entropy_bits(joint)


def entropy_bits(counts: np.ndarray | Sequence[int]) -> float:
    """Entropy of a table of counts in bits. Raises ValueError if all are 0."""
    values = np.asarray(counts, dtype=np.float64).ravel()
    if values.sum() <= 0:
        raise ValueError("statistics: counts must not all be 0 (got no token)")
    p = values[values > 0] / values.sum()
    return max(0.0, float(-(p * np.log2(p)).sum()))


def _check(
    experts: np.ndarray, weights: np.ndarray, labels: np.ndarray, num_experts: int, num_labels: int
) -> None:
    if experts.ndim != 2 or 0 in experts.shape:
        raise ValueError(
            f"statistics: experts must be [tokens, topk], not empty (got {list(experts.shape)})"
        )
    if weights.shape != experts.shape or labels.shape != experts.shape[:1]:
        raise ValueError(
            "statistics: weights and labels must be as long as experts "
            f"(got {list(weights.shape)} and {list(labels.shape)} with {list(experts.shape)})"
        )
    for name, values, end in (("experts", experts, num_experts), ("labels", labels, num_labels)):
        if values.min() < 0 or values.max() >= end:
            raise ValueError(
                f"statistics: {name} must be in [0, {end}) (got {values.min()} to {values.max()})"
            )
