"""Index and files of a checkpoint folder: they agree, lie inside it, or a named error says what is wrong."""

from __future__ import annotations

import json
import os
import shutil

import pytest

import tiny_checkpoint
from kimi_native.checkpoint import Checkpoint
from kimi_native.errors import ModelFormatError
from tiny_checkpoint import K2, TINY, write_checkpoint


@pytest.fixture
def sharded(tmp_path):
    return write_checkpoint(tmp_path / "model", TINY, shards=3)


def edit_index(folder, edit):
    path = folder / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    edit(index)
    path.write_text(json.dumps(index))


FIRST, SECOND = "model-00001-of-000003.safetensors", "model-00002-of-000003.safetensors"


def swap(index):
    names = [n for n, f in index["weight_map"].items() if f == FIRST]
    index["weight_map"][names[3]] = SECOND


BAD_INDEX = {
    "no weight_map": (lambda i: i.pop("weight_map"), "weight_map must map"),
    "list": (lambda i: i.update(weight_map=[]), "weight_map must map"),
    "number": (lambda i: i["weight_map"].update({"lm_head.weight": 1}), "weight_map must map"),
    "empty": (lambda i: i.update(weight_map={}), "must name 1 to 1000000 tensors"),
    "missing shard": (lambda i: i["weight_map"].update({"x": "y.safetensors"}), "y.safetensors: the file is missing"),
    "wrong shard": (swap, f"{SECOND}: tensor .* must be in this file according to"),
    "unknown tensor": (lambda i: i["weight_map"].update({"x": FIRST}), "tensor x must be in this file"),
    "tensor left out": (lambda i: i["weight_map"].pop("lm_head.weight"), "lm_head.weight must be in model.safe"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD_INDEX)
def test_checkpoint_bad_index_is_a_named_error(sharded, case):
    edit, message = BAD_INDEX[case]
    edit_index(sharded, edit)
    with pytest.raises(ModelFormatError, match=message):
        Checkpoint.open(sharded)


@pytest.mark.parametrize(
    "name",
    [
        "../outside.safetensors",
        "/etc/passwd",
        "sub/x.safetensors",
        "..",
        ".",
        "",
        "a\\b",
        "a\0b",
        "x" * 300,
    ],
)
def test_checkpoint_shard_name_with_a_folder_is_refused(sharded, name):
    shutil.copy(sharded / FIRST, sharded.parent / "outside.safetensors")
    edit_index(sharded, lambda i: i["weight_map"].update({"lm_head.weight": name}))
    message = (
        r"index\.json: tensor lm_head\.weight must be in a file of this folder, by its plain name"
    )
    with pytest.raises(ModelFormatError, match=message):
        Checkpoint.open(sharded)


@pytest.mark.parametrize("name", [FIRST, "model.safetensors.index.json"])
def test_checkpoint_link_out_of_the_folder_is_refused(sharded, name):
    shutil.move(sharded / name, sharded.parent / name)
    (sharded / name).symlink_to(sharded.parent / name)
    with pytest.raises(ModelFormatError, match="must stay inside the model folder"):
        Checkpoint.open(sharded)


def test_checkpoint_links_into_the_blobs_of_a_hub_cache_are_followed(tmp_path):
    repository = tmp_path / "models--a--b"
    snapshot, blobs = repository / "snapshots" / "0123abc", repository / "blobs"
    write_checkpoint(snapshot, TINY, shards=3)
    blobs.mkdir()
    for i, file in enumerate(sorted(snapshot.iterdir())):
        shutil.move(file, blobs / f"{i:040x}")
        file.symlink_to(os.path.join("..", "..", "blobs", f"{i:040x}"))
    assert len(Checkpoint.open(snapshot).files) == 3
    elsewhere = tmp_path / "models--c--d" / "blobs"  # another repository's blobs are not ours
    elsewhere.mkdir(parents=True)
    target = (snapshot / FIRST).resolve()
    shutil.move(target, elsewhere / "x")
    (snapshot / FIRST).unlink()
    (snapshot / FIRST).symlink_to(elsewhere / "x")
    with pytest.raises(ModelFormatError, match="must stay inside the model folder"):
        Checkpoint.open(snapshot)


def test_checkpoint_linked_folder_is_fine(sharded):
    link = sharded.parent / "link"
    link.symlink_to(sharded)
    assert len(Checkpoint.open(link).files) == 3


@pytest.mark.parametrize("name", [FIRST, "model.safetensors.index.json"])
def test_checkpoint_dangling_link_is_a_named_error(sharded, name):
    (sharded / name).unlink()
    (sharded / name).symlink_to(sharded / "gone")
    with pytest.raises(
        ModelFormatError, match=r"a link must lead to a file \(got .*/gone: No such"
    ):
        Checkpoint.open(sharded)


def test_checkpoint_tensor_in_two_files_is_an_error(sharded):
    (sharded / "model.safetensors.index.json").unlink()
    shutil.copy(sharded / FIRST, sharded / "model-copy.safetensors")
    with pytest.raises(
        ModelFormatError, match=r"must be in one file \(got .* and model-copy\.safetensors\)"
    ):
        Checkpoint.open(sharded)


def test_checkpoint_index_in_two_files_is_an_error(sharded):
    entries = {
        "lm_head.weight": ("BF16", (96, 64), bytes(96 * 64 * 2)),
        "extra.rotary_emb.inv_freq": ("F32", (1,), bytes(4)),
    }
    tiny_checkpoint.write_safetensors(sharded / "model-extra.safetensors", entries)
    edit_index(
        sharded,
        lambda i: i["weight_map"].update({"extra.rotary_emb.inv_freq": "model-extra.safetensors"}),
    )
    with pytest.raises(
        ModelFormatError, match=r"model-extra\.safetensors: tensor lm_head.weight must be in"
    ):
        Checkpoint.open(sharded)


def test_checkpoint_index_beside_a_whole_model_is_an_error(sharded):
    shutil.copy(sharded / FIRST, sharded / "model.safetensors")
    with pytest.raises(ModelFormatError, match=r"of its own \(got both\)"):
        Checkpoint.open(sharded)


@pytest.mark.parametrize("content", [b"", b"{}", b"[]", b"\xff"])
def test_checkpoint_malformed_shard_is_a_named_error(sharded, content):
    (sharded / SECOND).write_bytes(content)
    with pytest.raises(ModelFormatError, match=SECOND):
        Checkpoint.open(sharded)


def test_checkpoint_without_weights_or_folder_is_a_named_error(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(TINY))
    (tmp_path / "pytorch_model.bin").write_bytes(b"x")
    with pytest.raises(ModelFormatError, match=r"holds no \.safetensors file"):
        Checkpoint.open(tmp_path)
    with pytest.raises(ModelFormatError, match="must be a model folder"):
        Checkpoint.open(tmp_path / "nowhere")


def test_checkpoint_of_k2_size_opens_from_headers_alone(tmp_path):
    """Three of K2's layers at full size in sparse files: 24 GB that are never read."""
    config = K2 | {"num_hidden_layers": 3}
    table = tiny_checkpoint.tensors(config)
    (tmp_path / "config.json").write_text(json.dumps(config))
    shards: dict[str, list[str]] = {}
    for name in table:
        layer = name.split(".")[2] if name.startswith("model.layers.") else "0"
        shards.setdefault(f"model-{int(layer) + 1:05d}-of-000003.safetensors", []).append(name)
    weight_map = {}
    for file, names in shards.items():
        header, position = {}, 0
        for name in names:
            dtype, shape = table[name]
            end = position + tiny_checkpoint.nbytes(dtype, shape)
            header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [position, end]}
            position, weight_map[name] = end, file
        text = json.dumps(header).encode()
        with open(tmp_path / file, "wb") as f:
            f.write(len(text).to_bytes(8, "little") + text)
            f.truncate(8 + len(text) + position)
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    checkpoint = Checkpoint.open(tmp_path)
    assert len(checkpoint.tensors) == 12 + 2 * 3470 + 3
    assert checkpoint.summary()["bytes"] > 24e9
    allocated = sum(f.path.stat().st_blocks * 512 for f in checkpoint.files)
    assert allocated < 100e6
