"""One safetensors file: a header checked to the byte, then read-only, zero-copy views of the mapped file.

Layout: 8 bytes little-endian header length, that many bytes of JSON (name -> dtype, shape, data_offsets relative to
the end of the header), then the tensors' bytes without gaps. Nothing in the header is trusted: sizes are Python
integers, so no product can wrap.
"""

from __future__ import annotations

import mmap
import os
import warnings
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from kimi_native.errors import ModelFormatError
from kimi_native.json_file import parse_json, printable, short

MAX_HEADER_BYTES = 32 << 20
MAX_TENSORS = 200_000
MAX_DIMENSIONS = 8

DTYPES: dict[str, torch.dtype] = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "I16": torch.int16,
    "I32": torch.int32,
    "I64": torch.int64,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F32": torch.float32,
    "F64": torch.float64,
}
DTYPE_BYTES = {name: dtype.itemsize for name, dtype in DTYPES.items()}


class TensorInfo(NamedTuple):
    """Where a tensor lies: dtype as spelled in the file, `nbytes` bytes from byte `start` of `file`."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    file: Path
    start: int
    nbytes: int


class SafetensorsFile:
    """A mapped safetensors file.

    tensors   name -> TensorInfo, in the order of the header
    metadata  the header's __metadata__, strings only

    Raises ModelFormatError, naming file, tensor and field, on anything that is not exactly one well-formed file:
    a header over 32 MB or 200,000 tensors, duplicate keys, an unknown dtype, a size that is not dtype times shape,
    overlaps, gaps, bytes after the last tensor. The file must not be truncated while it is open.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        with open(self.path, "rb") as file:
            size = os.fstat(file.fileno()).st_size
            header, data_start = _read_header(file, size, self.path)
            self.metadata, self.tensors = _check_header(header, data_start, size, self.path)
            # Nothing is read from the map until a tensor is used; a file never written to cannot be changed by us.
            self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)

    def tensor(self, name: str) -> Tensor:
        """The tensor as a view of the mapped file, never a copy, even where the file does not align it.

        Reading it reads the disk; writing to it is undefined (the pages are read-only). The map lives as long as
        any view of it. A tensor without elements is a fresh empty one.

        Raises ModelFormatError if the file has no such tensor.
        """
        info = self.tensors.get(name)
        if info is None:
            raise ModelFormatError(f"{self.path}: tensor {printable(name)} is not in this file")
        dtype = DTYPES[info.dtype]
        if info.nbytes == 0:
            return torch.empty(info.shape, dtype=dtype)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="The given buffer is not writable")
            flat = torch.frombuffer(
                self._map, dtype=dtype, count=info.nbytes // dtype.itemsize, offset=info.start
            )
        return flat.view(info.shape)


def _read_header(file: Any, size: int, path: Path) -> tuple[bytes, int]:
    """The header's bytes and where the tensors' bytes begin."""
    if size < 8:
        raise ModelFormatError(f"{path}: a safetensors file has at least 8 bytes (got {size})")
    length = int.from_bytes(file.read(8), "little")
    if length > MAX_HEADER_BYTES:
        raise ModelFormatError(
            f"{path}: header length must be at most {MAX_HEADER_BYTES} bytes (got {length})"
        )
    if 8 + length > size:
        raise ModelFormatError(
            f"{path}: header length must lie within the file's {size} bytes (got {length})"
        )
    header = file.read(length)
    if len(header) != length:
        raise ModelFormatError(f"{path}: header ends early ({len(header)} of {length} bytes)")
    if not header.startswith(b"{"):
        raise ModelFormatError(f"{path}: header must start with {{ (got {short(header[:1])})")
    return header, 8 + length


def _check_header(
    header: bytes, data_start: int, size: int, path: Path
) -> tuple[dict[str, str], dict[str, TensorInfo]]:
    values = parse_json(header, source=f"{path}: header", error=ModelFormatError)
    metadata = values.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise ModelFormatError(f"{path}: __metadata__ must map strings to strings")
    if len(values) > MAX_TENSORS:
        raise ModelFormatError(f"{path}: at most {MAX_TENSORS} tensors (got {len(values)})")
    tensors = {
        name: _check_entry(name, entry, data_start, size, path) for name, entry in values.items()
    }
    _check_tiling(tensors, data_start, size, path)
    return metadata, tensors


def _check_entry(name: str, entry: Any, data_start: int, size: int, path: Path) -> TensorInfo:
    def fail(field: str, must: str, got: Any) -> ModelFormatError:
        return ModelFormatError(
            f"{path}: tensor {printable(name)}: {field} must {must} (got {short(got)})"
        )

    if not isinstance(entry, dict):
        raise fail("entry", "be an object", entry)
    if entry.keys() != {"dtype", "shape", "data_offsets"}:
        raise fail("entry", "hold dtype, shape and data_offsets and nothing else", sorted(entry))
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPE_BYTES:
        raise fail("dtype", f"be one of {', '.join(DTYPES)}", dtype)
    if not isinstance(shape, list) or any(type(d) is not int or d < 0 for d in shape):
        raise fail("shape", "be a list of non-negative integers", shape)
    if len(shape) > MAX_DIMENSIONS:
        raise fail("shape", f"have at most {MAX_DIMENSIONS} dimensions", shape)
    if not isinstance(offsets, list) or len(offsets) != 2:
        raise fail("data_offsets", "be two integers", offsets)
    begin, end = offsets
    if type(begin) is not int or type(end) is not int:
        raise fail("data_offsets", "be two integers", offsets)
    if not 0 <= begin <= end <= size - data_start:
        raise fail(
            "data_offsets", f"ascend within the {size - data_start} bytes after the header", offsets
        )
    nbytes = extent = DTYPE_BYTES[dtype]
    for d in shape:
        nbytes *= d
        extent *= max(d, 1)
    if extent >> 63:  # even with a zero among the sizes, strides must fit 64 bits
        raise fail("shape", "span less than 2**63 bytes", shape)
    if nbytes != end - begin:
        raise fail("data_offsets", f"span dtype times shape = {short(nbytes)} bytes", offsets)
    return TensorInfo(name, dtype, tuple(shape), path, data_start + begin, nbytes)


def _check_tiling(tensors: dict[str, TensorInfo], data_start: int, size: int, path: Path) -> None:
    """The tensors, in file order, must cover the data exactly once."""
    position, before = data_start, None

    def end_of() -> str:
        return "the header" if before is None else f"tensor {printable(before)}"

    for info in sorted(tensors.values(), key=lambda t: (t.start, t.nbytes)):
        if info.start != position:
            what = "leaves a gap after" if info.start > position else "overlaps"
            raise ModelFormatError(
                f"{path}: tensor {printable(info.name)}: data_offsets {what} {end_of()} "
                f"(starts at {info.start - data_start}, expected {position - data_start})"
            )
        position, before = info.start + info.nbytes, info.name
    if position != size:
        raise ModelFormatError(
            f"{path}: the file must end with {end_of()} (got {size - position} bytes after it)"
        )
