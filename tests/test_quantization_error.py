"""What INT4 cost: the numbers against loops over whole tensors, and the errors that name what does not match."""

from __future__ import annotations

import json
import math
import shutil

import pytest
import torch
from safetensors.torch import save_file

from kimi_native import cli
from kimi_native.checkpoint import Checkpoint
from kimi_native.errors import ModelFormatError, RequestError
from kimi_native.make_checkpoint import make_checkpoint
from kimi_native.quant import groups
from kimi_native.quant.fp8 import dequantize_block
from kimi_native.quant.ptq import quantize_checkpoint
from kimi_native.quant.quantization_error import quantization_error
from made_checkpoints import make_tiny_folders, read_tensors

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """The tiny preset in BF16 and FP8, and what quantize makes of each."""
    root = tmp_path_factory.mktemp("folders")
    found = make_tiny_folders(root)
    for source in ("bf16", "fp8"):
        for levels in (15, 16):
            found[f"{source}-{levels}"] = root / f"{source}-{levels}"
            quantize_checkpoint(found[source], found[f"{source}-{levels}"], levels=levels)
    return found


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch):
    """So that most tensors are read in several."""
    monkeypatch.setattr(groups, "CHUNK_ELEMENTS", 1 << 14)


def opened(path) -> Checkpoint:
    return Checkpoint.open(path)


def naive(quantized: dict, base: dict, layer: int, kind: str):
    """(relative error, worst error in steps, share of codes at the ends) of a layer's routed experts."""
    squares = errors = worst = ends = count = 0.0
    for name, packed in quantized.items():
        module = name.removesuffix(".weight_packed")
        if module == name or not module.startswith(f"model.layers.{layer}.mlp.experts."):
            continue
        if not module.endswith(kind):
            continue
        words = packed.long()[..., None] >> (4 * torch.arange(8))
        q = ((words & 15) - 8).flatten(1)
        scale = quantized[f"{module}.weight_scale"].double().repeat_interleave(32, 1)
        original = base[f"{module}.weight"]
        if original.dtype == torch.float8_e4m3fn:
            original = dequantize_block(original, base[f"{module}.weight_scale_inv"])
        difference = original.double() - q * scale
        squares += float(original.double().square().sum())
        errors += float(difference.square().sum())
        worst = max(worst, float((difference.abs() / scale).max()))
        ends += int((q == 7).sum() + (q == -7).sum() + (q == -8).sum())
        count += q.numel()
    return math.sqrt(errors / squares), worst, ends / count


@pytest.mark.parametrize("levels", [15, 16])
@pytest.mark.parametrize("source", ["bf16", "fp8"])
def test_quantization_error_is_what_loops_find(folders, source, levels):
    found = quantization_error(opened(folders[f"{source}-{levels}"]), opened(folders[source]))
    tensors = [read_tensors(folders[n]) for n in (f"{source}-{levels}", source)]
    int4 = [e for e in found.layers if e.int4]
    kinds = [f"experts.{k}_proj" for k in ("gate", "up", "down")]
    assert [(e.layer, e.kind) for e in int4] == [(i, k) for i in (1, 2, 3) for k in kinds]
    for e in int4:
        relative, worst, ends = naive(*tensors, e.layer, e.kind.removeprefix("experts"))
        assert e.tensors == 16
        assert e.relative_error == pytest.approx(relative, rel=1e-12)
        assert e.sqnr_db == pytest.approx(-20 * math.log10(relative), rel=1e-12)
        assert e.worst_steps == pytest.approx(worst, rel=1e-12)
        assert e.end_share == pytest.approx(ends)
        assert e.worst_steps <= (0.5 if levels == 15 else 0.53) + 1e-6
    for e in found.layers:
        if not e.int4:  # what quantize copies or, from FP8, multiplies out
            assert (e.relative_error, e.sqnr_db, e.worst_steps, e.end_share) == (
                0,
                None,
                None,
                None,
            )


def test_quantization_error_covers_every_tensor_once(folders):
    done = []
    checkpoint, base = opened(folders["bf16-15"]), opened(folders["bf16"])
    found = quantization_error(checkpoint, base, progress=lambda n, total: done.append((n, total)))
    assert sum(e.tensors for e in found.layers) == len(base.tensors) == len(done)
    total = checkpoint.summary()["parameters"]["total"]
    assert done[-1] == (total, total)
    assert [n for n, _ in done] == sorted(n for n, _ in done)
    names = {e.kind for e in found.layers if e.layer is None}
    assert names == {"embed_tokens", "norm", "lm_head"}
    assert {e.kind for e in found.layers if e.layer == 0} >= {"mlp.gate_proj", "self_attn.o_proj"}
    assert {e.kind for e in found.layers if e.layer == 1} >= {
        *("mlp.gate", "mlp.gate.e_score_correction_bias"),
        *("shared_experts.up_proj", "input_layernorm"),
    }


def test_quantization_error_of_all_layers_is_their_sum(folders):
    found = quantization_error(opened(folders["bf16-15"]), opened(folders["bf16"]))
    for total in found.kinds:
        parts = [e for e in found.layers if e.layer is not None and e.kind == total.kind]
        assert total.tensors == sum(e.tensors for e in parts)
        assert total.layer is None
        if total.int4:
            errors = [e.relative_error for e in parts]
            assert min(errors) <= total.relative_error <= max(errors)
            assert total.worst_steps == max(e.worst_steps for e in parts)


@pytest.mark.parametrize("levels", [15, 16])
@pytest.mark.parametrize("source", ["bf16", "fp8"])
def test_quantization_error_without_an_original_is_what_quantize_would_cost(
    folders, source, levels
):
    guessed = quantization_error(opened(folders[source]), levels=levels)
    real = quantization_error(opened(folders[f"{source}-{levels}"]), opened(folders[source]))
    assert guessed.layers == [e for e in real.layers if e.int4]
    assert guessed.kinds == [e for e in real.kinds if e.int4]


def test_quantization_error_of_weights_that_int4_holds_is_zero(tmp_path):
    """Quantized, multiplied out in BF16's place and compared: scales of 2^-7 make every product exact."""
    make_checkpoint(tmp_path / "int4", format="int4")
    tensors = read_tensors(tmp_path / "int4")
    for name, tensor in tensors.items():
        if name.endswith("weight_scale"):
            tensor.fill_(2.0**-7)
    values = dict(tensors)
    for name in [n for n in tensors if n.endswith("weight_packed")]:
        module = name.removesuffix("_packed")
        words = values.pop(name).long()[..., None] >> (4 * torch.arange(8))
        del values[f"{module}_scale"], values[f"{module}_shape"]
        values[module] = (((words & 15) - 8).flatten(1) * 2.0**-7).bfloat16()
    write(tmp_path / "int4", tensors)
    write(tmp_path / "bf16", values, (tmp_path / "int4" / "config.json").read_text())
    found = quantization_error(opened(tmp_path / "int4"), opened(tmp_path / "bf16"))
    assert all(e.relative_error == 0 and e.sqnr_db is None for e in found.layers)
    assert all(e.worst_steps == 0 and 0 < e.end_share < 0.4 for e in found.layers if e.int4)


def write(folder, tensors: dict, config: str | None = None) -> None:
    """A folder of one file."""
    folder.mkdir(exist_ok=True)
    for old in folder.glob("*.safetensors*"):
        old.unlink()
    save_file({n: t.contiguous() for n, t in tensors.items()}, folder / "model.safetensors")
    if config is not None:
        values = json.loads(config)
        del values["quantization_config"]
        (folder / "config.json").write_text(json.dumps(values))


@pytest.fixture
def copies(folders, tmp_path):
    """A quantized folder and its original, to be changed."""
    return [
        shutil.copytree(folders[name], tmp_path / name, symlinks=True)
        for name in ("bf16-15", "bf16")
    ]


def test_quantization_error_shows_other_tensors_that_changed(copies, capsys):
    quantized, base = copies
    tensors = read_tensors(base)
    tensors["model.layers.2.self_attn.o_proj.weight"] *= 1.0625
    tensors["model.norm.weight"] += 1
    write(base, tensors)
    assert cli.main(["inspect", str(quantized), "--quantization-error", str(base)]) == 0
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    others = [line for line in lines if "other" in line]
    assert [line[:2] for line in others] == [
        ["2", "self_attn.o_proj"],
        ["-", "norm"],
        ["all", "self_attn.o_proj"],
    ]
    assert float(others[0][4].rstrip("%")) == pytest.approx(100 * 0.0625 / 1.0625, rel=0.02)


def test_quantization_error_names_the_tensor_that_does_not_match(folders, tmp_path):
    quantized = folders["bf16-15"]
    make_checkpoint(tmp_path / "wide", format="bf16", overrides={"intermediate_size": 576})
    with pytest.raises(
        ModelFormatError,
        match=r"wide: tensor model\.layers\.0\.mlp\.gate_proj: shape must be .*got \[576, 256\]",
    ):
        quantization_error(opened(quantized), opened(tmp_path / "wide"))
    make_checkpoint(tmp_path / "deep", format="bf16", overrides={"num_hidden_layers": 5})
    with pytest.raises(ModelFormatError, match=r"must hold model\.layers\.4\.\S+, as .*deep does"):
        quantization_error(opened(quantized), opened(tmp_path / "deep"))
    make_checkpoint(tmp_path / "flat", format="bf16", overrides={"num_hidden_layers": 3})
    with pytest.raises(ModelFormatError, match=r"flat: must hold model\.layers\.3\.\S+, as "):
        quantization_error(opened(quantized), opened(tmp_path / "flat"))


def test_quantization_error_refuses_the_wrong_way_round(folders):
    quantized, base = opened(folders["bf16-15"]), opened(folders["bf16"])
    with pytest.raises(RequestError, match=r"bf16 must be INT4 .* \(got none of it\)"):
        quantization_error(base, quantized)
    with pytest.raises(RequestError, match=r"must be an original, .*experts\.0\.gate_proj in INT4"):
        quantization_error(quantized, opened(folders["int4"]))
    with pytest.raises(RequestError, match=r"must be given its original .*\(got INT4 alone\)"):
        quantization_error(quantized)


def test_quantization_error_says_nothing_of_what_zeros_became(copies, capsys):
    """An original of zeros has no relative error, a scale of zero no steps; both are shown, as JSON too."""
    quantized, base = copies
    tensors = read_tensors(base)
    tensors["model.layers.1.mlp.gate.e_score_correction_bias"].zero_()
    write(base, tensors)
    tensors = read_tensors(quantized)
    tensors["model.layers.1.mlp.experts.3.up_proj.weight_scale"][2, 1] = 0.0
    write(quantized, tensors)
    found = quantization_error(opened(quantized), opened(base))
    (bias,) = (e for e in found.layers if e.relative_error is None)
    assert (bias.layer, bias.kind) == (1, "mlp.gate.e_score_correction_bias")
    assert [(e.layer, e.kind) for e in found.layers if e.int4 and e.worst_steps is None] == [
        (1, "experts.up_proj")
    ]
    assert cli.main(["inspect", str(quantized), "--quantization-error", str(base)]) == 0
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert ["1", bias.kind, "other", "1", "-", "-", "-", "-"] in lines
    json.loads(json.dumps(found.to_dict(), allow_nan=False))


@pytest.mark.parametrize("which", [0, 1])
def test_quantization_error_names_what_is_not_finite(copies, which):
    name = ("weight_scale", "weight")[which]
    full = f"model.layers.2.mlp.experts.5.up_proj.{name}"
    tensors = read_tensors(copies[which])
    tensors[full][3, 1] = torch.nan
    write(copies[which], tensors)
    message = rf"tensor {full.replace('.', '[.]')}: values must be finite \(got 1 NaN"
    with pytest.raises(ModelFormatError, match=message):
        quantization_error(opened(copies[0]), opened(copies[1]))


# ---- the command ----------------------------------------------------------------------------------------------------


def test_inspect_quantization_error_as_json(folders, capsys):
    argv = ["inspect", str(folders["bf16-15"]), "--quantization-error", str(folders["bf16"])]
    assert cli.main([*argv, "--json"]) == 0
    found = quantization_error(opened(folders["bf16-15"]), opened(folders["bf16"]))
    assert json.loads(capsys.readouterr().out) == found.to_dict()


def test_inspect_quantization_error_as_a_table(folders, capsys):
    assert cli.main(["inspect", str(folders["bf16"]), "--quantization-error"]) == 0
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert lines[0][1:] == ["if", "quantized"]
    assert lines[2][:4] == ["layer", "kind", "form", "tensors"]
    first = quantization_error(opened(folders["bf16"])).layers[0]
    numbers = [f"{first.relative_error:.4%}", f"{first.sqnr_db:.2f}", f"{first.worst_steps:.3f}"]
    assert lines[4] == ["1", "experts.gate_proj", "INT4", "16", *numbers, f"{first.end_share:.2%}"]
    assert [line[0] for line in lines[4:] if line] == [*"111222333", *["all"] * 3]


def test_inspect_quantization_error_says_one_line_on_an_error(folders, capsys, tmp_path):
    argv = ["inspect", str(folders["bf16-15"]), "--quantization-error"]
    assert cli.main(argv) == 1
    assert cli.main([*argv, str(tmp_path / "none")]) == 1
    err = capsys.readouterr().err
    assert "must be given its original" in err
    assert "must be a model folder" in err
    assert err.count("\n") == 2
