"""Models trained for an experiment: from a checkpoint or anew, always on kimi-nano's conversations."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from kimi_native.checkpoint import Checkpoint
from kimi_native.errors import RequestError
from kimi_native.folder_names import NANO_FOLDER
from kimi_native.nano.batches import Batch, make_batch
from kimi_native.nano.conversations import Recipe
from kimi_native.nano.graph import KimiGraph
from kimi_native.nano.problems import Split
from kimi_native.nano.settings import TrainSettings
from kimi_native.nano.train import read_files
from kimi_native.nano.trainer import Progress, Trainer
from kimi_native.nano.transcripts import TranscriptDataset
from kimi_native.nano.vocabulary import nano_tokenizer

EXAMPLES = 1 << 40  # no conversation comes twice
SHORT = Recipe(
    windows=0
)  # conversations of at most 12 steps; long ones would take half of a run's time
WHOLE = Recipe(windows=0, drills=0)  # what the model is for


def train(
    values: Mapping[str, Any],
    out: Path,
    settings: TrainSettings,
    *,
    start: Path | None = None,
    prepare: Callable[[KimiGraph], None] | None = None,
    progress: Progress | None = None,
) -> KimiGraph:
    """The graph after a run in the folder `out`, which goes on where an interrupted one stopped.

    values  config.json of the model, without quantization
    start   a checkpoint to start from, else random weights
    prepare changes the graph before the first step

    Raises KeyboardInterrupt if the run was stopped before its end; what it has done is kept.
    """
    dataset = TranscriptDataset(nano_tokenizer(), EXAMPLES, settings.seed, recipe=SHORT)
    checkpoint = None if start is None else Checkpoint.open(start)
    trainer = Trainer(values, dataset, out, settings, start=checkpoint)
    if prepare is not None:
        prepare(trainer.graph)
    if not trainer.run(progress):
        raise KeyboardInterrupt
    return trainer.graph


def nano_files() -> dict[str, bytes]:
    """The files of kimi-nano's folder that are neither weights nor config."""
    return read_files(NANO_FOLDER)


def conversations(tokens: int, *, seed: int, split: Split, recipe: Recipe = WHOLE) -> Batch:
    """Whole conversations of at most so many tokens together. Raises RequestError if there is no room for one."""
    dataset = TranscriptDataset(nano_tokenizer(), EXAMPLES, seed, split, recipe)
    try:
        return make_batch(dataset, 0, tokens=tokens, seed=seed)
    except ValueError as error:
        raise RequestError(f"claims: {tokens} tokens must hold a conversation ({error})") from error
