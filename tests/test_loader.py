"""Loading: what is read ahead and what is converted, how it is reported, interrupted, and refused."""

from __future__ import annotations

import os
import shutil
import threading
import warnings

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

import kimi_native as kn
from kimi_native import loader, ops, plan
from kimi_native.cache import LatentCache
from kimi_native.errors import MemoryPlanError, MemoryPlanWarning, ModelFormatError
from kimi_native.huge_pages import HugePages
from kimi_native.loader import load_model
from kimi_native.mapped_file import MappedFile
from kimi_native.model import Experts
from kimi_native.quant.modules import Int4Experts
from made_checkpoints import make_tiny_folders
from page_table import present_pages

IDS = torch.arange(40, dtype=torch.int64)
FORMATS = ("int4", "bf16", "fp8")


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    return make_tiny_folders(tmp_path_factory.mktemp("tiny"))


@pytest.fixture
def int4(folders, tmp_path):
    """A copy, to be damaged."""
    return shutil.copytree(folders["int4"], tmp_path / "int4")


def logits(model) -> torch.Tensor:
    cache = LatentCache(model.config, max_tokens=64)
    return model.prefill(IDS, cache, cache.new_sequence())


def shard(folder):
    return folder / "model-00001-of-00001.safetensors"


# ---- the memory plan -------------------------------------------------------------------------------------------------


def test_load_refuses_what_does_not_fit_before_it_reads_a_weight(folders, monkeypatch):
    seen = []
    monkeypatch.setattr(plan, "available_memory", lambda: 100 << 20)
    with pytest.raises(MemoryPlanError, match=r"104\.86 MB are available"):
        kn.load(folders["int4"], progress=lambda *a: seen.append(a))
    assert seen == []


# ---- reading ahead --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dense", loader.DENSE_FORMATS)
@pytest.mark.parametrize("format", FORMATS)
def test_load_is_the_same_with_and_without_prefetch(folders, format, dense):
    results = [
        logits(load_model(folders[format], dense=dense, prefetch=prefetch)[0])
        for prefetch in (True, False)
    ]
    assert torch.equal(*results)


def test_load_prefetch_leaves_no_page_to_fault_in(folders, monkeypatch):
    for prefetch in (True, False):
        _, checkpoint = load_model(folders["bf16"], prefetch=prefetch)
        (file,) = checkpoint.files
        missing = -(-file.mapped.size // 4096) - present_pages(file.mapped)
        # The header's pages are not read ahead.
        header = min(info.start for info in file.tensors.values()) // 4096
        assert (missing <= header) == prefetch


@pytest.mark.parametrize("prefetch", [True, False])
@pytest.mark.parametrize("dense", loader.DENSE_FORMATS)
@pytest.mark.parametrize("format", FORMATS)
def test_load_progress_counts_every_byte_once(folders, format, dense, prefetch):
    seen = []
    _, checkpoint = load_model(
        folders[format], dense=dense, prefetch=prefetch, progress=lambda *a: seen.append(a)
    )
    total = sum(info.nbytes for info in checkpoint.tensors.values())
    assert {t for _, t in seen} == {total}
    done = [d for d, _ in seen]
    assert done == sorted(done)
    assert (done[0], done[-1]) == (0, total)


def test_load_reads_ahead_what_stays_mapped_and_nothing_else(folders, monkeypatch):
    read, copied = [], []
    release = MappedFile.release
    monkeypatch.setattr(loader, "read_ahead", lambda extents, report: read.extend(extents))
    monkeypatch.setattr(
        MappedFile, "release", lambda self, *at: (copied.append(at), release(self, *at))
    )
    cases = (("int4", "bf16"), ("int4", "int8"), ("int4", "int4"), ("fp8", "bf16"))
    for format, dense in cases:
        read.clear()
        copied.clear()
        _, checkpoint = load_model(folders[format], dense=dense)
        p = plan.memory_plan(checkpoint, max_context=64, dense=dense)
        assert sum(extent.nbytes for extent in read) == p.mapped_bytes
        extents = sorted([(e.start, e.nbytes) for e in read] + copied)
        first = min(info.start for info in checkpoint.tensors.values())
        for start, nbytes in extents:
            assert start == first
            first += nbytes
        assert first == checkpoint.files[0].mapped.size


@pytest.mark.parametrize("dense", ["int8", "int4"])
@pytest.mark.parametrize("format", FORMATS)
def test_load_allocates_what_the_plan_counts(folders, monkeypatch, format, dense):
    made = []
    monkeypatch.setattr(loader, "HugePages", lambda: made.append(HugePages()) or made[-1])
    model, checkpoint = load_model(folders[format], dense=dense)
    (pages,) = made
    with pytest.raises(RuntimeError, match="0 left"):  # all that was reserved is in use
        pages.empty((1,), torch.int8)
    copied = pages.nbytes
    if format == "fp8":  # these became BF16
        experts = [m for m in model.modules() if isinstance(m, Experts)]
        copied += sum(w.nbytes for m in experts for w in (*m.gate, *m.up, *m.down))
        copied += sum(p.nbytes for n, p in model.named_parameters() if "kv_b_proj" in n)
    planned = dict(plan.memory_plan(checkpoint, dense=dense).items)
    assert planned["weights copied or converted while loading"] == copied > 0


@pytest.mark.parametrize("dense", ["int8", "int4"])
def test_load_names_a_dense_weight_that_is_not_finite(folders, tmp_path, dense):
    folder = shutil.copytree(folders["bf16"], tmp_path / "nan")
    name = "model.layers.1.self_attn.o_proj.weight"
    with safe_open(shard(folder), "pt") as file:
        tensors = {n: file.get_tensor(n) for n in file.keys()}  # noqa: SIM118
    tensors[name][3, 5] = torch.nan
    save_file(tensors, shard(folder))
    with pytest.raises(ModelFormatError, match=rf"{name}: .*w must be finite"):
        load_model(folder, dense=dense)


def test_load_of_a_model_beyond_the_memory_maps_it_and_says_so(folders, monkeypatch):
    monkeypatch.setattr(loader, "read_ahead", None)  # not called
    with pytest.warns(MemoryPlanWarning, match="exceed the memory left for them .* not read ahead"):
        model, checkpoint = load_with_memory(monkeypatch, folders["int4"], 1)
    assert logits(model).isfinite().all()
    assert checkpoint.check_weight_shapes(all=True) > 0


def load_with_memory(monkeypatch, folder, spare: int):
    """Loads with `spare` bytes more than what must be resident."""
    from kimi_native.checkpoint import Checkpoint

    needed = plan.memory_plan(Checkpoint.open(folder)).needed_bytes
    monkeypatch.setattr(plan, "available_memory", lambda: needed + spare)
    return load_model(folder)


def test_load_of_a_model_that_just_fits_reads_ahead(folders, monkeypatch):
    called = []
    monkeypatch.setattr(loader, "read_ahead", lambda extents, report: called.append(extents))
    mapped = plan.memory_plan(load_model(folders["int4"])[1]).mapped_bytes
    called.clear()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load_with_memory(monkeypatch, folders["int4"], mapped)
    assert len(called) == 1
    with pytest.warns(MemoryPlanWarning):
        load_with_memory(monkeypatch, folders["int4"], mapped - 1)
    assert len(called) == 1


def test_load_int4_experts_are_addresses_in_the_file(folders):
    model, checkpoint = load_model(folders["int4"], prefetch=False)
    experts = [m for m in model.modules() if isinstance(m, Int4Experts)]
    assert len(experts) == 3
    for module in experts:
        for weights in (module.gate, module.up, module.down):
            assert len(weights) == len(weights.weights) == 16
            assert weights.packed_pointers.tolist() == [
                w.weight_packed.data_ptr() for w in weights.weights
            ]
            assert weights.scale_pointers.tolist() == [
                w.weight_scale.data_ptr() for w in weights.weights
            ]
    name = "model.layers.2.mlp.experts.5.up_proj.weight_packed"
    assert experts[1].up.packed_pointers[5] == checkpoint.tensor(name).data_ptr()


# ---- what fails leaves nothing behind -------------------------------------------------------------------------------


@pytest.fixture
def settings():
    """Process-wide settings that must survive, unlike those asked for."""
    before = ops.num_threads(), torch.get_num_threads(), ops.active_isa()
    yield {"threads": 3, "isa": "generic"}
    assert (ops.num_threads(), torch.get_num_threads(), ops.active_isa()) == before
    assert not [t for t in threading.enumerate() if t.name.startswith("read-ahead")]
    ops.force_isa("")


@pytest.mark.parametrize("format", FORMATS)
def test_load_interrupted_at_any_report_leaves_the_process_as_it_was(folders, settings, format):
    reports = []
    kn.load(folders[format], max_batch=1, progress=lambda *a: reports.append(a))
    for stop in {0, 1, len(reports) // 2, len(reports) - 1}:
        calls = []

        def interrupt(done, total, calls=calls, stop=stop):
            calls.append(done)
            if len(calls) > stop:
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            kn.load(folders[format], max_batch=1, progress=interrupt, **settings)
        assert len(calls) == stop + 1
    kn.load(folders[format], max_batch=1)


def test_load_refused_leaves_the_process_as_it_was(int4, settings):
    os.truncate(shard(int4), 5000)
    with pytest.raises(ModelFormatError):
        kn.load(int4, **settings)


def test_load_refuses_a_tokenizer_before_it_reads_weights(int4, monkeypatch):
    monkeypatch.setattr(loader, "load_model", None)  # not called
    (int4 / "tiktoken.model").write_text("nonsense")
    with pytest.raises(kn.TokenizerError):
        kn.load(int4)


def test_load_wrong_weight_shape_is_an_error_naming_it(int4):
    from kimi_native.checkpoint import Checkpoint

    name = "model.layers.2.mlp.experts.5.up_proj.weight_shape"
    info = Checkpoint.open(int4).tensors[name]
    with open(shard(int4), "r+b") as file:
        file.seek(info.start)
        file.write(bytes(8))
    with pytest.raises(ModelFormatError, match=rf"tensor {name}: must hold \[128, 256\]"):
        load_model(int4)


# ---- files that lose bytes ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("prefetch", [True, False])
def test_load_of_a_file_truncated_meanwhile_is_a_named_error(int4, prefetch):
    size = shard(int4).stat().st_size

    def truncate(done, total):
        os.truncate(shard(int4), size // 4)

    with pytest.raises(ModelFormatError, match=f"must keep its {size} bytes readable"):
        load_model(int4, prefetch=prefetch, progress=truncate)


def test_load_of_a_file_truncated_while_it_is_converted_is_a_named_error(folders, tmp_path):
    folder = shutil.copytree(folders["fp8"], tmp_path / "fp8")

    def truncate(done, total):
        if done > total // 2:
            os.truncate(shard(folder), 100_000)

    with pytest.raises(ModelFormatError, match="truncated to 100000 bytes"):
        load_model(folder, progress=truncate)


def test_answers_end_with_a_named_error_when_a_file_is_truncated(int4):
    model = kn.load(int4, max_batch=2, max_context=256)
    expected = model.generate("Hello", raw_prompt=True, max_tokens=8, seed=1).ids
    saved = shutil.copy(shard(int4), int4.parent / "saved")
    stream = model.stream("Hello", raw_prompt=True, max_tokens=100, seed=1, ignore_eos=True)
    next(stream)
    os.truncate(shard(int4), 10_000)
    message = r"model-00001-of-00001\.safetensors: must keep .* truncated to 10000 bytes"
    with pytest.raises(ModelFormatError, match=message):
        list(stream)
    for _ in range(2):  # what was lost stays lost
        with pytest.raises(ModelFormatError, match=message):
            model.generate("Hello", raw_prompt=True, max_tokens=8)
    shutil.copy(saved, shard(int4))
    again = kn.load(int4, max_batch=1, max_context=256)
    assert again.generate("Hello", raw_prompt=True, max_tokens=8, seed=1).ids == expected


def test_the_first_token_of_a_truncated_file_is_a_named_error(int4):
    """Prefill computes it, and no decode step follows that would see the damage."""
    model = kn.load(int4, max_batch=1, max_context=256)
    os.truncate(shard(int4), 10_000)
    with pytest.raises(ModelFormatError, match="truncated to 10000 bytes"):
        model.generate("Hello", raw_prompt=True, max_tokens=1, seed=1)
