"""What a model needs in memory, computed from headers before any weight is read.

Counted as needed: what the loader copies or converts, the latent cache, the working memory of one prefill chunk, and
the interpreter. Not counted: weights used in place from the mapped files. The system drops their pages when memory
is short and reads them again from disk, so they decide the speed, not whether the model fits.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import Any

from kimi_native import fp8_rows
from kimi_native.cache import PAGE_SIZE
from kimi_native.checkpoint import Checkpoint, StoredMatrices
from kimi_native.config import KimiConfig
from kimi_native.errors import MemoryPlanError, RequestError
from kimi_native.huge_pages import aligned_bytes
from kimi_native.machine import available_memory
from kimi_native.safetensors_file import DTYPE_BYTES, TensorInfo
from kimi_native.tensor_table import (
    expected_others,
    numel_of,
    share_of_token,
)
from kimi_native.units import bytes_text

PREFILL_CHUNK = 1024  # as in model.py, which this module does not import: planning needs no kernels
ATTENTION_ROWS = 128
PARTIAL_BYTES = 64 << 20  # what mla_decode.cpp keeps of chunks before it adds them up
ATTENTION_CHUNK = 512
INTERPRETER_BYTES = (
    400 << 20
)  # measured: 0.15 GB private after import, 0.23 GB with threads; room for the caller
GROUP_SIZE = 32  # weights that share a scale of 2 bytes
DENSE_FORMATS = ("bf16", "int8", "int4")  # most exact first
ITEM_BYTES = {"bfloat16": 2, "float32": 4}
CACHE_FORMATS = ("exact", "fp8")


@dataclass(frozen=True)
class Settings:
    """What the caller chooses: max_context and max_batch in tokens and sequences, dtype of activations and cache
    ("bfloat16", "float32"), dense ("bf16": matrices as published, "int8", "int4": copies of 8 or 4 bits), cache
    ("exact": rows of dtype, "fp8": fp8_rows.py)."""

    max_context: int
    max_batch: int
    dtype: str
    dense: str
    cache: str


@dataclass(frozen=True)
class MemoryPlan:
    """The budget of one model on one machine; made by memory_plan.

    items                 (name, bytes) of what must be resident; their sum is needed_bytes
    mapped_bytes          weights used in place from the mapped files; mapped_bytes_per_token of them per decoded token
    notes                 sentences about what will be slow
    suggestions           settings that would make it fit, empty if it fits or if none does
    """

    settings: Settings
    items: tuple[tuple[str, int], ...]
    available_bytes: int
    mapped_bytes: int
    mapped_bytes_per_token: int
    notes: tuple[str, ...] = ()
    suggestions: tuple[str, ...] = ()

    @property
    def needed_bytes(self) -> int:
        return sum(size for _, size in self.items)

    @property
    def fits(self) -> bool:
        return self.needed_bytes <= self.available_bytes

    @property
    def mapped_fits(self) -> bool:
        """Whether the mapped weights can stay in memory beside what is needed."""
        return self.needed_bytes + self.mapped_bytes <= self.available_bytes

    def check(self) -> None:
        """Raises MemoryPlanError, naming needed and available bytes and what would make it fit, unless it fits."""
        if self.fits:
            return
        way_out = " or ".join(self.suggestions)
        raise MemoryPlanError(
            f"memory: the model needs {bytes_text(self.needed_bytes)}, "
            f"{bytes_text(self.available_bytes)} are available (max_context={self.settings.max_context}, "
            f"max_batch={self.settings.max_batch}, dtype={self.settings.dtype}, dense={self.settings.dense}, "
            f"cache={self.settings.cache}); "
            + (f"it fits with {way_out}" if way_out else "no setting makes it fit on this machine")
        )

    def table(self) -> list[tuple[str, int]]:
        """(item, bytes) rows for printing, the sums and what they are compared with last."""
        return [
            *self.items,
            ("needed", self.needed_bytes),
            ("available", self.available_bytes),
            ("mapped from files, not counted", self.mapped_bytes),
            ("mapped bytes read per decoded token", self.mapped_bytes_per_token),
        ]

    def to_dict(self) -> dict[str, Any]:
        return {
            "settings": asdict(self.settings),
            "items": dict(self.items),
            "needed_bytes": self.needed_bytes,
            "available_bytes": self.available_bytes,
            "fits": self.fits,
            "mapped_bytes": self.mapped_bytes,
            "mapped_bytes_per_token": self.mapped_bytes_per_token,
            "notes": list(self.notes),
            "suggestions": list(self.suggestions),
        }


def memory_plan(
    checkpoint: Checkpoint,
    *,
    max_context: int | None = None,
    max_batch: int = 1,
    dtype: str = "bfloat16",
    dense: str = "bf16",
    cache: str = "exact",
    available_bytes: int | None = None,
) -> MemoryPlan:
    """Plans from headers only; reads no weight.

    max_context      tokens of the longest sequence; None: the model's max_position_embeddings
    available_bytes  None: what this process may still take, see available_memory

    Raises ValueError on a setting out of range.
    """
    if max_context is None:
        max_context = checkpoint.config.max_position_embeddings
    settings = Settings(max_context, max_batch, dtype, dense, cache)
    _check_settings(settings)
    if available_bytes is None:
        available_bytes = available_memory()
    weights = _Weights(checkpoint)
    mapped, per_token = weights.mapped(dense)
    plan = MemoryPlan(settings, _items(weights, settings), available_bytes, mapped, per_token)
    notes = _notes(plan)
    suggestions = () if plan.fits else _suggestions(weights, settings, available_bytes)
    return replace(plan, notes=notes, suggestions=suggestions)


def _check_settings(s: Settings) -> None:
    for name in ("max_context", "max_batch"):
        value = getattr(s, name)
        if type(value) is not int or not 1 <= value <= 1 << 40:
            raise ValueError(f"memory_plan: {name} must be a positive integer (got {value!r})")
    choices = {"dtype": tuple(ITEM_BYTES), "dense": DENSE_FORMATS, "cache": CACHE_FORMATS}
    for name, allowed in choices.items():
        value = getattr(s, name)
        if value not in allowed:
            raise ValueError(f"memory_plan: {name} must be {' or '.join(allowed)} (got {value!r})")


def check_context(op: str, config: KimiConfig, max_context: int | None) -> None:
    """Raises RequestError, named for the command `op`, on a max_context that the model does not have; None: its own."""
    limit = config.max_position_embeddings
    if max_context is not None and not 1 <= max_context <= limit:
        raise RequestError(f"{op}: max_context must be 1 to {limit} (got {max_context})")


# ---- weights --------------------------------------------------------------------------------------------------------


class _Weights:
    """Bytes that the loader copies and bytes that stay mapped, by the rules of the loader:

    - BF16 and INT4 matrices are used in place; F16 and F32 become BF16 copies, FP8 too: 2 bytes a weight.
    - dense="int8" (or "int4") makes copies of 1 (or 1/2) + 2/32 bytes a weight, integers and scales at cache lines, of
      the dense matrices that are not INT4. kv_b_proj is not among them (absorbed decoding takes it apart), nor one
      whose in_features are no multiple of 32, nor a head tied to the embedding.
    - kv_b_proj also gets its key half transposed, heads * nope * kv_lora_rank in BF16 per layer.
    - Experts of a layer are all INT4 or all BF16: where some are not INT4, the others become BF16.
    - Norms, router and embedding are used in place if BF16, else converted; the router's bias becomes F32.
    """

    def __init__(self, checkpoint: Checkpoint) -> None:
        self.config: KimiConfig = checkpoint.config
        # By the format of the dense matrices.
        self.copied = dict.fromkeys(DENSE_FORMATS, 0)
        self.scratch = dict.fromkeys(DENSE_FORMATS, 0)  # the largest temporary of one conversion
        self._mapped = dict.fromkeys(DENSE_FORMATS, 0)
        self._touched = dict.fromkeys(DENSE_FORMATS, 0)  # mapped bytes per decoded token
        experts = [s for s in checkpoint.stored if _is_expert(s)]
        mixed = {_layer(s.names[0]) for s in experts if s.form != "int4"}
        for s in checkpoint.stored:
            self._add_matrices(s, _is_expert(s) and _layer(s.names[0]) in mixed)
        for name in expected_others(self.config):
            self._add_other(name, checkpoint.tensors[name])
        c = self.config
        heads = c.num_attention_heads * c.num_hidden_layers
        self.key_half = heads * c.qk_nope_head_dim * c.kv_lora_rank * 2

    def mapped(self, dense: str) -> tuple[int, int]:
        return self._mapped[dense], self._touched[dense]

    def _add_matrices(self, group: StoredMatrices, mixed: bool) -> None:
        """mixed: experts of a layer whose experts are not all INT4."""
        expert = _is_expert(group)
        for dense in DENSE_FORMATS:
            copied, scratch = _conversion(group, dense, mixed)
            self.copied[dense] += copied * len(group.names)
            self.scratch[dense] = max(self.scratch[dense], scratch)
            if not copied:
                self._mapped[dense] += group.nbytes
                # Dividing per layer rounds down by less than a byte each.
                touched = share_of_token(self.config, group.nbytes) if expert else group.nbytes
                self._touched[dense] += touched

    def _add_other(self, name: str, info: TensorInfo) -> None:
        embedding = name.endswith("embed_tokens.weight")
        row_only = embedding and not self.config.tie_word_embeddings
        wanted, size = ("F32", 4) if name.endswith("e_score_correction_bias") else ("BF16", 2)
        for dense in DENSE_FORMATS:
            if info.dtype != wanted:
                self.copied[dense] += numel_of(info.shape) * size
                self.scratch[dense] = max(self.scratch[dense], info.nbytes)
            else:
                self._mapped[dense] += info.nbytes
                self._touched[dense] += info.nbytes // info.shape[0] if row_only else info.nbytes


def _is_expert(group: StoredMatrices) -> bool:
    return ".mlp.experts." in group.names[0]


def _layer(name: str) -> str:
    return name.partition(".mlp.")[0]


def _conversion(group: StoredMatrices, dense: str, mixed: bool) -> tuple[int, int]:
    """Bytes of the loader's copy of one matrix and of its temporaries; zeros if it is used in place."""
    dtype = group.dtype
    numel = group.out_features * group.in_features
    absorbed = group.names[0].endswith(".kv_b_proj")
    if group.form == "int4":
        return (numel * 2, 0) if absorbed or mixed else (0, 0)
    # F16 and F32 are converted back once, to see that nothing was lost.
    scratch = numel * DTYPE_BYTES[dtype] if dtype in ("F16", "F32") else 0
    in_groups = group.in_features % GROUP_SIZE == 0
    if dense != "bf16" and in_groups and not absorbed and not _is_expert(group):
        by_way_of_bf16 = 0 if dtype == "BF16" else numel * 2
        integers = numel if dense == "int8" else numel // 2
        copy = aligned_bytes(integers) + aligned_bytes(numel // GROUP_SIZE * 2)
        return copy, scratch + by_way_of_bf16
    return (0, 0) if dtype == "BF16" else (numel * 2, scratch)


# ---- items ----------------------------------------------------------------------------------------------------------


def _items(weights: _Weights, s: Settings) -> tuple[tuple[str, int], ...]:
    c = weights.config
    working = max(_prefill_bytes(c, s), weights.scratch[s.dense])  # one after the other
    return (
        ("weights copied or converted while loading", weights.copied[s.dense]),
        ("key half of kv_b_proj, transposed", weights.key_half),
        (f"latent cache, {s.max_batch} x {s.max_context} tokens", _cache_bytes(c, s)),
        (f"working memory, {min(PREFILL_CHUNK, s.max_context)} prompt tokens at a time", working),
        ("interpreter and libraries", INTERPRETER_BYTES),
    )


def _cache_bytes(c: KimiConfig, s: Settings) -> int:
    pages = s.max_batch * -(-s.max_context // PAGE_SIZE)
    row = c.latent_width * ITEM_BYTES[s.dtype]
    if s.cache == "fp8":
        row = fp8_rows.row_bytes(c.kv_lora_rank, c.qk_rope_head_dim)
    return pages * PAGE_SIZE * c.num_hidden_layers * row


def _prefill_bytes(c: KimiConfig, s: Settings) -> int:
    """The last chunk of a prompt that fills the context, or as many tokens of several, in the layer that takes most.

    Per token of the chunk: 4 * hidden (residual, normed, output, sum) and the larger of
      attention  heads * (query; output, twice); the numbers of its sequence's pages, twice
      MLP        dense 3 * intermediate; experts topk * (3 * width + hidden in fp32 + hidden as matrix tiles take it),
                 shared experts 3 * width
    Of ATTENTION_ROWS tokens at a time, in fp32 for every head: the absorbed query, the attended latent, and its parts
    by chunks of the context, PARTIAL_BYTES of them at once, or one token's if that is more. The logits in fp32.
    """
    item, keys = ITEM_BYTES[s.dtype], s.max_context
    chunk = min(PREFILL_CHUNK, keys * s.max_batch)
    heads = c.num_attention_heads
    pages = -(-keys // PAGE_SIZE)
    attention = heads * (c.qk_head_dim + 2 * c.v_head_dim) * item + 2 * pages * 4
    width = c.moe_intermediate_size
    tiles = c.hidden_size * item + c.hidden_size // 8 + 128  # csrc/cpu/int4_tiles.h
    routed = c.num_experts_per_tok * (3 * width * item + c.hidden_size * 4 + tiles)
    experts = routed + 3 * width * c.n_shared_experts * item
    dense = 3 * c.intermediate_size * item if "dense" in c.mlp_layer_types else 0
    tokens = max(chunk, s.max_batch) * (4 * c.hidden_size * item + max(attention, experts, dense))
    rows, latent = min(ATTENTION_ROWS, chunk), heads * c.kv_lora_rank * 4
    one_row = -(-keys // ATTENTION_CHUNK) * latent
    partial = max(one_row, min(rows * one_row, PARTIAL_BYTES))
    absorbed = rows * (heads * c.latent_width * 4 + latent)
    return tokens + absorbed + partial + s.max_batch * c.vocab_size * 4


def _notes(plan: MemoryPlan) -> tuple[str, ...]:
    if plan.mapped_fits:
        return ()
    left = max(plan.available_bytes - plan.needed_bytes, 0)
    return (
        f"the mapped weights ({bytes_text(plan.mapped_bytes)}) exceed the memory left for them "
        f"({bytes_text(left)}): they are not read ahead, and what does not stay cached is read from disk again, up to "
        f"{bytes_text(plan.mapped_bytes_per_token)} per decoded token",
    )


# ---- what would fit -------------------------------------------------------------------------------------------------


def _suggestions(weights: _Weights, s: Settings, available: int) -> tuple[str, ...]:
    """Settings under which it fits: single changes first, then the smallest of everything, but for an FP8 cache, with
    its best context."""

    def needed(t: Settings) -> int:
        return sum(size for _, size in _items(weights, t))

    others = [replace(s, dense=dense) for dense in DENSE_FORMATS if dense != s.dense]
    fitting = (t for t in others if needed(t) <= available)  # the most exact first
    other_dense = next(fitting, min(others, key=needed))
    changes = {
        "max_batch=1": replace(s, max_batch=1),
        f'dense="{other_dense.dense}"': other_dense,
        'dtype="bfloat16"': replace(s, dtype="bfloat16"),
        'cache="fp8"': replace(s, cache="fp8"),
    }
    found = []
    context = _largest_context(needed, s, available)
    if context:
        found.append(f"max_context={context}")
    found += [name for name, t in changes.items() if t != s and needed(t) <= available]
    if found:
        return tuple(found)
    combined = replace(s, max_batch=1, dtype="bfloat16")
    if needed(replace(combined, dense=other_dense.dense)) < needed(combined):
        combined = replace(combined, dense=other_dense.dense)
    context = _largest_context(needed, combined, available)
    if not context:
        return ()
    parts = [f"max_context={context}"]
    parts += [name for name, t in changes.items() if _agrees(name, combined) and t != s]
    return (" and ".join(parts),)


def _agrees(name: str, s: Settings) -> bool:
    field, _, value = name.partition("=")
    return str(getattr(s, field)) == value.strip('"')


def _largest_context(needed: Any, s: Settings, available: int) -> int:
    """The largest whole number of pages below max_context that fits, 0 if one page does not."""
    low, high = 0, (s.max_context - 1) // PAGE_SIZE
    while low < high:
        middle = (low + high + 1) // 2
        if needed(replace(s, max_context=middle * PAGE_SIZE)) <= available:
            low = middle
        else:
            high = middle - 1
    return low * PAGE_SIZE
