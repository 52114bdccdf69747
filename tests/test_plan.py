"""The memory plan: its items follow from the formulas, and what it suggests fits."""

from __future__ import annotations

import json
import re

import pytest
import torch

from kimi_native import model, plan
from kimi_native.cache import LatentCache
from kimi_native.checkpoint import Checkpoint
from kimi_native.errors import MemoryPlanError
from kimi_native.machine import available_memory
from kimi_native.plan import memory_plan
from tiny_checkpoint import FP8, INT4, TINY, matrices, nbytes, tensors, write_checkpoint

TINY_INT4 = TINY | {"quantization_config": INT4}
TINY_FP8 = TINY | {"quantization_config": FP8}
PLENTY = 1 << 40
COPIES, KEYS, CACHE, WORKING, INTERPRETER = range(5)


def open_tiny(folder, d=TINY, table=None) -> Checkpoint:
    return Checkpoint.open(write_checkpoint(folder, d, table))


def sizes(p) -> list[int]:
    return [size for _, size in p.items]


def is_dense(name: str) -> bool:
    """Matrices that dense="int8" turns into 8 bits, and "int4" into 4."""
    return ".experts." not in name and "kv_b_proj" not in name


def copy_bytes(shape, dense: str) -> int:
    """Integers and scales, each in whole cache lines."""
    weights = shape[0] * shape[1]
    integers = {"int8": weights, "int4": weights // 2}[dense]
    return -(-integers // 64) * 64 + -(-weights // 32 * 2 // 64) * 64


# ---- weights --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("d", [TINY, TINY_INT4], ids=["bf16", "int4"])
def test_plan_bf16_and_int4_weights_are_used_in_place(tmp_path, d):
    p = memory_plan(open_tiny(tmp_path, d), max_context=64, available_bytes=PLENTY)
    assert sizes(p)[COPIES] == 0
    assert p.mapped_bytes == sum(nbytes(*t) for t in tensors(d).values())


def test_plan_key_half_of_kv_b_proj_is_copied_per_layer(tmp_path):
    p = memory_plan(open_tiny(tmp_path), max_context=64, available_bytes=PLENTY)
    assert sizes(p)[KEYS] == 3 * (2 * 16 * 32) * 2  # layers * (heads * nope * kv_lora_rank) * bf16


def test_plan_fp8_weights_become_bf16(tmp_path):
    p = memory_plan(open_tiny(tmp_path, TINY_FP8), max_context=64, available_bytes=PLENTY)
    converted = {m: s for m, s in matrices(TINY).items() if m != "lm_head"}
    assert sizes(p)[COPIES] == sum(2 * o * i for o, i in converted.values())
    rest = [t for n, t in tensors(TINY_FP8).items() if n.rpartition(".")[0] not in converted]
    assert p.mapped_bytes == sum(nbytes(*t) for t in rest)


@pytest.mark.parametrize("dense", ["int8", "int4"])
@pytest.mark.parametrize("d", [TINY, TINY_FP8], ids=["bf16", "fp8"])
def test_plan_int8_and_int4_copy_the_dense_matrices(tmp_path, d, dense):
    p = memory_plan(open_tiny(tmp_path, d), max_context=64, dense=dense, available_bytes=PLENTY)
    expected = sum(copy_bytes(s, dense) for m, s in matrices(TINY).items() if is_dense(m))
    if d is TINY_FP8:  # experts and kv_b_proj become BF16
        expected += sum(2 * o * i for m, (o, i) in matrices(TINY).items() if not is_dense(m))
    assert sizes(p)[COPIES] == expected


@pytest.mark.parametrize("dense", ["int8", "int4"])
def test_plan_int8_and_int4_leave_int4_matrices_and_a_tied_head(tmp_path, dense):
    options = {"max_context": 64, "dense": dense, "available_bytes": PLENTY}
    p = memory_plan(open_tiny(tmp_path / "int4", TINY_INT4), **options)
    copied = {m: copy_bytes(s, dense) for m, s in matrices(TINY).items() if is_dense(m)}
    assert sizes(p)[COPIES] == sum(copied.values())
    p = memory_plan(open_tiny(tmp_path / "tied", TINY | {"tie_word_embeddings": True}), **options)
    assert sizes(p)[COPIES] == sum(copied.values()) - copied["lm_head"]


@pytest.mark.parametrize("dtype", ["F16", "F32"])
def test_plan_other_floats_become_bf16_and_the_router_bias_f32(tmp_path, dtype):
    table = {n: (dtype, shape) for n, (_, shape) in tensors(TINY).items()}
    p = memory_plan(open_tiny(tmp_path, TINY, table), max_context=64, available_bytes=PLENTY)
    bias = {n: s for n, (_, s) in table.items() if n.endswith("e_score_correction_bias")}
    others = sum(nbytes("BF16", s) for n, (_, s) in table.items() if n not in bias)
    biases = sum(nbytes("F32", s) for s in bias.values())
    assert sizes(p)[COPIES] == others + (biases if dtype == "F16" else 0)
    assert p.mapped_bytes == (0 if dtype == "F16" else biases)


def test_plan_int4_experts_beside_plain_ones_become_bf16(tmp_path):
    table = tensors(TINY_INT4, {"model.layers.1.mlp.experts.0.up_proj": "BF16"})
    p = memory_plan(open_tiny(tmp_path, TINY_INT4, table), max_context=64, available_bytes=PLENTY)
    assert (
        sizes(p)[COPIES] == (4 * 3 - 1) * 32 * 64 * 2
    )  # the other matrices of layer 1's four experts


def test_plan_bytes_per_token_count_the_used_experts_once(tmp_path):
    checkpoint = open_tiny(tmp_path, TINY_INT4)
    p = memory_plan(checkpoint, max_context=64, available_bytes=PLENTY)
    assert p.mapped_bytes_per_token == checkpoint.summary()["bytes_per_decoded_token"]["total"]


# ---- cache and working memory ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(("context", "batch"), [(1, 1), (64, 1), (65, 3), (512, 2)])
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_plan_cache_is_what_the_cache_allocates(tmp_path, context, batch, dtype):
    checkpoint = open_tiny(tmp_path)
    p = memory_plan(
        checkpoint, max_context=context, max_batch=batch, dtype=dtype, available_bytes=PLENTY
    )
    rounded = -(-context // 64) * 64
    cache = LatentCache(checkpoint.config, max_tokens=batch * rounded, dtype=getattr(torch, dtype))
    assert sizes(p)[CACHE] == cache.data.numel() * cache.data.element_size()


@pytest.mark.parametrize(("context", "batch"), [(1, 1), (65, 3)])
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_plan_of_an_fp8_cache_is_what_the_cache_allocates(tmp_path, context, batch, dtype):
    checkpoint = open_tiny(tmp_path)
    sizes_asked = {"max_context": context, "max_batch": batch, "dtype": dtype}
    p = memory_plan(checkpoint, **sizes_asked, cache="fp8", available_bytes=PLENTY)
    tokens = batch * -(-context // 64) * 64
    cache = LatentCache(checkpoint.config, max_tokens=tokens, dtype=torch.uint8)
    assert sizes(p)[CACHE] == cache.data.numel()
    # A row of TINY: 32 latents, one scale, 8 key values.
    assert cache.data.shape[-1] == 32 + 4 + 2 * 8


def test_plan_suggests_an_fp8_cache_where_that_is_enough(tmp_path):
    checkpoint = open_tiny(tmp_path)
    asked = {"max_context": 4096, "max_batch": 50}
    needed = memory_plan(checkpoint, **asked, cache="fp8", available_bytes=0).needed_bytes
    p = memory_plan(checkpoint, **asked, available_bytes=needed)
    assert 'cache="fp8"' in p.suggestions
    with pytest.raises(MemoryPlanError, match=r"cache=exact\); it fits with"):
        p.check()
    assert memory_plan(checkpoint, **asked, cache="fp8", available_bytes=needed).fits


def test_plan_uses_the_constants_of_the_model():
    assert plan.PREFILL_CHUNK == model.PREFILL_CHUNK
    assert plan.ATTENTION_ROWS == model.ATTENTION_ROWS


def test_plan_working_memory_grows_with_the_context(tmp_path):
    checkpoint = open_tiny(tmp_path)
    plans = [
        memory_plan(checkpoint, max_context=c, available_bytes=PLENTY)
        for c in (64, 1024, 1025, 65536)
    ]
    working = [sizes(p)[WORKING] for p in plans]
    assert working == sorted(set(working))
    # The chunk's page tables, and the parts of attention's result.
    heads, latent = TINY["num_attention_heads"], TINY["kv_lora_rank"]
    assert working[3] - working[1] > 1024 * 1000 * 4 + 100 * heads * latent * 4


def test_plan_max_context_defaults_to_the_models_own(tmp_path):
    p = memory_plan(open_tiny(tmp_path), available_bytes=PLENTY)
    assert p.settings.max_context == TINY["max_position_embeddings"]


@pytest.mark.parametrize(
    "changes",
    [{"max_context": 0}, {"max_context": -1}, {"max_context": 1.5}, {"max_batch": 0}, {"max_batch": True},
     {"dtype": "float16"}, {"dense": "int2"}, {"cache": "int8"}],
)  # fmt: skip
def test_plan_bad_setting_is_an_error_naming_it(tmp_path, changes):
    with pytest.raises(ValueError, match=f"memory_plan: {next(iter(changes))} must be"):
        memory_plan(open_tiny(tmp_path), **changes)


def test_plan_reads_no_weight(tmp_path, monkeypatch):
    checkpoint = open_tiny(tmp_path, TINY_INT4)
    monkeypatch.setattr(Checkpoint, "tensor", None)
    memory_plan(checkpoint, available_bytes=0)


# ---- fitting --------------------------------------------------------------------------------------------------------


def test_plan_table_and_dict_add_up(tmp_path):
    p = memory_plan(open_tiny(tmp_path, TINY_FP8), max_context=128, available_bytes=PLENTY)
    rows = dict(p.table())
    assert rows["needed"] == sum(sizes(p)) == p.needed_bytes
    assert rows["available"] == PLENTY
    assert len(rows) == len(p.table())
    d = json.loads(json.dumps(p.to_dict()))
    assert sum(d["items"].values()) == d["needed_bytes"]
    assert d["fits"] is True


def test_plan_that_fits_exactly_passes_and_one_byte_less_does_not(tmp_path):
    checkpoint = open_tiny(tmp_path)
    needed = memory_plan(checkpoint, max_context=64, available_bytes=0).needed_bytes
    memory_plan(checkpoint, max_context=64, available_bytes=needed).check()
    with pytest.raises(
        MemoryPlanError, match=r"the model needs .* MB, .* are available \(max_context=64, "
    ):
        memory_plan(checkpoint, max_context=64, available_bytes=needed - 1).check()


def settings_of(suggestion: str) -> dict:
    found = dict(re.findall(r'(\w+)="?([\w]+)"?', suggestion))
    return {k: int(v) if v.isdigit() else v for k, v in found.items()}


@pytest.mark.parametrize("d", [TINY, TINY_INT4, TINY_FP8], ids=["bf16", "int4", "fp8"])
@pytest.mark.parametrize("percent", [5, 30, 70, 90, 99])
def test_plan_every_suggestion_fits(tmp_path, d, percent):
    checkpoint = open_tiny(tmp_path, d)
    asked = {"max_context": 1 << 20, "max_batch": 8, "dtype": "float32", "dense": "bf16"}
    needed = memory_plan(checkpoint, **asked, available_bytes=0).needed_bytes
    available = plan.INTERPRETER_BYTES + (needed - plan.INTERPRETER_BYTES) * percent // 100
    p = memory_plan(checkpoint, **asked, available_bytes=available)
    assert p.suggestions
    with pytest.raises(MemoryPlanError) as refused:
        p.check()
    for suggestion in p.suggestions:
        assert suggestion in str(refused.value)
        changed = asked | settings_of(suggestion)
        assert changed != asked
        memory_plan(checkpoint, **changed, available_bytes=available).check()


def test_plan_suggests_the_largest_context(tmp_path):
    checkpoint = open_tiny(tmp_path)
    available = memory_plan(checkpoint, max_context=640, available_bytes=0).needed_bytes + 5
    p = memory_plan(checkpoint, max_context=100_000, available_bytes=available)
    assert p.suggestions == ("max_context=640",)


def test_plan_suggests_fewer_sequences_when_that_is_enough(tmp_path):
    checkpoint = open_tiny(tmp_path)
    available = memory_plan(checkpoint, max_context=64, available_bytes=0).needed_bytes
    p = memory_plan(checkpoint, max_context=64, max_batch=100, available_bytes=available)
    assert p.suggestions == ("max_batch=1",)


def test_plan_suggests_the_most_exact_dense_format_that_fits(tmp_path):
    checkpoint = open_tiny(tmp_path, TINY_FP8 | {"hidden_size": 512, "vocab_size": 96})
    needed = {
        dense: memory_plan(checkpoint, max_context=64, dense=dense, available_bytes=0).needed_bytes
        for dense in ("bf16", "int8", "int4")
    }
    assert needed["int4"] < needed["int8"] < needed["bf16"]
    for dense in ("int8", "int4"):
        p = memory_plan(checkpoint, max_context=64, available_bytes=needed[dense])
        assert p.suggestions == (f'dense="{dense}"',)
    p = memory_plan(checkpoint, max_context=64, dense="int8", available_bytes=needed["int4"])
    assert p.suggestions == ('dense="int4"',)


def test_plan_suggests_int8_where_it_saves_and_bf16_where_int8_costs(tmp_path):
    fp8 = open_tiny(tmp_path / "fp8", TINY_FP8 | {"hidden_size": 512, "vocab_size": 96})
    needed = memory_plan(fp8, max_context=64, dense="int8", available_bytes=0).needed_bytes
    p = memory_plan(fp8, max_context=64, available_bytes=needed)
    assert p.suggestions == ('dense="int8"',)
    bf16 = open_tiny(tmp_path / "bf16")
    needed = memory_plan(bf16, max_context=64, available_bytes=0).needed_bytes
    p = memory_plan(bf16, max_context=64, dense="int8", available_bytes=needed)
    assert p.suggestions == ('dense="bf16"',)


def test_plan_suggests_several_changes_at_once_when_one_is_not_enough(tmp_path):
    checkpoint = open_tiny(tmp_path)
    available = memory_plan(checkpoint, max_context=192, available_bytes=0).needed_bytes
    p = memory_plan(
        checkpoint,
        max_context=1 << 20,
        max_batch=1 << 20,
        dtype="float32",
        available_bytes=available,
    )
    assert p.suggestions == ('max_context=192 and max_batch=1 and dtype="bfloat16"',)


def test_plan_says_when_no_setting_helps(tmp_path):
    p = memory_plan(open_tiny(tmp_path), available_bytes=plan.INTERPRETER_BYTES)
    assert p.suggestions == ()
    with pytest.raises(MemoryPlanError, match="no setting makes it fit on this machine"):
        p.check()


def test_plan_notes_weights_that_will_be_read_from_disk(tmp_path):
    checkpoint = open_tiny(tmp_path)
    needed = memory_plan(checkpoint, max_context=64, available_bytes=PLENTY).needed_bytes
    tight = memory_plan(checkpoint, max_context=64, available_bytes=needed + 1000)
    tight.check()
    assert "read from disk again, up to" in tight.notes[0]
    assert memory_plan(checkpoint, max_context=64, available_bytes=PLENTY).notes == ()


# ---- the machine ----------------------------------------------------------------------------------------------------


def machine(root, files: dict[str, str]):
    for name, text in (
        {"proc/meminfo": "MemTotal: 99 kB\nMemAvailable:    8000 kB\n"} | files
    ).items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


GROUP = "sys/fs/cgroup"
V1 = f"{GROUP}/memory"
MACHINES = {
    "no cgroup": ({}, 8_192_000),
    "v2 without a limit": (
        {"proc/self/cgroup": "0::/a\n", f"{GROUP}/a/memory.max": "max\n", f"{GROUP}/a/memory.current": "5\n"},
        8_192_000,
    ),
    "v2": (
        {"proc/self/cgroup": "0::/a\n", f"{GROUP}/a/memory.max": "1000\n", f"{GROUP}/a/memory.current": "300\n"},
        700,
    ),
    "v2, file cache can be dropped": (
        {
            "proc/self/cgroup": "0::/a\n",
            f"{GROUP}/a/memory.max": "1000",
            f"{GROUP}/a/memory.current": "300",
            f"{GROUP}/a/memory.stat": "anon 100\ninactive_file 120\nactive_file 80\n",
        },
        900,
    ),
    "v2, the parent is tighter": (
        {
            "proc/self/cgroup": "0::/a/b\n",
            f"{GROUP}/a/b/memory.max": "5000",
            f"{GROUP}/a/b/memory.current": "100",
            f"{GROUP}/a/memory.max": "2000",
            f"{GROUP}/a/memory.current": "1500",
        },
        500,
    ),
    "v2 in a container": (
        {"proc/self/cgroup": "0::/\n", f"{GROUP}/memory.max": "4096", f"{GROUP}/memory.current": "96"},
        4000,
    ),
    "v2, path of the host": (
        {"proc/self/cgroup": "0::/../../x\n", f"{GROUP}/memory.max": "4096", f"{GROUP}/memory.current": "96"},
        4000,
    ),
    "v2 overdrawn": (
        {"proc/self/cgroup": "0::/\n", f"{GROUP}/memory.max": "100", f"{GROUP}/memory.current": "200"},
        0,
    ),
    "limit above the machine": (
        {"proc/self/cgroup": "0::/\n", f"{GROUP}/memory.max": str(1 << 50), f"{GROUP}/memory.current": "1"},
        8_192_000,
    ),
    "v1": (
        {
            "proc/self/cgroup": "12:cpu,cpuacct:/x\n5:memory:/docker/1\n1:name=systemd:/\n",
            f"{V1}/docker/1/memory.limit_in_bytes": "3000",
            f"{V1}/docker/1/memory.usage_in_bytes": "1500",
            f"{V1}/docker/1/memory.stat": "active_file 7\ntotal_inactive_file 500\ntotal_active_file 100\n",
            f"{V1}/memory.limit_in_bytes": "9223372036854771712",
            f"{V1}/memory.usage_in_bytes": "999",
        },
        2100,
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", MACHINES)
def test_plan_available_memory_is_the_tightest_limit(tmp_path, case):
    files, expected = MACHINES[case]
    assert available_memory(machine(tmp_path, files)) == expected


@pytest.mark.parametrize(
    "text", ["", "MemTotal: 5 kB\n", "MemAvailable:\n", "MemAvailable: many kB\n"]
)
def test_plan_without_meminfo_is_an_error(tmp_path, text):
    with pytest.raises(RuntimeError, match="must hold MemAvailable"):
        available_memory(machine(tmp_path, {"proc/meminfo": text}))


def test_plan_available_memory_of_this_machine_is_plausible():
    assert 0 <= available_memory() < 1 << 50
