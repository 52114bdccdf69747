"""Checkpoint folders and safetensors files, written so that nothing incomplete ever looks complete.

Every file is written under a temporary name, flushed to the disk and renamed; whoever writes a folder writes its index
and config.json last.
"""

from __future__ import annotations

import collections
import contextlib
import fcntl
import itertools
import json
import math
import os
import re
import shutil
import struct
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, Protocol, TypeVar

import numpy as np

from kimi_native.errors import CheckpointWriteError
from kimi_native.folder_names import CONFIG_NAME, INDEX_NAME

ITEM_BYTES = {
    "BOOL": 1,
    "U8": 1,
    "I8": 1,
    "F8_E4M3": 1,
    "F8_E5M2": 1,
    "I16": 2,
    "F16": 2,
    "BF16": 2,
    "I32": 4,
    "F32": 4,
    "I64": 8,
    "F64": 8,
}

Data = bytes | np.ndarray
_SHARD_NAME = re.compile(r"model-\d{5,}-of-\d{5,}\.safetensors")
TEMPORARY = ".part"
_Argument = TypeVar("_Argument")
_Result = TypeVar("_Result")


class FileTensor(Protocol):
    """What a writer must know of a tensor: dtype as safetensors names it."""

    @property
    def name(self) -> str: ...
    @property
    def dtype(self) -> str: ...
    @property
    def shape(self) -> tuple[int, ...]: ...
    @property
    def nbytes(self) -> int: ...


class PlainTensor(NamedTuple):
    """A FileTensor and nothing else."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * ITEM_BYTES[self.dtype]


# ---- contents --------------------------------------------------------------------------------------------------------


def split(groups: Iterable[Sequence[FileTensor]], shard_bytes: int) -> dict[str, list[int]]:
    """Shard name -> indices of its groups, filled in order; the tensors of a group stay together.

    A shard is closed before it would exceed shard_bytes; a larger group has one of its own.
    """
    shards: list[list[int]] = [[]]
    filled = 0
    for i, group in enumerate(groups):
        nbytes = sum(t.nbytes for t in group)
        if shards[-1] and filled + nbytes > shard_bytes:
            shards.append([])
            filled = 0
        shards[-1].append(i)
        filled += nbytes
    return {
        f"model-{i:05d}-of-{len(shards):05d}.safetensors": members
        for i, members in enumerate(shards, 1)
    }


def file_order(tensors: Iterable[FileTensor]) -> list[FileTensor]:
    """Widest dtype first, then by name: the order of the safetensors library, which keeps every tensor aligned."""
    return sorted(tensors, key=lambda t: (-ITEM_BYTES[t.dtype], t.dtype, t.name))


def file_header(ordered: Sequence[FileTensor]) -> bytes:
    """Length and JSON header of a safetensors file, padded so that the data starts at a multiple of 8."""
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    start = 0
    for t in ordered:
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


def file_index(shards: Mapping[str, Sequence[FileTensor]]) -> dict[str, Any]:
    """The index of a folder, from shard name -> its tensors."""
    where = {t.name: shard for shard, tensors in shards.items() for t in file_order(tensors)}
    total = sum(t.nbytes for tensors in shards.values() for t in tensors)
    return {"metadata": {"total_size": total}, "weight_map": where}


def needed_bytes(tensors: Iterable[FileTensor], other_bytes: int) -> int:
    """An upper bound: tensors, their entries in header and index, the other files, the file system's rounding."""
    return sum(t.nbytes + 2 * len(t.name) + 256 for t in tensors) + other_bytes + (1 << 20)


def in_order(
    pool: ThreadPoolExecutor,
    function: Callable[[_Argument], _Result],
    arguments: Iterable[_Argument],
    ahead: int,
) -> Iterator[_Result]:
    """function of each argument, in order, at most `ahead` of them made before they are taken: memory is bounded."""
    pending: collections.deque[Future[_Result]] = collections.deque()
    for argument in arguments:
        pending.append(pool.submit(function, argument))
        if len(pending) == ahead:
            yield pending.popleft().result()
    while pending:
        yield pending.popleft().result()


def one_after_another(pieces: Iterable[Data], start: int = 0) -> Iterator[tuple[int, Data]]:
    """Each piece with its position, when they follow each other from `start`."""
    for data in pieces:
        yield start, data
        start += len(data) if isinstance(data, bytes) else data.nbytes


# ---- the folder ------------------------------------------------------------------------------------------------------


def is_shard(name: str) -> bool:
    """Whether a file name is one of those that split gives."""
    return _SHARD_NAME.fullmatch(name) is not None


class FolderWriter:
    """Writes the folder `path` for the command `op`, whose name stands before every error.

    Every method raises CheckpointWriteError on what the system refuses: no room, no permission, a failed write.
    """

    def __init__(self, op: str, path: Path) -> None:
        self.op, self.path = op, path
        self._written: list[Path] = []

    def present_files(self, own: Callable[[str], bool]) -> list[Path]:
        """The files that are there, sorted; refuses a folder that holds anything but files with a name of its `own`."""
        if not self.path.exists():
            return []
        if not self.path.is_dir():
            raise CheckpointWriteError(
                f"{self.op}: out_dir must be a folder (got file {self.path})"
            )
        present = sorted(self.path.iterdir())
        strangers = [
            p.name for p in present if p.is_dir() or not own(p.name.removesuffix(TEMPORARY))
        ]
        if strangers:
            shown = ", ".join(strangers[:3]) + (", ..." if len(strangers) > 3 else "")
            raise CheckpointWriteError(
                f"{self.op}: out_dir must hold no other files (got {shown} in {self.path})"
            )
        return present

    def require_overwrite(self, present: Sequence[Path], overwrite: bool) -> None:
        if present and not overwrite:
            raise CheckpointWriteError(
                f"{self.op}: out_dir must be empty, or be overwritten on request "
                f"(got a checkpoint in {self.path})"
            )

    def require_room(self, needed: int, freed: Iterable[Path] = ()) -> None:
        """The disk must have `needed` bytes, counting those of the files about to go."""
        with self._errors("prepare", self.path):
            free = _free_bytes(self.path) + sum(p.lstat().st_size for p in freed)
        if free < needed:
            raise CheckpointWriteError(
                f"{self.op}: {self.path} needs {_gib(needed)} on the disk (got {_gib(free)} free)"
            )

    def make(self) -> None:
        with self._errors("prepare", self.path):
            self.path.mkdir(parents=True, exist_ok=True)

    def remove(self, files: Iterable[Path]) -> None:
        """Index and config go first, so that a half removed checkpoint does not look complete either."""
        with self._errors("prepare", self.path):
            for path in sorted(
                files, key=lambda p: (p.name not in (INDEX_NAME, CONFIG_NAME), p.name)
            ):
                path.unlink(missing_ok=True)

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Only one process at a time writes the folder, which must exist; the lock goes with the process."""
        with self._errors("lock", self.path):
            handle = os.open(self.path, os.O_RDONLY)
        try:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise CheckpointWriteError(
                    f"{self.op}: {self.path} must be free (got another process that writes it)"
                ) from None
            except OSError:
                pass  # a network file system without locks
            yield
        finally:
            os.close(handle)

    @contextlib.contextmanager
    def kept_if_whole(self) -> Iterator[None]:
        """What ends the body early, an interrupt too, takes the files with it that were written through this object."""
        try:
            yield
        except BaseException:
            with contextlib.suppress(CheckpointWriteError):  # the first error is the one to know
                self.remove(self._written)
            raise

    def write(self, name: str, pieces: Iterable[tuple[int, Data]]) -> None:
        """Write (position, data) pieces under a temporary name, flush, rename. What fails leaves nothing behind."""
        path = self.path / name
        temporary = path.with_name(name + TEMPORARY)
        with self._errors("write", path):
            temporary.unlink(missing_ok=True)  # of a killed run; it may be a link
            try:
                with open(temporary, "xb") as file:
                    for position, data in pieces:
                        write_at(file, position, data)
                    file.flush()
                    os.fsync(file.fileno())
                os.replace(temporary, path)
                self._written.append(path)
            finally:
                temporary.unlink(missing_ok=True)

    def write_json(self, name: str, value: Any) -> None:
        self.write(name, [(0, (json.dumps(value, indent=2) + "\n").encode())])

    def write_shard(
        self,
        name: str,
        tensors: Iterable[FileTensor],
        pieces: Iterable[tuple[str, int, np.ndarray]],
    ) -> None:
        """Write a safetensors file from (tensor name, byte offset in it, data) in any order; they must cover it."""
        ordered = file_order(tensors)
        header = file_header(ordered)
        ends = itertools.accumulate((t.nbytes for t in ordered), initial=len(header))
        starts = dict(zip((t.name for t in ordered), ends, strict=False))
        body = ((starts[tensor] + offset, data) for tensor, offset, data in pieces)
        self.write(name, itertools.chain([(0, header)], body))

    def sync(self) -> None:
        """Renames reach the disk."""
        with self._errors("write", self.path):
            handle = os.open(self.path, os.O_RDONLY)
            try:
                os.fsync(handle)
            finally:
                os.close(handle)

    @contextlib.contextmanager
    def _errors(self, verb: str, path: Path) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            if isinstance(error, CheckpointWriteError):
                raise
            # Not with the free bytes: they would count what was just removed.
            reason = error.strerror or str(error)
            raise CheckpointWriteError(f"{self.op}: cannot {verb} {path} (got {reason})") from error


def write_at(file: BinaryIO, position: int, data: Data) -> None:
    """All of data at a position of a file."""
    file.seek(position)
    file.write(data if isinstance(data, bytes) else memoryview(data).cast("B"))


def _free_bytes(path: Path) -> int:
    """On the disk that holds a path, or would."""
    nearest = next(p for p in (path, *path.absolute().parents) if p.exists())
    return shutil.disk_usage(nearest).free


def _gib(nbytes: int) -> str:
    return f"{nbytes / 2**30:.3f} GiB"
