"""quantize: sources it must refuse, by name; the command; the room it takes in memory and on disk."""

from __future__ import annotations

import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from kimi_native import cli
from kimi_native.checkpoint import Checkpoint
from kimi_native.errors import ConfigError, KimiNativeError, ModelFormatError, RequestError
from kimi_native.make_checkpoint import make_checkpoint
from kimi_native.quant import ptq
from kimi_native.quant.ptq import quantize_checkpoint
from made_checkpoints import read_bytes, read_tensors
from tiny_checkpoint import FP8, INT4, TINY, tensors, write_checkpoint

SMALL = TINY | {"num_hidden_layers": 2}
EXPERT = "model.layers.1.mlp.experts.2.down_proj.weight"


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return write_checkpoint(tmp_path_factory.mktemp("small") / "source", SMALL)


# ---- sources ---------------------------------------------------------------------------------------------------------


def refused(source: Path, out: Path, error: type[KimiNativeError], message: str, **options) -> None:
    """Raises, and leaves nothing: the source is refused from its headers."""
    with pytest.raises(error, match=message):
        quantize_checkpoint(source, out, **options)
    assert not out.exists()


def test_quantize_refuses_int4(tmp_path):
    source = write_checkpoint(tmp_path / "s", SMALL | {"quantization_config": INT4})
    refused(
        source, tmp_path / "o", ConfigError, r"must be BF16 or FP8 \(got .* INT4 already .* 12 mat"
    )


def test_quantize_refuses_a_config_that_says_int4_over_plain_weights(tmp_path):
    config = SMALL | {"quantization_config": INT4}
    source = write_checkpoint(tmp_path / "s", config, tensors(SMALL))
    refused(source, tmp_path / "o", ConfigError, r"INT4 already .* in 0 matrices")


@pytest.mark.parametrize("change", [{"first_k_dense_replace": 2}, {"n_routed_experts": None}])
def test_quantize_refuses_a_model_without_experts(tmp_path, change):
    config = SMALL | {"first_k_dense_replace": 2} | change
    source = write_checkpoint(tmp_path / "s", config)
    refused(
        source, tmp_path / "o", ConfigError, r"must have routed experts, .* \(got \S+ with none\)"
    )


def test_quantize_refuses_a_width_that_is_not_whole_groups(tmp_path):
    source = write_checkpoint(tmp_path / "s", SMALL | {"moe_intermediate_size": 48})
    message = r"experts\.0\.down_proj: INT4 needs in_features that are a multiple of 32 \(got 48\)"
    refused(source, tmp_path / "o", ConfigError, message)


def test_quantize_refuses_what_is_no_checkpoint(source, tmp_path):
    refused(tmp_path / "none", tmp_path / "o", ModelFormatError, "must be a model folder")
    own = Path(shutil.copytree(source, tmp_path / "s"))
    (own / "model.safetensors").write_bytes((own / "model.safetensors").read_bytes()[:-1])
    refused(own, tmp_path / "o", ModelFormatError, r"model\.safetensors: tensor .* data_offsets")


def test_quantize_refuses_a_half_written_source(source, tmp_path):
    own = Path(shutil.copytree(source, tmp_path / "s"))
    (own / "quantize-state.json").write_text("{}")
    refused(own, tmp_path / "o", ModelFormatError, "quantize was interrupted here")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"levels": 14}, r"levels must be 15 or 16 \(got 14\)"),
        ({"threads": 0}, r"threads must be 1 to 16 \(got 0\)"),
        ({"threads": 17}, r"threads must be 1 to 16 \(got 17\)"),
        ({"shard_bytes": 0}, r"shard_bytes must be positive \(got 0\)"),
    ],
)
def test_quantize_refuses_wrong_arguments(source, tmp_path, options, message):
    refused(source, tmp_path / "o", RequestError, f"quantize: {message}", **options)


def test_quantize_refuses_places_inside_each_other(source, tmp_path):
    own = Path(shutil.copytree(source, tmp_path / "deep" / "s"))
    link = tmp_path / "link"
    link.symlink_to(own)
    before = read_bytes(own)
    for out in (own, link, Path(os.path.relpath(own)), own / ".." / "s"):
        with pytest.raises(RequestError, match="out_dir must not be the source"):
            quantize_checkpoint(own, out, overwrite=True)
    for out in (own / "o", link / "deep" / "o"):
        with pytest.raises(RequestError, match="out_dir must lie outside the source"):
            quantize_checkpoint(own, out, overwrite=True)
    with pytest.raises(RequestError, match="the source must lie outside out_dir"):
        quantize_checkpoint(link, tmp_path / "deep", overwrite=True)
    assert read_bytes(own) == before


def test_quantize_refuses_a_file_for_a_folder(source, tmp_path):
    (tmp_path / "o").write_text("mine")
    for overwrite in (False, True):
        with pytest.raises(KimiNativeError, match=r"out_dir must be a folder \(got file "):
            quantize_checkpoint(source, tmp_path / "o", overwrite=overwrite)
    assert (tmp_path / "o").read_text() == "mine"


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("name", [EXPERT, "lm_head.weight", "model.norm.weight"])
def test_quantize_names_a_tensor_that_is_not_finite(source, tmp_path, name, value):
    own, out = Path(shutil.copytree(source, tmp_path / "s")), tmp_path / "o"
    values = load_file(own / "model.safetensors")
    values[name].view(-1)[-1] = value
    save_file(values, own / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(
        ModelFormatError, match=rf"model\.safetensors: tensor {name}: .*finite.* \(got 1 NaN or inf"
    ):
        quantize_checkpoint(own, out)
    with pytest.raises(ModelFormatError, match="quantize was interrupted"):
        Checkpoint.open(out)


@pytest.mark.parametrize("name", [EXPERT, "model.layers.0.self_attn.o_proj.weight"])
@pytest.mark.parametrize("part", ["weight", "multiplier"])
def test_quantize_names_an_fp8_tensor_that_is_not_finite(tmp_path, name, part):
    source = tmp_path / "s"
    make_checkpoint(source, format="fp8", layers=2)
    (shard,) = source.glob("*.safetensors")
    values = read_tensors(source)
    if part == "weight":
        values[name].view(torch.uint8)[0, 0] = 0x7F  # the NaN of e4m3
    else:
        values[f"{name}_scale_inv"][0, 0] = float("inf")
    save_file(values, shard, metadata={"format": "pt"})
    with pytest.raises(ModelFormatError, match=rf"tensor {name}: .*finite.* \(got \d+ NaN or inf"):
        quantize_checkpoint(source, tmp_path / "o")


@pytest.mark.parametrize(
    ("scale", "got"),
    [
        (None, r"F8_E4M3 \[130, 8\] with none"),
        (torch.ones(1, 1), r"with F32 \[1, 1\]"),
        (torch.ones(2, 1).bfloat16(), r"with BF16 \[2, 1\]"),
    ],
)
def test_quantize_refuses_fp8_without_its_multipliers(tmp_path, scale, got):
    """Of the text model opening refuses that; this is an MTP layer's tensor."""
    source = tmp_path / "s"
    make_checkpoint(source, format="fp8", layers=2, overrides={"num_nextn_predict_layers": 1})
    (shard,) = source.glob("*.safetensors")
    name = "model.layers.2.extra.weight"
    values = read_tensors(source) | {name: torch.zeros(130, 8).to(torch.float8_e4m3fn)}
    if scale is not None:
        values[f"{name}_scale_inv"] = scale
    save_file(values, shard, metadata={"format": "pt"})
    index = {n: shard.name for n in values}
    (source / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    refused(
        source, tmp_path / "o", ModelFormatError, rf"tensor {name}: FP8 must be .* \(got .*{got}\)"
    )


def test_quantize_refuses_a_config_it_could_not_read_back(tmp_path):
    """A pattern per MTP layer: beyond the reader's limit nothing is written."""
    config = SMALL | {"num_nextn_predict_layers": 40}
    extra = {f"model.layers.{i}.enorm.weight": ("BF16", (4,)) for i in range(2, 42)}
    source = write_checkpoint(tmp_path / "s", config, tensors(config) | extra)
    refused(
        source,
        tmp_path / "o",
        ConfigError,
        r"quantization_config.ignore must hold at most 32 patterns \(got 43\)",
    )


def test_quantize_names_a_source_that_cannot_be_read(source, tmp_path, monkeypatch):
    own, out = Path(shutil.copytree(source, tmp_path / "s")), tmp_path / "o"
    file = own / "model.safetensors"
    make_plan = ptq.make_plan

    def then_cut(*args, **options):
        plan = make_plan(*args, **options)
        os.truncate(file, file.stat().st_size // 2)
        return plan

    monkeypatch.setattr(ptq, "make_plan", then_cut)
    with pytest.raises(
        ModelFormatError, match=r"model\.safetensors: tensor \S+: the file ends early"
    ):
        quantize_checkpoint(own, out)
    file.unlink()
    monkeypatch.setattr(ptq, "make_plan", lambda *args, **options: make_plan(*args, **options))
    with pytest.raises(ModelFormatError, match=r"no \.safetensors file"):
        quantize_checkpoint(own, out)


# ---- the command -----------------------------------------------------------------------------------------------------


def run(*argv: object) -> int:
    return cli.main([str(a) for a in argv])


def test_command_prints_one_line_and_what_it_left(source, tmp_path, capsys):
    own, out = Path(shutil.copytree(source, tmp_path / "s")), tmp_path / "o"
    (own / "README.md").write_text("of the source")
    assert run("quantize", own, out) == 0
    line, notes = capsys.readouterr()
    assert line.startswith(f"{out}: 12 matrices in INT4 (15 levels), ")
    assert " in 1 shard from " in line
    assert line.endswith(" GB/s\n")
    assert line.count("\n") == 1
    assert notes == "kimi-native: not copied: README.md\n"


def test_command_prints_json(source, tmp_path, capsys):
    out = tmp_path / "o"
    assert run("quantize", source, out, "--levels", "16", "--threads", "2", "--json") == 0
    printed, notes = capsys.readouterr()
    report = json.loads(printed)
    assert (report["path"], report["source"], report["levels"]) == (str(out), str(source), 16)
    assert notes == ""
    assert run("inspect", out, "--json") == 0
    assert json.loads(capsys.readouterr().out)["matrices_by_form"]["int4"] == 12


def test_command_needs_overwrite(source, tmp_path, capsys):
    out = tmp_path / "o"
    assert run("quantize", source, out) == 0
    capsys.readouterr()
    assert run("quantize", source, out) == 1
    printed, notes = capsys.readouterr()
    assert printed == ""
    assert notes.startswith(
        "kimi-native: error: quantize: out_dir must be empty, or be overwritten"
    )
    assert notes.count("\n") == 1
    assert run("quantize", source, out, "--overwrite") == 0


def test_command_takes_unknown_config_keys_on_request(source, tmp_path, capsys):
    own, out = Path(shutil.copytree(source, tmp_path / "s")), tmp_path / "o"
    config = json.loads((own / "config.json").read_text()) | {"novelty": 1}
    (own / "config.json").write_text(json.dumps(config))
    assert run("quantize", own, out) == 1
    assert "keys must be known to this package (got novelty" in capsys.readouterr().err
    assert run("quantize", own, out, "--ignore-config-key", "novelty") == 0
    assert json.loads((out / "config.json").read_text())["novelty"] == 1


def test_command_takes_an_unknown_key_of_the_scheme_it_replaces(tmp_path):
    scheme = FP8 | {"novelty": 1}
    config = SMALL | {"quantization_config": scheme}
    own = write_checkpoint(tmp_path / "s", config, tensors(SMALL))
    key = "quantization_config.novelty"
    assert run("quantize", own, tmp_path / "o") == 1
    assert run("quantize", own, tmp_path / "o", "--ignore-config-key", key) == 0


def test_command_interrupted_before_it_writes_says_so(source, tmp_path, capsys, monkeypatch):
    def interrupted(*args, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr(ptq, "quantize_checkpoint", interrupted)
    assert run("quantize", source, tmp_path / "o") == 130
    assert capsys.readouterr().err == "kimi-native: interrupted; nothing was written\n"


@pytest.mark.parametrize("argv", [[], ["a"], ["a", "b", "--levels", "8"]])
def test_command_refuses_wrong_usage(capsys, argv):
    with pytest.raises(SystemExit) as caught:
        run("quantize", *argv)
    assert caught.value.code == 2
    assert "usage: kimi-native quantize" in capsys.readouterr().err


def test_command_shows_progress_on_a_terminal_only(source, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    assert run("quantize", source, tmp_path / "o") == 0
    shown = capsys.readouterr().err
    assert "quantize" in shown
    assert "/s" in shown


# ---- disk and memory, each in a process of its own -------------------------------------------------------------------


def test_a_full_disk_is_one_line_and_the_command_goes_on(source, tmp_path):
    """The limit on a file's size stands for a disk that fills up while a shard is written."""
    out = tmp_path / "o"

    def limit():
        resource.setrlimit(resource.RLIMIT_FSIZE, (40_000, 40_000))

    process = subprocess.run(
        [sys.executable, "-P", "-m", "kimi_native", "quantize", source, out],
        capture_output=True,
        text=True,
        preexec_fn=limit,
        check=False,
    )
    printed, notes = process.stdout, process.stderr
    assert process.returncode == 1
    assert printed == ""
    assert notes.count("\n") == 1
    assert notes.startswith(
        f"kimi-native: error: quantize: cannot write {out}/model-00001-of-00001"
    )
    assert "(got File too large); no shard of 1 is done: the same command begins again" in notes
    assert not list(out.glob("*.part"))
    with pytest.raises(ModelFormatError, match="quantize was interrupted here"):
        Checkpoint.open(out)
    assert run("quantize", source, out) == 0
    quantize_checkpoint(source, tmp_path / "fresh")
    assert read_bytes(out) == read_bytes(tmp_path / "fresh")


STUCK = """
import sys, time
from pathlib import Path
from kimi_native import checkpoint_writer, cli
write_at, count = checkpoint_writer.write_at, iter(range(10**9))
def then_stuck(file, position, data):
    write_at(file, position, data)
    if next(count) == 20:
        Path(sys.argv[1]).touch()
        time.sleep(60)
checkpoint_writer.write_at = then_stuck
sys.exit(cli.main(sys.argv[2:]))
"""


@pytest.mark.parametrize("signal_number", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_a_killed_command_leaves_what_the_next_goes_on_from(source, tmp_path, signal_number):
    out, stuck = tmp_path / "o", tmp_path / "stuck"
    process = subprocess.Popen(
        [sys.executable, "-P", "-c", STUCK, stuck, "quantize", source, out],
        stderr=subprocess.PIPE,
        text=True,
    )
    while not stuck.exists():
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(signal_number)
    _, notes = process.communicate(timeout=60)
    leftover = list(out.glob("model-*.part"))
    if signal_number == signal.SIGINT:
        assert process.returncode == 130
        assert notes == (
            "kimi-native: interrupted; no shard of 1 is done: the same command begins again\n"
        )
        assert not leftover
    else:
        assert process.returncode == -signal_number
        assert leftover
    with pytest.raises(ModelFormatError, match="quantize was interrupted here"):
        Checkpoint.open(out)
    assert run("quantize", source, out) == 0
    quantize_checkpoint(source, tmp_path / "fresh")
    assert read_bytes(out) == read_bytes(tmp_path / "fresh")


PEAK = """
import re, sys
from kimi_native.quant.ptq import quantize_checkpoint
quantize_checkpoint(sys.argv[1], sys.argv[2], threads=2)
print(re.search(r"VmHWM:\\s*(\\d+) kB", open("/proc/self/status").read())[1])
"""


def peak_bytes(source: Path, out: Path) -> int:
    """Largest resident set of a process, mapped pages included (ru_maxrss would count the one that started it)."""
    result = subprocess.run(
        [sys.executable, "-P", "-c", PEAK, str(source), str(out)],
        capture_output=True,
        text=True,
        check=True,
    )
    return int(result.stdout) << 10


def test_quantize_memory_does_not_grow_with_the_model(source, tmp_path):
    """A model of 420 MB, whose INT4 form has 120 MB, takes less than 84 MB more than one of 0.1 MB.

    Each of 2 threads holds a piece of 4 MiB, what becomes of it and temporaries: not three times as much; four finished
    pieces of at most 4 MiB wait to be written. That is 42 MB; allocators and thread stacks get as much again.
    """
    large = tmp_path / "source"
    overrides = {"moe_intermediate_size": 512, "hidden_size": 1024}
    made = make_checkpoint(large, format="bf16", layers=2, experts=128, overrides=overrides)
    small = peak_bytes(source, tmp_path / "small")
    peak = peak_bytes(large, tmp_path / "large")
    written = sum(p.stat().st_size for p in (tmp_path / "large").glob("*.safetensors"))
    shutil.rmtree(large)
    shutil.rmtree(tmp_path / "large")
    print(
        f"peak {small / 1e6:.0f} MB for 0.1 MB, {peak / 1e6:.0f} MB for {made['bytes'] / 1e6:.0f} MB"
    )
    bound = 2 * (2 * 3 + 4) * (4 << 20)
    assert made["bytes"] > written > bound
    assert peak - small < bound
