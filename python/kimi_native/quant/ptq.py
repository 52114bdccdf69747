"""Post-training quantization: a BF16 or FP8 checkpoint to the published INT4 format, folder to folder.

Routed experts become INT4 (compressed-tensors "pack-quantized", groups of 32, symmetric); every other tensor stays as
it is, except that FP8, FP16 and FP32 become BF16. The source streams through in pieces: memory depends on the number of
threads (some 30 MB each, measured) and of tensors (their headers), not on the size of the model.

The new folder never loads before it is complete. quantize-state.json is its first file and the last to go; between
them shards appear one by one, each written under a temporary name, flushed and renamed; index and config.json follow.
Run again with the same arguments, quantize goes on after the finished shards, and the bytes are the same.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch

from kimi_native import __version__
from kimi_native.checkpoint import Checkpoint
from kimi_native.checkpoint_writer import (
    TEMPORARY,
    FolderWriter,
    file_header,
    file_index,
    file_order,
    in_order,
    is_shard,
    needed_bytes,
    one_after_another,
)
from kimi_native.errors import CheckpointWriteError, ModelFormatError, RequestError
from kimi_native.folder_names import CONFIG_NAME, INDEX_NAME, UNFINISHED_NAME
from kimi_native.model_file import model_folder
from kimi_native.quant.ptq_plan import QuantizePlan, make_plan
from kimi_native.quant.ptq_state import RunState, changed_file, stamps
from kimi_native.quant.ptq_tensors import Conversion, Piece

MAX_THREADS = 16  # more than any disk keeps busy
SHARD_BYTES = 1 << 30  # what an interrupted run may lose: it goes on after the last whole shard
_COPY_BYTES = 1 << 20

Progress = Callable[[int, int], None]  # (bytes of source tensors done, bytes in all)


def quantize_checkpoint(
    source: str | os.PathLike[str],
    out_dir: str | os.PathLike[str],
    *,
    levels: int = 15,
    threads: int | None = None,
    shard_bytes: int = SHARD_BYTES,
    overwrite: bool = False,
    ignore_config_keys: tuple[str, ...] = (),
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Quantize the routed experts of a checkpoint folder and write the published INT4 format.

    source       BF16 or FP8 (128 x 128 blocks); FP16 and FP32 tensors must hold values that BF16 holds exactly
    out_dir      made if missing; must be empty, or hold an unfinished run of the same source and settings, which is
                 continued, or be overwritten on request
    levels       15: scale = bf16(amax / 7), q in -7 .. 7, as the published weights appear to use.
                 16: scale = bf16(amax / 7.5), q in -8 .. 7, the rule of compressed-tensors.
                 Recorded in config.json, quantization_config...weights.observer_kwargs
    threads      default: the cores there are, at most MAX_THREADS; the result does not depend on it
    shard_bytes  a shard is closed before it would exceed this
    overwrite    replace a checkpoint in out_dir, or an unfinished run that cannot be continued
    progress     called with (bytes of source tensors done, bytes in all)
    returns      path, source, levels, quantized (matrices), tensors, bytes (of tensors), source_bytes, shards (file
                 names), resumed_shards (how many of them an earlier run had finished), copied and left_out (files of
                 the source), seconds, gb_per_s (source bytes of this run)

    Raises RequestError on an argument; ConfigError and ModelFormatError on a source that is no checkpoint, is INT4
    already, has no routed experts or holds values that are not finite (by name), or that changes meanwhile;
    CheckpointWriteError if the disk has no room, the folder is in use or a write fails. A KeyboardInterrupt meanwhile
    is raised again with the number of finished shards as its text.
    """
    started = time.perf_counter()
    _check_arguments(levels, threads, shard_bytes)
    source, out = model_folder("quantize", source), model_folder("quantize", out_dir)
    _check_places(source, out)
    found = stamps(source, os.listdir(source)) if source.is_dir() else {}  # before anything is read
    checkpoint = Checkpoint.open(source, ignore_keys=ignore_config_keys)
    plan = make_plan(
        checkpoint, levels=levels, shard_bytes=shard_bytes, ignore_config_keys=ignore_config_keys
    )
    settings = {"levels": levels, "shard_bytes": shard_bytes, "version": __version__}
    files = {name: stamp for name, stamp in found.items() if name in plan.source_files}
    state = RunState(str(source.absolute()), files, settings)
    run = _Run(plan, source, state, threads or _default_threads(), progress)
    with run.folder(out, overwrite) as folder:
        run.write(folder)
    seconds = time.perf_counter() - started
    return run.report(out) | {
        "seconds": round(seconds, 3),
        "gb_per_s": round(run.converted / seconds / 1e9, 3),
    }


def _default_threads() -> int:
    return min(len(os.sched_getaffinity(0)), MAX_THREADS)


def _check_arguments(levels: int, threads: int | None, shard_bytes: int) -> None:
    if levels not in (15, 16):
        raise RequestError(f"quantize: levels must be 15 or 16 (got {levels})")
    if threads is not None and not 1 <= threads <= MAX_THREADS:
        raise RequestError(f"quantize: threads must be 1 to {MAX_THREADS} (got {threads})")
    if shard_bytes < 1:
        raise RequestError(f"quantize: shard_bytes must be positive (got {shard_bytes})")


def _check_places(source: Path, out: Path) -> None:
    real_source, real_out = (Path(os.path.realpath(p)) for p in (source, out))
    same = real_source == real_out
    if not same and real_source.exists() and real_out.exists():
        same = os.path.samefile(real_source, real_out)
    if same:
        raise RequestError(f"quantize: out_dir must not be the source (got {out} for both)")
    if real_source in real_out.parents:
        raise RequestError(f"quantize: out_dir must lie outside the source (got {out} in {source})")
    if real_out in real_source.parents:
        raise RequestError(f"quantize: the source must lie outside out_dir (got {source} in {out})")


class _Run:
    """One run: what is planned, and how far it is.

    state      grows by each finished shard
    resumed    shards that an earlier run had finished
    gone       files to remove once the state file is there
    converted  bytes of source tensors that this run has converted
    """

    def __init__(
        self,
        plan: QuantizePlan,
        source: Path,
        state: RunState,
        threads: int,
        progress: Progress | None,
    ) -> None:
        self.plan, self.source, self.state = plan, source, state
        self.threads, self.progress = threads, progress
        self.stored = plan.stored()
        self.resumed: list[str] = []
        self.gone: list[Path] = []
        self.converted = 0
        self.done = 0
        self.total = sum(_source_bytes(conversions) for conversions in plan.shards.values())

    # ---- before -----------------------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def folder(self, out: Path, overwrite: bool) -> Iterator[FolderWriter]:
        """The folder, made and locked; what it holds may be continued or replaced, and there is room for the rest."""
        folder = FolderWriter("quantize", out)
        if not out.exists():
            folder.require_room(self._needed_bytes())
            folder.make()
        elif not out.is_dir():
            folder.present_files(lambda name: False)  # says so
        with folder.locked():
            before = self._unfinished(out, overwrite)
            of_before = before.files.keys() if before else ()
            present = folder.present_files(lambda name: self._is_own(name) or name in of_before)
            if before is None or not self._resume(out, before, overwrite):
                begun = out / (UNFINISHED_NAME + TEMPORARY)  # nothing else was written then
                folder.require_overwrite([p for p in present if p != begun], overwrite)
            keep = {out / name for name in (*self.resumed, UNFINISHED_NAME)}
            self.gone = [p for p in present if p not in keep]
            folder.require_room(self._needed_bytes(), freed=self.gone)
            yield folder

    def _is_own(self, name: str) -> bool:
        names = (CONFIG_NAME, INDEX_NAME, UNFINISHED_NAME, *self.plan.copied)
        return name in names or is_shard(name)

    def _unfinished(self, out: Path, overwrite: bool) -> RunState | None:
        """The run that a folder holds unfinished, if it does."""
        try:
            return RunState.read(out)
        except ModelFormatError as error:
            if overwrite:
                return None
            raise CheckpointWriteError(
                f"quantize: {error}; it can be overwritten on request"
            ) from error

    def _resume(self, out: Path, before: RunState, overwrite: bool) -> bool:
        """Whether this run goes on with that one; notes what is finished. A different one may be overwritten."""
        difference = self.state.difference(before)
        if difference is not None:
            if overwrite:
                return False
            raise CheckpointWriteError(
                f"quantize: out_dir must hold an unfinished run of the same source and settings, or be overwritten on "
                f"request (got {out}, begun with {difference})"
            )
        found = stamps(out, before.shards)
        self.resumed = [
            name
            for name in self.plan.shards
            if name in found and found[name] == before.shards[name] and self._has_header(out, name)
        ]
        self.state.shards = {name: before.shards[name] for name in self.resumed}
        return True

    def _has_header(self, out: Path, shard: str) -> bool:
        header = file_header(file_order(self.stored[shard]))
        with open(out / shard, "rb") as file:
            return file.read(len(header)) == header

    def _needed_bytes(self) -> int:
        """Of what is still to be written."""
        tensors = [t for s, ts in self.stored.items() if s not in self.resumed for t in ts]
        side = sum((self.source / name).stat().st_size for name in self.plan.copied)
        return needed_bytes(tensors, side)

    # ---- writing ----------------------------------------------------------------------------------------------------

    def write(self, folder: FolderWriter) -> None:
        try:
            self.state.write(folder)
            folder.sync()  # from here on the folder does not load, whatever else it holds
            folder.remove(self.gone)
            for name in self.plan.copied:
                folder.write(name, one_after_another(_file_pieces(self.source / name)))
            with _worker_pool(self.threads) as pool:
                for shard in self.plan.shards:
                    self._write_shard(folder, shard, pool)
            self._check_unchanged()
            folder.write_json(INDEX_NAME, file_index(self.stored))
            folder.write_json(CONFIG_NAME, self.plan.config)
            folder.sync()
            folder.remove([folder.path / UNFINISHED_NAME])
        except CheckpointWriteError as error:
            raise CheckpointWriteError(f"{error}; {self._progress_text()}") from error
        except KeyboardInterrupt:
            raise KeyboardInterrupt(self._progress_text()) from None

    def _progress_text(self) -> str:
        done, planned = len(self.state.shards), len(self.plan.shards)
        if done == 0:
            return f"no shard of {planned} is done: the same command begins again"
        return f"{done} of {planned} shards are done: the same command goes on after them"

    def _write_shard(self, folder: FolderWriter, shard: str, pool: ThreadPoolExecutor) -> None:
        if shard in self.resumed:
            self._report(_source_bytes(self.plan.shards[shard]))
            return
        folder.write_shard(shard, self.stored[shard], self._pieces(self.plan.shards[shard], pool))
        folder.sync()
        self.state.shards |= stamps(folder.path, [shard])
        self.state.write(folder)

    def _pieces(self, conversions: list[Conversion], pool: ThreadPoolExecutor) -> Iterator[Piece]:
        levels = self.state.settings["levels"]
        jobs = ((c, *span) for c in conversions for span in c.spans())

        def convert(job: tuple[Conversion, int, int]) -> tuple[int, list[Piece]]:
            conversion, first, last = job
            pieces = conversion.pieces(first, last, levels)
            return conversion.span_bytes(first, last), pieces

        for nbytes, pieces in in_order(pool, convert, jobs, ahead=2 * self.threads):
            yield from pieces
            self.converted += nbytes
            self._report(nbytes)

    def _report(self, nbytes: int) -> None:
        self.done += nbytes
        if self.progress is not None:
            self.progress(self.done, self.total)

    def _check_unchanged(self) -> None:
        """What was read over minutes or hours must be one checkpoint."""
        change = changed_file(stamps(self.source, self.state.files), self.state.files)
        if change is not None:
            raise ModelFormatError(
                f"quantize: {self.source} must stay as it is meanwhile (got {change} quantize began); overwrite the "
                "new folder on request"
            )

    def report(self, out: Path) -> dict[str, Any]:
        tensors = [t for ts in self.stored.values() for t in ts]
        return {
            "path": str(out),
            "source": str(self.source),
            "levels": self.state.settings["levels"],
            "quantized": sum(t.name.endswith(".weight_packed") for t in tensors),
            "tensors": len(tensors),
            "bytes": sum(t.nbytes for t in tensors),
            "source_bytes": self.total,
            "shards": list(self.plan.shards),
            "resumed_shards": len(self.resumed),
            "copied": self.plan.copied,
            "left_out": self.plan.left_out,
        }


def _source_bytes(conversions: list[Conversion]) -> int:
    return sum(c.source.nbytes for c in conversions)


def _file_pieces(path: Path) -> Iterator[bytes]:
    try:
        with open(path, "rb") as file:
            while data := file.read(_COPY_BYTES):
                yield data
    except OSError as error:
        raise ModelFormatError(f"{path}: cannot be read (got {error.strerror})") from error


@contextlib.contextmanager
def _worker_pool(threads: int) -> Iterator[ThreadPoolExecutor]:
    """Threads that compute one piece each; torch must not split a piece further."""
    before = torch.get_num_threads()
    try:
        with ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,)) as pool:
            yield pool
    finally:
        torch.set_num_threads(before)  # the default that threads made later start from
