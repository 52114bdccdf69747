"""The learning rate over a run: warm up, stay, decay (WSD)."""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class Schedule:
    """Linear from 0 over warmup_steps, constant, cosine to final_rate over the last decay_steps.

    steps  of the whole run

    Raises ValueError if the parts do not fit into the run.
    """

    rate: float
    steps: int
    warmup_steps: int
    decay_steps: int
    final_rate: float = 0.0

    def __post_init__(self) -> None:
        if min(self.warmup_steps, self.decay_steps) < 0 or (
            self.warmup_steps + self.decay_steps > self.steps
        ):
            raise ValueError(
                "schedule: warmup_steps and decay_steps must not be negative and fit into steps "
                f"(got {self.warmup_steps}, {self.decay_steps}, {self.steps})"
            )
        if not 0 <= self.final_rate <= self.rate < math.inf:
            raise ValueError(
                "schedule: 0 <= final_rate <= rate must hold "
                f"(got {self.final_rate} and {self.rate})"
            )

    def at(self, step: int) -> float:
        """The rate of a step, counted from 0; step 0 does not stand still."""
        if step < self.warmup_steps:
            return self.rate * (step + 1) / self.warmup_steps
        left = self.steps - step
        if left > self.decay_steps:
            return self.rate
        done = 1 - left / (self.decay_steps + 1)  # neither end is repeated
        return self.final_rate + (self.rate - self.final_rate) * (1 + math.cos(math.pi * done)) / 2
