"""A checkpoint folder to a model that runs: validate, plan memory, fill the modules, read the weights ahead.

Weights that the kernels read as they are stored (BF16 matrices, INT4 experts) become views of the mapped files: nothing
is copied or converted, and if they fit into memory they are read ahead. Copies are made only for what has no kernel of
its own (FP8, FP16, FP32 weights become BF16), for `dense="int8"` and `"int4"`, and for the transposed key half of
kv_b_proj. Names, shapes, dtypes and the memory plan are checked before the first weight is read.
"""

from __future__ import annotations

import itertools
import operator
import os
import warnings
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor, nn

from kimi_native.checkpoint import Checkpoint
from kimi_native.errors import MemoryPlanWarning, ModelFormatError, RequestError
from kimi_native.gc_pause import paused_gc
from kimi_native.huge_pages import HugePages
from kimi_native.model import Attention, Experts, Gate, KimiModel, Linear, RMSNorm
from kimi_native.plan import CACHE_FORMATS, DENSE_FORMATS, MemoryPlan, check_context, memory_plan
from kimi_native.progress_bar import Progress
from kimi_native.quant.fp8 import dequantize_block
from kimi_native.quant.int4 import dequantize
from kimi_native.quant.modules import Int4Experts, Int4Linear, Int8Linear
from kimi_native.read_ahead import Extent, read_ahead
from kimi_native.safetensors_file import TensorInfo
from kimi_native.tensor_table import FORM_SUFFIXES
from kimi_native.weights import Int4ExpertWeights, Int4Weight

DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}
COMPUTE = ("exact", "int8")
_QUANTIZED = {"int8": Int8Linear, "int4": Int4Linear}  # by what `dense` asks for
_CONVERT_AHEAD_BYTES = 256 << 20  # asked of the disk while earlier weights are converted


def load_model(
    path: str | os.PathLike[str],
    *,
    max_context: int | None = None,
    max_batch: int = 1,
    dtype: str = "bfloat16",
    dense: str = "bf16",
    cache: str = "exact",
    compute: str = "exact",
    prefetch: bool = True,
    ignore_config_keys: tuple[str, ...] = (),
    progress: Progress | None = None,
) -> tuple[KimiModel, Checkpoint]:
    """Open, check and map a checkpoint folder.

    path                the folder with config.json and the safetensors files
    max_context         tokens of prompt and answer that a sequence may have (default: the checkpoint's own limit)
    max_batch           sequences at once; with max_context it sizes the latent cache in the memory plan
    dtype               activations and cache: "bfloat16", or "float32" for checking
    dense               dense matrices as stored ("bf16"), or quantized while loading, which is not exact: "int8", and
                        "int4" with about eighteen times the rounding error
    cache               the latent cache that the memory plan counts: of dtype ("exact"), or "fp8"
    compute             activations that meet INT4 matrices: "exact", or "int8", rounded to 8 bits per 32, not exact
    prefetch            read mapped weights into memory now, if all of them fit; else each is read when first used
    ignore_config_keys  config.json keys to accept although this package does not know them
    progress            called with (bytes done, bytes in all): weights converted, read ahead, or left where they are

    Whoever computes with the model calls Checkpoint.check_readable before using a result.

    Raises ConfigError, ModelFormatError, MemoryPlanError (before any weight is read), RequestError on an argument,
    OSError on a file that cannot be read. Warns with MemoryPlanWarning if the mapped weights do not fit.
    """
    _check_choice("dtype", dtype, tuple(DTYPES))
    _check_choice("dense", dense, DENSE_FORMATS)
    _check_choice("cache", cache, CACHE_FORMATS)
    _check_choice("compute", compute, COMPUTE)
    with paused_gc():
        checkpoint = Checkpoint.open(path, ignore_keys=ignore_config_keys)
        check_context("load", checkpoint.config, max_context)
        settings = {"max_batch": max_batch, "dtype": dtype, "dense": dense, "cache": cache}
        plan = memory_plan(checkpoint, max_context=max_context, **settings)
        plan.check()
        model = KimiModel(checkpoint.config, DTYPES[dtype])
        filler = _Filler(checkpoint, dense, compute)
        filler.fill(model)
    _read_weights(checkpoint, filler, plan, prefetch, progress)
    filler.finish(model)
    checkpoint.check_readable()
    return model, checkpoint


def _check_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise RequestError(f"load: {name} must be one of {', '.join(choices)} (got {value})")


def _read_weights(
    checkpoint: Checkpoint,
    filler: _Filler,
    plan: MemoryPlan,
    prefetch: bool,
    progress: Progress | None,
) -> None:
    """Converts what has to be, then brings in what stays mapped, if it fits."""
    total = sum(info.nbytes for info in checkpoint.tensors.values())
    done = 0

    def report(nbytes: int) -> None:
        nonlocal done
        done += nbytes
        if progress is not None:
            progress(done, total)

    report(0)
    _convert(checkpoint, filler.conversions, report)
    extents = list(_mapped_extents(checkpoint, filler.conversions))
    fits = plan.mapped_fits
    if not fits:
        for note in plan.notes:
            warnings.warn(note, MemoryPlanWarning, stacklevel=4)
    if prefetch and fits:
        read_ahead(extents, report)
    else:
        report(sum(extent.nbytes for extent in extents))
    checkpoint.check_weight_shapes(all=prefetch and fits)


class _Conversion(NamedTuple):
    """A weight that cannot be used as it is stored: its tensors, and what makes a copy of them and puts it in place."""

    tensors: list[TensorInfo]
    run: Callable[[], None]

    @property
    def nbytes(self) -> int:
        return sum(info.nbytes for info in self.tensors)


def _convert(
    checkpoint: Checkpoint, conversions: list[_Conversion], report: Callable[[int], None]
) -> None:
    """In the order of the files; the disk reads ahead of the arithmetic, and what is done leaves this process."""
    in_order = sorted(conversions, key=lambda c: (c.tensors[0].file, c.tensors[0].start))
    asked, ahead = 0, 0
    for conversion in in_order:
        while asked < len(in_order) and ahead < _CONVERT_AHEAD_BYTES:
            for info in in_order[asked].tensors:
                checkpoint.mapped(info).will_need(info.start, info.nbytes)
            ahead += in_order[asked].nbytes
            asked += 1
        conversion.run()
        ahead -= conversion.nbytes
        for info in conversion.tensors:
            checkpoint.mapped(info).release(info.start, info.nbytes)
        report(conversion.nbytes)


def _mapped_extents(checkpoint: Checkpoint, conversions: list[_Conversion]) -> Iterator[Extent]:
    """Where the weights lie that are used in place, in file order, neighbours joined."""
    converted = {info.name for c in conversions for info in c.tensors}
    used = checkpoint.tensors.keys() - converted if converted else checkpoint.tensors.keys()
    for file in checkpoint.files:
        infos = sorted(file.tensors.values(), key=operator.attrgetter("start"))
        if file.tensors.keys() <= used:  # mostly
            yield Extent(file.mapped, infos[0].start, sum(i.nbytes for i in infos))
            continue
        for in_place, run in itertools.groupby(infos, lambda info: info.name in used):
            if in_place:
                infos = list(run)
                yield Extent(file.mapped, infos[0].start, sum(i.nbytes for i in infos))


class _Filler:
    """Walks a built model and gives every module its weights: at once those used in place, later the `conversions`."""

    def __init__(self, checkpoint: Checkpoint, dense: str, compute: str) -> None:
        self.checkpoint = checkpoint
        self.prefix = checkpoint.config.tensor_prefix
        self.dense = dense
        self.compute = compute
        self.conversions: list[_Conversion] = []
        self.pages = HugePages()  # of the quantized dense matrices
        stored = checkpoint.stored
        self.int4_groups = {s.names[0]: s.names for s in stored if s.form == "int4"}

    def fill(self, model: KimiModel) -> None:
        for name, module in list(model.named_modules()):
            if isinstance(module, Experts):
                self._experts(model, name, module)
            elif isinstance(module, Linear):
                self._linear(model, name, module)
            elif isinstance(module, Gate):
                self._weight(self.prefix + name, module)
                if module.e_score_correction_bias is not None:
                    self._correction_bias(self.prefix + name, module)
            elif isinstance(module, RMSNorm | nn.Embedding):
                self._weight(self.prefix + name, module)

    def finish(self, model: KimiModel) -> None:
        """What needs all weights in place."""
        if model.config.tie_word_embeddings:
            model.lm_head.weight = model.model.embed_tokens.weight
        for module in model.modules():
            if isinstance(module, Attention):
                module.absorb()
            elif isinstance(module, Int4Linear | Int4Experts):
                module.compute = self.compute

    def _linear(self, model: KimiModel, name: str, module: Linear) -> None:
        stored = self.prefix + name
        if name == "lm_head" and model.config.tie_word_embeddings:
            return
        # kv_b_proj stays BF16: absorbed attention takes it apart.
        absorbed = "kv_b_proj" in name
        if self._is_int4(stored) and not absorbed:
            _replace(model, name, Int4Linear(self._int4(stored)))
        elif self.dense in _QUANTIZED and not absorbed and module.weight.shape[1] % 32 == 0:
            self._quantize(model, name, module)
        else:
            self._weight(stored, module)

    def _quantize(self, model: KimiModel, name: str, module: Linear) -> None:
        """A module with fewer bits in place of this one, later."""
        stored, kind = self.prefix + name, _QUANTIZED[self.dense]
        for shape, dtype in kind.parts(*module.weight.shape):
            self.pages.reserve(shape, dtype)

        def put() -> None:
            try:
                quantized = kind.quantized(self._bf16(stored), self.pages.empty)
            except ValueError as error:
                self.checkpoint.check_readable()
                raise ModelFormatError(f"{stored}.weight: {error}") from error
            _replace(model, name, quantized)

        self._later(stored, put)

    def _weight(self, stored: str, module: nn.Module) -> None:
        """module.weight in BF16: a view if it is stored so, else a copy made later."""

        def put() -> None:
            module.weight = _frozen(self._bf16(stored))

        self._now_or_later(stored, put)

    def _correction_bias(self, stored: str, module: Gate) -> None:
        name = f"{stored}.e_score_correction_bias"
        info = self.checkpoint.tensors[name]

        def put() -> None:
            module.e_score_correction_bias = _frozen(self.checkpoint.tensor(name).float())

        if info.dtype == "F32":
            put()
        else:
            self.conversions.append(_Conversion([info], put))

    def _experts(self, model: KimiModel, name: str, module: Experts) -> None:
        count = model.config.n_routed_experts
        stored = {p: f"{self.prefix}{name}.{{}}.{p}_proj" for p in ("gate", "up", "down")}
        int4 = {p: self.int4_groups.get(n.format(0), []) for p, n in stored.items()}
        if all(len(names) == count for names in int4.values()):
            _replace(
                model, name, Int4Experts(**{p: self._int4_experts(n) for p, n in int4.items()})
            )
            return
        for projection, expert_name in stored.items():
            matrices: list[Tensor | None] = [None] * count
            setattr(module, projection, matrices)
            for e in range(count):
                expert = expert_name.format(e)

                def put(matrices: list = matrices, e: int = e, expert: str = expert) -> None:
                    matrices[e] = self._bf16(expert)

                self._now_or_later(expert, put)

    def _int4_experts(self, names: list[str]) -> Int4ExpertWeights:
        tensors = self.checkpoint.tensors
        base = {file.path: file.mapped.address for file in self.checkpoint.files}
        packed = [tensors[name + ".weight_packed"] for name in names]
        scale = [tensors[name + ".weight_scale"] for name in names]
        out_features, words = packed[0].shape
        return Int4ExpertWeights.at(
            [base[info.file] + info.start for info in packed],
            [base[info.file] + info.start for info in scale],
            out_features,
            words * 8,
            lambda: [self._int4(name) for name in names],
        )

    # ---- one matrix -------------------------------------------------------------------------------------------------

    def _is_int4(self, stored: str) -> bool:
        return f"{stored}.weight_packed" in self.checkpoint.tensors

    def _int4(self, stored: str) -> Int4Weight:
        tensor = self.checkpoint.tensor
        return Int4Weight(tensor(f"{stored}.weight_packed"), tensor(f"{stored}.weight_scale"))

    def _now_or_later(self, stored: str, put: Callable[[], None]) -> None:
        weight = self.checkpoint.tensors.get(f"{stored}.weight")
        if weight is not None and weight.dtype == "BF16":
            put()
        else:
            self._later(stored, put)

    def _later(self, stored: str, put: Callable[[], None]) -> None:
        suffixes = FORM_SUFFIXES[self.checkpoint.forms.get(stored, "plain")]
        tensors = [self.checkpoint.tensors[stored + suffix] for suffix in suffixes]
        self.conversions.append(_Conversion(tensors, put))

    def _bf16(self, stored: str) -> Tensor:
        """A module's weight as BF16: a view if it is stored so, else an exact or documented conversion."""
        if self._is_int4(stored):
            return dequantize(self._int4(stored))
        weight = self.checkpoint.tensor(f"{stored}.weight")
        if weight.dtype == torch.bfloat16:
            return weight
        if weight.dtype == torch.float8_e4m3fn:
            return dequantize_block(weight, self.checkpoint.tensor(f"{stored}.weight_scale_inv"))
        rounded = weight.to(torch.bfloat16)
        if not torch.equal(rounded.to(weight.dtype), weight):
            self.checkpoint.check_readable()
            raise ModelFormatError(
                f"{stored}.weight: stored as {weight.dtype} with values that BF16 cannot hold; "
                "save the checkpoint in bfloat16 to run it"
            )
        return rounded


def _frozen(tensor: Tensor) -> nn.Parameter:
    return nn.Parameter(tensor, requires_grad=False)


def _replace(model: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, module)
