"""What the tests of made checkpoints share: the tiny preset in every format, and a reader that is not ours."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from kimi_native import random_tensors
from kimi_native.make_checkpoint import make_checkpoint


def read_tensors(path: Path) -> dict[str, torch.Tensor]:
    """Every tensor of a folder through the safetensors library, found by the index."""
    index = json.loads((path / "model.safetensors.index.json").read_text())
    tensors = {}
    for shard in sorted(set(index["weight_map"].values())):
        held = load_file(path / shard)
        assert {n for n, s in index["weight_map"].items() if s == shard} == set(held)
        tensors |= held
    return tensors


def read_bytes(path: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in sorted(path.iterdir())}


def make_tiny_folders(root: Path) -> dict[str, Path]:
    """The tiny preset in the three formats, seed 0, in row chunks so small that most matrices have several."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(random_tensors, "_CHUNK_ELEMENTS", 1 << 13)
        for format in ("int4", "bf16", "fp8"):
            make_checkpoint(root / format, format=format)
    return {p.name: p for p in root.iterdir()}
