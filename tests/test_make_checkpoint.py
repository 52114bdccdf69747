"""make_checkpoint: the folder is the published one in form, and never half written."""

from __future__ import annotations

import argparse
import errno
import json
import math
import re
from pathlib import Path

import pytest

from kimi_native import checkpoint_writer, presets
from kimi_native import make_checkpoint as maker
from kimi_native.errors import ConfigError, KimiNativeError
from kimi_native.make_checkpoint import CheckpointWriteError, make_checkpoint
from made_checkpoints import make_tiny_folders, read_bytes, read_tensors


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    return make_tiny_folders(tmp_path_factory.mktemp("tiny"))


# ---- files -----------------------------------------------------------------------------------------------------------


def test_folder_holds_the_published_files(folders):
    for path in folders.values():
        assert {p.name for p in path.iterdir()} == {
            "config.json",
            "generation_config.json",
            "model-00001-of-00001.safetensors",
            "model.safetensors.index.json",
            "tiktoken.model",
            "tokenizer_config.json",
        }


def test_summary_says_what_was_written(tmp_path):
    summary = make_checkpoint(tmp_path / "c", seed=3, shard_bytes=1 << 20)
    tensors = read_tensors(tmp_path / "c")
    assert summary["tensors"] == len(tensors)
    assert summary["bytes"] == sum(t.nbytes for t in tensors.values())
    assert summary["shards"] == sorted(p.name for p in (tmp_path / "c").glob("*.safetensors"))
    assert len(summary["shards"]) > 5
    assert (summary["preset"], summary["format"], summary["seed"]) == ("tiny", "int4", 3)
    config = presets.text_config("tiny", {})
    assert summary["parameters"] == sum(math.prod(w.shape) for w in presets.weights(config))


def test_index_names_every_tensor_and_the_total(folders):
    for path in folders.values():
        index = json.loads((path / "model.safetensors.index.json").read_text())
        tensors = read_tensors(path)
        assert set(index["weight_map"]) == set(tensors)
        assert index["metadata"]["total_size"] == sum(t.nbytes for t in tensors.values())


def test_shards_keep_to_their_size_and_tensors_to_their_alignment(tmp_path):
    make_checkpoint(tmp_path / "c", format="fp8", shard_bytes=300_000)
    largest = 2048 * 256 * 2  # the embedding has a shard of its own
    for shard in (tmp_path / "c").glob("*.safetensors"):
        raw = shard.read_bytes()
        length = int.from_bytes(raw[:8], "little")
        header = json.loads(raw[8 : 8 + length])
        assert length % 8 == 0
        header.pop("__metadata__")
        assert len(raw) - 8 - length <= (300_000 if len(header) > 1 else largest)
        for entry in header.values():
            assert entry["data_offsets"][0] % checkpoint_writer.ITEM_BYTES[entry["dtype"]] == 0


def test_config_carries_the_published_quantization(folders):
    configs = {f: json.loads((p / "config.json").read_text()) for f, p in folders.items()}
    assert "quantization_config" not in configs["bf16"]
    assert configs["fp8"]["quantization_config"] == {
        "quant_method": "fp8",
        "fmt": "e4m3",
        "activation_scheme": "dynamic",
        "weight_block_size": [128, 128],
    }
    scheme = configs["int4"]["quantization_config"]
    assert scheme["quant_method"] == "compressed-tensors"
    assert scheme["format"] == "pack-quantized"
    assert scheme["config_groups"]["group_0"]["weights"]["group_size"] == 32
    for config in configs.values():
        assert config["model_type"] == "kimi_k2"
        assert config["bos_token_id"] == 2048 - 256
        assert config["eos_token_id"] == 2048 - 256 + 2
    assert len({json.dumps({**c, "quantization_config": 0}) for c in configs.values()}) == 1


# ---- arguments -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"preset": "huge"}, r"preset must be one of tiny, .* \(got huge\)"),
        ({"overrides": {"hiden_size": 64}}, r"overrides must be config keys .* \(got hiden_size\)"),
        ({"overrides": {"hidden_size": 100}}, r"multiple of 32 \(got hidden_size=100\)"),
        ({"overrides": {"hidden_size": "256"}}, r"must be an integer .* \(got hidden_size=256\)"),
        ({"overrides": {"moe_intermediate_size": 48}}, r"\(got moe_intermediate_size=48\)"),
        ({"overrides": {"qk_rope_head_dim": 15}}, r"even \(got qk_rope_head_dim=15\)"),
        ({"overrides": {"q_lora_rank": 0}}, r"\(got q_lora_rank=0\)"),
        ({"overrides": {"n_group": 3}}, r"n_group must divide .*n_group=3"),
        ({"overrides": {"topk_group": 2}}, r"must not exceed n_group .*topk_group=2"),
        ({"overrides": {"n_group": 8}}, r"num_experts_per_tok must not exceed .*n_group=8"),
        ({"experts": 2}, r"num_experts_per_tok must not exceed .*n_routed_experts=2"),
        ({"layers": 0}, r"at least 1 \(got num_hidden_layers=0\)"),
        ({"vocab": 511}, r"256 bytes and 256 reserved slots \(got vocab_size=511\)"),
        ({"layers": 2, "overrides": {"num_hidden_layers": 3}}, "must be given once"),
    ],
)
def test_wrong_configs_are_refused_before_anything_is_written(tmp_path, options, message):
    with pytest.raises(ConfigError, match=message):
        make_checkpoint(tmp_path / "c", **options)
    assert not (tmp_path / "c").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"format": "int3"}, r"format must be one of bf16, int4, fp8 \(got int3\)"),
        ({"seed": -1}, r"seed must not be negative \(got -1\)"),
        ({"shard_bytes": 0}, r"shard_bytes must be positive \(got 0\)"),
    ],
)
def test_wrong_arguments_are_refused_before_anything_is_written(tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        make_checkpoint(tmp_path / "c", **options)
    assert not (tmp_path / "c").exists()


def test_progress_ends_at_the_total(tmp_path):
    seen = []
    summary = make_checkpoint(
        tmp_path / "c", progress=lambda done, total: seen.append((done, total))
    )
    assert seen == sorted(seen)
    assert seen[-1] == (summary["bytes"], summary["bytes"])


# ---- the folder ------------------------------------------------------------------------------------------------------


def test_a_checkpoint_is_replaced_only_on_request(tmp_path):
    out = tmp_path / "c"
    make_checkpoint(out, shard_bytes=1 << 20)
    before = read_bytes(out)
    with pytest.raises(CheckpointWriteError, match=r"out_dir must be empty, or be overwritten"):
        make_checkpoint(out)
    assert read_bytes(out) == before
    make_checkpoint(out, overwrite=True)
    make_checkpoint(tmp_path / "fresh")
    assert read_bytes(out) == read_bytes(tmp_path / "fresh")  # no shard of the old one is left


def test_a_folder_with_other_files_is_never_touched(tmp_path):
    out = tmp_path / "c"
    make_checkpoint(out, layers=2)
    (out / "notes.txt").write_text("mine")
    before = read_bytes(out)
    with pytest.raises(CheckpointWriteError, match=r"hold no other files \(got notes.txt in "):
        make_checkpoint(out, overwrite=True)
    assert read_bytes(out) == before
    with pytest.raises(CheckpointWriteError, match=r"must be a folder \(got file "):
        make_checkpoint(out / "notes.txt")


def test_a_full_disk_is_seen_before_anything_is_written_or_removed(tmp_path, monkeypatch):
    out = tmp_path / "c"
    make_checkpoint(out, layers=2)
    before = read_bytes(out)
    usage = type("Usage", (), {"free": 1000})
    monkeypatch.setattr(checkpoint_writer.shutil, "disk_usage", lambda path: usage)
    with pytest.raises(
        CheckpointWriteError, match=r"needs 0\.\d+ GiB on the disk \(got 0\.\d+ GiB free\)"
    ):
        make_checkpoint(out, overwrite=True, format="bf16")
    assert read_bytes(out) == before
    with pytest.raises(CheckpointWriteError, match=r"\(got 0.000 GiB free\)"):
        make_checkpoint(tmp_path / "new" / "deeper")
    assert not (tmp_path / "new").exists()


def fail_after(monkeypatch, writes: int, error: BaseException) -> None:
    """The `writes`-th write of this run writes a part of its data, then raises."""
    write_at, count = checkpoint_writer.write_at, iter(range(10**9))

    def failing(file, position, data):
        if next(count) == writes:
            file.write(b"\0" * 100)
            raise error
        write_at(file, position, data)

    monkeypatch.setattr(checkpoint_writer, "write_at", failing)


@pytest.mark.parametrize("writes", [0, 3, 40, 300, 484])
@pytest.mark.parametrize(
    "error", [OSError(errno.ENOSPC, "No space left on device"), KeyboardInterrupt()]
)
def test_an_interrupted_run_leaves_nothing(tmp_path, monkeypatch, writes, error):
    out = tmp_path / "c"
    make_checkpoint(out, seed=1, layers=2)  # an older checkpoint is being replaced
    with monkeypatch.context() as patch:
        fail_after(patch, writes, error)
        expected = CheckpointWriteError if isinstance(error, OSError) else KeyboardInterrupt
        with pytest.raises(expected) as caught:
            make_checkpoint(out, shard_bytes=1 << 20, overwrite=True)
    if isinstance(error, OSError):
        assert isinstance(caught.value, KimiNativeError)
        assert re.search(
            r"cannot write .*/c/\S+ \(got No space left on device\)",
            str(caught.value),
        )
    assert list(out.iterdir()) == []
    make_checkpoint(out, shard_bytes=1 << 20)
    make_checkpoint(tmp_path / "fresh", shard_bytes=1 << 20)
    assert read_bytes(out) == read_bytes(tmp_path / "fresh")


def test_an_interrupted_removal_leaves_nothing_that_looks_complete(tmp_path, monkeypatch):
    out = tmp_path / "c"
    make_checkpoint(out, layers=2)
    unlink = Path.unlink

    def failing(path, missing_ok=False):
        if path.suffix == ".safetensors":
            raise PermissionError(errno.EACCES, "Permission denied")
        unlink(path, missing_ok)

    monkeypatch.setattr(Path, "unlink", failing)
    with pytest.raises(CheckpointWriteError, match=r"cannot prepare .*Permission denied"):
        make_checkpoint(out, layers=2, overwrite=True)
    left = {p.name for p in out.iterdir()}
    assert "model-00001-of-00001.safetensors" in left
    assert not left & {"config.json", "model.safetensors.index.json"}


def test_leftover_temporaries_of_a_killed_run_can_be_overwritten(tmp_path):
    out = tmp_path / "c"
    out.mkdir()
    (out / "model-00001-of-00002.safetensors.part").write_bytes(b"half")
    with pytest.raises(CheckpointWriteError):
        make_checkpoint(out)
    make_checkpoint(out, overwrite=True)
    make_checkpoint(tmp_path / "fresh")
    assert read_bytes(out) == read_bytes(tmp_path / "fresh")


# ---- the command -----------------------------------------------------------------------------------------------------


def parse(*argv: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    maker.add_arguments(parser)
    return parser.parse_args(argv)


def test_run_prints_the_summary_as_json(tmp_path, capsys):
    out = str(tmp_path / "c")
    options = ("--preset", "tiny-groups", "--format", "bf16", "--seed", "7", "--layers", "2")
    sets = ("--experts", "32", "--vocab", "600", "--set", "rope_scaling=null")
    sizes = ("--set", "n_shared_experts=2", "--shard-gib", "0.001", "--json")
    assert maker.run(parse(*options, *sets, *sizes, out)) == 0
    captured = capsys.readouterr()
    summary = json.loads(captured.out)
    assert captured.err == ""
    assert summary["path"] == out
    assert (summary["preset"], summary["format"], summary["seed"]) == ("tiny-groups", "bf16", 7)
    assert len(summary["shards"]) > 1
    config = json.loads((tmp_path / "c/config.json").read_text())
    expected = {
        "num_hidden_layers": 2,
        "n_routed_experts": 32,
        "vocab_size": 600,
        "rope_scaling": None,
        "n_shared_experts": 2,
        "n_group": 4,
    }
    assert {key: config[key] for key in expected} == expected


def test_run_prints_one_line_and_needs_overwrite(tmp_path, capsys):
    out = str(tmp_path / "c")
    assert maker.run(parse(out)) == 0
    line = capsys.readouterr().out
    assert line.startswith(f"{out}: 6.92 M parameters, 489 tensors, 7.06 MB in 1 shard, ")
    assert line.count("\n") == 1
    with pytest.raises(CheckpointWriteError):
        maker.run(parse(out))
    assert maker.run(parse(out, "--overwrite")) == 0


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (("--set", "n_group"), "must be KEY=JSON"),
        (("--set", "n_group=four"), "n_group must be JSON"),
        (("--shard-gib", "none"), "must be a size in GiB"),
        (("--shard-gib", "0"), "must be a size in GiB"),
        (("--preset", "huge"), "invalid choice"),
    ],
)
def test_bad_command_lines_are_refused(argv, message, capsys):
    with pytest.raises(SystemExit):
        parse("out", *argv)
    assert message in capsys.readouterr().err
