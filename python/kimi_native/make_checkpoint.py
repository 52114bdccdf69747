"""Random checkpoints in the published formats: to test, to measure and to size a machine without downloading a model.

The folder is laid out as the published ones: config.json, generation_config.json, the tokenizer's two files, numbered
safetensors shards and their index. Nothing incomplete ever looks complete: every file is written under a temporary
name, flushed to the disk and renamed, and the index and config.json come last. A run that fails or is interrupted takes
away what it wrote.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from kimi_native import presets
from kimi_native.checkpoint_writer import (
    FolderWriter,
    file_index,
    file_order,
    in_order,
    is_shard,
    needed_bytes,
    split,
)
from kimi_native.errors import CheckpointWriteError, ConfigError
from kimi_native.folder_names import CONFIG_NAME, INDEX_NAME, UNFINISHED_NAME
from kimi_native.presets import PRESETS, Weight
from kimi_native.progress_bar import Progress, progress_bar
from kimi_native.random_tensors import StoredTensor, piece, row_chunks, stored_tensors
from kimi_native.tokenizer_files import tokenizer_files
from kimi_native.units import bytes_text, count_text

__all__ = ["PRESETS", "CheckpointWriteError", "add_arguments", "make_checkpoint", "run"]

_OWN_FILES = (
    CONFIG_NAME,
    "generation_config.json",
    "tiktoken.model",
    "tokenizer_config.json",
    INDEX_NAME,
    UNFINISHED_NAME,
)


def make_checkpoint(
    out_dir: str | os.PathLike[str],
    *,
    preset: str = "tiny",
    format: str = "int4",
    seed: int = 0,
    overrides: Mapping[str, Any] | None = None,
    layers: int | None = None,
    experts: int | None = None,
    vocab: int | None = None,
    shard_bytes: int = 4 << 30,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Write a random checkpoint and return a summary of it.

    out_dir      made if missing; must be empty, or hold nothing but a checkpoint's files with overwrite=True
    preset       one of PRESETS; "tiny" is K2 in a few MB
    format       "int4": routed experts as compressed-tensors pack-quantized, group 32; "fp8": 128 x 128 blocks; "bf16"
    seed         values depend on (seed, tensor name) alone. With one seed the bf16 checkpoint holds exactly what the
                 int4 one means, and the fp8 one is quantized from the same values
    overrides    config.json values of the preset to change; layers, experts, vocab: short for the usual three
    shard_bytes  a shard is closed before it would exceed this
    progress     called with (bytes written, bytes in all) as tensors are written
    returns      path, preset, format, seed, parameters, tensors, bytes (of tensors), shards (file names), seconds

    Raises ConfigError on a preset, key or value it cannot build, ValueError on another argument, and
    CheckpointWriteError if the disk has no room, the folder is in use or a write fails.
    """
    started = time.perf_counter()
    _check_arguments(format, seed, shard_bytes)
    text = presets.text_config(preset, _merged_overrides(overrides, layers, experts, vocab))
    weights = list(presets.weights(text, presets.tensor_prefix(preset)))
    shards = _planned_shards(weights, format, text, shard_bytes)
    tokenizer = tokenizer_files(text["vocab_size"])
    stored = [t for tensors in shards.values() for t in tensors]
    total = sum(t.nbytes for t in stored)

    folder = FolderWriter("make_checkpoint", Path(out_dir))
    _prepare(folder, needed_bytes(stored, sum(map(len, tokenizer.values()))), overwrite)
    with folder.kept_if_whole():
        for name, content in tokenizer.items():
            folder.write(name, [(0, content)])
        folder.write_json("generation_config.json", _generation_config(text))
        _write_shards(folder, shards, seed, _reporter(progress, total))
        folder.sync()  # the shards' names are on the disk before anything refers to them
        folder.write_json(INDEX_NAME, file_index(shards))
        folder.write_json(CONFIG_NAME, presets.file_config(preset, format, text))
        folder.sync()
    return {
        "path": str(folder.path),
        "preset": preset,
        "format": format,
        "seed": seed,
        "parameters": sum(int(np.prod(w.shape, dtype=np.int64)) for w in weights),
        "tensors": len(stored),
        "bytes": total,
        "shards": list(shards),
        "seconds": round(time.perf_counter() - started, 3),
    }


def _planned_shards(
    weights: Iterable[Weight], format: str, text: Mapping[str, Any], shard_bytes: int
) -> dict[str, list[StoredTensor]]:
    bias_dtype = "BF16" if text["model_type"] == "deepseek_v3" else "F32"  # as published
    stored = [t for w in weights for t in stored_tensors(w, format, bias_dtype)]
    members = split([[t] for t in stored], shard_bytes)
    return {shard: [stored[i] for i in indices] for shard, indices in members.items()}


def _check_arguments(format: str, seed: int, shard_bytes: int) -> None:
    if format not in presets.QUANTIZATION:
        known = ", ".join(presets.QUANTIZATION)
        raise ValueError(f"make_checkpoint: format must be one of {known} (got {format})")
    if seed < 0:
        raise ValueError(f"make_checkpoint: seed must not be negative (got {seed})")
    if shard_bytes < 1:
        raise ValueError(f"make_checkpoint: shard_bytes must be positive (got {shard_bytes})")


def _merged_overrides(
    overrides: Mapping[str, Any] | None,
    layers: int | None,
    experts: int | None,
    vocab: int | None,
) -> dict[str, Any]:
    merged = dict(overrides or {})
    short = {"num_hidden_layers": layers, "n_routed_experts": experts, "vocab_size": vocab}
    for key, value in short.items():
        if value is None:
            continue
        if key in merged:
            raise ConfigError(f"make_checkpoint: {key} must be given once (got it twice)")
        merged[key] = value
    return merged


def _generation_config(text: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "bos_token_id": text["bos_token_id"],
        "eos_token_id": text["eos_token_id"],
        "max_length": text["max_position_embeddings"],
    }


def _prepare(folder: FolderWriter, needed: int, overwrite: bool) -> None:
    """Make or clear the folder. Nothing is removed unless all of it is a checkpoint's and the new one will fit."""
    present = folder.present_files(lambda name: name in _OWN_FILES or is_shard(name))
    folder.require_overwrite(present, overwrite)
    folder.require_room(needed, freed=present)
    folder.make()
    folder.remove(present)


def _write_shards(
    folder: FolderWriter,
    shards: Mapping[str, list[StoredTensor]],
    seed: int,
    report: Callable[[int], None],
) -> None:
    workers = min(4, os.cpu_count() or 1)
    with ThreadPoolExecutor(workers) as pool:
        for name, tensors in shards.items():
            jobs = (
                (t, seed, chunk)
                for t in file_order(tensors)
                for chunk in row_chunks(t.weight.shape)
            )
            made = in_order(pool, lambda job: (job[0].name, piece(*job)), jobs, ahead=2 * workers)
            folder.write_shard(name, tensors, _placed(made, report))


def _placed(
    made: Iterator[tuple[str, np.ndarray]], report: Callable[[int], None]
) -> Iterator[tuple[str, int, np.ndarray]]:
    """Pieces that follow each other in a tensor, with their offsets; each is reported once it is written."""
    current, offset = "", 0
    for name, data in made:
        if name != current:
            current, offset = name, 0
        yield name, offset, data
        offset += data.nbytes
        report(data.nbytes)


def _reporter(progress: Progress | None, total: int) -> Callable[[int], None]:
    written = 0

    def report(nbytes: int) -> None:
        nonlocal written
        written += nbytes
        if progress is not None:
            progress(written, total)

    return report


# ---- the command -----------------------------------------------------------------------------------------------------


def _setting(text: str) -> tuple[str, Any]:
    key, equals, value = text.partition("=")
    if not (key and equals):
        raise argparse.ArgumentTypeError(f"must be KEY=JSON (got {text})")
    try:
        return key, json.loads(value)
    except json.JSONDecodeError as error:
        raise argparse.ArgumentTypeError(f"{key} must be JSON (got {value}: {error})") from error


def _gibibytes(text: str) -> int:
    try:
        nbytes = int(float(text) * 2**30)
    except (ValueError, OverflowError) as error:
        raise argparse.ArgumentTypeError(f"must be a size in GiB (got {text})") from error
    if nbytes < 1:
        raise argparse.ArgumentTypeError(f"must be a size in GiB (got {text})")
    return nbytes


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of `kimi-native make-checkpoint`."""
    parser.add_argument("out", metavar="OUT", help="folder to write, made if missing")
    parser.add_argument("--preset", choices=list(PRESETS), default="tiny", help="default: tiny")
    parser.add_argument("--format", choices=list(presets.QUANTIZATION), default="int4")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--layers", type=int, metavar="N", help="num_hidden_layers")
    parser.add_argument("--experts", type=int, metavar="N", help="n_routed_experts")
    parser.add_argument("--vocab", type=int, metavar="N", help="vocab_size")
    parser.add_argument(
        "--set",
        action="append",
        type=_setting,
        default=[],
        metavar="KEY=JSON",
        help="any other value of the preset's config.json; may be repeated",
    )
    parser.add_argument(
        "--shard-gib", type=_gibibytes, default=4 << 30, metavar="X", help="size of a shard"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace a checkpoint in OUT")
    parser.add_argument("--json", action="store_true", help="print the summary as JSON")


def run(args: argparse.Namespace) -> int:
    """Run `kimi-native make-checkpoint`; errors (KimiNativeError, ValueError) are the caller's to print."""
    with progress_bar("write") as progress:
        summary = make_checkpoint(
            args.out,
            preset=args.preset,
            format=args.format,
            seed=args.seed,
            overrides=dict(args.set),
            layers=args.layers,
            experts=args.experts,
            vocab=args.vocab,
            shard_bytes=args.shard_gib,
            overwrite=args.overwrite,
            progress=progress,
        )
    if args.json:
        print(json.dumps(summary))
        return 0
    shards = len(summary["shards"])
    print(
        f"{summary['path']}: {count_text(summary['parameters'])} parameters, {summary['tensors']:,} tensors, "
        f"{bytes_text(summary['bytes'])} in {shards} shard{'s' if shards > 1 else ''}, {summary['seconds']:.1f} s"
    )
    return 0
