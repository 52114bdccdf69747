"""Interleaved thinking against planning first and against no tools: the same weights, the same problems.

The account that is usually given: a call fails with probability e, the model notices with probability r, so n steps
come out right with probability (1 - e (1 - r))^n, and without looking with (1 - e)^n. Here the calls are real, every
number is counted, and the account is put beside them; docs/claims.md derives both formulas.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from kimi_native.claims.kept_rows import KeptRows
from kimi_native.nano.episode import Episode
from kimi_native.nano.evaluate import AnswerAll, Score, Share, evaluate_all, make_episodes
from kimi_native.nano.modes import Mode
from kimi_native.nano.world import Failures


@dataclass(frozen=True)
class Cell:
    """So many held-out problems of one kind."""

    mode: Mode
    num_steps: int
    failure_rate: float
    count: int


def cells(*, quick: bool) -> tuple[Cell, ...]:
    """What is played: all of it takes hours on two cores, the quick part minutes."""
    if quick:
        plan = [("interleaved", n, e, 50) for n in (5, 10, 20) for e in (0.0, 0.1)]
        plan += [("plan-first", n, e, 50) for n in (5, 10, 20) for e in (0.0, 0.1)]
        plan += [("no-tools", n, 0.0, 50) for n in (5, 10)]
        return tuple(Cell(*row) for row in plan)
    counts = {5: 200, 10: 200, 20: 200, 30: 100, 50: 100, 100: 40, 150: 40, 200: 20}
    rates = (0.0, 0.05, 0.1, 0.2)
    plan = [("interleaved", n, e, count) for n, count in counts.items() for e in rates]
    plan += [("plan-first", n, e, c) for n, c in counts.items() if n <= 50 for e in rates]
    plan += [("no-tools", n, 0.0, c) for n, c in counts.items() if n <= 20]
    return tuple(Cell(*row) for row in plan)


TOKENS_OF_A_STEP = 160  # in a conversation, where tools often fail


def play(
    answer_all: AnswerAll,
    plan: Sequence[Cell],
    *,
    seed: int,
    done: Callable[[Score], None],
    kept: KeptRows | None = None,
    room: int | None = None,
) -> list[dict[str, Any]]:
    """One row for each cell: its numbers, each share as count and trials, and the seconds it took.

    done  called with each score as it comes in
    kept  rows of cells that need not be played again; gets those that are
    room  tokens of conversations that can be kept: with more of them at once, each computes all of its own anew
    """
    kept = kept or KeptRows(None, None)
    rows = []
    for cell in plan:
        if (row := kept.get(asdict(cell))) is not None:
            rows.append(row)
            continue
        started = time.perf_counter()
        score = evaluate_all(
            answer_all,
            mode=cell.mode,
            num_steps=cell.num_steps,
            failures=Failures(cell.failure_rate),
            count=cell.count,
            at_once=None if room is None else max(1, room // (TOKENS_OF_A_STEP * cell.num_steps)),
            seed=seed,
        )
        rows.append({**asdict(score), "seconds": time.perf_counter() - started})
        kept.put(asdict(cell), rows[-1])
        done(score)
    return rows


def calls_per_step(plan: Sequence[Cell], *, seed: int) -> float:
    """Calls that a step of these problems takes if nothing fails: a price or a note has to be got first."""
    steps = [
        step for cell in plan for episode in _episodes(cell, seed) for step in episode.problem.steps
    ]
    return sum(1 + (s.op != "save" and s.source != "number") for s in steps) / len(steps)


def _episodes(cell: Cell, seed: int) -> list[Episode]:
    """The ones that `play` plays."""
    return make_episodes(
        mode=cell.mode,
        num_steps=cell.num_steps,
        failures=Failures(cell.failure_rate),
        count=cell.count,
        seed=seed,
        split="held-out",
    )


def popular(failure_rate: float, catch_rate: float) -> float:
    """What the usual account gives a step."""
    return 1 - failure_rate * (1 - catch_rate)


def derived(failure_rate: float, catch_rate: float, calls: float, accuracy: float) -> float:
    """What a step comes to with `calls` calls, retries that may fail too, and a model that errs by itself.

    A call ends unnoticed wrong with probability e (1 - r) / (1 - e r): it fails unnoticed at once, or is caught and
    made again. accuracy: of a step without failures.
    """
    lost = failure_rate * (1 - catch_rate) / (1 - failure_rate * catch_rate)
    return accuracy * (1 - lost) ** calls


def fits(rows: Sequence[dict[str, Any]], calls: float) -> Iterator[dict[str, Any]]:
    """For each mode and failure rate, over all lengths: accuracy of a step, catch rate, and both accounts of it.

    calls  that a step takes

    The accuracy is the maximum-likelihood one of a chain that ends at its first wrong step: right steps, of those and
    one for each episode that went wrong.
    """
    perfect = {}
    for mode, rate in dict.fromkeys((row["mode"], row["failure_rate"]) for row in rows):
        same = [r for r in rows if (r["mode"], r["failure_rate"]) == (mode, rate)]
        step, caught = _sum(same, "steps"), _sum(same, "catches")
        if not rate:
            perfect[mode] = step.rate
        catch = caught.rate if caught.trials else 0.0
        accuracy = perfect.get(mode, 1.0)
        yield {
            "mode": mode,
            "failure_rate": rate,
            "step": asdict(step),
            "caught": asdict(caught),
            "calls_per_step": calls,
            "popular": popular(rate, catch),
            "derived": derived(rate, catch, calls, accuracy),
        }


def _sum(rows: Sequence[dict[str, Any]], name: str) -> Share:
    return Share(sum(r[name]["count"] for r in rows), sum(r[name]["trials"] for r in rows))
