"""Loading a folder: seconds until it answers, page faults of the first tokens, memory against the plan.

Peak memory is a process's own, so each run measures one folder.
"""

from __future__ import annotations

import os
import random
import resource
import time
from pathlib import Path
from typing import Any

from kimi_native.bench.load import OtherLoad
from kimi_native.checkpoint import Checkpoint
from kimi_native.errors import RequestError
from kimi_native.generate import Model, load
from kimi_native.plan import MemoryPlan, memory_plan

_NEW_TOKENS = 8  # after the prompt that fills the context


def measure(
    folder: str,
    *,
    cold: bool = False,
    prefetch: bool = True,
    max_context: int = 2048,
    dtype: str = "bfloat16",
    dense: str = "bf16",
    cache: str = "exact",
) -> dict[str, Any]:
    """Loads once, answers, fills the context; one row.

    cold         drop the folder's files from the system's cache first, as far as no process has them mapped
    max_context  of the model; a prompt fills it, so that memory reaches its peak
    dtype, dense, cache, prefetch  as of load()

    Row: before_weights_s (tokenizer, headers, plan, mapping), weights_s and load_s; gb_per_s of the weights; of
    the first and second token their seconds, minor and major page faults; peak_bytes resident, private_bytes of it that
    no file backs, and what the plan says of both (plan_bytes, plan_private_bytes).

    Raises what load() raises; RequestError on a context below 64 tokens.
    """
    if max_context < 64:
        raise RequestError(f"bench load: max_context must be at least 64 (got {max_context})")
    sizes = {
        "max_context": max_context,
        "max_batch": 1,
        "dtype": dtype,
        "dense": dense,
        "cache": cache,
    }
    if cold:
        _drop_from_cache(folder)
    others, started = OtherLoad(), time.perf_counter()
    reached: list[tuple[float, int]] = []
    model = load(
        folder,
        **sizes,
        prefetch=prefetch,
        progress=lambda done, total: reached.append((time.perf_counter() - started, total)),
    )
    load_s = time.perf_counter() - started
    (before, nbytes), after = reached[0], reached[-1][0]
    row = {
        "op": "load",
        "shape": Path(folder).resolve().name,
        "page_cache": "cold" if cold else "as it was",
        "prefetch": prefetch,
        **sizes,
        "bytes": nbytes,
        "before_weights_s": round(before, 3),
        "weights_s": round(after - before, 3),
        "load_s": round(load_s, 3),
        "gb_per_s": round(nbytes / 1e9 / max(after - before, 1e-9), 2),
        "others": others.share(),
        "first_token": _token(model),
        "second_token": _token(model),
    }
    ids = random.Random(0)
    prompt = [ids.randrange(model.config.vocab_size) for _ in range(max_context - _NEW_TOKENS)]
    model.generate(prompt, max_tokens=_NEW_TOKENS, ignore_eos=True)
    return row | _memory(memory_plan(Checkpoint.open(folder), **sizes))


def _token(model: Model) -> dict[str, Any]:
    """One prompt of one token, one token of answer."""
    before, started = resource.getrusage(resource.RUSAGE_SELF), time.perf_counter()
    model.generate([0], max_tokens=1)
    seconds, after = time.perf_counter() - started, resource.getrusage(resource.RUSAGE_SELF)
    return {
        "s": round(seconds, 3),
        "minor_faults": after.ru_minflt - before.ru_minflt,
        "major_faults": after.ru_majflt - before.ru_majflt,
    }


def _memory(plan: MemoryPlan) -> dict[str, Any]:
    status = {}
    for line in Path("/proc/self/status").read_text().splitlines():
        name, _, value = line.partition(":")
        status[name] = value.split()
    peak, file_backed = (int(status[name][0]) * 1024 for name in ("VmHWM", "RssFile"))
    return {
        "peak_bytes": peak,
        "plan_bytes": plan.needed_bytes + plan.mapped_bytes,
        "private_bytes": peak - file_backed,
        "plan_private_bytes": plan.needed_bytes,
    }


def _drop_from_cache(folder: str) -> None:
    for path in sorted(Path(folder).iterdir()):
        if not path.is_file():
            continue
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)  # what is not on the disk yet cannot be dropped
            os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(handle)
