"""A checkpoint folder: which tensors its config promises, where they lie, and that every one is as promised.

Opening reads config.json, the index and the header of each file, and nothing else: a 594 GB model opens in seconds.
What passes here needs no further check of names, shapes or dtypes.
"""

from __future__ import annotations

import os
import struct
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from kimi_native.config import KimiConfig, load_config
from kimi_native.errors import ModelFormatError
from kimi_native.folder_names import INDEX_NAME
from kimi_native.gc_pause import paused_gc
from kimi_native.generation_config import load_generation_config
from kimi_native.json_file import printable, read_json
from kimi_native.mapped_file import MappedFile
from kimi_native.model_file import file_inside, find_file, is_plain_name, model_folder
from kimi_native.safetensors_file import SafetensorsFile, TensorInfo
from kimi_native.tensor_table import (
    FORM_SUFFIXES,
    Expected,
    Matrix,
    configured_form,
    expected_groups,
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


class StoredMatrices(NamedTuple):
    """Matrices that are alike and stored alike.

    form    as in Checkpoint.forms
    dtype   of their weights, as the file spells it: I32 for INT4
    nbytes  of all their tensors together
    """

    names: list[str]
    out_features: int
    in_features: int
    form: str
    dtype: str
    nbytes: int


class Checkpoint:
    """A checked checkpoint folder; made by Checkpoint.open.

    path, config, generation_config ({} if there is none)
    files    the safetensors files, in order
    tensors  name in the files -> TensorInfo, without the tensors that the text model does not use
    forms    matrix name (a tensor's name without ".weight") -> "plain", "int4" or "fp8": what the files hold, which
             may be plain where the config would quantize
    stored   the same by groups of matrices that are alike
    """

    def __init__(
        self, path: Path, config: KimiConfig, generation_config: dict, files: list[SafetensorsFile]
    ) -> None:
        self.path, self.config, self.generation_config = path, config, generation_config
        self.files = files
        self._file_at = {file.path: file for file in files}
        self.tensors: dict[str, TensorInfo] = {}
        for file in files:
            self.tensors.update(file.tensors)
        if len(self.tensors) != sum(len(file.tensors) for file in files):
            raise _tensor_in_two_files(path, files)
        self.stored = _check_tensors(path, config, self.tensors)
        self.forms = {name: s.form for s in self.stored for name in s.names}

    @staticmethod
    def open(path: str | Path, *, ignore_keys: Iterable[str] = ()) -> Checkpoint:
        """Opens a model folder and checks every name, shape and dtype before any weight is read.

        ignore_keys  unknown config keys to accept, see load_config and load_generation_config

        Raises ConfigError on either of them, ModelFormatError on the index or a file (missing, unexpected, malformed),
        TypeError and RequestError on a path that is none.
        """
        path = model_folder("checkpoint", path)
        if not path.is_dir():
            raise ModelFormatError(f"{path}: must be a model folder (found none)")
        ignored = tuple(ignore_keys)
        config = load_config(path, ignore_keys=ignored)
        generation_config = load_generation_config(
            path, vocab_size=config.vocab_size, ignore_keys=ignored
        )
        with paused_gc():
            return Checkpoint(path, config, generation_config, _open_files(path, config))

    def tensor(self, name: str) -> Tensor:
        """A zero-copy view of the mapped file; the name may leave out the config's tensor_prefix.

        Raises ModelFormatError if the text model has no such tensor.
        """
        if name not in self.tensors:
            name = self.config.tensor_prefix + name
        if name not in self.tensors:
            raise ModelFormatError(f"{self.path}: the model has no tensor {printable(name)}")
        return self._file_at[self.tensors[name].file].tensor(name)

    def mapped(self, info: TensorInfo) -> MappedFile:
        """The map of the file that a tensor of this checkpoint lies in."""
        return self._file_at[info.file].mapped

    def check_readable(self) -> None:
        """Raises ModelFormatError if weights that were read, here or in a kernel, were not in their file any more.

        To be called before what was computed from them is used.
        """
        for file in self.files:
            file.mapped.check()

    def form(self, module_name: str) -> str:
        """How a matrix is stored: "plain", "int4" or "fp8"; the name may leave out tensor_prefix."""
        if module_name not in self.forms:
            module_name = self.config.tensor_prefix + module_name
        if module_name not in self.forms:
            raise ModelFormatError(f"{self.path}: the model has no matrix {printable(module_name)}")
        return self.forms[module_name]

    def check_weight_shapes(self, *, all: bool) -> int:
        """Reads weight_shape tensors and returns how many; each must repeat what weight_packed's shape says.

        all  False: one expert stands for its layer; what is not in memory costs a read of the disk each

        Raises ModelFormatError on a weight_shape that contradicts its weight_packed.
        """
        groups = [s.names for s in self.stored if s.form == "int4"]
        names = [name for group in groups for name in (group if all else group[:1])]
        for name in names:
            rows, words = self.tensors[name + ".weight_packed"].shape
            info = self.tensors[name + ".weight_shape"]
            got = struct.unpack_from(
                "<2q" if info.dtype == "I64" else "<2i", self.mapped(info).buffer, info.start
            )
            if got != (rows, words * 8):
                self.check_readable()
                raise ModelFormatError(
                    f"{info.file}: tensor {info.name}: must hold {[rows, words * 8]}, the shape that "
                    f"weight_packed has (got {list(got)})"
                )
        return len(names)

    def summary(self) -> dict[str, Any]:
        """What `kimi-native inspect` prints; see summarize."""
        return summarize(self.config, self.tensors) | {
            "path": str(self.path),
            "files": len(self.files),
            "file_bytes": sum(f.path.stat().st_size for f in self.files),
            "matrices_by_form": dict(sorted(Counter(self.forms.values()).items())),
        }


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
    files: dict[str, SafetensorsFile] = {}
    for name in names:
        files[name] = _open_file(path, name)
        if sum(len(file.tensors) for file in files.values()) > MAX_INDEX_TENSORS:
            raise ModelFormatError(f"{path}: at most {MAX_INDEX_TENSORS} tensors (got more)")
    if index is not None:
        _check_index(path, config, index, files)
    return list(files.values())


def _index(path: Path) -> dict[str, str] | None:
    """The index's weight_map, tensor -> file name, or None if the folder has no index."""
    file = find_file(path, INDEX_NAME, ModelFormatError)
    if file is None:
        return None
    values = read_json(file, max_bytes=MAX_INDEX_BYTES, error=ModelFormatError)
    weight_map = values.get("weight_map")
    if not isinstance(weight_map, dict) or not {*map(type, weight_map.values())} <= {str}:
        raise ModelFormatError(f"{file}: weight_map must map tensor names to file names")
    if not 0 < len(weight_map) <= MAX_INDEX_TENSORS:
        raise ModelFormatError(
            f"{file}: weight_map must name 1 to {MAX_INDEX_TENSORS} tensors (got {len(weight_map)})"
        )
    bad = {name for name in set(weight_map.values()) if not is_plain_name(name)}
    if bad:
        tensor, name = next((t, n) for t, n in weight_map.items() if n in bad)
        raise ModelFormatError(
            f"{file}: tensor {printable(tensor)} must be in a file of this folder, by its plain name "
            f"(got '{printable(name)}')"
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
    if len(index) == sum(len(file.tensors) for file in files.values()) and all(
        [*map(index.get, file.tensors)].count(file_name) == len(file.tensors)
        for file_name, file in files.items()
    ):
        return
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
) -> list[StoredMatrices]:
    """How the matrices are stored. Takes out of `tensors` what the text model does not use.

    Raises ModelFormatError unless the others are exactly those of the model.
    """
    stored: list[StoredMatrices] = []
    found = 0
    missing: list[str] = []
    for name, expected in expected_others(config).items():
        found += len(_check_alike([name], expected, tensors, missing))
    for group in expected_groups(config):
        for (form, dtype), names in _by_form(path, config, group.names, tensors).items():
            matrix = Matrix(names[0], group.out_features, group.in_features)
            nbytes = 0
            for suffix, expected in matrix_tensors(matrix, form):
                infos = _check_alike([n + suffix for n in names], expected, tensors, missing)
                found += len(infos)
                nbytes += sum([info.nbytes for info in infos])
            stored.append(
                StoredMatrices(names, group.out_features, group.in_features, form, dtype, nbytes)
            )
    if missing:
        raise ModelFormatError(
            f"{path}: must hold every tensor of the model (missing {_listed(missing)})"
        )
    if found != len(tensors):
        known = expected_others(config).keys() | {
            name + suffix for s in stored for name in s.names for suffix in FORM_SUFFIXES[s.form]
        }
        unexpected = [n for n in tensors if n not in known]
        strangers = [n for n in unexpected if not is_ignored_tensor(config, n)]
        if strangers:
            placed = [f"{n} in {tensors[n].file.name}" for n in strangers]
            raise ModelFormatError(
                f"{path}: must hold no tensor that has no place in the model (got {_listed(placed)})"
            )
        for name in unexpected:
            del tensors[name]
    return stored


def _by_form(
    path: Path, config: KimiConfig, names: list[str], tensors: dict[str, TensorInfo]
) -> dict[tuple[str, str], list[str]]:
    """Names of matrices by (form, dtype of their weights)."""
    found: dict[tuple[str, str], list[str]] = {}
    for name in names:
        form = _stored_form(path, config, name, tensors)
        weight = tensors.get(name + FORM_SUFFIXES[form][0])
        found.setdefault((form, weight.dtype if weight else ""), []).append(name)
    return found


def _tensor_in_two_files(path: Path, files: list[SafetensorsFile]) -> ModelFormatError:
    seen: dict[str, TensorInfo] = {}
    for file in files:
        for name, info in file.tensors.items():
            if name in seen:
                return ModelFormatError(
                    f"{path}: tensor {printable(name)} must be in one file "
                    f"(got {seen[name].file.name} and {info.file.name})"
                )
            seen[name] = info
    raise AssertionError("called for files that share no tensor")


def _listed(names: list[str]) -> str:
    """How many, and the first of them."""
    shown = ", ".join(printable(n) for n in names[:5])
    more = f" and {len(names) - 5} more" if len(names) > 5 else ""
    return f"{len(names)}: {shown}{more}"


def _check_alike(
    names: list[str], expected: Expected, tensors: dict[str, TensorInfo], missing: list[str]
) -> list[TensorInfo]:
    """Those of the tensors that are there, which must be as expected; adds the others to `missing`."""
    infos = [info for info in map(tensors.get, names) if info is not None]
    if len(infos) != len(names):
        missing += [name for name in names if name not in tensors]
    shapes, dtypes = {info.shape for info in infos}, {info.dtype for info in infos}
    if shapes <= {expected.shape} and dtypes <= {*expected.dtypes}:
        return infos
    for info in infos:
        if info.shape != expected.shape:
            raise ModelFormatError(
                f"{info.file}: tensor {info.name}: shape must be {list(expected.shape)} (got {list(info.shape)})"
            )
        if info.dtype not in expected.dtypes:
            raise ModelFormatError(
                f"{info.file}: tensor {info.name}: dtype must be {' or '.join(expected.dtypes)} (got {info.dtype})"
            )
    raise AssertionError("one of them is not as expected")


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
