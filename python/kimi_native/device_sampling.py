"""One token for each row of a step's logits, wherever the logits are.

On a GPU the op `sample` chooses: a few numbers a row go there and one id comes back, instead of every logit. It follows
sampling.sample, with the same uniform number, so a seed means the same on both; rows that need more than it does,
penalties or logprobs, are copied and sampled here, and so are rows that it refuses, for the error that names them.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from kimi_native import ops
from kimi_native.checks import check_tensor
from kimi_native.errors import KimiNativeError, NonFiniteLogitsError
from kimi_native.sampling import (
    SampledToken,
    SamplingParams,
    TokenHistory,
    check_allowed,
    has_penalty,
    sample,
    uniform,
)


class Draw(NamedTuple):
    """What sampling.sample takes besides the logits."""

    params: SamplingParams
    seed: int
    position: int
    history: TokenHistory | None = None
    allowed: np.ndarray | None = None


_UNUSED = Draw(SamplingParams(temperature=0), 0, 0)  # for a row that is not drawn on the device


def sample_rows(
    logits: Tensor, draws: Mapping[int, Draw]
) -> dict[int, SampledToken | KimiNativeError]:
    """A token for each row in `draws`, or the NonFiniteLogitsError that ends it.

    logits  [rows, vocab]  float32

    Raises ValueError on a shape, TypeError on a dtype.
    """
    there = {}
    if ops.uses_cuda(logits.device) and ops.active_backend() == "native":
        there = _sample_on_device(logits, {r: d for r, d in draws.items() if _is_plain(d)})
    return {row: there.get(row) or _sample_here(logits[row], d) for row, d in draws.items()}


def _is_plain(draw: Draw) -> bool:
    return draw.params.logprobs is None and not has_penalty(draw.params, draw.history)


def _sample_here(row: Tensor, draw: Draw) -> SampledToken | KimiNativeError:
    try:
        return sample(
            row.cpu(),
            draw.params,
            seed=draw.seed,
            position=draw.position,
            history=draw.history,
            allowed=draw.allowed,
        )
    except NonFiniteLogitsError as error:
        return error


def _sample_on_device(logits: Tensor, draws: Mapping[int, Draw]) -> dict[int, SampledToken]:
    """Tokens of the rows that have finite logits."""
    if not draws:
        return {}
    check_tensor("sample", "logits", logits, (None, None), torch.float32)
    rows, vocab = logits.shape
    every = [draws.get(row, _UNUSED) for row in range(rows)]
    options = torch.tensor([_options(d) for d in every], dtype=torch.float64)
    top_k = torch.tensor([d.params.top_k for d in every], dtype=torch.int32)
    ids = torch.empty(rows, dtype=torch.int32, device=logits.device)
    inputs = (_allowed_bits(every, vocab), options, top_k)
    inputs = [None if x is None else x.to(logits.device, non_blocking=True) for x in inputs]
    ops.call_with_workspace("sample", (logits, *inputs, ids), rows, vocab)
    chosen = ids.tolist()
    return {row: SampledToken(chosen[row]) for row in draws if chosen[row] >= 0}


def _options(draw: Draw) -> tuple[float, float, float, float]:
    params = draw.params
    drawn = uniform(draw.seed, draw.position) if params.temperature > 0 else 0.0
    return params.temperature, params.top_p, params.min_p, drawn


def _allowed_bits(draws: list[Draw], vocab: int) -> Tensor | None:
    """[rows, ceil(vocab / 8)] uint8, id i in bit i % 8; None if everything is allowed everywhere."""
    if all(d.allowed is None for d in draws):
        return None
    bits = np.full((len(draws), -(-vocab // 8)), 255, dtype=np.uint8)
    for row, draw in zip(bits, draws, strict=True):
        if draw.allowed is not None:
            check_allowed(draw.allowed, vocab)
            row[:] = np.packbits(draw.allowed, bitorder="little")
    return torch.from_numpy(bits)
