"""One decode step of a slice of K2, as the engine makes it, and the tokens per second of a conversation, against what
the bytes of weights and cache that a step reads take at the rate of a copy."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from limits import Limits
from torch import Tensor

import kimi_native as kn
from kimi_native.bench.rows import median_and_spread
from kimi_native.cache import CachedSequence, LatentCache
from kimi_native.checkpoint import Checkpoint
from kimi_native.config import KimiConfig
from kimi_native.loader import load_model
from kimi_native.make_checkpoint import make_checkpoint
from kimi_native.model import KimiModel
from kimi_native.placement import place
from kimi_native.recorded import RecordedModel

DEPTH, BATCHES, STEPS, NEW_TOKENS = 4096, (1, 8, 32), 40, 128
PROMPT_TOKENS = 32


def step_rows(limits: Limits, device: torch.device) -> Iterator[dict[str, Any]]:
    """Makes a checkpoint in a folder of its own, loads it, and times it."""
    cuda = device.type == "cuda"
    with tempfile.TemporaryDirectory(prefix="kimi-native-") as parent:
        folder = Path(parent) / "k2-slice"
        if cuda:  # a dense layer and two of 64 experts: 6 GB
            make_checkpoint(folder, preset="k2-slice", layers=3)
            model = kn.load(
                folder, device="cuda", max_context=DEPTH + 2 * STEPS, max_batch=max(BATCHES)
            )
            with model.held_network() as network:
                yield from _steps(network, folder, limits, device, DEPTH, BATCHES, STEPS)
            yield from _conversation(model, folder, limits)
            return
        widths = {"kv_lora_rank": 512, "qk_rope_head_dim": 64}
        make_checkpoint(folder, layers=2, experts=8, overrides=widths)
        network = load_model(folder)[0]
        place(network, device, experts_on_cpu=False, cache_bytes=0)
        yield from _steps(network, folder, limits, device, 10, (1,), 1)


def floor_bytes(folder: Path, config: KimiConfig, depth: int, batch: int) -> float:
    """What a step must read: dense weights once, each expert that is hit (on average, if all are equally likely) once,
    and every sequence's cache."""
    one = Checkpoint.open(folder).summary()["bytes_per_decoded_token"]["total"]
    experts, topk = config.n_routed_experts, config.num_experts_per_tok
    layers = config.num_hidden_layers - config.first_k_dense_replace
    expert = 3 * config.hidden_size * config.moe_intermediate_size * 9 / 16
    hit = experts * (1 - (1 - topk / experts) ** batch)
    cache = batch * depth * config.num_hidden_layers * config.latent_width * 2
    return one + layers * expert * (hit - topk) + cache


def _steps(
    network: KimiModel,
    folder: Path,
    limits: Limits,
    device: torch.device,
    depth: int,
    batches: tuple[int, ...],
    steps: int,
) -> Iterator[dict[str, Any]]:
    config = network.config
    for batch in batches:
        cache = LatentCache(config, max_tokens=batch * (depth + 2 * steps + 128), device=device)
        cache.data.normal_()  # decoding costs the same whatever they hold
        seqs = [_filled(cache, depth, steps) for _ in range(batch)]
        model = RecordedModel(network, cache) if device.type == "cuda" else network
        seconds = _timed_steps(model.decode, cache, seqs, steps, config.vocab_size)
        nbytes = floor_bytes(folder, config, depth, batch)
        yield _row("decode_step", folder, batch, depth, seconds, nbytes, limits)


def _filled(cache: LatentCache, depth: int, steps: int) -> CachedSequence:
    seq = cache.new_sequence()
    cache.reserve(seq, depth + steps + 2)
    seq.length = depth
    return seq


def _timed_steps(
    decode: Callable[[Tensor, LatentCache, list[CachedSequence]], Tensor],
    cache: LatentCache,
    seqs: list[CachedSequence],
    steps: int,
    vocab_size: int,
) -> list[float]:
    """Of random tokens, whose experts differ from step to step; from the ids to the logits on the host."""
    seconds = []
    for _ in range(steps + 2):  # the first captures the graph
        ids = torch.randint(vocab_size, (len(seqs),))
        begin = time.perf_counter()
        decode(ids, cache, seqs).cpu()
        seconds.append(time.perf_counter() - begin)
    return seconds[2:]


def _conversation(model: kn.Model, folder: Path, limits: Limits) -> Iterator[dict[str, Any]]:
    """kimi_native.load and generate, sampling and all; what a prompt of a few tokens costs is taken off."""
    config = model.config
    for batch in BATCHES[:2]:
        prompts = torch.randint(config.vocab_size, (batch, PROMPT_TOKENS)).tolist()

        def answer(tokens: int, prompts: list[list[int]] = prompts) -> float:
            begin = time.perf_counter()
            results = model.generate(prompts, max_tokens=tokens, temperature=1.0, seed=1)
            seconds = time.perf_counter() - begin
            if any(len(r.ids) < tokens for r in results):
                raise RuntimeError("generate: an answer ended early (a random model's end token)")
            return seconds

        answer(4)
        seconds = [(answer(NEW_TOKENS) - answer(1)) / (NEW_TOKENS - 1) for _ in range(3)]
        depth = PROMPT_TOKENS + NEW_TOKENS // 2
        nbytes = floor_bytes(folder, config, depth, batch)
        yield _row("generate", folder, batch, depth, seconds, nbytes, limits)


def _row(
    op: str,
    folder: Path,
    batch: int,
    depth: int,
    seconds: list[float],
    nbytes: float,
    limits: Limits,
) -> dict[str, Any]:
    median, spread = median_and_spread(seconds)
    floor = nbytes / limits.bytes_per_s
    return {
        "op": op,
        "isa": limits.isa,
        "device": limits.device,
        "threads": 0,
        "tokens": batch,
        "shape": f"{folder.name} depth={depth}",
        "time_us": float(f"{median * 1e6:.6g}"),
        "spread": round(spread, 4),
        "samples": len(seconds),
        "bytes": round(nbytes),
        "gb_per_s": float(f"{nbytes / median / 1e9:.6g}"),
        "gflop_per_s": 0.0,
        "limit": "copy",
        "percent_of_limit": round(100 * floor / median, 2),
        "compute": "exact",
        "tokens_per_s": float(f"{batch / median:.6g}"),
        "limit_tokens_per_s": float(f"{batch / floor:.6g}"),
    }
