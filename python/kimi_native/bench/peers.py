"""Other engines and ours on the same problem in the same process, taking turns; the ratio of their times is printed.

A peer that is not installed is skipped by name: none is a dependency of this package. Before timing, a peer's result
is compared with ours. What is computed: `compute` is "exact" for INT4 weights times unrounded activations, "w4a8" where
the engine rounds activations to 8 bits (not the same numbers), as ours does with "int8"; "bf16" and "fp32" for products
in these formats.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from kimi_native import ops
from kimi_native.bench import peer_dense, peer_int4, peer_mla, peer_moe
from kimi_native.bench.load import OtherLoad
from kimi_native.bench.peer_llama import compare_llama
from kimi_native.bench.problem import OurCalls, PeerMissing, Problem
from kimi_native.bench.rows import Limits
from kimi_native.bench.turns import pair_rows, take_turns
from kimi_native.checkpoint import Checkpoint
from kimi_native.errors import RequestError

# Root-mean-square error that rounding alone explains, with room: bf16 keeps 8 bits, w4a8 seven per 32 activations.
TOLERANCES = {"exact": 0.02, "bf16": 0.02, "fp32": 0.02, "w4a8": 0.03, "int8": 0.03}

# Op -> its problems, as (what makes it, shape). "e2e" is a whole model.
PROBLEMS: dict[str, Callable[[], Iterator[tuple[Callable[[], Problem], str]]]] = {
    "int4_gemm": peer_int4.problems,
    "moe_layer": peer_moe.problems,
    "bf16_gemm": peer_dense.bf16_problems,
    "int8_gemm": peer_dense.int8_problems,
    "mla_decode": peer_mla.problems,
}
OPS = (*PROBLEMS, "e2e")


class Contestant(Protocol):
    """An engine's way to solve a problem. calls_per_run: how often one call of it does."""

    name: str
    compute: str
    calls_per_run: int

    def __init__(self, problem: Any, threads: int) -> None: ...

    def set_tokens(self, tokens: int) -> None: ...

    def __call__(self, call: int) -> Tensor: ...


@dataclass(frozen=True)
class Selection:
    """What to compare: empty means everything.

    ops, shape, peer  names of ops; parts of a shape's text and of a peer's name
    tokens            token counts in place of each op's own
    budget_s          seconds for one problem and one peer
    model, gguf       checkpoint folder and GGUF file for the op "e2e"; dense as of load()
    compute           as of load(), of our INT4 products; other ops stay exact
    """

    ops: tuple[str, ...] = ()
    peer: str = ""
    shape: str = ""
    tokens: tuple[int, ...] | None = None
    budget_s: float = 2.0
    quick: bool = False
    model: str | None = None
    gguf: str | None = None
    dense: str = "bf16"
    compute: str = "exact"


def check(selection: Selection) -> None:
    """Raises RequestError on an unknown op, a budget of no time, or when e2e lacks one of its two files; what
    Checkpoint.open raises."""
    unknown = [op for op in selection.ops if op not in OPS]
    if unknown:
        raise RequestError(
            f"bench peers: op must be one of {', '.join(OPS)} (got {', '.join(unknown)})"
        )
    if (selection.model is None) != (selection.gguf is None):
        raise RequestError("bench peers: e2e needs both --model and --gguf (got one)")
    if "e2e" in selection.ops and selection.model is None:
        raise RequestError("bench peers: e2e needs --model and --gguf (got none)")
    if not 0 < selection.budget_s < math.inf:
        raise RequestError(
            f"bench peers: budget must be positive seconds (got {selection.budget_s})"
        )
    if selection.model is not None:
        Checkpoint.open(selection.model)
        if not Path(selection.gguf).is_file():
            raise RequestError(f"bench peers: gguf must be a file (got {selection.gguf})")


def compare(
    selection: Selection, limits: Limits, *, skipped: Callable[[str], None]
) -> Iterator[dict[str, Any]]:
    """Yields a row of ours, then the peer's with peer and ratio, for every problem and peer.

    skipped  called with a sentence for each peer that is not installed

    Raises RuntimeError if a peer's result is not ours, RequestError if no case is as selected.
    """
    ops.set_num_threads(limits.threads)
    torch.set_num_threads(limits.threads)
    missing: set[str] = set()
    found = False

    def miss(error: PeerMissing) -> None:
        if str(error) not in missing:
            missing.add(str(error))
            skipped(f"skipped: {error}")

    with torch.no_grad():
        for op in selection.ops or OPS:
            for row in _compare_op(op, selection, limits, miss):
                found = True
                yield row
    if not found and not missing:
        raise RequestError(
            f"bench peers: no case matches (shape={selection.shape}, peer={selection.peer})"
        )


def _compare_op(
    op: str, selection: Selection, limits: Limits, miss: Callable[[PeerMissing], None]
) -> Iterator[dict[str, Any]]:
    if op == "e2e":
        if selection.model is not None:
            yield from _compare_e2e(selection, limits, miss)
        return
    for make, shape in PROBLEMS[op]():
        # Problems named "tiny" exist for tests.
        if selection.shape not in shape or (not selection.shape and shape.startswith("tiny")):
            continue
        problem = make()
        if selection.compute in problem.computes:
            problem.compute = selection.compute
        for peer in problem.peers:
            if selection.peer not in peer.name:
                continue
            try:
                contestant = peer(problem, limits.threads)
            except PeerMissing as error:
                miss(error)
                continue
            for tokens in problem.token_counts(selection.tokens, quick=selection.quick):
                yield from _compare_tokens(problem, contestant, tokens, limits, selection.budget_s)
            del contestant  # its gigabyte of weights, before the next one's


def _compare_tokens(
    problem: Problem, contestant: Contestant, tokens: int, limits: Limits, budget_s: float
) -> list[dict[str, Any]]:
    problem.set_tokens(tokens)
    contestant.set_tokens(tokens)
    ours = OurCalls(problem)
    _check_result(problem, ours(0), contestant)
    load = OtherLoad()
    samples = take_turns(ours, contestant, contestant.calls_per_run, budget_s)
    return pair_rows(
        (problem.op, problem.shape, tokens),
        samples,
        limits=limits,
        nbytes=problem.nbytes,
        flops=problem.flops,
        limbs=problem.limbs,
        isa=ops.active_isa(),
        compute=problem.compute,
        peer=contestant.name,
        peer_compute=contestant.compute,
        others=load.share(),
    )


def _check_result(problem: Problem, result: Tensor, contestant: Contestant) -> None:
    """Within a few percent in the root mean square: rounding passes, another product does not."""
    ours, theirs = result.float(), contestant(0).float()
    same_shape = ours.shape == theirs.shape
    error = float((ours - theirs).norm() / ours.norm()) if same_shape else float("nan")
    if not error <= max(TOLERANCES[contestant.compute], TOLERANCES[problem.compute]):
        raise RuntimeError(
            f"bench peers: {contestant.name} must give our result for {problem.op} {problem.shape} "
            f"(got {list(theirs.shape)} for {list(ours.shape)}, relative difference {error:.3g})"
        )


def _compare_e2e(
    selection: Selection, limits: Limits, miss: Callable[[PeerMissing], None]
) -> Iterator[dict[str, Any]]:
    try:
        yield from compare_llama(
            selection.model,
            selection.gguf,
            limits=limits,
            prompts=list(selection.tokens or ((32,) if selection.quick else (128,))),
            dense=selection.dense,
            compute=selection.compute,
            budget_s=selection.budget_s,
        )
    except PeerMissing as error:
        miss(error)
