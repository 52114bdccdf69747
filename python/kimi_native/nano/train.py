"""`python -m kimi_native.nano.train OUT`: train a small model of the family and export it in the published format.

The same command continues an interrupted run. OUT gets the state, a log with one JSON object a line, and at the end the
folder OUT/checkpoint: INT4 if the run trained with quantized weights, else BF16.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import os
import sys
import tempfile
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from kimi_native import presets
from kimi_native.chat.template import detect_format
from kimi_native.checkpoint import Checkpoint
from kimi_native.config import KimiConfig
from kimi_native.errors import KimiNativeError, RequestError
from kimi_native.folder_names import CONFIG_NAME, NANO_FOLDER
from kimi_native.json_file import read_json
from kimi_native.nano.chat_rows import chat_encoder
from kimi_native.nano.conversations import Recipe
from kimi_native.nano.dataset import Dataset
from kimi_native.nano.plot import check_picture, plot_log
from kimi_native.nano.settings import TrainSettings
from kimi_native.nano.text_rows import read_rows
from kimi_native.nano.toy import CopyTask
from kimi_native.nano.train_log import LOG_NAME, StepReport
from kimi_native.nano.trainer import Progress, Trainer
from kimi_native.nano.transcripts import TranscriptDataset
from kimi_native.quant.export import export_checkpoint
from kimi_native.tokenizer import Tokenizer, load_tokenizer
from kimi_native.tokenizer_files import tokenizer_files

WORLD, COPY = "world", "copy"
WORLD_EXAMPLES = 1 << 40  # more than any run sees: no conversation comes twice
COPY_SYMBOLS = 16
ROWS = 'rows {"text": ...}, {"messages": ..., "tools": ...} or {"ids": ..., "loss": ...}'
TOKENIZER_FILES = (
    *("tiktoken.model", "tokenizer.json", "tokenizer_config.json"),
    *("special_tokens_map.json", "chat_template.jinja"),
)
GENERATION_CONFIG = "generation_config.json"
INTERRUPTED = 130  # as a shell reports a command that SIGINT ended
_KINDS = {"int": int, "float": float, "str": str}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("out", metavar="OUT", help="folder of the run, made if missing")
    parser.add_argument(
        "--data",
        default=WORLD,
        metavar="FILE",
        help=f'{ROWS}; "{WORLD}" (default): kimi-nano\'s conversations; "{COPY}": repeat a sequence',
    )
    model = parser.add_mutually_exclusive_group()
    model.add_argument("--preset", choices=list(presets.PRESETS), default="nano")
    model.add_argument("--start", metavar="FOLDER", help="a checkpoint to train on")
    model.add_argument("--config", metavar="FILE", help="config.json of a model to start anew")
    parser.add_argument(
        "--tokenizer",
        metavar="FOLDER",
        help="with tiktoken.model (default: the start's, kimi-nano's, or a small one)",
    )
    add_settings(parser)


def add_settings(parser: argparse.ArgumentParser, left_out: Collection[str] = ()) -> None:
    """--plot, --chat-format, and an option for each setting but those left out."""
    parser.add_argument("--plot", metavar="FILE", help="draw the log at the end (needs matplotlib)")
    parser.add_argument(
        "--chat-format",
        metavar="NAME",
        help="of rows with messages, such as k2-thinking (default: that of the checkpoint to be written)",
    )
    for f in dataclasses.fields(TrainSettings):
        if f.name in left_out:
            continue
        name = "--" + f.name.replace("_", "-")
        kind = _KINDS[str(f.type).partition(" ")[0]]
        text = f.metadata["help"] + ("" if f.default is None else f" (default: {f.default})")
        parser.add_argument(name, type=kind, default=f.default, help=text)


def run(args: argparse.Namespace) -> int:
    """Train as the arguments say; errors (KimiNativeError, ValueError) are the caller's to print.

    The checkpoint goes to args.checkpoint, where that is set, else into the run's folder, over an earlier one.
    """
    names = [f.name for f in dataclasses.fields(TrainSettings)]
    settings = TrainSettings(**{name: getattr(args, name) for name in names})
    if args.plot is not None:
        check_picture(Path(args.plot))  # before hours of training
    start = None if args.start is None else Checkpoint.open(args.start)
    values = _values(args)
    files = _files(args, values)
    dataset, held_out = _datasets(args, values, files, settings)
    trainer = Trainer(values, dataset, args.out, settings, held_out=held_out, start=start)
    if trainer.steps_done:
        note(f"going on after step {trainer.steps_done}")
    with progress_line(settings.steps, trainer.steps_done) as progress:
        complete = trainer.run(progress)
    if complete:
        format = "int4" if settings.qat_from is not None else "bf16"
        folder = getattr(args, "checkpoint", None) or Path(args.out) / "checkpoint"
        summary = export_checkpoint(
            trainer.graph, folder, values, format=format, files=files, overwrite=True
        )
        print(json.dumps(summary))
    else:
        note(f"stopped after step {trainer.steps_done}; the same command goes on from there")
    if args.plot is not None:
        plot_log(Path(args.out) / LOG_NAME, Path(args.plot))
    return 0 if complete else INTERRUPTED


def _values(args: argparse.Namespace) -> dict[str, Any]:
    if args.start is None and args.config is None:
        return presets.text_config(args.preset, {})
    return config_values(
        Path(args.config) if args.start is None else Path(args.start) / CONFIG_NAME
    )


def config_values(file: Path) -> dict[str, Any]:
    """config.json of a model without its quantization. Raises RequestError on a wrapper's."""
    values = read_json(file, max_bytes=1 << 20)
    if "text_config" in values:
        raise RequestError(f"train: {file} must be of a text model (got a wrapper)")
    values.pop("quantization_config", None)
    return values


def _files(args: argparse.Namespace, values: Mapping[str, Any]) -> dict[str, bytes]:
    """What the checkpoint holds besides weights and config: the tokenizer, and where an answer ends."""
    folder = args.tokenizer or args.start
    start = args.start
    if folder is None and args.config is None and args.preset == "nano":
        folder = start = NANO_FOLDER
    files = tokenizer_files(values["vocab_size"]) if folder is None else read_files(folder)
    files.pop(GENERATION_CONFIG, None)
    if start is not None and (kept := Path(start) / GENERATION_CONFIG).is_file():
        return files | {GENERATION_CONFIG: kept.read_bytes()}
    ends = {key: values[key] for key in ("bos_token_id", "eos_token_id") if key in values}
    return files | {GENERATION_CONFIG: (json.dumps(ends, indent=2) + "\n").encode()}


def read_files(folder: str | os.PathLike[str]) -> dict[str, bytes]:
    """A checkpoint's files besides weights and config, by name, as far as it has them."""
    paths = [Path(folder) / name for name in (*TOKENIZER_FILES, GENERATION_CONFIG)]
    return {path.name: path.read_bytes() for path in paths if path.is_file()}


def _datasets(
    args: argparse.Namespace,
    values: Mapping[str, Any],
    files: Mapping[str, bytes],
    settings: TrainSettings,
) -> tuple[Dataset, Dataset | None]:
    """What to learn, and for kimi-nano's conversations what to look at only."""
    data, vocab_size = args.data, values["vocab_size"]
    if data == COPY:
        return CopyTask(min(vocab_size, COPY_SYMBOLS + 2), seed=settings.seed), None
    with tempfile.TemporaryDirectory() as folder:
        for name, content in files.items():
            (Path(folder) / name).write_bytes(content)
        tokenizer = load_tokenizer(folder, vocab_size=vocab_size)
        format = args.chat_format or _chat_format(values, tokenizer, settings, folder)
    if data == WORLD:
        whole = Recipe(drills=0)  # what the model is for
        held_out = TranscriptDataset(tokenizer, WORLD_EXAMPLES, settings.seed, "held-out", whole)
        return TranscriptDataset(tokenizer, WORLD_EXAMPLES, settings.seed), held_out
    rows = read_rows(
        data,
        tokenizer.encode,
        vocab_size=vocab_size,
        max_tokens=settings.tokens_per_step + 1,
        encode_chat=None if format is None else chat_encoder(format, tokenizer),
    )
    if rows.bad:
        note(rows.report())
    return rows, None


def _chat_format(
    values: Mapping[str, Any], tokenizer: Tokenizer, settings: TrainSettings, folder: str
) -> str | None:
    """The format that whoever loads the written checkpoint will talk to it in; folder: of its tokenizer's files."""
    quantization = presets.QUANTIZATION["bf16" if settings.qat_from is None else "int4"]
    written = {**values, "quantization_config": quantization}
    return detect_format(KimiConfig.from_dict(written, source="train: values"), tokenizer, folder)


# ---- what is shown --------------------------------------------------------------------------------------------------


def note(text: str) -> None:
    print(f"kimi-native train: {text}", file=sys.stderr)


@contextlib.contextmanager
def progress_line(steps: int, done: int) -> Iterator[Progress | None]:
    """A line on stderr with loss, tokens per second and time left, on a terminal only; None elsewhere."""
    if not sys.stderr.isatty():
        yield None
        return
    from rich import progress as rich_progress
    from rich.console import Console

    columns = (
        rich_progress.TextColumn("step {task.completed}/{task.total}"),
        rich_progress.BarColumn(),
        rich_progress.TextColumn("{task.description}"),
        rich_progress.TimeRemainingColumn(),
    )
    with rich_progress.Progress(*columns, console=Console(stderr=True)) as bar:
        task = bar.add_task("", total=steps, completed=done)

        def show(report: StepReport) -> None:
            speed = report.tokens / report.seconds
            text = f"loss {report.loss:.4f}  {speed:,.0f} tokens/s"
            bar.update(task, completed=report.step + 1, description=text)

        yield show


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="kimi_native.nano.train", description=__doc__)
    add_arguments(parser)
    try:
        return run(parser.parse_args(argv))
    except (KimiNativeError, ValueError, OSError) as error:
        note(f"error: {error}")
        return 1


if __name__ == "__main__":
    sys.exit(main())
