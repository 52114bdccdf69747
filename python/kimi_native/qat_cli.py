"""The verb qat: a small checkpoint, a file of rows, and quantization-aware training to an INT4 checkpoint."""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path

from kimi_native.checkpoint import Checkpoint
from kimi_native.checkpoint_writer import FolderWriter
from kimi_native.errors import RequestError
from kimi_native.machine import available_memory
from kimi_native.model_file import model_folder
from kimi_native.nano import train
from kimi_native.nano.settings import TrainSettings
from kimi_native.quant.export import is_own_file
from kimi_native.units import bytes_text

# Weights, gradients and the optimizer's two means, float32; activations come on top.
TRAINING_BYTES = 16
# What the verb decides, or has another default of.
_LEFT_OUT = (
    *("steps", "learning_rate", "warmup_steps", "decay_steps", "qat_from"),
    *("held_out_every", "held_out_tokens"),
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL", help="checkpoint folder to start from")
    parser.add_argument("data", metavar="DATA", help=f"JSON lines: {train.ROWS}")
    parser.add_argument("out", metavar="OUT", help="folder of the INT4 checkpoint to write")
    parser.add_argument(
        "--run",
        dest="run_folder",
        metavar="FOLDER",
        help="state and log, with which the same command goes on (default: OUT.run)",
    )
    parser.add_argument("--overwrite", action="store_true", help="replace a checkpoint in OUT")
    parser.add_argument("--steps", type=int, default=200, help="optimizer steps (default: 200)")
    parser.add_argument(
        "--learning-rate", type=float, default=3e-4, help="of the constant part (default: 0.0003)"
    )
    parser.add_argument(
        "--warmup-steps", type=int, help="linear, from 0 (default: a twentieth of the steps)"
    )
    parser.add_argument(
        "--decay-steps", type=int, help="cosine, at the end (default: a quarter of the steps)"
    )
    train.add_settings(parser, _LEFT_OUT)


def run(args: argparse.Namespace) -> int:
    """Train with quantized weights from the first step; prints what was written as JSON.

    Raises RequestError on arguments or data, CheckpointWriteError if OUT holds something, and what a run raises.
    """
    model, out = model_folder("qat", args.model), Path(args.out)
    folder = Path(f"{out}.run" if args.run_folder is None else args.run_folder)
    if len({p.resolve() for p in (model, out, folder)}) < 3:
        raise RequestError(
            f"qat: MODEL, OUT and the run's folder must be three (got {model}, {out}, {folder})"
        )
    _require_memory(Checkpoint.open(model))
    writer = FolderWriter("qat", out)
    texts = {n for n in train.TOKENIZER_FILES if (model / n).is_file()} | {train.GENERATION_CONFIG}
    present = writer.present_files(lambda n: is_own_file(n) or n in texts)
    writer.require_overwrite(present, args.overwrite)
    steps = args.steps
    warmup = steps // 20 if args.warmup_steps is None else args.warmup_steps
    decay = steps // 4 if args.decay_steps is None else args.decay_steps
    chosen = {"warmup_steps": warmup, "decay_steps": decay, "qat_from": 0}
    defaults = {f.name: f.default for f in dataclasses.fields(TrainSettings)}
    places = {"out": str(folder), "checkpoint": out, "start": str(model)}
    places |= {
        "data": Path.cwd() / args.data
    }  # a path, whatever data sets of its own `train` has names for
    unused = {"config": None, "tokenizer": None}
    return train.run(argparse.Namespace(**defaults | vars(args) | chosen | places | unused))


def _require_memory(checkpoint: Checkpoint) -> None:
    parameters = checkpoint.summary()["parameters"]["total"]
    needed, available = parameters * TRAINING_BYTES, available_memory()
    if needed > available:
        raise RequestError(
            f"qat: {checkpoint.path} needs {bytes_text(needed)} of memory to train {parameters:,} weights "
            f"(got {bytes_text(available)})"
        )
