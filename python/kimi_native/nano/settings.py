"""What a training run is told, checked once. The recipe is K2's (arXiv 2507.20534), in small."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, fields
from typing import Any

from kimi_native.nano.batches import Stretch
from kimi_native.nano.schedule import Schedule

# What may change when a run goes on: how far it goes, and what is written meanwhile.
CHANGEABLE = frozenset(
    "steps decay_steps final_rate qat_from bias_until save_every log_every held_out_every held_out_tokens".split()  # noqa: SIM905
)


def _setting(default: Any, text: str) -> Any:
    return field(default=default, metadata={"help": text})


@dataclass(frozen=True)
class TrainSettings:
    """Everything but the model's config and the data; with those and the seed it decides every weight.

    Raises ValueError naming the setting that is out of range.
    """

    steps: int = _setting(1000, "optimizer steps of the whole run")
    tokens_per_step: int = _setting(12288, "budget of a batch; examples are packed into it")
    seed: int = _setting(0, "of the weights, the order of the examples and their positions")
    learning_rate: float = _setting(3e-3, "of the constant part of the schedule")
    final_rate: float = _setting(0.0, "at the end of the decay")
    warmup_steps: int = _setting(50, "linear, from 0")
    decay_steps: int = _setting(200, "cosine, at the end")
    weight_decay: float = _setting(0.1, "of matrices")
    clip_norm: float = _setting(1.0, "largest norm of the gradient")
    logit_limit: float = _setting(100.0, "QK-Clip's threshold for attention logits")
    bias_rate: float = _setting(
        1e-3, "step of the router's selection bias; 0: no balancing by bias"
    )
    bias_until: int | None = _setting(None, "first step without bias updates (default: all have)")
    balance_weight: float = _setting(1e-3, "of the sequence-wise balance loss")
    qat_from: int | None = _setting(None, "first step with quantized weights (default: none)")
    dtype: str = _setting("bfloat16", "what matrices multiply in: bfloat16 or float32")
    stretch_chance: float = _setting(0.0, "share of the examples with random positions")
    stretch_to: int = _setting(0, "random positions stay below this")
    stretch_jumps: int = _setting(0, "at most so many jumps of the position inside an example")
    highest_temperature: float = _setting(
        1.0, "each example's attention has a temperature between 1 and this"
    )
    threads: int | None = _setting(
        None, "of torch, on which the last bits depend (default: as it began)"
    )
    device: str = _setting("cpu", "cpu or cuda")
    save_every: int = _setting(200, "steps between saved states")
    log_every: int = _setting(10, "steps between lines of the log")
    held_out_every: int = _setting(0, "steps between looks at the held-out data; 0: none")
    held_out_tokens: int = _setting(16384, "of them, looked at each time")

    def __post_init__(self) -> None:
        for name in ("steps", "tokens_per_step", "save_every", "log_every", "held_out_tokens"):
            self._require(name, getattr(self, name) >= 1, "at least 1")
        for name in ("seed", "held_out_every"):
            self._require(name, getattr(self, name) >= 0, "not negative")
        for name in ("weight_decay", "bias_rate", "balance_weight"):
            self._require(name, 0 <= getattr(self, name) < math.inf, "finite and not negative")
        for name in ("clip_norm", "logit_limit", "learning_rate"):
            self._require(name, 0 < getattr(self, name) < math.inf, "finite and positive")
        self._require("learning_rate", self.learning_rate <= 1e6, "at most 1e6")
        for name in ("bias_until", "qat_from"):
            value = getattr(self, name)
            self._require(name, value is None or value >= 0, "a step")
        highest = self.highest_temperature
        self._require("highest_temperature", 1 <= highest < math.inf, "finite and at least 1")
        self._require("dtype", self.dtype in ("bfloat16", "float32"), "bfloat16 or float32")
        self._require("threads", self.threads is None or self.threads >= 1, "at least 1")
        self.schedule()
        self.stretch()

    def _require(self, name: str, holds: bool, rule: str) -> None:
        if not holds:
            raise ValueError(f"train: {name} must be {rule} (got {getattr(self, name)})")

    def schedule(self) -> Schedule:
        return Schedule(
            self.learning_rate, self.steps, self.warmup_steps, self.decay_steps, self.final_rate
        )

    def stretch(self) -> Stretch:
        return Stretch(self.stretch_chance, self.stretch_to, self.stretch_jumps)

    def fixed(self) -> dict[str, Any]:
        """What must not change when a run goes on, threads aside: the run knows how many it had."""
        names = [f.name for f in fields(self) if f.name not in CHANGEABLE | {"threads"}]
        return {name: getattr(self, name) for name in names}
