"""What the inexact options of load() do to a checkpoint's logits.

The prompts are answered greedily with float32 activations and weights as published. Every option then reads the same
ids, and its logits before each id of the answers are compared with those of float32.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import log_softmax

from kimi_native import fp8_rows
from kimi_native.cache import PAGE_SIZE, LatentCache
from kimi_native.errors import RequestError
from kimi_native.generate import Model, load

PROMPTS = (
    "Who are you?",
    "What is 17 * 23? Use a calculator if you have one.",
    "Name three things that an expert in a mixture of experts might know.",
)
REFERENCE: Mapping[str, str] = {"dtype": "float32"}
VARIANTS: tuple[Mapping[str, str], ...] = (
    {},
    {"cache": "fp8"},
    {"compute": "int8"},
    {"dense": "int8"},
    {"dense": "int4"},
    {"dense": "int4", "compute": "int8", "cache": "fp8"},
)
_DEFAULTS = {"dtype": "bfloat16", "dense": "bf16", "compute": "exact", "cache": "exact"}


def compare(
    folder: str | None,
    *,
    prompts: Sequence[str] = PROMPTS,
    new_tokens: int = 64,
    report: Callable[[dict[str, Any]], None],
) -> None:
    """One row for each of VARIANTS, given to `report` when it is known. The models are loaded one after another.

    folder      a checkpoint; None: kimi-nano
    new_tokens  of each answer, at most

    Raises RequestError on no prompt or a count below 1, and what load raises.
    """
    if not prompts or new_tokens < 1:
        raise RequestError(
            "bench logits: prompts and new_tokens must be at least 1 "
            f"(got {len(prompts)} and {new_tokens})"
        )
    model = load(folder, max_batch=1, **REFERENCE)
    answers = model.generate(list(prompts), temperature=0.0, max_tokens=new_tokens)
    texts = [
        (model.prompt_ids(prompt), answer.ids)
        for prompt, answer in zip(prompts, answers, strict=True)
    ]
    expected = _logits(model, texts, torch.float32)
    del model  # one model in memory at a time
    for options in VARIANTS:
        chosen = {**_DEFAULTS, **options}
        rows = fp8_rows.DTYPE if chosen["cache"] == "fp8" else torch.bfloat16
        actual = _logits(load(folder, max_batch=1, **chosen), texts, rows)
        report({"op": "logits", **chosen, **differences(expected, actual)})


def _logits(
    model: Model, texts: Sequence[tuple[list[int], list[int]]], rows: torch.dtype
) -> Tensor:
    """[ids of all answers, vocab_size] float32: the logits before each id of an answer."""
    longest = max(len(prompt) + len(answer) for prompt, answer in texts)
    found = []
    with model.held_network() as network:
        cache = LatentCache(
            network.config, max_tokens=-(-longest // PAGE_SIZE) * PAGE_SIZE, dtype=rows
        )
        for prompt, answer in texts:
            seq = cache.new_sequence()
            found.append(network.prefill(torch.tensor(prompt), cache, seq)[None])
            found += [network.decode(torch.tensor([i]), cache, [seq]) for i in answer[:-1]]
            cache.free(seq)
    return torch.cat(found)


def differences(expected: Tensor, actual: Tensor) -> dict[str, Any]:
    """How far logits [positions, vocab_size] are from those expected.

    rms        median over positions of the root mean square error, in units of the standard deviation of the row
    kl         mean Kullback-Leibler divergence in nats a position; kl_error: its standard error
    same_best  positions with the same likeliest id, of `tokens`
    """
    expected, actual = expected.double(), actual.double()
    rms = (actual - expected).square().mean(1).sqrt() / expected.std(1)
    p, q = log_softmax(expected, 1), log_softmax(actual, 1)
    kl = (p.exp() * (p - q)).sum(1)
    return {
        "tokens": len(expected),
        "rms": float(rms.median()),
        "kl": float(kl.mean()),
        "kl_error": float(kl.std() / len(kl) ** 0.5) if len(kl) > 1 else None,
        "same_best": int((expected.argmax(1) == actual.argmax(1)).sum()),
    }


def table(rows: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """Lines of a table."""
    yield "dense  compute  cache  dtype     error of a row's logits  divergence, nats     same best id"
    for r in rows:
        error = "" if r["kl_error"] is None else f" ± {r['kl_error']:.1g}"
        yield (
            f"{r['dense']:<5}  {r['compute']:<7}  {r['cache']:<5}  {r['dtype']:<8}  "
            f"{r['rms']:>20.2%} rms  {r['kl']:>8.2g}{error:<11}  {r['same_best']} of {r['tokens']}"
        )
