"""A measurement for people and programs: rows of a table, and an object for JSON."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from kimi_native.routing_statistics import LayerStatistics, entropy_bits

if TYPE_CHECKING:
    from kimi_native.routing import Routing

BUSIEST = 4  # experts that a row names
HEADER = ("layer", "max/mean", "variation", "entropy", "never", "bits", "by chance", "busiest")


def table(statistics: Sequence[LayerStatistics]) -> list[tuple[str, ...]]:
    """One row per layer, as HEADER says; busiest are experts with their load over the mean."""
    return [
        (
            str(s.layer),
            f"{s.max_over_mean:.2f}",
            f"{s.variation:.2f}",
            f"{s.entropy:.3f}",
            str(len(s.never)),
            f"{s.information:.3f}",
            f"{s.shuffled:.3f}",
            ", ".join(f"{e} ({s.shares[e]:.1f})" for e in busiest(s)),
        )
        for s in statistics
    ]


def busiest(layer: LayerStatistics) -> list[int]:
    """The experts with the largest loads, the larger first; of equals the lower index."""
    order = sorted(range(len(layer.counts)), key=lambda e: (-layer.counts[e], e))
    return [e for e in order[:BUSIEST] if layer.counts[e] > 0]


def summary(routing: Routing) -> str:
    """One line: how much was measured."""
    texts = f"{len(routing.texts)} text{'s' if len(routing.texts) > 1 else ''}"
    return (
        f"{routing.num_tokens:,} tokens of {texts}; each chooses {routing.topk} of {routing.num_experts} experts "
        f"in each of {len(routing.layers)} layers"
    )


def label_line(routing: Routing) -> str:
    """One line: the labels' tokens, and their entropy, which `bits` cannot exceed."""
    counts = label_counts(routing)
    named = ", ".join(f"{name} {count:,}" for name, count in counts.items() if count)
    return f"{named}; {entropy_bits(list(counts.values())):.3f} bits"


def label_counts(routing: Routing) -> dict[str, int]:
    """Tokens of each label."""
    found = Counter(name for text in routing.texts for name in text.labels)
    return {name: found[name] for name in routing.label_names}


def report(routing: Routing, statistics: Sequence[LayerStatistics], model: str) -> dict[str, Any]:
    """All of it for JSON: fields as of Routing, RoutedText and LayerStatistics; nan is null."""
    return {
        "model": model,
        "num_experts": routing.num_experts,
        "topk": routing.topk,
        "num_tokens": routing.num_tokens,
        "label_names": list(routing.label_names),
        "label_tokens": label_counts(routing),
        "label_entropy": entropy_bits(list(label_counts(routing).values())),
        "layers": [_layer(s) for s in statistics],
        "texts": [
            {
                "ids": text.ids,
                "prompt_tokens": text.prompt_tokens,
                "tokens": text.tokens,
                "labels": text.labels,
                "experts": text.experts.tolist(),
                "weights": text.weights.tolist(),
            }
            for text in routing.texts
        ],
    }


def _layer(s: LayerStatistics) -> dict[str, Any]:
    return {
        "layer": s.layer,
        "max_over_mean": s.max_over_mean,
        "variation": s.variation,
        "entropy": s.entropy,
        "information": s.information,
        "plug_in": s.plug_in,
        "shuffled": s.shuffled,
        "never": s.never,
        "counts": s.counts.tolist(),
        "shares": s.shares.tolist(),
        "mean_weights": [None if math.isnan(w) else w for w in s.mean_weights.tolist()],
        "label_counts": s.label_counts.tolist(),
    }
