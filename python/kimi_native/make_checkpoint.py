"""Random checkpoints in the published formats: to test, to measure and to size a machine without downloading a model.

The folder is laid out as the published ones: config.json, generation_config.json, the tokenizer's two files, numbered
safetensors shards and their index. Nothing incomplete ever looks complete: every file is written under a temporary
name, flushed to the disk and renamed, and the index and config.json come last.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import errno
import itertools
import json
import os
import re
import shutil
import struct
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from kimi_native import presets
from kimi_native.errors import ConfigError, KimiNativeError
from kimi_native.presets import PRESETS
from kimi_native.random_tensors import (
    ITEM_BYTES,
    StoredTensor,
    piece,
    row_chunks,
    stored_tensors,
)
from kimi_native.tokenizer_files import tokenizer_files

__all__ = ["PRESETS", "CheckpointWriteError", "add_arguments", "make_checkpoint", "run"]

INDEX = "model.safetensors.index.json"
_OWN_FILES = (
    "config.json",
    "generation_config.json",
    "tiktoken.model",
    "tokenizer_config.json",
    INDEX,
)
_SHARD_NAME = re.compile(r"model-\d{5,}-of-\d{5,}\.safetensors")
_TEMPORARY = ".part"

Progress = Callable[[int, int], None]  # (bytes of tensors written, bytes of tensors in all)


class CheckpointWriteError(KimiNativeError, OSError):
    """A checkpoint cannot be written: no room on the disk, a folder in use, a failed write."""


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
    tokenizer = tokenizer_files(text["vocab_size"])
    bias_dtype = "BF16" if text["model_type"] == "deepseek_v3" else "F32"  # as published
    weights = list(presets.weights(text, presets.tensor_prefix(preset)))
    stored = [t for w in weights for t in stored_tensors(w, format, bias_dtype)]
    shards = _split(stored, shard_bytes)
    total = sum(t.nbytes for t in stored)

    out = Path(out_dir)
    _prepare(out, _needed_bytes(stored, tokenizer), overwrite)
    for name, content in tokenizer.items():
        _write_file(out / name, [content])
    _write_file(out / "generation_config.json", [_json_bytes(_generation_config(text))])
    _write_shards(out, shards, seed, _reporter(progress, total))
    _sync_folder(out)  # the shards' names are on the disk before anything refers to them
    _write_file(out / INDEX, [_json_bytes(_index(shards, total))])
    _write_file(out / "config.json", [_json_bytes(presets.file_config(preset, format, text))])
    _sync_folder(out)
    return {
        "path": str(out),
        "preset": preset,
        "format": format,
        "seed": seed,
        "parameters": sum(int(np.prod(w.shape, dtype=np.int64)) for w in weights),
        "tensors": len(stored),
        "bytes": total,
        "shards": list(shards),
        "seconds": round(time.perf_counter() - started, 3),
    }


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


def _json_bytes(value: Any) -> bytes:
    return (json.dumps(value, indent=2) + "\n").encode()


# ---- shards ----------------------------------------------------------------------------------------------------------


def _split(stored: list[StoredTensor], shard_bytes: int) -> dict[str, list[StoredTensor]]:
    """Shard name -> its tensors: filled in the model's order; inside, widest dtype first, then by name.

    That inner order is the one of the safetensors library; it keeps every tensor aligned to its items.
    """
    groups: list[list[StoredTensor]] = [[]]
    filled = 0
    for tensor in stored:
        if groups[-1] and filled + tensor.nbytes > shard_bytes:
            groups.append([])
            filled = 0
        groups[-1].append(tensor)
        filled += tensor.nbytes
    return {
        f"model-{i:05d}-of-{len(groups):05d}.safetensors": sorted(
            group, key=lambda t: (-ITEM_BYTES[t.dtype], t.dtype, t.name)
        )
        for i, group in enumerate(groups, 1)
    }


def _index(shards: Mapping[str, list[StoredTensor]], total: int) -> dict[str, Any]:
    where = {t.name: shard for shard, tensors in shards.items() for t in tensors}
    return {"metadata": {"total_size": total}, "weight_map": where}


def _header(tensors: list[StoredTensor]) -> bytes:
    """Length and JSON header of a safetensors file, padded so that the data starts at a multiple of 8."""
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    start = 0
    for t in tensors:
        stop = start + t.nbytes
        entries[t.name] = {
            "dtype": t.dtype,
            "shape": list(t.shape),
            "data_offsets": [start, stop],
        }
        start = stop
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text


def _write_shards(
    out: Path, shards: Mapping[str, list[StoredTensor]], seed: int, report: Callable[[int], None]
) -> None:
    workers = min(4, os.cpu_count() or 1)
    with ThreadPoolExecutor(workers) as pool:
        for name, tensors in shards.items():
            jobs = ((t, seed, chunk) for t in tensors for chunk in row_chunks(t.weight.shape))
            pieces = _in_order(pool, jobs, ahead=2 * workers)
            _write_file(out / name, itertools.chain([_header(tensors)], pieces), report)


def _in_order(
    pool: ThreadPoolExecutor, jobs: Iterator[tuple[StoredTensor, int, Any]], ahead: int
) -> Iterator[np.ndarray]:
    """Pieces in the order of the jobs, at most `ahead` of them made before they are taken: memory stays bounded."""
    pending: collections.deque[Future[np.ndarray]] = collections.deque()
    for job in jobs:
        pending.append(pool.submit(piece, *job))
        if len(pending) == ahead:
            yield pending.popleft().result()
    while pending:
        yield pending.popleft().result()


def _reporter(progress: Progress | None, total: int) -> Callable[[int], None]:
    written = 0

    def report(nbytes: int) -> None:
        nonlocal written
        written += nbytes
        if progress is not None:
            progress(written, total)

    return report


# ---- the folder ------------------------------------------------------------------------------------------------------


def _needed_bytes(stored: list[StoredTensor], tokenizer: Mapping[str, bytes]) -> int:
    """An upper bound: tensors, their entries in header and index, the other files, the file system's rounding."""
    entries = sum(2 * len(t.name) + 256 for t in stored)
    return sum(t.nbytes for t in stored) + entries + sum(map(len, tokenizer.values())) + (1 << 20)


def _is_own(name: str) -> bool:
    name = name.removesuffix(_TEMPORARY)
    return name in _OWN_FILES or _SHARD_NAME.fullmatch(name) is not None


def _prepare(out: Path, needed: int, overwrite: bool) -> None:
    """Make or clear the folder. Nothing is removed unless all of it is a checkpoint's and the new one will fit."""
    present = _present_files(out, overwrite)
    try:
        nearest = next(p for p in (out, *out.absolute().parents) if p.exists())
        free = shutil.disk_usage(nearest).free + sum(p.stat().st_size for p in present)
        if free < needed:
            raise CheckpointWriteError(
                f"make_checkpoint: {out} needs {_gib(needed)} on the disk (got {_gib(free)} free)"
            )
        out.mkdir(parents=True, exist_ok=True)
        # Index and config go first, so that a half removed checkpoint does not look complete either.
        for path in sorted(present, key=lambda p: (p.name not in (INDEX, "config.json"), p.name)):
            path.unlink()
    except OSError as error:
        if isinstance(error, CheckpointWriteError):
            raise
        raise CheckpointWriteError(
            f"make_checkpoint: cannot prepare {out} (got {error})"
        ) from error


def _present_files(out: Path, overwrite: bool) -> list[Path]:
    if not out.exists():
        return []
    if not out.is_dir():
        raise CheckpointWriteError(f"make_checkpoint: out_dir must be a folder (got file {out})")
    present = sorted(out.iterdir())
    strangers = [p.name for p in present if not (p.is_file() and _is_own(p.name))]
    if strangers:
        shown = ", ".join(strangers[:3]) + (", ..." if len(strangers) > 3 else "")
        raise CheckpointWriteError(
            f"make_checkpoint: out_dir must hold no other files (got {shown} in {out})"
        )
    if present and not overwrite:
        raise CheckpointWriteError(
            f"make_checkpoint: out_dir must be empty, or be overwritten on request (got a checkpoint in {out})"
        )
    return present


def _gib(nbytes: int) -> str:
    return f"{nbytes / 2**30:.3f} GiB"


def _write_bytes(file: BinaryIO, data: bytes | np.ndarray) -> None:
    file.write(memoryview(data).cast("B") if isinstance(data, np.ndarray) else data)


def _write_file(
    path: Path,
    pieces: Iterable[bytes | np.ndarray],
    report: Callable[[int], None] = lambda nbytes: None,
) -> None:
    """Write under a temporary name, flush to the disk, rename. What fails leaves nothing behind.

    report is called with the size of each array; headers and small files, which are bytes, are not counted.
    """
    temporary = path.with_name(path.name + _TEMPORARY)
    try:
        with open(temporary, "wb") as file:
            for data in pieces:
                _write_bytes(file, data)
                if isinstance(data, np.ndarray):
                    report(data.nbytes)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        reason = error.strerror or str(error)
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            reason += f", {_gib(shutil.disk_usage(path.parent).free)} free"
        raise CheckpointWriteError(
            f"make_checkpoint: cannot write {path} (got {reason})"
        ) from error
    finally:
        temporary.unlink(missing_ok=True)


def _sync_folder(out: Path) -> None:
    """Renames reach the disk, where the system lets a folder be opened for that."""
    if os.name != "posix":
        return
    handle = os.open(out, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


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
    with _progress_bar(sys.stderr.isatty()) as progress:
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
    print(
        f"{summary['path']}: {summary['parameters'] / 1e9:.3f} B parameters, {summary['tensors']} tensors, "
        f"{summary['bytes'] / 1e9:.3f} GB in {len(summary['shards'])} shard(s), {summary['seconds']:.1f} s"
    )
    return 0


@contextlib.contextmanager
def _progress_bar(shown: bool) -> Iterator[Progress | None]:
    """A bar on stderr, on a terminal only."""
    if not shown:
        yield None
        return
    from rich import progress as rich_progress
    from rich.console import Console

    columns = (
        rich_progress.BarColumn(),
        rich_progress.DownloadColumn(),
        rich_progress.TransferSpeedColumn(),
        rich_progress.TimeRemainingColumn(),
    )
    with rich_progress.Progress(*columns, console=Console(stderr=True)) as bar:
        task = bar.add_task("write", total=None)
        yield lambda written, total: bar.update(task, completed=written, total=total)
