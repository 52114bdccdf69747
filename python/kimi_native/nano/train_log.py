"""The log of a run: one JSON object a line, cut back to the saved step when the run goes on."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from kimi_native.checkpoint_writer import FolderWriter
from kimi_native.errors import ModelFormatError

LOG_NAME = "train-log.jsonl"


@dataclass(frozen=True)
class StepReport:
    """One step, counted from 0.

    loss           mean cross-entropy of the batch's predicted tokens, in nats
    balance_loss   the sequence-wise term, summed over layers; as many as there are layers with experts is balance
    grad_norm      before clipping
    max_logit      largest attention logit of the batch, or its bound
    clipped_heads  how many heads QK-Clip scaled down
    loads          [moe layers][experts]: (token, slot) pairs
    seconds        of this step, since the run was started or continued for total_seconds
    held_out_loss, held_out_accuracy  None unless looked at in this step
    """

    step: int
    loss: float
    balance_loss: float
    grad_norm: float
    learning_rate: float
    max_logit: float
    clipped_heads: int
    loads: list[list[int]]
    qat: bool
    tokens: int
    seconds: float
    total_seconds: float
    held_out_loss: float | None = None
    held_out_accuracy: float | None = None


def append(path: Path, report: StepReport) -> None:
    with open(path, "a", encoding="utf-8") as file:
        file.write(json.dumps(asdict(report)) + "\n")


def read_log(path: Path) -> list[dict[str, Any]]:
    """The log's lines; an unfinished last line, of a killed run, is left out.

    Raises ModelFormatError naming another line that is no step.
    """
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines() if path.exists() else []
    found = []
    for number, line in enumerate(lines, 1):
        try:
            values = json.loads(line)
            if not isinstance(values, dict) or type(values.get("step")) is not int:
                raise ValueError("no step")
        except ValueError as error:
            if number == len(lines):
                break
            raise ModelFormatError(f"{path}: line {number} must be a step ({error})") from error
        found.append(values)
    return found


def cut_back(folder: FolderWriter, steps: int) -> None:
    """Leave the lines of the first `steps` steps; a run that goes on from there writes the others again."""
    kept = [v for v in read_log(folder.path / LOG_NAME) if v["step"] < steps]
    folder.write(LOG_NAME, [(0, "".join(json.dumps(v) + "\n" for v in kept).encode())])
