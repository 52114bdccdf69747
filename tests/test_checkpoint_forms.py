"""How single matrices of a checkpoint may be stored; a wrong tensor is an error that names it."""

from __future__ import annotations

import numpy as np
import pytest

import tiny_checkpoint
from kimi_native.checkpoint import Checkpoint
from kimi_native.errors import KimiNativeError, ModelFormatError
from tiny_checkpoint import FP8, INT4, TINY, write_checkpoint

TINY_INT4 = TINY | {"quantization_config": INT4}
TINY_FP8 = TINY | {"quantization_config": FP8}
EXPERT = "model.layers.1.mlp.experts.2.up_proj"


def with_forms(d: dict, forms: dict[str, str]) -> dict[str, tuple[str, tuple]]:
    return tiny_checkpoint.tensors(d, forms)


@pytest.mark.parametrize("d", [TINY_INT4, TINY_FP8], ids=["int4", "fp8"])
@pytest.mark.parametrize("dtype", ["BF16", "F16", "F32"])
def test_checkpoint_matrix_may_be_plain_where_the_config_quantizes(tmp_path, d, dtype):
    checkpoint = Checkpoint.open(write_checkpoint(tmp_path, d, with_forms(d, {EXPERT: dtype})))
    assert checkpoint.form(EXPERT) == "plain"
    assert checkpoint.form(EXPERT.replace("up", "down")) != "plain"


@pytest.mark.parametrize(
    ("d", "module", "form"),
    [
        (TINY, EXPERT, "int4"),
        (TINY, EXPERT, "fp8"),
        (TINY_FP8, EXPERT, "int4"),
        (TINY_INT4, "model.layers.0.mlp.up_proj", "int4"),
        (TINY_INT4, "model.layers.1.self_attn.q_a_proj", "int4"),
        (TINY_INT4, "lm_head", "int4"),
        (TINY_FP8, "lm_head", "fp8"),
    ],
)
def test_checkpoint_matrix_quantized_against_the_config_is_an_error(tmp_path, d, module, form):
    write_checkpoint(tmp_path, d, with_forms(d, {module: form}))
    with pytest.raises(
        ModelFormatError, match=f"{module} is stored as {form}, but config.json keeps it"
    ):
        Checkpoint.open(tmp_path)


@pytest.mark.parametrize("module", [EXPERT, "model.layers.0.mlp.up_proj", "lm_head"])
def test_checkpoint_matrix_may_be_fp8_beside_int4(tmp_path, module):
    table = with_forms(TINY_INT4, {module: "fp8"})
    checkpoint = Checkpoint.open(write_checkpoint(tmp_path, TINY_INT4, table))
    assert checkpoint.form(module) == "fp8"
    assert set(checkpoint.forms.values()) == {"int4", "fp8", "plain"}
    del table[module + ".weight_scale_inv"]
    write_checkpoint(tmp_path, TINY_INT4, table)
    with pytest.raises(ModelFormatError, match=rf"\(missing 1: {module}.weight_scale_inv\)"):
        Checkpoint.open(tmp_path)


def test_checkpoint_matrix_stored_twice_is_an_error(tmp_path):
    table = tiny_checkpoint.tensors(TINY_INT4) | {EXPERT + ".weight": ("BF16", (32, 64))}
    write_checkpoint(tmp_path, TINY_INT4, table)
    with pytest.raises(ModelFormatError, match=f"{EXPERT} must be stored once"):
        Checkpoint.open(tmp_path)


@pytest.mark.parametrize(
    ("d", "name", "dtype", "message"),
    [
        (TINY, "model.norm.weight", "F8_E4M3", "dtype must be BF16 or F16 or F32"),
        (TINY, "model.norm.weight", "I32", "dtype must be BF16"),
        (TINY, EXPERT + ".weight", "F64", "dtype must be BF16"),
        (
            TINY,
            "model.layers.1.mlp.gate.e_score_correction_bias",
            "F64",
            "dtype must be F32 or BF16",
        ),
        (TINY_INT4, EXPERT + ".weight_packed", "U8", "dtype must be I32"),
        (TINY_INT4, EXPERT + ".weight_scale", "F16", "dtype must be BF16"),
        (TINY_INT4, EXPERT + ".weight_shape", "F32", "dtype must be I32 or I64"),
        (TINY_FP8, EXPERT + ".weight", "F8_E5M2", "dtype must be F8_E4M3"),
        (
            TINY_FP8,
            EXPERT + ".weight",
            "BF16",
            "dtype must be F8_E4M3",
        ),  # its weight_scale_inv is there
        (TINY_FP8, EXPERT + ".weight_scale_inv", "BF16", "dtype must be F32"),
    ],
)
def test_checkpoint_wrong_dtype_is_an_error_naming_the_tensor(tmp_path, d, name, dtype, message):
    table = tiny_checkpoint.tensors(d)
    table[name] = (dtype, table[name][1])
    write_checkpoint(tmp_path, d, table)
    with pytest.raises(
        ModelFormatError, match=f"model.safetensors: tensor {name}: {message}.*got {dtype}"
    ):
        Checkpoint.open(tmp_path)


def each_tensor_once(d: dict) -> dict[str, tuple[str, tuple]]:
    """One layer of each kind and one expert stand for the others."""
    names = [n for n in tiny_checkpoint.tensors(d) if "layers.2" not in n]
    names = [n for n in names if ".experts." not in n or ".experts.2." in n]
    return {n: tiny_checkpoint.tensors(d)[n] for n in names}


@pytest.mark.parametrize("d", [TINY, TINY_INT4, TINY_FP8], ids=["bf16", "int4", "fp8"])
def test_checkpoint_wrong_shape_is_an_error_naming_the_tensor(tmp_path, d):
    for name, (dtype, shape) in each_tensor_once(d).items():
        if name.endswith("weight_shape"):
            continue
        for wrong in ((*shape, 1), (shape[0] + 1, *shape[1:])):
            table = tiny_checkpoint.tensors(d) | {name: (dtype, wrong)}
            write_checkpoint(tmp_path, d, table)
            with pytest.raises(ModelFormatError, match=f"tensor {name}: shape must be"):
                Checkpoint.open(tmp_path)


@pytest.mark.parametrize("d", [TINY, TINY_INT4, TINY_FP8], ids=["bf16", "int4", "fp8"])
def test_checkpoint_each_missing_tensor_is_an_error_naming_it(tmp_path, d):
    for name in each_tensor_once(d):
        table = tiny_checkpoint.tensors(d)
        del table[name]
        write_checkpoint(tmp_path, d, table)
        with pytest.raises(KimiNativeError) as error:
            Checkpoint.open(tmp_path)
        module = name.rpartition(".")[0]
        assert name in str(error.value) or module in str(error.value)


def test_checkpoint_missing_and_unexpected_tensors_are_counted(tmp_path):
    table = {n: t for n, t in tiny_checkpoint.tensors(TINY).items() if ".experts." not in n}
    write_checkpoint(tmp_path / "less", TINY, table)
    with pytest.raises(
        ModelFormatError,
        match=r"every tensor of the model \(missing 24: model\.layers\.1\..* and 19 more\)$",
    ):
        Checkpoint.open(tmp_path / "less")
    extra = {f"model.layers.0.self_attn.q_a_proj.bias{i}": ("BF16", (32,)) for i in range(7)}
    write_checkpoint(tmp_path / "more", TINY, tiny_checkpoint.tensors(TINY) | extra)
    with pytest.raises(
        ModelFormatError,
        match=r"\(got 7: .*q_a_proj\.bias0 in model\.safetensors, .* and 2 more\)$",
    ):
        Checkpoint.open(tmp_path / "more")


@pytest.mark.parametrize("values", [[64, 32], [32, 65], [0, 0], [-1, 64]])
def test_checkpoint_wrong_weight_shape_is_an_error(tmp_path, values):
    path = write_checkpoint(tmp_path, TINY_INT4) / "model.safetensors"
    info = Checkpoint.open(tmp_path).tensors[EXPERT + ".weight_shape"]
    content = bytearray(path.read_bytes())
    content[info.start : info.start + 8] = np.array(values, np.int32).tobytes()
    path.write_bytes(content)
    checkpoint = Checkpoint.open(tmp_path)
    with pytest.raises(ModelFormatError, match=rf"{EXPERT}.weight_shape: must hold \[32, 64\]"):
        checkpoint.check_weight_shapes(all=True)


def test_checkpoint_reads_one_weight_shape_of_a_layer_if_not_all(tmp_path):
    path = write_checkpoint(tmp_path, TINY_INT4) / "model.safetensors"
    info = Checkpoint.open(tmp_path).tensors[EXPERT + ".weight_shape"]
    content = bytearray(path.read_bytes())
    content[info.start : info.start + 8] = bytes(8)
    path.write_bytes(content)
    checkpoint = Checkpoint.open(tmp_path)
    assert checkpoint.check_weight_shapes(all=False) == 2 * 3
    with pytest.raises(ModelFormatError, match="weight_shape"):
        checkpoint.check_weight_shapes(all=True)
