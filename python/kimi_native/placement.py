"""Puts a built model on a GPU: its weights where the CUDA kernels read them. The routed experts may stay on the CPU."""

from __future__ import annotations

import re

import torch
from torch import Tensor, nn

from kimi_native import ops
from kimi_native.errors import MemoryPlanError, RequestError
from kimi_native.model import Attention, Experts, KimiModel
from kimi_native.quant.modules import Int4Experts, Int4Linear, Int8Linear
from kimi_native.quant.tiles import tile_int4, tile_int4_experts, tiled_bytes
from kimi_native.units import bytes_text
from kimi_native.weights import Int8Weight, MoeDispatch

MLA_WIDTHS = (512, 64)  # of mla_decode's CUDA kernel: kv_lora_rank, qk_rope_head_dim
# An allowance, not measured: the driver's context, scratch, and the activations of one prefill chunk.
WORKING_BYTES = 2 << 30


class HostExperts(nn.Module):
    """Experts that stay in host memory on the CPU kernels, in a model whose other parts are on a GPU."""

    def __init__(self, experts: nn.Module) -> None:
        super().__init__()
        self.experts = experts
        self._on_host: tuple[Tensor, ...] = ()
        self._arrived: torch.cuda.Event | None = None

    def fetch(self, x: Tensor, dispatch: MoeDispatch) -> None:
        """Sets off the copies that the next forward, of the same inputs, waits for. What is launched on the GPU after
        this runs while the experts are at work."""
        parts = (x, dispatch.token_index, dispatch.row_index, dispatch.expert_offsets)
        self._on_host = tuple(t.to("cpu", non_blocking=True) for t in parts)  # to pinned memory
        self._arrived = torch.cuda.Event() if x.is_cuda else None
        if self._arrived:
            self._arrived.record(torch.cuda.current_stream(x.device))

    def forward(self, x: Tensor, dispatch: MoeDispatch) -> Tensor:
        """As the experts', on x's device."""
        if not self._on_host:
            self.fetch(x, dispatch)
        if self._arrived:
            self._arrived.synchronize()
        inputs, *parts = self._on_host
        self._on_host, self._arrived = (), None
        with ops.cpu_kernels():
            rows = self.experts(inputs, MoeDispatch(*parts))
        return rows.to(x.device)


def check_device(device: str, experts: str | None) -> torch.device:
    """The device to load to. Raises RequestError on an unknown name or one that this build or machine lacks."""
    if experts not in (None, "cpu"):
        raise RequestError(f"load: experts must be 'cpu' or None (got {experts!r})")
    if device == "cpu":
        return torch.device(device)
    if not re.fullmatch(r"cuda(:\d{1,3})?", device):
        raise RequestError(f"load: device must be 'cpu', 'cuda' or 'cuda:N' (got {device!r})")
    problem = str(ops.cuda_library()["error"])
    if not problem and not torch.cuda.is_available():
        problem = "torch has no CUDA support here"
    if not problem and (torch.device(device).index or 0) >= torch.cuda.device_count():
        problem = f"there are {torch.cuda.device_count()} GPUs"
    if problem:
        raise RequestError(f"load: device {device} cannot be used: {problem}")
    index = torch.device(device).index
    return torch.device("cuda", torch.cuda.current_device() if index is None else index)


def place(
    model: KimiModel, device: torch.device, *, experts_on_cpu: bool, cache_bytes: int
) -> None:
    """Moves every weight of `model` to `device` in place; with experts_on_cpu all but the routed experts.

    cache_bytes  what the latent cache will take beside them

    Raises RequestError for what has no CUDA kernel, MemoryPlanError, before anything is copied, if the device
    has no room; RuntimeError if there are no CUDA kernels.
    """
    widths = (model.config.kv_lora_rank, model.config.qk_rope_head_dim)
    if widths != MLA_WIDTHS:
        raise RequestError(
            f"load: kv_lora_rank and qk_rope_head_dim must be {' and '.join(map(str, MLA_WIDTHS))} on a GPU "
            f"(got {widths[0]} and {widths[1]})"
        )
    _check_room(device, device_bytes(model, experts_on_cpu=experts_on_cpu) + cache_bytes)
    for name, module in list(model.named_modules()):
        if isinstance(module, Int4Experts | Experts) and experts_on_cpu:
            model.get_submodule(name.rpartition(".")[0]).experts = HostExperts(module)
        elif isinstance(module, Int4Experts):
            module.gate, module.up, module.down = (
                tile_int4_experts(w, device) for w in (module.gate, module.up, module.down)
            )
        elif isinstance(module, Experts):
            for projection in ("gate", "up", "down"):
                matrices = [w.to(device, copy=True) for w in getattr(module, projection)]
                setattr(module, projection, matrices)
        elif isinstance(module, Int4Linear):
            module.int4 = tile_int4(module.int4, device)
        elif isinstance(module, Int8Linear):
            parts = (module.int8.weight, module.int8.weight_scale)
            module.int8 = Int8Weight(*(t.to(device, copy=True) for t in parts))
    for parameter in model.parameters():
        parameter.data = parameter.data.to(device, copy=True)  # a mapped file's are not aligned
    for module in model.modules():
        if isinstance(module, Attention):
            module.absorb()


def device_bytes(model: KimiModel, *, experts_on_cpu: bool) -> int:
    """Bytes of a model's weights on a GPU."""
    total = sum(p.numel() * p.element_size() for p in model.parameters())
    for module in model.modules():
        if isinstance(module, Attention):
            total += module.key_up_t.numel() * module.key_up_t.element_size()
        elif isinstance(module, Int4Linear):
            total += tiled_bytes(module.int4.out_features, module.int4.in_features)
        elif isinstance(module, Int8Linear):
            parts = (module.int8.weight, module.int8.weight_scale)
            total += sum(t.numel() * t.element_size() for t in parts)
        elif isinstance(module, Int4Experts) and not experts_on_cpu:
            for w in (module.gate, module.up, module.down):
                total += len(w) * tiled_bytes(w.out_features, w.in_features)
        elif isinstance(module, Experts) and not experts_on_cpu:
            total += sum(w.numel() * 2 for w in (*module.gate, *module.up, *module.down))
    return total


def _check_room(device: torch.device, nbytes: int) -> None:
    if device.type != "cuda":
        return
    free, _ = torch.cuda.mem_get_info(device)
    if nbytes + WORKING_BYTES > free:
        raise MemoryPlanError(
            f"memory: the model needs {bytes_text(nbytes + WORKING_BYTES)} on {device}, {bytes_text(free)} are free; "
            "experts='cpu' keeps the routed experts in host memory, max_context and max_batch size the cache"
        )
