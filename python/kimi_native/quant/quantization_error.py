"""What INT4 cost a checkpoint, layer by layer and kind by kind: its weights against those it was made from.

Tensors are read in pieces of some million elements, from the files, so memory does not grow with the model.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from kimi_native.checkpoint import Checkpoint
from kimi_native.errors import ModelFormatError, RequestError
from kimi_native.quant.fp8 import BLOCK_SIZE, dequantize_block
from kimi_native.quant.groups import row_chunks
from kimi_native.quant.int4 import quantize, unpack
from kimi_native.quant.ptq_tensors import read_elements
from kimi_native.safetensors_file import TensorInfo
from kimi_native.tensor_table import numel_of, tensor_kind
from kimi_native.weights import GROUP_SIZE, Int4Weight


@dataclass(frozen=True)
class KindError:
    """The error of a layer's tensors of one kind, taken together. None: not said by the numbers there are.

    layer           its number; None outside the layers, and in the sums over all of them
    kind            the tensor's name without layer and expert: experts.gate_proj, self_attn.o_proj, lm_head
    tensors         how many
    int4            whether they are INT4 now
    relative_error  Frobenius norm of the differences over that of the original; None if only the latter is 0
    sqnr_db         -20 log10 of that; None where that is 0 or None
    worst_steps     INT4: largest difference in units of its group's scale; None if one is 0 where weights were not
    end_share       INT4: share of the codes -8, -7 and 7
    """

    layer: int | None
    kind: str
    tensors: int
    int4: bool
    relative_error: float | None
    sqnr_db: float | None
    worst_steps: float | None
    end_share: float | None

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


@dataclass
class _Sums:
    int4: bool
    tensors: int = 0
    weights: int = 0
    squares: float = 0.0
    squared_errors: float = 0.0
    worst: float = 0.0
    ends: int = 0

    def add(self, other: _Sums) -> None:
        self.worst = max(self.worst, other.worst)
        for name in ("tensors", "weights", "squares", "squared_errors", "ends"):
            setattr(self, name, getattr(self, name) + getattr(other, name))

    def error(self, layer: int | None, kind: str) -> KindError:
        ratio = self.squared_errors / self.squares if self.squares else None
        if not self.squared_errors:
            ratio = 0.0
        return KindError(
            layer,
            kind,
            self.tensors,
            self.int4,
            relative_error=None if ratio is None else math.sqrt(ratio),
            sqnr_db=-10 * math.log10(ratio) if ratio else None,
            worst_steps=self.worst if self.int4 and self.worst < math.inf else None,
            end_share=self.ends / max(self.weights, 1) if self.int4 else None,
        )


@dataclass(frozen=True)
class QuantizationError:
    """layers: an entry for each layer and kind, in order, then what is outside; kinds: sums over the layers."""

    layers: list[KindError]
    kinds: list[KindError]

    def to_dict(self) -> dict[str, Any]:
        return {name: [e.to_dict() for e in getattr(self, name)] for name in ("layers", "kinds")}


@dataclass(frozen=True)
class _Pair:
    """A tensor, and the one it was made from; `name` without prefix and ".weight"."""

    name: str
    shape: tuple[int, ...]
    form: str
    checkpoint: Checkpoint = field(repr=False)
    base: Checkpoint = field(repr=False)


def quantization_error(
    checkpoint: Checkpoint,
    base: Checkpoint | None = None,
    *,
    levels: int = 15,
    progress: Callable[[int, int], None] | None = None,
) -> QuantizationError:
    """Compare a checkpoint with the one it was quantized from, or tell what rounding its routed experts would cost.

    checkpoint  INT4 with `base`; BF16 (or FP16, FP32) or FP8 without
    base        the original: BF16 (or FP16, FP32) or FP8, of the same tensors
    levels      without `base`: of quantize, which is what `kimi-native quantize` does
    progress    called with (weights done, weights in all)

    Raises RequestError if one is INT4 that must not be, or the other way round, and ModelFormatError, naming the
    tensor, if the two do not match, a file cannot be read or a value is not finite.
    """
    if base is None:
        if "int4" in checkpoint.forms.values():
            raise RequestError(
                f"quantization error: {checkpoint.path} must be given its original to be compared with (got INT4 alone)"
            )
        pairs = [dataclasses.replace(p, form="nearest") for p in _pairs(checkpoint, checkpoint)]
        pairs = [p for p in pairs if tensor_kind(f"model.{p.name}.") == "routed experts"]
    else:
        if "int4" not in checkpoint.forms.values():
            raise RequestError(
                f"quantization error: {checkpoint.path} must be INT4 to be compared with an original (got none of it)"
            )
        pairs = _pairs(checkpoint, base)
    return _measured(pairs, levels, progress or (lambda done, total: None))


def _measured(
    pairs: list[_Pair], levels: int, progress: Callable[[int, int], None]
) -> QuantizationError:
    total, done = sum(numel_of(p.shape) for p in pairs), 0
    layers: dict[tuple[int | None, str, bool], _Sums] = {}
    for pair in pairs:
        sums = _Sums(int4=pair.form in ("int4", "nearest"), tensors=1)
        for rows in row_chunks(*_grid(pair.shape), multiple=BLOCK_SIZE):
            _add_rows(sums, pair, rows, levels)
        key = (*_place(pair.name), sums.int4)
        layers.setdefault(key, _Sums(sums.int4)).add(sums)
        progress(done := done + sums.weights, total)
    kinds: dict[tuple[str, bool], _Sums] = {}
    for (layer, kind, int4), sums in layers.items():
        if layer is not None:
            kinds.setdefault((kind, int4), _Sums(int4)).add(sums)
    in_order = sorted(layers.items(), key=lambda i: math.inf if i[0][0] is None else i[0][0])
    return QuantizationError(
        [sums.error(layer, kind) for (layer, kind, _), sums in in_order],
        [sums.error(None, kind) for (kind, _), sums in kinds.items()],
    )


# ---- which tensors --------------------------------------------------------------------------------------------------


def _shapes(checkpoint: Checkpoint) -> dict[str, tuple[int, ...]]:
    """Name without prefix, and of a matrix without ".weight" -> the tensor's logical shape."""
    skip = len(checkpoint.config.tensor_prefix)
    shapes: dict[str, tuple[int, ...]] = {}
    for stored in checkpoint.stored:
        shape = (stored.out_features, stored.in_features)
        shapes |= {name[skip:]: shape for name in stored.names}
    for name, info in checkpoint.tensors.items():
        if name.rpartition(".")[0] not in checkpoint.forms:
            shapes[name[skip:]] = info.shape
    return shapes


def _pairs(checkpoint: Checkpoint, base: Checkpoint) -> list[_Pair]:
    """Every tensor of the two, which must be the same."""
    ours, theirs = _shapes(checkpoint), _shapes(base)
    for name, shape in ours.items():
        if name not in theirs:
            raise ModelFormatError(f"{base.path}: must hold {name}, as {checkpoint.path} does")
        if theirs[name] != shape:
            raise ModelFormatError(
                f"{base.path}: tensor {name}: shape must be {list(shape)}, as in {checkpoint.path} "
                f"(got {list(theirs[name])})"
            )
        if _form(base, name) == "int4":
            raise RequestError(
                f"quantization error: {base.path} must be an original, not quantized to INT4 (got {name} in INT4)"
            )
    for name in theirs:
        if name not in ours:
            raise ModelFormatError(f"{checkpoint.path}: must hold {name}, as {base.path} does")
    return [_Pair(n, s, _form(checkpoint, n), checkpoint, base) for n, s in ours.items()]


def _form(checkpoint: Checkpoint, name: str) -> str:
    """As in Checkpoint.forms; what is no matrix is plain."""
    return checkpoint.forms.get(checkpoint.config.tensor_prefix + name, "plain")


def _place(name: str) -> tuple[int | None, str]:
    """(layer, kind) of KindError."""
    name = name.removeprefix("model.").removesuffix(".weight")
    if not name.startswith("layers."):
        return None, name
    _, layer, rest = name.split(".", 2)
    parts = [p for p in rest.split(".") if not p.isdigit()]
    in_experts = parts[0] == "mlp" and parts[1] in ("experts", "shared_experts")
    return int(layer), ".".join(parts[1:] if in_experts else parts)


# ---- pieces ---------------------------------------------------------------------------------------------------------


def _grid(shape: tuple[int, ...]) -> tuple[int, int]:
    return (shape[0], shape[1]) if len(shape) == 2 else (numel_of(shape), 1)


def _add_rows(sums: _Sums, pair: _Pair, rows: slice, levels: int) -> None:
    original = _rows(pair.base, pair, rows)
    sums.weights += original.numel()
    sums.squares += float(original.square().sum())
    if not sums.int4:
        sums.squared_errors += float((_rows(pair.checkpoint, pair, rows) - original).square().sum())
        return
    weight = (
        quantize(original, levels=levels)
        if pair.form == "nearest"
        else _int4_rows(pair.checkpoint, pair, rows)
    )
    q, scale = unpack(weight.weight_packed), weight.weight_scale.double()[..., None]
    error = (original - (q.unflatten(1, (-1, GROUP_SIZE)) * scale).flatten(1)).abs_()
    sums.ends += int(((q <= -7) | (q == 7)).sum())
    steps = error.unflatten(1, (-1, GROUP_SIZE)) / scale.abs()
    steps = steps.nan_to_num_(0.0, posinf=math.inf)  # 0 / 0: a scale of zero, and zeros
    sums.worst = max(sums.worst, float(steps.max()))
    sums.squared_errors += float(error.square_().sum())


def _rows(checkpoint: Checkpoint, pair: _Pair, rows: slice) -> Tensor:
    """[rows, columns] float64 of a tensor that is not INT4."""
    info = _info(checkpoint, pair.name, "")
    columns = _grid(pair.shape)[1]
    values = read_elements(info, rows.start * columns, rows.stop * columns).view(-1, columns)
    if values.dtype == torch.float8_e4m3fn:
        scale = _info(checkpoint, pair.name, "_scale_inv")
        width = scale.shape[1]
        blocks = slice(rows.start // BLOCK_SIZE, -(-rows.stop // BLOCK_SIZE))
        multipliers = read_elements(scale, blocks.start * width, blocks.stop * width)
        values = dequantize_block(values, multipliers.view(-1, width))
    return _finite(info, values.double())


def _int4_rows(checkpoint: Checkpoint, pair: _Pair, rows: slice) -> Int4Weight:
    parts = []
    for suffix, per_word in (("_packed", 8), ("_scale", GROUP_SIZE)):
        columns = pair.shape[1] // per_word
        info = _info(checkpoint, pair.name, suffix)
        part = read_elements(info, rows.start * columns, rows.stop * columns)
        parts.append(_finite(info, part).view(-1, columns))
    return Int4Weight(*parts)


def _info(checkpoint: Checkpoint, name: str, suffix: str) -> TensorInfo:
    stored = checkpoint.config.tensor_prefix + name
    matrix = stored in checkpoint.forms
    return checkpoint.tensors[f"{stored}.weight{suffix}" if matrix else stored]


def _finite(info: TensorInfo, values: Tensor) -> Tensor:
    if bad := values.numel() - int(torch.isfinite(values).sum()):
        raise ModelFormatError(
            f"{info.file}: tensor {info.name}: values must be finite (got {bad} NaN or infinite values)"
        )
    return values


def table(error: QuantizationError) -> Iterator[tuple[str, ...]]:
    """HEADER's columns as text: what is INT4, and what else is not as it was."""
    named = [("-" if e.layer is None else str(e.layer), e) for e in error.layers]
    for layer, entry in named + [("all", e) for e in error.kinds]:
        if entry.int4 or entry.relative_error != 0:
            yield (
                layer,
                entry.kind,
                "INT4" if entry.int4 else "other",
                f"{entry.tensors:,}",
                _text(entry.relative_error, ".4%"),
                _text(entry.sqnr_db, ".2f"),
                _text(entry.worst_steps, ".3f"),
                _text(entry.end_share, ".2%"),
            )


HEADER = (
    *("layer", "kind", "form", "tensors"),
    *("relative error", "SQNR dB", "worst, in steps", "codes at the ends"),
)


def _text(value: float | None, format: str) -> str:
    return "-" if value is None else f"{value:{format}}"
