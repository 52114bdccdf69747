"""A checkpoint folder: which tensors its config promises, where they lie, and that every one is as promised.

Opening reads config.json, the index and the header of each file, and nothing else: a 594 GB model opens in seconds.
What passes here needs no further check of names, shapes or dtypes.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kimi_native.config import KimiConfig, load_config, load_generation_config
from kimi_native.errors import ModelFormatError
from kimi_native.folder_names import INDEX_NAME
from kimi_native.json_file import file_inside, printable, read_json
from kimi_native.safetensors_file import SafetensorsFile, TensorInfo
from kimi_native.tensor_table import (
    FORM_SUFFIXES,
    Expected,
    configured_form,
    expected_matrices,
    expected_others,
    expected_tensors,
    is_ignored_tensor,
    matrix_tensors,
    summarize,
)

__all__ = ["Checkpoint", "Expected", "expected_tensors", "summarize"]

MAX_INDEX_BYTES = 128 << 20
MAX_INDEX_TENSORS = 1_000_000
MAX_FILES = 4096
MAX_SHAPES_READ = (
    10_000  # weight_shape values read while opening; each may cost one random disk read
)


class Checkpoint:
    """A checked checkpoint folder; made by Checkpoint.open.

    path, config, generation_config ({} if there is none)
    files    the safetensors files, in order
    tensors  name in the files -> TensorInfo, without the tensors that the text model does not use
    forms    matrix name (a tensor's name without ".weight") -> "plain", "int4" or "fp8": what the files hold, which
             may be plain where the config would quantize
    """

    def __init__(
        self, path: Path, config: KimiConfig, generation_config: dict, files: list[SafetensorsFile]
    ) -> None:
        self.path, self.config, self.generation_config = path, config, generation_config
        self.files = files
        self._file_of: dict[str, SafetensorsFile] = {}
        self.tensors: dict[str, TensorInfo] = {}
        for file in files:
            for name, info in file.tensors.items():
                if name in self.tensors:
                    raise ModelFormatError(
                        f"{path}: tensor {printable(name)} must be in one file "
                        f"(got {self.tensors[name].file.name} and {info.file.name})"
                    )
                self.tensors[name] = info
                self._file_of[name] = file
        self._drop_ignored()
        self.forms = _check_tensors(path, config, self.tensors)
        self._check_weight_shapes(MAX_SHAPES_READ)

    @staticmethod
    def open(path: str | Path, *, ignore_keys: Iterable[str] = ()) -> Checkpoint:
        """Opens a model folder and checks every name, shape and dtype before any weight is read.

        ignore_keys  config keys to treat as absent, see KimiConfig.from_dict

        Raises ConfigError on config.json, ModelFormatError on the index or a file (missing, unexpected, malformed).
        """
        path = Path(path)
        if not path.is_dir():
            raise ModelFormatError(f"{path}: must be a model folder (found none)")
        config = load_config(path, ignore_keys=ignore_keys)
        generation_config = load_generation_config(path)
        return Checkpoint(path, config, generation_config, _open_files(path, config))

    def tensor(self, name: str) -> Tensor:
        """A zero-copy view of the mapped file; the name may leave out the config's tensor_prefix.

        Raises ModelFormatError if the text model has no such tensor.
        """
        if name not in self.tensors:
            name = self.config.tensor_prefix + name
        if name not in self.tensors:
            raise ModelFormatError(f"{self.path}: the model has no tensor {printable(name)}")
        return self._file_of[name].tensor(name)

    def form(self, module_name: str) -> str:
        """How a matrix is stored: "plain", "int4" or "fp8"; the name may leave out tensor_prefix."""
        if module_name not in self.forms:
            module_name = self.config.tensor_prefix + module_name
        if module_name not in self.forms:
            raise ModelFormatError(f"{self.path}: the model has no matrix {printable(module_name)}")
        return self.forms[module_name]

    def verify_weight_shapes(self) -> int:
        """Reads every weight_shape (opening reads at most MAX_SHAPES_READ of them); returns how many.

        Raises ModelFormatError on one that contradicts its weight_packed.
        """
        return self._check_weight_shapes(None)

    def summary(self) -> dict[str, Any]:
        """What `kimi-native inspect` prints; see summarize."""
        return summarize(self.config, self.tensors) | {
            "path": str(self.path),
            "files": len(self.files),
            "file_bytes": sum(f.path.stat().st_size for f in self.files),
            "matrices_by_form": dict(sorted(Counter(self.forms.values()).items())),
        }

    def _drop_ignored(self) -> None:
        for name in [n for n in self.tensors if is_ignored_tensor(self.config, n)]:
            del self.tensors[name], self._file_of[name]

    def _check_weight_shapes(self, limit: int | None) -> int:
        """weight_shape repeats what weight_packed's shape says. Beyond `limit`, expert 0 stands for its layer."""
        modules = [m for m, form in self.forms.items() if form == "int4"]
        if limit is not None and len(modules) > limit:
            modules = [m for m in modules if ".experts." not in m or ".experts.0." in m]
        for module in modules:
            rows, words = self.tensors[module + ".weight_packed"].shape
            name = module + ".weight_shape"
            got = tuple(self._file_of[name].tensor(name).to(torch.int64).tolist())
            if got != (rows, words * 8):
                raise ModelFormatError(
                    f"{self.tensors[name].file}: tensor {name}: must hold {[rows, words * 8]}, the shape that "
                    f"weight_packed has (got {list(got)})"
                )
        return len(modules)


def _open_files(path: Path, config: KimiConfig) -> list[SafetensorsFile]:
    """The safetensors files of a folder: those of the index, else model.safetensors, else all there are."""
    index = _index(path)
    if index is None:
        names = sorted(n for n in os.listdir(path) if n.endswith(".safetensors"))
        if "model.safetensors" in names:
            names = ["model.safetensors"]
        if not names:
            raise ModelFormatError(f"{path}: holds no .safetensors file and no {INDEX_NAME}")
    else:
        names = sorted(set(index.values()))
    if len(names) > MAX_FILES:
        raise ModelFormatError(f"{path}: at most {MAX_FILES} files (got {len(names)})")
    files = {name: _open_file(path, name) for name in names}
    if index is not None:
        _check_index(path, config, index, files)
    return list(files.values())


def _index(path: Path) -> dict[str, str] | None:
    """The index's weight_map, tensor -> file name, or None if the folder has no index."""
    try:
        file = file_inside(path, INDEX_NAME, ModelFormatError)
    except FileNotFoundError:
        return None
    values = read_json(file, max_bytes=MAX_INDEX_BYTES, error=ModelFormatError)
    weight_map = values.get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(v, str) for v in weight_map.values()):
        raise ModelFormatError(f"{file}: weight_map must map tensor names to file names")
    if not 0 < len(weight_map) <= MAX_INDEX_TENSORS:
        raise ModelFormatError(
            f"{file}: weight_map must name 1 to {MAX_INDEX_TENSORS} tensors (got {len(weight_map)})"
        )
    return weight_map


def _open_file(path: Path, name: str) -> SafetensorsFile:
    try:
        return SafetensorsFile(file_inside(path, name, ModelFormatError))
    except FileNotFoundError:
        raise ModelFormatError(f"{path / name}: the file is missing") from None


def _check_index(
    path: Path, config: KimiConfig, index: dict[str, str], files: dict[str, SafetensorsFile]
) -> None:
    """Index and headers must say the same, and no file beside them may claim to be the whole model."""
    if "model.safetensors" not in files and (path / "model.safetensors").exists():
        raise ModelFormatError(
            f"{path}: must hold {INDEX_NAME} or a model.safetensors of its own (got both)"
        )
    for name, file_name in index.items():
        if name not in files[file_name].tensors:
            raise ModelFormatError(
                f"{path / file_name}: tensor {printable(name)} must be in this file according to {INDEX_NAME}"
            )
    for file_name, file in files.items():
        for name in file.tensors:
            if index.get(name) != file_name and not is_ignored_tensor(config, name):
                raise ModelFormatError(
                    f"{path / file_name}: tensor {printable(name)} must be in {INDEX_NAME} with this file "
                    f"(got {printable(index.get(name, 'no entry'))})"
                )


# ---- files against promises -----------------------------------------------------------------------------------------


def _check_tensors(
    path: Path, config: KimiConfig, tensors: dict[str, TensorInfo]
) -> dict[str, str]:
    """Raises ModelFormatError unless the tensors are exactly those of the model; returns the matrices' forms."""
    forms: dict[str, str] = {}
    found = 0
    missing: list[str] = []
    for name, expected in expected_others(config).items():
        found += _check_tensor(name, expected, tensors, missing)
    shared: dict[tuple[int, int, str], list[tuple[str, Expected]]] = {}
    for matrix in expected_matrices(config):
        form = _stored_form(path, config, matrix.name, tensors)
        key = (matrix.out_features, matrix.in_features, form)
        if key not in shared:
            parts = matrix_tensors(matrix, form)
            shared[key] = [(name[len(matrix.name) :], e) for name, e in parts.items()]
        forms[matrix.name] = form
        for suffix, expected in shared[key]:
            found += _check_tensor(matrix.name + suffix, expected, tensors, missing)
    if missing:
        raise ModelFormatError(_list_names(path, "is missing", missing))
    if found != len(tensors):
        known = expected_others(config).keys() | {
            m + suffix for m in forms for suffix in FORM_SUFFIXES[forms[m]]
        }
        unexpected = [n for n in tensors if n not in known]
        raise ModelFormatError(_list_names(path, "has no place in this model", unexpected))
    return forms


def _list_names(path: Path, what: str, names: list[str]) -> str:
    shown = ", ".join(printable(n) for n in names[:5])
    more = f" and {len(names) - 5} more" if len(names) > 5 else ""
    return f"{path}: {len(names)} tensor{'s' if len(names) > 1 else ''}: {what}: {shown}{more}"


def _check_tensor(
    name: str, expected: Expected, tensors: dict[str, TensorInfo], missing: list[str]
) -> int:
    """1 if the tensor is there and as expected, 0 if it is missing."""
    info = tensors.get(name)
    if info is None:
        missing.append(name)
        return 0
    if info.shape != expected.shape:
        raise ModelFormatError(
            f"{info.file}: tensor {name}: shape must be {list(expected.shape)} (got {list(info.shape)})"
        )
    if info.dtype not in expected.dtypes:
        raise ModelFormatError(
            f"{info.file}: tensor {name}: dtype must be {' or '.join(expected.dtypes)} (got {info.dtype})"
        )
    return 1


def _stored_form(path: Path, config: KimiConfig, name: str, tensors: dict[str, TensorInfo]) -> str:
    """How the files store a matrix. A matrix may be plain where the config would quantize, not the reverse.

    One exception: beside INT4, which its config describes, a matrix may be FP8 in blocks, which describes itself (dtype
    and weight_scale_inv). No published config declares both.
    """
    weight, packed = tensors.get(name + ".weight"), name + ".weight_packed" in tensors
    if weight is not None and packed:
        raise ModelFormatError(f"{path}: {name} must be stored once (got weight and weight_packed)")
    configured = configured_form(config, name)
    if packed:
        form = "int4"
    elif weight is None:
        return configured  # all of it is missing; say so in the configured form
    elif weight.dtype.startswith("F8_") or name + ".weight_scale_inv" in tensors:
        form = "fp8"
    else:
        return "plain"
    scheme = config.quantization.kind if config.quantization else "none"
    if configured != form and (form, scheme) != ("fp8", "int4"):
        raise ModelFormatError(
            f"{path}: {name} is stored as {form}, but config.json keeps it {configured} "
            f"(quantization_config: {scheme})"
        )
    return form
