"""What this machine offers and whether every kernel computes what the reference says.

Nothing here fails: what cannot be found out is reported as None, what is broken as a failed check.
"""

from __future__ import annotations

import ctypes.util
import os
import platform
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from kimi_native import __version__
from kimi_native.machine import (
    available_memory,
    cpu_quota,
    meminfo,
    memory_limit,
    read_text,
    usable_cores,
)

MEASURED_BYTES = 512 << 20  # far beyond a last level cache
QUICK_BYTES = 64 << 20

_FAILURES = (ArithmeticError, RuntimeError, TypeError, ValueError)


def examine(*, quick: bool = False, root: str | Path = "/") -> dict[str, Any]:
    """The report of `kimi-native doctor`: nested dicts of plain values, and "ok".

    quick  measure the memory bandwidth on 64 MiB, which a large cache may hold, instead of 512 MiB
    root   where proc and sys are mounted
    """
    root = Path(root)
    native = _native_settings()
    threads = native.get("threads") or usable_cores()
    checks = self_check() if "error" not in native else []
    available = _available(root)
    measured_bytes = QUICK_BYTES if quick else MEASURED_BYTES
    if available is not None:
        measured_bytes = min(measured_bytes, max(available // 4, 1 << 20))
    return {
        "version": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "cpu": {
            "model": _cpu_model(root),
            "cores_online": os.cpu_count(),
            "cores_usable": usable_cores(),
            "cores_cgroup_quota": cpu_quota(root),
            "numa_nodes": len(list(root.glob("sys/devices/system/node/node[0-9]*"))) or None,
        },
        "kernels": native,
        "memory": {
            "total_bytes": meminfo(root, "MemTotal"),
            "available_bytes": available,
            "cgroup_limit_bytes": memory_limit(root),
            "transparent_huge_pages": _chosen(
                read_text(root / "sys/kernel/mm/transparent_hugepage/enabled")
            ),
            "read_bandwidth": read_bandwidth(measured_bytes, threads),
        },
        "cuda": _cuda(root),
        "self_check": checks,
        "ok": bool(checks) and all(check["ok"] for check in checks),
    }


# ---- kernels --------------------------------------------------------------------------------------------------------


def _native_settings() -> dict[str, Any]:
    forced = os.environ.get("KIMI_NATIVE_CPU_ISA")
    try:
        from kimi_native import ops

        return {
            "isa": ops.active_isa(),
            "supported_isas": ops.supported_isas(),
            "KIMI_NATIVE_CPU_ISA": forced,
            "backend": ops.active_backend(),
            "threads": ops.num_threads(),
            "cpu_features": ops.cpu_features(),
        }
    except (ImportError, RuntimeError) as error:
        return {"error": str(error), "KIMI_NATIVE_CPU_ISA": forced}


def self_check() -> list[dict[str, Any]]:
    """Runs every op once, natively and by the reference, on tiny inputs: {"op", "ok", "result"} of each."""
    from kimi_native import ops

    return [_check_op(ops, name) for name in ops.__all__]


def _check_op(ops: Any, name: str) -> dict[str, Any]:
    case = _CASES.get(name)
    if case is None:
        return {"op": name, "ok": False, "result": "failed: the doctor has no check for it"}
    try:
        with ops.backend("reference"):
            expected = case(ops, torch.Generator().manual_seed(0))
        with ops.backend("native"):
            actual = case(ops, torch.Generator().manual_seed(0))
    except _FAILURES as error:
        return {"op": name, "ok": False, "result": f"failed: {error}"}
    for a, e in zip(actual, expected, strict=True):
        if a.shape != e.shape or not bool(_close(a, e)):
            return {"op": name, "ok": False, "result": "failed: differs from the reference"}
    return {"op": name, "ok": True, "result": "ok"}


def _close(actual: Tensor, expected: Tensor) -> Tensor:
    """Equal integers; floats within 1e-4 of the largest value.

    The inputs are chosen so that activations are exact in the kernels' fixed point. What is left are at most 64 fp32
    roundings of sums whose absolute values exceed the result's largest by less than ten: 64 * 2**-24 * 10 < 4e-5.
    """
    if not actual.is_floating_point():
        return (actual == expected).all()
    return ((actual - expected).abs() <= 1e-4 * expected.abs().max()).all()


_TOKENS, _IN, _OUT, _EXPERTS, _TOPK = 3, 64, 32, 4, 2


def _activations(g: torch.Generator, *shape: int) -> Tensor:
    """Multiples of 1/64 in (-1, 1]."""
    return torch.randint(-63, 65, shape, generator=g).float() / 64


def _int4(ops: Any, g: torch.Generator, out: int = _OUT, in_: int = _IN) -> Any:
    packed = torch.randint(-(2**31), 2**31, (out, in_ // 8), generator=g).to(torch.int32)
    scale = (torch.randint(1, 65, (out, in_ // 32), generator=g).float() / 64).bfloat16()
    return ops.Int4Weight(packed, scale)


def _experts(ops: Any, g: torch.Generator) -> Any:
    return ops.Int4ExpertWeights([_int4(ops, g) for _ in range(_EXPERTS)])


def _dispatch(ops: Any) -> Any:
    """Rows of a fixed choice, so that the check of one op does not rest on another: expert 3 gets none."""
    ids = torch.tensor([[0, 2], [2, 1], [0, 1]])
    order = sorted(range(6), key=lambda pair: (int(ids.flatten()[pair]), pair))
    row_index = torch.empty(6, dtype=torch.int32)
    row_index[order] = torch.arange(6, dtype=torch.int32)
    token_index = torch.tensor([pair // _TOPK for pair in order], dtype=torch.int32)
    offsets = torch.tensor([0, 2, 4, 6, 6], dtype=torch.int32)
    return ops.MoeDispatch(token_index, row_index.view(_TOKENS, _TOPK), offsets)


def _bf16_gemm(ops: Any, g: torch.Generator) -> tuple[Tensor, ...]:
    weight = _activations(g, _OUT, _IN).bfloat16()
    return (ops.bf16_gemm(_activations(g, _TOKENS, _IN), weight),)


def _int4_gemm(ops: Any, g: torch.Generator) -> tuple[Tensor, ...]:
    """A few tokens; and enough of them for matrix tiles."""
    x, weight = _activations(g, 4 * _TOKENS, _IN), _int4(ops, g)
    return ops.int4_gemm(x[:_TOKENS], weight), ops.int4_gemm(x, weight)


def _int4_grouped_gemm(ops: Any, g: torch.Generator) -> tuple[Tensor, ...]:
    x = _activations(g, _TOKENS * _TOPK, _IN)
    return (ops.int4_grouped_gemm(x, _dispatch(ops), _experts(ops, g)),)


def _int4_grouped_swiglu(ops: Any, g: torch.Generator) -> tuple[Tensor, ...]:
    x = _activations(g, _TOKENS, _IN)
    return (ops.int4_grouped_swiglu(x, _dispatch(ops), _experts(ops, g), _experts(ops, g)),)


def _int8_gemm(ops: Any, g: torch.Generator) -> tuple[Tensor, ...]:
    weight = torch.randint(-127, 128, (_OUT, _IN), generator=g).to(torch.int8)
    scale = (torch.randint(1, 65, (_OUT, _IN // 32), generator=g).float() / 64).bfloat16()
    return (ops.int8_gemm(_activations(g, _TOKENS, _IN), ops.Int8Weight(weight, scale)),)


def _int4_quantize(ops: Any, g: torch.Generator) -> tuple[Tensor, ...]:
    weight = ops.int4_quantize(_activations(g, _OUT, _IN).bfloat16())
    return weight.weight_packed, weight.weight_scale


def _mla_decode(ops: Any, g: torch.Generator) -> tuple[Tensor, ...]:
    page_table = torch.tensor([[2, 0], [1, 2**31 - 1]], dtype=torch.int32)
    seq_lens = torch.tensor([67, 5], dtype=torch.int32)
    q, cache = _activations(g, 2, 4, 48), _activations(g, 3, 64, 48)
    options = {"kv_lora_rank": 32, "softmax_scale": 0.125}
    return (ops.mla_decode(q, cache, page_table, seq_lens, **options),)


def _moe_combine(ops: Any, g: torch.Generator) -> tuple[Tensor, ...]:
    rows = _activations(g, _TOKENS * _TOPK, _OUT)
    weights = _activations(g, _TOKENS, _TOPK).abs()
    return (ops.moe_combine(rows, _dispatch(ops), weights, _activations(g, _TOKENS, _OUT)),)


def _moe_dispatch(ops: Any, g: torch.Generator) -> tuple[Tensor, ...]:
    ids = torch.tensor([[0, 2], [2, 1], [0, 1]], dtype=torch.int32)
    result = ops.moe_dispatch(ids, _EXPERTS)
    return result.token_index, result.row_index, result.expert_offsets


def _moe_route(ops: Any, g: torch.Generator) -> tuple[Tensor, ...]:
    logits = torch.randperm(_TOKENS * 8, generator=g).view(_TOKENS, 8) / 8.0 - 1.5
    return ops.moe_route(logits, torch.arange(8) / 64.0, topk=_TOPK, routed_scaling_factor=2.5)


def _rms_norm(ops: Any, g: torch.Generator) -> tuple[Tensor, ...]:
    weight = _activations(g, _IN).bfloat16()
    return (ops.rms_norm(_activations(g, _TOKENS, _IN), weight, eps=1e-6),)


def _add_rms_norm(ops: Any, g: torch.Generator) -> tuple[Tensor, ...]:
    x, residual = _activations(g, _TOKENS, _IN), _activations(g, _TOKENS, _IN)
    return ops.add_rms_norm(x, residual, _activations(g, _IN).bfloat16(), eps=1e-6)


def _rope_append(ops: Any, g: torch.Generator) -> tuple[Tensor, ...]:
    q, latent = _activations(g, _TOKENS, 2, 8), _activations(g, _TOKENS, 16)
    cos, sin = torch.rand(2, _TOKENS, 4, generator=g)
    cache, q_out = torch.zeros(1, 4, 24), torch.zeros(_TOKENS, 2, 8)
    slots = torch.tensor([2, 0, 3])
    ops.rope_append(q, latent, _activations(g, _TOKENS, 8), cos, sin, slots, cache, q_out)
    return q_out, cache


def _swiglu(ops: Any, g: torch.Generator) -> tuple[Tensor, ...]:
    return (ops.swiglu(_activations(g, _TOKENS, _IN), _activations(g, _TOKENS, _IN)),)


_CASES: dict[str, Callable[[Any, torch.Generator], tuple[Tensor, ...]]] = {
    "add_rms_norm": _add_rms_norm,
    "bf16_gemm": _bf16_gemm,
    "int4_gemm": _int4_gemm,
    "int4_grouped_gemm": _int4_grouped_gemm,
    "int4_grouped_swiglu": _int4_grouped_swiglu,
    "int4_quantize": _int4_quantize,
    "int8_gemm": _int8_gemm,
    "mla_decode": _mla_decode,
    "moe_combine": _moe_combine,
    "moe_dispatch": _moe_dispatch,
    "moe_route": _moe_route,
    "rms_norm": _rms_norm,
    "rope_append": _rope_append,
    "swiglu": _swiglu,
}


# ---- processor and memory -------------------------------------------------------------------------------------------


def read_bandwidth(nbytes: int, threads: int, passes: int = 5) -> dict[str, Any]:
    """Gigabytes per second that summing a numpy array reads, best of some passes: a lower bound of the memory's."""
    values = np.ones(nbytes // 8, dtype=np.int64)  # written, hence backed by memory of its own
    parts = np.array_split(values, threads)

    def best(read: Callable[[], object]) -> float:
        seconds = []
        for _ in range(passes):
            started = time.perf_counter()
            read()
            seconds.append(time.perf_counter() - started)
        return round(nbytes / min(seconds) / 1e9, 2)

    one = best(values.sum)
    with ThreadPoolExecutor(threads) as pool:
        many = best(lambda: list(pool.map(np.sum, parts)))
    return {
        "one_thread_gb_per_s": one,
        "all_threads_gb_per_s": many,
        "threads": threads,
        "measured": f"sum of {nbytes >> 20} MiB of int64 by numpy, best of {passes} passes",
    }


def _cpu_model(root: Path) -> str | None:
    for line in (read_text(root / "proc/cpuinfo") or "").splitlines():
        name, _, value = line.partition(":")
        if name.strip() in ("model name", "Model"):
            return value.strip()
    return platform.processor() or None


def _available(root: Path) -> int | None:
    try:
        return available_memory(root)
    except RuntimeError:
        return None


def _chosen(text: str | None) -> str | None:
    """The bracketed word of "always [madvise] never"."""
    if text is None or "[" not in text:
        return None
    return text.partition("[")[2].partition("]")[0]


def _cuda(root: Path) -> dict[str, Any]:
    names = []
    for file in sorted(root.glob("proc/driver/nvidia/gpus/*/information")):
        for line in (read_text(file) or "").splitlines():
            name, _, value = line.partition(":")
            if name == "Model":
                names.append(value.strip())
    driver = read_text(root / "proc/driver/nvidia/version")
    return {
        **_cuda_kernels(),
        "driver": driver.splitlines()[0].strip() if driver else None,
        "driver_library": ctypes.util.find_library("cuda"),
        "gpus": names,
    }


def _cuda_kernels() -> dict[str, Any]:
    try:
        from kimi_native import ops

        library = ops.cuda_library()
    except ImportError as error:
        return {"kernels": str(error), "architectures": []}
    return {
        "kernels": library["error"] or "ready",
        "architectures": library["architectures"],
    }
