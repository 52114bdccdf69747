"""Two engines timed in turns, so that a busy moment of the machine hits both."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from kimi_native.bench.rows import Limits, make_row, median_and_spread

# After a call an engine's threads spin for up to some milliseconds; the next one to be timed must not pay for it.
REST_SECONDS = 0.01
# Long enough that what a rest has cost an engine hardly counts: matrix tiles need some 100 ms to their full rate.
TURN_SECONDS = 0.4
FEWEST_SAMPLES = 5


def take_turns(
    ours: Callable[[int], Any], theirs: Callable[[int], Any], calls_per_run: int, budget_s: float
) -> tuple[list[float], list[float]]:
    """Seconds per problem of each engine's calls. A turn is a rest, one call that is not counted, then some that are.

    ours, theirs   called with 0, 1, 2, ... to rotate weights by
    calls_per_run  problems that one call of `theirs` solves
    budget_s       for both together; each gets FEWEST_SAMPLES in any case
    """
    samples: tuple[list[float], list[float]] = ([], [])
    calls = [0, 0]
    turn_seconds = min(TURN_SECONDS, budget_s / 4)
    until = time.perf_counter() + budget_s
    while time.perf_counter() < until or min(map(len, samples)) < FEWEST_SAMPLES:
        for who, (solve, per_run) in enumerate(((ours, 1), (theirs, calls_per_run))):
            time.sleep(REST_SECONDS)
            solve(calls[who])
            ended = time.perf_counter()
            turn = ended + turn_seconds
            while ended < turn:
                calls[who] += 1
                started = time.perf_counter()
                solve(calls[who])
                ended = time.perf_counter()
                samples[who].append((ended - started) / per_run)
    return samples


def pair_rows(
    case: tuple[str, str, int],
    samples: tuple[list[float], list[float]],
    *,
    limits: Limits,
    nbytes: float,
    flops: float,
    limbs: bool,
    isa: str,
    compute: str,
    peer: str,
    peer_compute: str,
    **more: Any,
) -> list[dict[str, Any]]:
    """Our row, and the peer's with its name and the ratio of its time to ours; both count the problem's bytes.

    case     op, shape, tokens
    compute  what ours computes; peer_compute: what the peer does
    """
    ours, theirs = samples
    common = {
        "limits": limits,
        "nbytes": nbytes,
        "flops": flops,
        "limbs": limbs,
        "isa": isa,
        **more,
    }
    ratio = median_and_spread(theirs)[0] / median_and_spread(ours)[0]
    return [
        make_row(*case, ours, compute=compute, peer=None, ratio=None, **common),
        make_row(
            *case,
            theirs,
            compute=peer_compute,
            peer=peer,
            ratio=round(ratio, 3),
            **common,
        ),
    ]
