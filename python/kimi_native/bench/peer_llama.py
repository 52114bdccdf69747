"""A whole model beside llama.cpp (llama-cpp-python) on a GGUF of the same shape: prefill, then decode at that depth.

llama.cpp multiplies with activations rounded to 8 bits ("w4a8"). Its rows count our bytes and FLOPs: the ratio compares
the times of one task.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

from kimi_native import ops
from kimi_native.bench import llama_worker
from kimi_native.bench.e2e import LoadedModel, decode_figures, prefill_figures, with_rate
from kimi_native.bench.load import OtherLoad
from kimi_native.bench.problem import PeerMissing
from kimi_native.bench.rows import Limits
from kimi_native.bench.turns import REST_SECONDS, pair_rows

STEPS = 8  # tokens decoded in a turn
MOST_TURNS = 20


def compare_llama(
    folder: str,
    gguf: str,
    *,
    limits: Limits,
    prompts: list[int],
    dense: str,
    compute: str,
    budget_s: float,
) -> Iterator[dict[str, Any]]:
    """Rows of ours and llama.cpp's for each prompt length: the prefill, and decoding after it.

    folder, gguf    one model's shape in both forms
    dense, compute  as of load()
    budget_s        seconds for one comparison; each engine gets two turns in any case

    Raises PeerMissing without llama-cpp-python, RuntimeError if llama.cpp ends, with what it said last.
    """
    longest = max(prompts) + STEPS + 2
    theirs = Llama(gguf, threads=limits.threads, max_context=longest)
    try:
        ours = LoadedModel(folder, max_context=longest, dense=dense, compute=compute)
        forms = {"dense": dense, "compute": compute}
        for tokens in prompts:
            yield from _compare_prompt(ours, theirs, tokens, limits, forms, budget_s)
    finally:
        theirs.close()


def _compare_prompt(
    ours: LoadedModel,
    theirs: Llama,
    tokens: int,
    limits: Limits,
    forms: dict[str, str],
    budget_s: float,
) -> Iterator[dict[str, Any]]:
    common = {
        "limits": limits,
        "limbs": True,
        "isa": ops.active_isa(),
        "peer": "llama-cpp",
        "peer_compute": "w4a8",
        **forms,
    }
    load = OtherLoad([theirs.pid])
    samples = _turns(
        lambda: [ours.prefill_seconds(tokens)], lambda: [theirs.prefill_seconds(tokens)], budget_s
    )
    case = ("e2e_prefill", ours.folder.name, tokens)
    figures = {**prefill_figures(ours, tokens), "others": load.share()}
    for row in pair_rows(case, samples, **figures, **common):
        yield with_rate(row)
    load = OtherLoad([theirs.pid])
    samples = _turns(
        lambda: ours.decode_seconds(tokens, STEPS),
        lambda: theirs.decode_seconds(tokens, STEPS),
        budget_s,
    )
    case = ("e2e_decode", f"{ours.folder.name} depth={tokens}", 1)
    figures = {**decode_figures(ours, tokens), "others": load.share(), "depth": tokens}
    for row in pair_rows(case, samples, **figures, **common):
        yield with_rate(row)


def _turns(
    ours: Callable[[], list[float]], theirs: Callable[[], list[float]], budget_s: float
) -> tuple[list[float], list[float]]:
    """Seconds that each engine's calls gave, in turns, two at least."""
    samples: tuple[list[float], list[float]] = ([], [])
    until = time.perf_counter() + budget_s
    for turn in range(MOST_TURNS):
        for engine, seconds in zip((ours, theirs), samples, strict=True):
            time.sleep(REST_SECONDS)
            seconds += engine()
        if turn > 0 and time.perf_counter() > until:
            break
    return samples


class Llama:
    """llama.cpp in a process of its own (llama_worker.py): it ends that process when it meets what it cannot do."""

    def __init__(self, gguf: str, *, threads: int, max_context: int) -> None:
        command = [sys.executable, "-P", "-m", llama_worker.__name__]
        self._process = subprocess.Popen(
            [*command, gguf, str(threads), str(max_context)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, "GGML_NO_BACKTRACE": "1"},
        )
        answer = self._answer()
        if "missing" in answer:
            raise PeerMissing(f"llama-cpp-python must be installed ({answer['missing']})")

    @property
    def pid(self) -> int:
        return self._process.pid

    def prefill_seconds(self, tokens: int) -> float:
        """As LoadedModel.prefill_seconds."""
        return self._ask({"prefill": tokens})[0]

    def decode_seconds(self, depth: int, steps: int) -> list[float]:
        """As LoadedModel.decode_seconds."""
        return self._ask({"depth": depth, "steps": steps})

    def close(self) -> None:
        """Ends the process."""
        self._process.stdin.close()
        self._process.wait()
        for stream in (self._process.stdout, self._process.stderr):
            stream.close()

    def _ask(self, question: dict[str, int]) -> list[float]:
        self._process.stdin.write(json.dumps(question) + "\n")
        self._process.stdin.flush()
        return self._answer()["seconds"]

    def _answer(self) -> dict[str, Any]:
        line = self._process.stdout.readline()
        if not line:
            said = self._process.stderr.read().strip().splitlines()
            raise RuntimeError(
                f"llama.cpp: must answer (it ended: {said[-1] if said else 'no word'})"
            )
        return json.loads(line)
