"""A whole model: prefill, decode at several depths of context, memory, and how cost grows with context.

The model runs as engine.py runs it, sampling included, one sequence. Depth comes from a cache filled with random
latents: decoding costs the same whatever they hold, and a prefill of thousands of tokens is not waited for.
"""

from __future__ import annotations

import resource
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from kimi_native import fp8_rows, ops
from kimi_native.bench.load import OtherLoad
from kimi_native.bench.rows import Limits, make_row
from kimi_native.cache import PAGE_SIZE, CachedSequence, LatentCache
from kimi_native.checkpoint import Checkpoint
from kimi_native.errors import RequestError
from kimi_native.loader import DTYPES, load_model
from kimi_native.model import Experts, KimiModel
from kimi_native.plan import available_memory, check_context
from kimi_native.recorded import RecordedModel
from kimi_native.sampling import SamplingParams, TokenHistory, sample
from kimi_native.weights import Int4ExpertWeights, Int4Weight, Int8Weight

WARM_UP_TOKENS = 32
PREFILL_SECONDS = (
    20.0  # the prefill is timed up to three times, as long as that takes no longer than this
)
_GREEDY = SamplingParams(temperature=0)


class LoadedModel:
    """A checkpoint folder ready to be timed: `prefill_seconds` and `decode_seconds` run it once each.

    folder, config
    load_s        seconds from the folder to a model that could answer
    file_bytes    size of the folder's safetensors files
    weight_bytes  what one decoded token reads of the weights as loaded
    weight_flops  two for each weight that one token meets
    """

    def __init__(
        self,
        folder: str,
        *,
        max_context: int,
        dtype: str = "bfloat16",
        dense: str = "bf16",
        cache: str = "exact",
        compute: str = "exact",
    ) -> None:
        started = time.perf_counter()
        options = {"dtype": dtype, "dense": dense, "cache": cache, "compute": compute}
        network, checkpoint = load_model(folder, max_context=max_context, **options)
        pages = -(-max_context // PAGE_SIZE)
        rows = fp8_rows.DTYPE if cache == "fp8" else DTYPES[dtype]
        self.cache = LatentCache(checkpoint.config, max_tokens=pages * PAGE_SIZE, dtype=rows)
        self.model = RecordedModel(network, self.cache)
        self.load_s = time.perf_counter() - started
        self.folder = Path(folder).resolve()
        self.config = checkpoint.config
        self.file_bytes = sum(f.path.stat().st_size for f in checkpoint.files)
        self.weight_bytes, self.weight_flops = weights_per_token(network)
        self._random = torch.Generator().manual_seed(0)
        _read_files([f.path for f in checkpoint.files])

    def prefill_seconds(self, tokens: int) -> float:
        """Seconds from a prompt of random ids to its first token."""
        seq = self.cache.new_sequence()
        ids = self._ids(tokens)
        started = time.perf_counter()
        self._choose(self.model.prefill(ids, self.cache, seq), tokens)
        seconds = time.perf_counter() - started
        self.cache.free(seq)
        return seconds

    def decode_seconds(self, depth: int, steps: int) -> list[float]:
        """Seconds of each of `steps` tokens after `depth` cached ones; the first two of all are not counted."""
        seq = self._filled(depth)
        token, seconds = 0, []
        for step in range(steps + 2):
            started = time.perf_counter()
            logits = self.model.decode(torch.tensor([token]), self.cache, [seq])
            token = self._choose(logits[0], depth + step)
            seconds.append(time.perf_counter() - started)
            # A random model repeats itself, and would read the same experts again.
            token = int(self._ids(1)[0])
        self.cache.free(seq)
        return seconds[2:]

    def attention_flops(self, depth: int) -> int:
        """Of one decoded token in the absorbed form, all layers."""
        c = self.config
        per_key = c.num_attention_heads * (2 * c.kv_lora_rank + c.qk_rope_head_dim)
        return 2 * per_key * depth * c.num_hidden_layers

    def cache_bytes(self, depth: int) -> int:
        return depth * self.config.num_hidden_layers * self.cache.data[0, 0, 0].nbytes

    def _ids(self, tokens: int) -> Tensor:
        return torch.randint(self.config.vocab_size, (tokens,), generator=self._random)

    def _filled(self, depth: int) -> CachedSequence:
        seq = self.cache.new_sequence()
        self.cache.reserve(seq, depth)
        seq.length = depth
        rank = self.config.kv_lora_rank
        for layer in self.cache.data:
            values = torch.randn(
                self.cache.page_size, self.config.latent_width, generator=self._random
            )
            if self.cache.dtype == fp8_rows.DTYPE:
                values = fp8_rows.quantize(values[:, :rank], values[:, rank:])
            layer[seq.pages] = values.to(layer.dtype)
        return seq

    def _choose(self, logits: Tensor, position: int) -> int:
        history = TokenHistory([0])
        return sample(logits, _GREEDY, seed=0, position=position, history=history).id


def weights_per_token(model: KimiModel) -> tuple[int, int]:
    """Bytes of weights that one decoded token reads, in the form they were loaded, and two FLOPs per weight met."""
    config = model.config
    share = config.num_experts_per_tok / config.n_routed_experts if config.n_routed_experts else 0
    nbytes = flops = 0.0
    for module in model.modules():
        if isinstance(module, nn.Embedding):  # one row, and its numbers multiply nothing
            nbytes += module.weight[0].nbytes
            continue
        for value in _held(module):
            size, weights = _size(value)
            routed = isinstance(module, Experts) or isinstance(value, Int4ExpertWeights)
            nbytes += size * (share if routed else 1)
            flops += 2 * weights * (share if routed else 1)
    return round(nbytes), round(flops)


def _held(module: nn.Module) -> list[Tensor | Int4Weight | Int8Weight | Int4ExpertWeights]:
    """A module's own weights. Plain tensors beside the parameters are copies or views of one, except in Experts."""
    quantized = (Int4Weight, Int8Weight, Int4ExpertWeights)
    held = [*module.parameters(recurse=False)]
    held += [v for v in vars(module).values() if isinstance(v, quantized)]
    return [*held, *module.gate, *module.up, *module.down] if isinstance(module, Experts) else held


def _size(value: Tensor | Int4Weight | Int8Weight | Int4ExpertWeights) -> tuple[int, int]:
    """Bytes, and numbers that are weights."""
    if isinstance(value, Int4Weight):
        size = value.weight_packed.nbytes + value.weight_scale.nbytes
        return size, value.out_features * value.in_features
    if isinstance(value, Int8Weight):
        return value.weight.nbytes + value.weight_scale.nbytes, value.weight.numel()
    if isinstance(value, Int4ExpertWeights):
        size, weights = _size(value.weights[0])
        return size * len(value), weights * len(value)
    return value.nbytes, value.numel()


def _read_files(paths: list[Path]) -> None:
    """Into the page cache, unless they are larger than it can be: a disk is not what is timed here."""
    if sum(p.stat().st_size for p in paths) > available_memory():
        return
    buffer = bytearray(16 << 20)
    for path in paths:
        with open(path, "rb", buffering=0) as file:
            while file.readinto(buffer):
                pass


# ---- rows -----------------------------------------------------------------------------------------------------------


def check(folder: str, *, prompt_tokens: int, new_tokens: int, depths: list[int]) -> int:
    """The context that `measure` needs. Reads headers only: a wrong folder should not cost a measured machine.

    Raises what Checkpoint.open raises; RequestError on a count below 1, or a context that the model does not have.
    """
    for name, counts in (
        ("prompt_tokens", [prompt_tokens]),
        ("new_tokens", [new_tokens]),
        ("depths", depths),
    ):
        if not counts or min(counts) < 1:
            raise RequestError(f"e2e: {name} must be at least 1 (got {counts})")
    max_context = max(prompt_tokens, WARM_UP_TOKENS, max(depths) + new_tokens + 2)
    check_context("e2e", Checkpoint.open(folder).config, max_context)
    return max_context


def measure(
    folder: str,
    *,
    limits: Limits,
    prompt_tokens: int,
    new_tokens: int,
    depths: list[int],
    dtype: str = "bfloat16",
    dense: str = "bf16",
    cache: str = "exact",
    compute: str = "exact",
    report: Callable[[dict[str, Any]], None],
) -> None:
    """Times one checkpoint folder; gives each row to `report` when it is known.

    prompt_tokens  of the timed prefill
    new_tokens     decoded at each depth
    depths         tokens cached before them
    dtype, dense, cache, compute  as of load()

    Raises what check and load_model raise.
    """
    max_context = check(folder, prompt_tokens=prompt_tokens, new_tokens=new_tokens, depths=depths)
    ops.set_num_threads(limits.threads)
    torch.set_num_threads(limits.threads)
    shared = {"dense": dense, "dtype": dtype, "cache": cache, "compute": compute}
    loaded = LoadedModel(folder, max_context=max_context, **shared)
    loaded.prefill_seconds(WARM_UP_TOKENS)
    report(_prefill_row(loaded, prompt_tokens, limits, shared))
    for depth in depths:
        report(_decode_row(loaded, depth, new_tokens, limits, shared))
    report(_load_row(loaded, limits, shared))


def prefill_figures(loaded: LoadedModel, tokens: int) -> dict[str, float]:
    """nbytes and flops of a prefill. Every expert is hit by one token or another; a token meets half of the others."""
    c = loaded.config
    width = c.qk_nope_head_dim + c.qk_rope_head_dim + c.v_head_dim
    attention = c.num_hidden_layers * c.num_attention_heads * width * tokens * tokens
    return {"nbytes": loaded.file_bytes, "flops": tokens * loaded.weight_flops + attention}


def decode_figures(loaded: LoadedModel, depth: int) -> dict[str, float]:
    """nbytes and flops of one token after `depth` others."""
    return {
        "nbytes": loaded.weight_bytes + loaded.cache_bytes(depth),
        "flops": loaded.weight_flops + loaded.attention_flops(depth),
    }


def with_rate(row: dict[str, Any]) -> dict[str, Any]:
    """The row, and its tokens per second."""
    return {**row, "tokens_per_s": round(1e6 * row["tokens"] / row["time_us"], 3)}


def _prefill_row(
    loaded: LoadedModel, tokens: int, limits: Limits, shared: dict[str, Any]
) -> dict[str, Any]:
    load = OtherLoad()
    seconds = [loaded.prefill_seconds(tokens)]
    while len(seconds) < 3 and sum(seconds) + seconds[-1] <= PREFILL_SECONDS:
        seconds.append(loaded.prefill_seconds(tokens))
    row = make_row(
        "e2e_prefill",
        loaded.folder.name,
        tokens,
        seconds,
        limits=limits,
        limbs=True,
        isa=ops.active_isa(),
        others=load.share(),
        **prefill_figures(loaded, tokens),
        **shared,
    )
    return with_rate(row)


def _decode_row(
    loaded: LoadedModel, depth: int, steps: int, limits: Limits, shared: dict[str, Any]
) -> dict[str, Any]:
    load = OtherLoad()
    seconds = loaded.decode_seconds(depth, steps)
    row = make_row(
        "e2e_decode",
        f"{loaded.folder.name} depth={depth}",
        1,
        seconds,
        limits=limits,
        limbs=True,
        isa=ops.active_isa(),
        others=load.share(),
        **decode_figures(loaded, depth),
        **shared,
    )
    return {
        **with_rate(row),
        "depth": depth,
        "limit_tokens_per_s": round(limits.read_gb_per_s * 1e9 / row["bytes"], 3),
        "cache_bytes": loaded.cache_bytes(depth),
    }


def _load_row(loaded: LoadedModel, limits: Limits, shared: dict[str, Any]) -> dict[str, Any]:
    row = make_row(
        "e2e_load",
        loaded.folder.name,
        0,
        [loaded.load_s],
        limits=limits,
        nbytes=loaded.file_bytes,
        flops=0,
        isa=ops.active_isa(),
        **shared,
    )
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024  # Linux counts in KiB
    return {
        **row,
        "limit": "none",  # mapping reads nothing
        "percent_of_limit": None,
        "file_bytes": loaded.file_bytes,
        "peak_rss_bytes": peak,
        "peak_rss_over_files": round(peak / loaded.file_bytes, 4),
        "load_s": round(loaded.load_s, 3),
    }


# ---- tables ---------------------------------------------------------------------------------------------------------


def growth_table(rows: list[dict[str, Any]], read_gb_per_s: float) -> Iterator[str]:
    """How the cost of a token grows with context: lines of a table over the e2e_decode rows of one folder."""
    decode = [r for r in rows if r["op"] == "e2e_decode"]
    yield "context  ms per token  tokens/s  limit  percent  GB per token  of it cache MB"
    for r in decode:
        yield (
            f"{r['depth']:>7}  {r['time_us'] / 1e3:>12.2f}  {r['tokens_per_s']:>8.2f}  "
            f"{r['limit_tokens_per_s']:>5.1f}  {r['percent_of_limit']:>7.0f}  {r['bytes'] / 1e9:>12.3f}  "
            f"{r['cache_bytes'] / 1e6:>14.1f}"
        )
    first, last = decode[0], decode[-1]
    if last["depth"] > first["depth"]:
        thousands = (last["depth"] - first["depth"]) / 1000
        slope = (last["time_us"] - first["time_us"]) / 1e3 / thousands
        by_bytes = (last["cache_bytes"] - first["cache_bytes"]) / read_gb_per_s / 1e6 / thousands
        yield (
            f"a thousand tokens of context cost {slope:.3f} ms per token; their cache bytes alone, "
            f"at the read limit, {by_bytes:.3f} ms"
        )


def size_table(rows: list[dict[str, Any]]) -> Iterator[str]:
    """Cost of a token against size on disk and load time: one line per folder, at its first depth.

    rows  of one folder after the other; its e2e_load row is its last
    """
    yield "folder                     GB on disk  load s  GB per token  ms per token  percent of limit"
    decode = None
    for row in rows:
        if row["op"] == "e2e_decode":
            decode = decode or row
        elif row["op"] == "e2e_load":
            yield (
                f"{row['shape']:<26} {row['file_bytes'] / 1e9:>10.2f}  {row['load_s']:>6.2f}  "
                f"{decode['bytes'] / 1e9:>12.3f}  {decode['time_us'] / 1e3:>12.2f}  "
                f"{decode['percent_of_limit']:>16.0f}"
            )
            decode = None


def memory_line(load: dict[str, Any]) -> str:
    return (
        f"loaded in {load['load_s']:.2f} s; peak resident memory {load['peak_rss_bytes'] / 1e9:.2f} GB, "
        f"{load['peak_rss_over_files']:.2f} of the {load['file_bytes'] / 1e9:.2f} GB of files"
    )
