"""What quantize makes of one tensor of a source checkpoint, in pieces of bounded size.

What is quantized is what `load` would run: FP8 times its multipliers, rounded to BF16; FP16 and FP32 only where BF16
holds the values exactly. Files are read, not mapped: pages of a map would count as this process's memory.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from kimi_native.checkpoint_writer import PlainTensor
from kimi_native.errors import ModelFormatError
from kimi_native.json_file import printable
from kimi_native.quant.fp8 import BLOCK_SIZE, dequantize_block
from kimi_native.quant.groups import CHUNK_ELEMENTS
from kimi_native.quant.int4 import quantize
from kimi_native.safetensors_file import DTYPES, TensorInfo
from kimi_native.weights import GROUP_SIZE

# Of the source, converted at once by one thread; with all that is made of it, not three times as much.
PIECE_BYTES = 4 << 20

Piece = tuple[str, int, np.ndarray]  # tensor name, byte offset in it, data


@dataclass(frozen=True)
class Conversion:
    """One tensor of the source and what becomes of it.

    source   the tensor; for "int4" and for FP8 a matrix [out, in]
    scale    of an FP8 matrix its weight_scale_inv, which may lie in another file; else None
    form     "copy": the same bytes · "bf16": a BF16 tensor of the same name · "int4": packed, scale and shape
    finite   whether a copied tensor is looked at for NaN and infinity; what is converted always is
    """

    source: TensorInfo
    scale: TensorInfo | None
    form: str
    finite: bool

    def stored(self) -> list[PlainTensor]:
        """The tensors of the new checkpoint."""
        name, shape = self.source.name, self.source.shape
        if self.form == "copy":
            return [PlainTensor(name, self.source.dtype, shape)]
        if self.form == "bf16":
            return [PlainTensor(name, "BF16", shape)]
        out, in_ = shape
        return [
            PlainTensor(f"{name}_packed", "I32", (out, in_ // 8)),
            PlainTensor(f"{name}_scale", "BF16", (out, in_ // GROUP_SIZE)),
            PlainTensor(f"{name}_shape", "I32", (2,)),
        ]

    def spans(self) -> Iterator[tuple[int, int]]:
        """(first, last + 1) of the parts to convert one by one: rows of a matrix, else elements."""
        rows, columns = self._grid()
        row_bytes = columns * DTYPES[self.source.dtype].itemsize
        step = max(PIECE_BYTES // max(row_bytes, 1) // BLOCK_SIZE, 1) * BLOCK_SIZE
        for first in range(0, rows, step):
            yield first, min(first + step, rows)

    def span_bytes(self, first: int, last: int) -> int:
        """Bytes of the source in a span."""
        return (last - first) * self._grid()[1] * DTYPES[self.source.dtype].itemsize

    def pieces(self, first: int, last: int, levels: int) -> list[Piece]:
        """What the new checkpoint holds of one span.

        Raises ModelFormatError, naming file and tensor, on values that are not finite, that BF16 cannot hold, or
        that cannot be read.
        """
        name, columns = self.source.name, self._grid()[1]
        elements = (first * columns, last * columns)
        if self.form == "copy":
            values = read_elements(self.source, *elements)
            if self.finite:
                self._require_finite(values)
            return [(name, first * values.itemsize, _octets(values))]
        values = read_elements(self.source, *elements, _scratch(self.span_bytes(first, last)))
        values = self._bf16(values.view(-1, columns), first, last)
        if self.form == "bf16":
            self._require_finite(values)
            return [(name, first * columns * 2, _octets(values))]
        try:
            weight = quantize(values, levels=levels)
        except ValueError as error:
            raise ModelFormatError(f"{self.source.file}: tensor {name}: {error}") from error
        found = [
            (f"{name}_packed", first * columns // 2, _octets(weight.weight_packed)),
            (f"{name}_scale", first * columns // GROUP_SIZE * 2, _octets(weight.weight_scale)),
        ]
        if first == 0:
            found.append((f"{name}_shape", 0, np.array(self.source.shape, "<i4")))
        return found

    def _grid(self) -> tuple[int, int]:
        if self.form == "int4" or self.scale is not None:
            rows, columns = self.source.shape
            return rows, columns
        return math.prod(self.source.shape), 1

    def _bf16(self, values: Tensor, first: int, last: int) -> Tensor:
        if values.dtype == torch.bfloat16:
            return values
        if self.scale is not None:
            columns = self.scale.shape[1]
            blocks = slice(first // BLOCK_SIZE, -(-last // BLOCK_SIZE))
            scale = read_elements(self.scale, blocks.start * columns, blocks.stop * columns)
            return dequantize_block(values, scale.view(-1, columns))
        self._require_finite(values)
        rounded = values.to(torch.bfloat16)
        if not torch.equal(rounded.to(values.dtype), values):
            raise ModelFormatError(
                f"{self.source.file}: tensor {self.source.name}: values must be such that BF16 holds them exactly "
                f"(got {self.source.dtype} values that it would round); save the checkpoint in bfloat16 first"
            )
        return rounded

    def _require_finite(self, values: Tensor) -> None:
        parts = values.flatten().split(CHUNK_ELEMENTS)
        if not all(_is_finite(part) for part in parts):
            bad = sum(part.numel() - int(torch.isfinite(part).sum()) for part in parts)
            raise ModelFormatError(
                f"{self.source.file}: tensor {self.source.name}: values must be finite "
                f"(got {bad} NaN or infinite values)"
            )


# dtype -> an integer dtype of its width, all bits but the sign's, the bits of infinity: no finite value reaches them
_BITS = {
    torch.bfloat16: (torch.int16, 0x7FFF, 0x7F80),
    torch.float16: (torch.int16, 0x7FFF, 0x7C00),
    torch.float32: (torch.int32, 0x7FFFFFFF, 0x7F800000),
}


def _is_finite(values: Tensor) -> bool:
    """torch.isfinite(values).all(), several times as fast: one AND and one maximum of integers."""
    integer, magnitude, infinity = _BITS[values.dtype]
    return int((values.view(integer) & magnitude).max()) < infinity


_local = threading.local()


def _scratch(nbytes: int) -> Tensor:
    """Bytes of this thread's own, the same for each piece: fresh memory costs more than what is read into it."""
    if getattr(_local, "scratch", None) is None or _local.scratch.numel() < nbytes:
        _local.scratch = torch.empty(nbytes, dtype=torch.uint8)
    return _local.scratch[:nbytes]


def read_elements(info: TensorInfo, first: int, last: int, octets: Tensor | None = None) -> Tensor:
    """Elements first .. last of a tensor, flat, in the given bytes or in memory of their own."""
    dtype = DTYPES[info.dtype]
    if octets is None:
        octets = torch.empty((last - first) * dtype.itemsize, dtype=torch.uint8)
    left = memoryview(octets.numpy())
    try:
        with open(info.file, "rb", buffering=0) as file:
            file.seek(info.start + first * dtype.itemsize)
            while left:
                count = file.readinto(left)
                if not count:
                    raise ModelFormatError(
                        f"{info.file}: tensor {printable(info.name)}: the file ends early"
                    )
                left = left[count:]
    except OSError as error:
        reason = error.strerror or str(error)
        raise ModelFormatError(f"{info.file}: cannot be read (got {reason})") from error
    return octets.view(dtype)


def _octets(tensor: Tensor) -> np.ndarray:
    return tensor.view(torch.uint8).numpy()
