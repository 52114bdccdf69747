"""One safetensors file: a header checked to the byte, then read-only, zero-copy views of the mapped file.

Layout: 8 bytes little-endian header length, that many bytes of JSON (name -> dtype, shape, data_offsets relative to
the end of the header), then the tensors' bytes without gaps. Nothing in the header is trusted: sizes are Python
integers, so no product can wrap.
"""

from __future__ import annotations

import contextlib
import itertools
import operator
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from kimi_native.errors import ModelFormatError
from kimi_native.json_file import parse_json, printable, short
from kimi_native.mapped_file import MappedFile

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
    mapped    MappedFile of the whole file; nothing is read from it until a tensor is used

    Raises ModelFormatError, naming file, tensor and field, on anything that is not exactly one well-formed file:
    a header over 32 MB or 200,000 tensors, duplicate keys, an unknown dtype, a size that is not dtype times shape,
    overlaps, gaps, bytes after the last tensor. OSError, naming the file, if it cannot be opened or read.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        with open(self.path, "rb") as file, _named_errors(self.path):
            size = os.fstat(file.fileno()).st_size
            header, data_start = _read_header(file, size, self.path)
            self.metadata, self.tensors = _check_header(header, data_start, size, self.path)
            self.mapped = MappedFile(file, size, self.path)

    def tensor(self, name: str) -> Tensor:
        """The tensor as a view of the mapped file, never a copy, even where the file does not align it.

        Reading it reads the disk; writing to it is undefined (the pages are read-only). The map lives as long as
        any view of it; what was read is good if mapped.check() does not raise. A tensor without elements is a fresh
        empty one.

        Raises ModelFormatError if the file has no such tensor.
        """
        info = self.tensors.get(name)
        if info is None:
            raise ModelFormatError(f"{self.path}: tensor {printable(name)} is not in this file")
        dtype = DTYPES[info.dtype]
        if info.nbytes == 0:
            return torch.empty(info.shape, dtype=dtype)
        count = info.nbytes // dtype.itemsize
        flat = torch.frombuffer(self.mapped.buffer, dtype=dtype, count=count, offset=info.start)
        return flat.view(info.shape)


@contextlib.contextmanager
def _named_errors(path: Path) -> Iterator[None]:
    """A failed read of an open file does not know the file's name."""
    try:
        yield
    except OSError as error:
        if error.errno is None or error.filename is not None:
            raise
        raise OSError(error.errno, os.strerror(error.errno), str(path)) from error


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
    """The metadata and the tensors, which must cover the data exactly once."""
    found = _regular_header(header, data_start, size, path)
    if found is not None:
        return found
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


# ---- the header as the published libraries write it -----------------------------------------------------------------

# No white space, no escapes, the fields in this order. Groups: name, dtype and shape as one text, begin, end.
_INTEGER = r"(0|[1-9][0-9]{0,17})"
_REGULAR_ENTRY = re.compile(
    r'"([^"\\\x00-\x1f]+)":\{"dtype":"([A-Z0-9_]+","shape":\[[0-9,]*\]),"data_offsets":\['
    + _INTEGER
    + ","
    + _INTEGER
    + r"\]\}(?:,|(?=\}))"
)
_DTYPE_OF, _SHAPE_OF, _NBYTES_OF = map(operator.attrgetter, ("dtype", "shape", "nbytes"))


def _regular_header(
    header: bytes, data_start: int, size: int, path: Path
) -> tuple[dict[str, str], dict[str, TensorInfo]] | None:
    """The same for a header in which nothing is unusual; None for any other, right or wrong.

    JSON and a look at each entry cost twice as much for the 208,215 tensors of K2. They have some twenty different
    (dtype, shape), so here one entry of each is checked, and the rest is done by whole columns.
    """
    try:
        text = header.decode("utf-8").rstrip(" ")
        before, *columns, after = _REGULAR_ENTRY.split(text)
        names, layouts, begins, ends = (columns[i::5] for i in range(4))
        metadata = _regular_start(before)
    except ValueError:
        return None
    whole = after == "}" and text.endswith("}}") and not any(columns[4::5])
    if not whole or metadata is None or not 0 < len(names) <= MAX_TENSORS:
        return None
    try:
        alike = _checked_layouts(names, layouts, begins, ends, data_start, size, path)
    except ModelFormatError:
        return None
    begins, ends = [*map(int, begins)], [*map(int, ends)]
    nbytes = [*map(_NBYTES_OF, alike)]
    if begins != [0, *ends[:-1]] or ends[-1] != size - data_start:
        return None
    if [*map(operator.sub, ends, begins)] != nbytes:
        return None
    starts = map(data_start.__add__, begins)
    fields = map(_DTYPE_OF, alike), map(_SHAPE_OF, alike), itertools.repeat(path), starts, nbytes
    infos = map(tuple.__new__, itertools.repeat(TensorInfo), zip(names, *fields, strict=False))
    tensors = dict(zip(names, infos, strict=True))
    if len(tensors) != len(names) or "__metadata__" in tensors:
        return None
    return metadata, tensors


def _regular_start(text: str) -> dict[str, str] | None:
    """The metadata of a header that begins with it, or with the first tensor."""
    if text == "{":
        return {}
    if not text.endswith("},"):
        return None
    values = parse_json((text[:-1] + "}").encode(), source="", error=ModelFormatError)
    metadata = values.get("__metadata__")
    if len(values) != 1 or not isinstance(metadata, dict):
        return None
    return metadata if all(isinstance(v, str) for v in metadata.values()) else None


def _checked_layouts(
    names: list[str],
    layouts: list[str],
    begins: list[str],
    ends: list[str],
    data_start: int,
    size: int,
    path: Path,
) -> list[TensorInfo]:
    """For each tensor the TensorInfo of one with the same dtype and shape. Raises ModelFormatError if one is wrong."""
    checked = {}
    for layout, i in dict(zip(layouts, range(len(layouts)), strict=True)).items():
        text = f'{{"dtype":"{layout},"data_offsets":[{begins[i]},{ends[i]}]}}'
        entry = parse_json(text.encode(), source="", error=ModelFormatError)
        checked[layout] = _check_entry(names[i], entry, data_start, size, path)
    return [*map(checked.__getitem__, layouts)]


# ---- any header -----------------------------------------------------------------------------------------------------


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

    for info in sorted(tensors.values(), key=operator.attrgetter("start", "nbytes")):
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
