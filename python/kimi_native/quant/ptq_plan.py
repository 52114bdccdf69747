"""From a source folder to everything that quantize will write, before it writes anything; reads headers only."""

from __future__ import annotations

import copy
import os
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kimi_native.checkpoint import Checkpoint
from kimi_native.checkpoint_writer import PlainTensor, split
from kimi_native.config import MAX_CONFIG_BYTES, KimiConfig
from kimi_native.config_keys import GENERATION_PREFIX
from kimi_native.errors import ConfigError, ModelFormatError
from kimi_native.folder_names import CONFIG_NAME, INDEX_NAME
from kimi_native.json_file import printable, read_json
from kimi_native.model_file import file_inside, find_file
from kimi_native.presets import QUANTIZATION
from kimi_native.quant.ptq_tensors import Conversion
from kimi_native.safetensors_file import TensorInfo
from kimi_native.tensor_table import (
    FP8_BLOCK,
    VISION_PREFIXES,
    expected_matrices,
    matrix_tensors,
    tensor_kind,
)

# What travels with the weights: tokenizer, generation settings, chat template, processor, remote code (never run by
# this package), licence.
_SIDE_FILE = re.compile(
    r"(?!\.).*\.(json|jinja|model|tiktoken|py)|merges\.txt|vocab\.txt|[\w\-. ]*(licen[cs]e|notice|copying)[\w\-. ]*",
    re.IGNORECASE,
)


@dataclass(frozen=True)
class QuantizePlan:
    """config      the new config.json
    shards      file name -> what it is made of, in the order of the source
    copied      files of the source that are copied; left_out: the other files and folders in it
    source_files  names of all that is read
    """

    config: dict[str, Any]
    shards: dict[str, list[Conversion]]
    copied: list[str]
    left_out: list[str]
    source_files: list[str]

    def stored(self) -> dict[str, list[PlainTensor]]:
        """Shard -> its tensors."""
        return {
            shard: [t for c in conversions for t in c.stored()]
            for shard, conversions in self.shards.items()
        }


def make_plan(
    checkpoint: Checkpoint, *, levels: int, shard_bytes: int, ignore_config_keys: Iterable[str]
) -> QuantizePlan:
    """Decides what becomes of every tensor and file.

    Raises ConfigError on a model without routed experts, one that is INT4 already, or a width that is not a multiple
    of 32; ModelFormatError on an FP8 tensor without its multipliers.
    """
    _check_source(checkpoint)
    conversions = _conversions(checkpoint)
    groups = split([c.stored() for c in conversions], shard_bytes)
    weights = [file.path.name for file in checkpoint.files]
    present = sorted(os.listdir(checkpoint.path))
    copied = [n for n in present if _is_side_file(checkpoint.path, n)]
    taken = {*weights, *copied, CONFIG_NAME, INDEX_NAME}
    plan = QuantizePlan(
        config=_new_config(checkpoint, levels),
        shards={s: [conversions[i] for i in members] for s, members in groups.items()},
        copied=copied,
        left_out=[n for n in present if n not in taken],
        source_files=[n for n in present if n in taken],
    )
    replaced = ("quantization_config.", "text_config.quantization_config.")
    kept = [key for key in ignore_config_keys if not key.startswith((GENERATION_PREFIX, *replaced))]
    KimiConfig.from_dict(plan.config, ignore_keys=kept)  # what cannot be read back is not written
    return plan


def _check_source(checkpoint: Checkpoint) -> None:
    config, path = checkpoint.config, checkpoint.path
    int4 = sum(form == "int4" for form in checkpoint.forms.values())
    if int4 or (config.quantization is not None and config.quantization.kind == "int4"):
        raise ConfigError(
            f"quantize: the source must be BF16 or FP8 (got {path}, which is INT4 already in its "
            f"quantization_config and in {int4} matrices)"
        )
    experts = [
        m for m in expected_matrices(config) if tensor_kind(m.name + ".") == "routed experts"
    ]
    if not experts:
        raise ConfigError(
            f"quantize: the source must have routed experts, the format quantizes nothing else (got {path} with none)"
        )
    for matrix in experts:
        matrix_tensors(matrix, "int4")  # refuses a width


def _is_side_file(folder: Path, name: str) -> bool:
    if name == CONFIG_NAME or name.endswith(".index.json") or not _SIDE_FILE.fullmatch(name):
        return False
    return find_file(folder, name) is not None


# ---- tensors ---------------------------------------------------------------------------------------------------------


def _conversions(checkpoint: Checkpoint) -> list[Conversion]:
    """In the order in which the files hold them, so that reading is sequential."""
    every = {name: info for file in checkpoint.files for name, info in file.tensors.items()}
    multipliers = {n for n in every if n.endswith("_scale_inv") and _is_fp8(every, n)}
    return [
        _conversion(checkpoint, info, every)
        for file in checkpoint.files
        for info in sorted(file.tensors.values(), key=lambda t: t.start)
        if info.name not in multipliers
    ]


def _is_fp8(every: dict[str, TensorInfo], scale_name: str) -> bool:
    weight = every.get(scale_name.removesuffix("_scale_inv"))
    return weight is not None and weight.dtype.startswith("F8_")


def _conversion(
    checkpoint: Checkpoint, info: TensorInfo, every: dict[str, TensorInfo]
) -> Conversion:
    scale = _multipliers(info, every) if info.dtype.startswith("F8_") else None
    if info.name not in checkpoint.tensors:  # MTP layers, vision, frequencies: only FP8 cannot stay
        return Conversion(info, scale, "copy" if scale is None else "bf16", finite=False)
    if tensor_kind(info.name) == "routed experts":
        return Conversion(info, scale, "int4", finite=True)
    plain = info.dtype == "BF16" or info.name.endswith(".e_score_correction_bias")
    return Conversion(info, scale, "copy" if plain else "bf16", finite=True)


def _multipliers(info: TensorInfo, every: dict[str, TensorInfo]) -> TensorInfo:
    """weight_scale_inv of an FP8 matrix. That of the text model is checked already, others are not."""
    scale = every.get(info.name + "_scale_inv")
    blocks = tuple(-(-n // FP8_BLOCK) for n in info.shape)
    if (
        scale is None
        or (info.dtype, scale.dtype) != ("F8_E4M3", "F32")
        or len(blocks) != 2
        or scale.shape != blocks
    ):
        raise ModelFormatError(
            f"{info.file}: tensor {printable(info.name)}: FP8 must be an F8_E4M3 matrix with a weight_scale_inv "
            f"of F32 {list(blocks)} (got {info.dtype} {list(info.shape)} with "
            f"{'none' if scale is None else f'{scale.dtype} {list(scale.shape)}'})"
        )
    return scale


# ---- config.json -----------------------------------------------------------------------------------------------------


def _new_config(checkpoint: Checkpoint, levels: int) -> dict[str, Any]:
    """The source's config.json with the published INT4 scheme, beside the text model's keys."""
    file = file_inside(checkpoint.path, CONFIG_NAME)
    config = read_json(file, max_bytes=MAX_CONFIG_BYTES)
    config.pop("quantization_config", None)
    text = config["text_config"] if checkpoint.config.tensor_prefix else config
    for key in ("dtype", "torch_dtype"):
        if text.get(key) is not None:
            text[key] = "bfloat16"
    scheme = copy.deepcopy(QUANTIZATION["int4"])
    # Ours and compressed-tensors' readers take any observer_kwargs: they tell how the scales were found.
    scheme["config_groups"]["group_0"]["weights"]["observer_kwargs"] = {"levels": levels}
    scheme["ignore"] += _unquantized_parts(checkpoint)
    text["quantization_config"] = scheme
    return config


def _unquantized_parts(checkpoint: Checkpoint) -> list[str]:
    """What the published scheme does not name: parts that the text model does not use, and a prefixed lm_head."""
    config = checkpoint.config
    others = {n for file in checkpoint.files for n in file.tensors} - checkpoint.tensors.keys()
    first = config.num_hidden_layers
    patterns = {
        rf"re:.*layers\.{i}\..*": f"{config.tensor_prefix}model.layers.{i}."
        for i in range(first, first + config.num_nextn_predict_layers)
    }
    patterns |= {f"re:.*{p.removesuffix('.')}.*": p for p in VISION_PREFIXES}
    found = [pattern for pattern, p in patterns.items() if any(n.startswith(p) for n in others)]
    if config.tensor_prefix:  # the published scheme names lm_head as the text model alone does
        found.append(f"{config.tensor_prefix}lm_head")
    return found
