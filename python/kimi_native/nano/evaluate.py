"""How well an assistant solves held-out problems: success, accuracy a step, and the share of failures it catches."""

from __future__ import annotations

import collections
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from kimi_native.chat.tool import Tool
from kimi_native.chat.types import Message
from kimi_native.nano.dice import Dice
from kimi_native.nano.episode import Episode
from kimi_native.nano.modes import Mode
from kimi_native.nano.problems import Split, make_problem
from kimi_native.nano.world import FailureKind, Failures, World


class Assistant(Protocol):
    """Whatever answers a conversation: a model, the expert, a person."""

    def __call__(self, messages: Sequence[Message], tools: Sequence[Tool]) -> Message: ...


AnswerAll = Callable[[Sequence[Episode]], Sequence[Message]]  # the next message of each, in order


@dataclass(frozen=True)
class Share:
    """So many of so many."""

    count: int
    trials: int

    @property
    def rate(self) -> float:
        return self.count / self.trials if self.trials else math.nan

    def interval(self, z: float = 1.959964) -> tuple[float, float]:
        """Wilson's score interval, 95 % by default; (0, 1) of no trials. Source: Wilson, JASA 22 (1927) 209."""
        if not self.trials:
            return 0.0, 1.0
        n, p = self.trials, self.rate
        middle = (p + z * z / (2 * n)) / (1 + z * z / n)
        half = z / (1 + z * z / n) * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
        # exactly 0 and 1 at the ends, where rounding would leave a crumb
        return (max(0.0, middle - half) if self.count else 0.0), (
            min(1.0, middle + half) if self.count < n else 1.0
        )

    def __str__(self) -> str:
        if not self.trials:
            return "of none"
        low, high = self.interval()
        return f"{100 * self.rate:.1f} % [{100 * low:.1f}, {100 * high:.1f}]"


@dataclass(frozen=True)
class Score:
    """What count episodes of one kind came to.

    solved        the answer was right
    exact         the answer was right, and so was every step. A wrong value may come right again where a note that has
                  the same fault is subtracted
    steps         steps taken right, of those and one for each episode that went wrong: the chance to take a step right
    catches       failed calls made again at once, of all failed calls; catches_of: the same for each kind of failure
    false_alarms  calls made again for nothing, of all calls
    outcomes      episodes by how they ended
    """

    mode: Mode
    num_steps: int
    failure_rate: float
    solved: Share
    exact: Share
    steps: Share
    catches: Share
    catches_of: Mapping[FailureKind, Share]
    false_alarms: Share
    outcomes: Mapping[str, int]

    def row(self) -> str:
        return (
            f"{self.mode:<12} {self.num_steps:>4} steps, {100 * self.failure_rate:>4.1f} % fail | "
            f"solved {self.solved} | step {self.steps} | caught {self.catches}"
        )


def make_episodes(
    *, mode: Mode, num_steps: int, failures: Failures, count: int, seed: int, split: Split
) -> list[Episode]:
    """Problems of one kind, each with a world of its own; the same for the same seed, in every mode.

    Raises ValueError on a count below 1, an unknown mode, or num_steps out of range.
    """
    if count < 1:
        raise ValueError(f"evaluate: count must be at least 1 (got {count})")
    episodes = []
    for index in range(count):
        dice = Dice("evaluate", split, num_steps, seed, index)
        problem = make_problem(dice, num_steps, split)
        episodes.append(Episode(problem, mode, World(problem.prices, dice, failures)))
    return episodes


def evaluate(
    assistant: Assistant,
    *,
    mode: Mode = "interleaved",
    num_steps: int,
    failures: Failures | None = None,
    count: int = 100,
    seed: int = 0,
    split: Split = "held-out",
) -> Score:
    """The score of an assistant that answers one conversation at a time; see evaluate_all."""
    return evaluate_all(
        lambda episodes: [assistant(e.messages, e.tools) for e in episodes],
        mode=mode,
        num_steps=num_steps,
        failures=failures,
        count=count,
        seed=seed,
        split=split,
    )


def evaluate_all(
    answer_all: AnswerAll,
    *,
    mode: Mode = "interleaved",
    num_steps: int,
    failures: Failures | None = None,
    count: int = 100,
    at_once: int | None = None,
    seed: int = 0,
    split: Split = "held-out",
) -> Score:
    """The score of one who answers many conversations at once, as a model does that runs them as a batch.

    answer_all  called with the episodes still open, whose messages and tools it reads, until none is
    at_once     so many of them at most, the first ones (default: all); the score is the same for who answers each alone

    Raises ValueError on a bad argument, or if answer_all gives another number of messages than it was asked for.
    """
    if at_once is not None and at_once < 1:
        raise ValueError(f"evaluate: at_once must be at least 1 (got {at_once})")
    failures = failures or Failures()
    episodes = make_episodes(
        mode=mode, num_steps=num_steps, failures=failures, count=count, seed=seed, split=split
    )
    while still_open := [e for e in episodes if e.outcome == "open"][:at_once]:
        for episode, message in zip(still_open, answer_all(still_open), strict=True):
            episode.push(message)
    return score(episodes)


def score(episodes: Sequence[Episode]) -> Score:
    """The score of episodes of one kind that have ended. Raises ValueError if there is none."""
    if not episodes:
        raise ValueError("evaluate: episodes must hold at least one (got 0)")
    first, count = episodes[0], len(episodes)
    length = len(first.problem.steps)
    right = [episode.num_right_steps for episode in episodes]
    solved = [episode.outcome == "solved" for episode in episodes]
    exact = sum(s and r == length for s, r in zip(solved, right, strict=True))
    catches_of = _catches_of(episodes)
    return Score(
        first.mode,
        length,
        first.world.failures.rate,
        solved=Share(sum(solved), count),
        exact=Share(exact, count),
        steps=Share(sum(right), sum(right) + sum(r < length for r in right)),
        catches=Share(
            sum(share.count for share in catches_of.values()),
            sum(share.trials for share in catches_of.values()),
        ),
        catches_of=catches_of,
        false_alarms=Share(
            sum(e.num_false_alarms for e in episodes), sum(len(e.world.log) for e in episodes)
        ),
        outcomes=dict(collections.Counter(episode.outcome for episode in episodes)),
    )


def _catches_of(episodes: Sequence[Episode]) -> dict[FailureKind, Share]:
    counts: dict[FailureKind, Share] = {}
    for episode in episodes:
        for kind, (caught, failed) in episode.failures.items():
            before = counts.get(kind, Share(0, 0))
            counts[kind] = Share(before.count + caught, before.trials + failed)
    return counts
