"""The state of a training run in one safetensors file, written whole or not at all.

It holds the weights, the optimizer's tensors and, as bytes of JSON in the tensor `run`, the counters and what the run
was told. There is no random state to keep: everything random follows from the seed and the counters.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from kimi_native.checkpoint_writer import FolderWriter, PlainTensor
from kimi_native.errors import ModelFormatError, RequestError
from kimi_native.json_file import parse_json
from kimi_native.safetensors_file import SafetensorsFile

STATE_NAME = "train-state.safetensors"
COUNTS = ("threads", "steps_done", "optimizer_steps", "counter")  # what every run has of integers
_RUN = "run"


def save_state(folder: FolderWriter, tensors: Mapping[str, Tensor], run: Mapping[str, Any]) -> None:
    """Write float32 tensors and JSON values to the folder's state file.

    Raises CheckpointWriteError if the file cannot be written; the old one is then still there.
    """
    text = np.frombuffer(json.dumps(run).encode(), np.uint8)
    entries = [PlainTensor(n, "F32", tuple(t.shape)) for n, t in tensors.items()]
    entries.append(PlainTensor(_RUN, "U8", text.shape))
    arrays = ((n, 0, t.detach().cpu().contiguous().numpy()) for n, t in tensors.items())
    folder.write_shard(STATE_NAME, entries, (*arrays, (_RUN, 0, text)))
    folder.sync()


def read_run(path: Path) -> tuple[SafetensorsFile, dict[str, Any]]:
    """The state file and its JSON values. Raises ModelFormatError on a file that save_state did not write."""
    file = SafetensorsFile(path)
    if _RUN not in file.tensors or file.tensors[_RUN].dtype != "U8":
        raise ModelFormatError(f"{path}: must be the state of a training run (got no run in it)")
    data = bytes(file.tensor(_RUN).numpy())
    run = parse_json(data, source=f"{path}: run", error=ModelFormatError)
    for name in COUNTS:
        if type(run.get(name)) is not int or run[name] < 0:
            raise ModelFormatError(f"{path}: run: {name} must be a count (got {run.get(name)})")
    return file, run


@torch.no_grad()
def restore(file: SafetensorsFile, tensors: Mapping[str, Tensor]) -> None:
    """Copy the file's tensors into these. Raises ModelFormatError unless they are the same by name and shape."""
    stored = {n: (i.dtype, i.shape) for n, i in file.tensors.items() if n != _RUN}
    wanted = {n: ("F32", tuple(t.shape)) for n, t in tensors.items()}
    if stored != wanted:
        different = sorted(n for n in stored.keys() | wanted if stored.get(n) != wanted.get(n))
        raise ModelFormatError(
            f"{file.path}: tensors must be those of the model and its optimizer "
            f"(got {len(different)} others, first {different[0]})"
        )
    for name, tensor in tensors.items():
        tensor.copy_(file.tensor(name))
    file.mapped.check()


def check_same(path: Path, what: str, stored: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """Raises RequestError, naming what differs, unless a run goes on as it began."""
    different = [k for k in now if k not in stored or stored[k] != now[k]]
    different += [k for k in stored if k not in now]
    if different:
        key = different[0]
        raise RequestError(
            f"train: {path} holds a run with another {what}: {key} must be {stored.get(key)} (got "
            f"{now.get(key)}); choose another folder, or take away its {STATE_NAME} to start anew"
        )
