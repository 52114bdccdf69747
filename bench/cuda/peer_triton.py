"""The plain Triton kernels beside ours; of a few settings each takes the one that is fastest here."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
import torch.nn.functional as F
from peer_torch import Missing
from problems import SCALE, MlaDecode, MoeExperts
from timing import Solve
from torch import Tensor


def _triton(name: str):
    try:
        return __import__(name)
    except ImportError as error:
        raise Missing(f"triton must be installed ({error})") from None


def fastest(candidates: Iterable[Callable[[], Solve]], device: torch.device) -> Solve:
    """The quickest of several; one that the compiler or the device refuses is left out."""
    best: tuple[float, Solve] | None = None
    refusal: Exception | None = None
    for make in candidates:
        try:
            solve = make()
            solve(0)
            if device.type == "cpu":
                return solve
            seconds = _seconds(solve)
        except (
            Exception
        ) as error:  # Triton raises its own kinds: out of shared memory, no such product
            refusal = error
            continue
        if best is None or seconds < best[0]:
            best = (seconds, solve)
    if best is None:
        raise Missing(f"no setting of the Triton kernel runs here ({refusal})")
    return best[1]


def _seconds(solve: Solve) -> float:
    times = []
    for call in range(5):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        solve(call)
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end))
    return sorted(times)[len(times) // 2]


# Rows, columns and depth of a block; warps; stages.
FEW = [((16, 64, 128), 4, 3), ((16, 32, 128), 4, 4), ((16, 128, 64), 4, 4)]
MANY = [((64, 128, 64), 4, 3), ((128, 128, 32), 8, 3), ((64, 64, 64), 4, 4)]


def grouped_int4(problem: MoeExperts) -> Solve:
    kernel = _triton("triton_moe")
    device, weights = problem.x.device, problem.weights
    rows = problem.tokens * weights.shape.topk
    identity = torch.arange(rows, dtype=torch.int32, device=device)

    def with_setting(blocks: tuple[int, int, int], warps: int, stages: int) -> Solve:
        plans = [kernel.plan(d.expert_offsets, rows, blocks[0]) for d in problem.dispatches]
        options = {"num_warps": warps, "num_stages": stages}

        def solve(call: int) -> Tensor:
            planned = plans[call % problem.num_calls]
            index = problem.dispatch(call).token_index
            both = kernel.grouped_int4(
                *(problem.x, index, weights.gate_up, planned, blocks),
                out_dtype=torch.bfloat16,
                **options,
            )
            gate, up = both.chunk(2, dim=-1)
            return kernel.grouped_int4(
                *(F.silu(gate) * up, identity, weights.down, planned, blocks),
                out_dtype=torch.float32,
                **options,
            )

        return solve

    settings = FEW if problem.tokens * weights.shape.topk <= 16 * weights.shape.experts else MANY
    return fastest([lambda s=s: with_setting(*s) for s in settings], device)


def mla_decode(problem: MlaDecode) -> Solve:
    if problem.fp8:
        raise Missing("the plain Triton kernel reads bf16 rows")
    kernel = _triton("triton_mla")
    device = problem.q.device
    most = max(1, problem.length // 128)
    programs = problem.tokens * -(-problem.heads // kernel.HEADS)
    wanted = {min(most, max(1, -(-n // programs))) for n in (132, 264, 528)}

    def with_setting(pieces: int, warps: int) -> Solve:
        return lambda call: kernel.mla_decode(
            *(problem.q, problem.cache(call), problem.page_table, problem.seq_lens),
            softmax_scale=SCALE,
            pieces=pieces,
            num_warps=warps,
        )

    settings = [(pieces, warps) for pieces in sorted(wanted) for warps in (4, 8)]
    return fastest([lambda s=s: with_setting(*s) for s in settings], device)
