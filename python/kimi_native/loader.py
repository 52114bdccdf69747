"""A checkpoint folder to a model that runs: validate, plan memory, then fill the modules.

Weights that the kernels read as they are stored (BF16 matrices, INT4 experts) become views of the mapped files: nothing
is copied or converted, the operating system reads them on first use and may drop them again. Copies are made only for
what has no kernel of its own (FP8, FP16, FP32 weights become BF16), for `dense="int8"`, and for the transposed key half
of kv_b_proj. Names, shapes, dtypes and the memory plan are checked before the first weight is read.
"""

from __future__ import annotations

import os
from collections.abc import Callable

import torch
from torch import Tensor, nn

from kimi_native.checkpoint import Checkpoint
from kimi_native.errors import ModelFormatError, RequestError
from kimi_native.model import Attention, Experts, Gate, KimiModel, Linear, RMSNorm
from kimi_native.plan import memory_plan
from kimi_native.quant.fp8 import dequantize_block
from kimi_native.quant.int4 import dequantize
from kimi_native.quant.int8 import quantize_int8
from kimi_native.quant.modules import Int4Experts, Int4Linear, Int8Linear
from kimi_native.weights import Int4Weight

DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}
DENSE_FORMATS = ("bf16", "int8")

Progress = Callable[[int, int], None]  # (bytes done, bytes in all)


def load_model(
    path: str | os.PathLike[str],
    *,
    max_context: int | None = None,
    max_batch: int = 1,
    dtype: str = "bfloat16",
    dense: str = "bf16",
    ignore_config_keys: tuple[str, ...] = (),
    progress: Progress | None = None,
) -> tuple[KimiModel, Checkpoint]:
    """Open, check and map a checkpoint folder.

    path                the folder with config.json and the safetensors files
    max_context         tokens of prompt and answer that a sequence may have (default: the checkpoint's own limit)
    max_batch           sequences at once; with max_context it sizes the latent cache in the memory plan
    dtype               activations and cache: "bfloat16", or "float32" for checking
    dense               dense matrices as stored ("bf16") or quantized to INT8 while loading ("int8", not exact)
    ignore_config_keys  config.json keys to accept although this package does not know them
    progress            called with (bytes done, bytes in all) while weights are converted

    Raises ConfigError, ModelFormatError, MemoryPlanError (before any weight is read), RequestError on an argument.
    """
    if dtype not in DTYPES:
        raise RequestError(f"load: dtype must be one of {', '.join(DTYPES)} (got {dtype})")
    if dense not in DENSE_FORMATS:
        raise RequestError(f"load: dense must be one of {', '.join(DENSE_FORMATS)} (got {dense})")
    checkpoint = Checkpoint.open(path, ignore_keys=ignore_config_keys)
    config = checkpoint.config
    limit = config.max_position_embeddings
    if max_context is not None and not 1 <= max_context <= limit:
        raise RequestError(f"load: max_context must be 1 to {limit} (got {max_context})")
    memory_plan(
        checkpoint, max_context=max_context or limit, max_batch=max_batch, dtype=dtype, dense=dense
    ).check()
    model = KimiModel(config, DTYPES[dtype])
    _Filler(checkpoint, dense, progress).fill(model)
    return model, checkpoint


class _Filler:
    """Walks a built model and gives every module its weights."""

    def __init__(self, checkpoint: Checkpoint, dense: str, progress: Progress | None) -> None:
        self.checkpoint = checkpoint
        self.prefix = checkpoint.config.tensor_prefix
        self.dense = dense
        self.progress = progress
        self.total = sum(t.nbytes for t in checkpoint.tensors.values())
        self.done = 0

    def fill(self, model: KimiModel) -> None:
        for name, module in list(model.named_modules()):
            if isinstance(module, Experts):
                _replace(model, name, self._experts(self.prefix + name, module, model.config))
            elif isinstance(module, Linear):
                self._linear(model, self.prefix + name, name, module)
            elif isinstance(module, Gate):
                module.weight = _frozen(self._bf16(self.prefix + name))
                if module.e_score_correction_bias is not None:
                    bias = self._tensor(f"{self.prefix}{name}.e_score_correction_bias")
                    module.e_score_correction_bias = _frozen(bias.float())
            elif isinstance(module, RMSNorm | nn.Embedding):
                module.weight = _frozen(self._bf16(self.prefix + name))
        if model.config.tie_word_embeddings:
            model.lm_head.weight = model.model.embed_tokens.weight
        for module in model.modules():
            if isinstance(module, Attention):
                module.absorb()

    def _linear(self, model: KimiModel, stored: str, name: str, module: Linear) -> None:
        if name == "lm_head" and model.config.tie_word_embeddings:
            return
        if f"{stored}.weight_packed" in self.checkpoint.tensors and "kv_b_proj" not in name:
            _replace(model, name, Int4Linear(self._int4(stored)))
            return
        weight = self._bf16(stored)
        # kv_b_proj stays BF16: absorbed attention takes it apart.
        if self.dense == "int8" and "kv_b_proj" not in name and weight.shape[1] % 32 == 0:
            _replace(model, name, Int8Linear(quantize_int8(weight)))
        else:
            module.weight = _frozen(weight)

    def _experts(self, stored: str, module: Experts, config) -> nn.Module:
        names = {
            projection: [f"{stored}.{e}.{projection}_proj" for e in range(config.n_routed_experts)]
            for projection in ("gate", "up", "down")
        }
        packed = {
            f"{n}.weight_packed" in self.checkpoint.tensors for ns in names.values() for n in ns
        }
        if packed == {True}:
            return Int4Experts(*([self._int4(n) for n in names[p]] for p in ("gate", "up", "down")))
        for projection, stored_names in names.items():
            setattr(module, projection, [self._bf16(n) for n in stored_names])
        return module

    def _int4(self, stored: str) -> Int4Weight:
        return Int4Weight(
            self._tensor(f"{stored}.weight_packed"), self._tensor(f"{stored}.weight_scale")
        )

    def _bf16(self, stored: str) -> Tensor:
        """A module's weight as BF16: a view if it is stored so, else an exact or documented conversion."""
        if f"{stored}.weight_packed" in self.checkpoint.tensors:
            return dequantize(self._int4(stored))
        weight = self._tensor(f"{stored}.weight")
        if weight.dtype == torch.bfloat16:
            return weight
        if weight.dtype == torch.float8_e4m3fn:
            return dequantize_block(weight, self._tensor(f"{stored}.weight_scale_inv"))
        rounded = weight.to(torch.bfloat16)
        if not torch.equal(rounded.to(weight.dtype), weight):
            raise ModelFormatError(
                f"{stored}.weight: stored as {weight.dtype} with values that BF16 cannot hold; "
                "save the checkpoint in bfloat16 to run it"
            )
        return rounded

    def _tensor(self, name: str) -> Tensor:
        tensor = self.checkpoint.tensor(name)
        self.done += self.checkpoint.tensors[name].nbytes
        if self.progress is not None:
            self.progress(self.done, self.total)
        return tensor


def _frozen(tensor: Tensor) -> nn.Parameter:
    return nn.Parameter(tensor, requires_grad=False)


def _replace(model: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, module)
