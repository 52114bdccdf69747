"""config.json of the family, read without guessing: every key is used, known to be without effect, or an error.

Published spellings differ (`rope_scaling` / `rope_parameters`, `torch_dtype` / `dtype`, a `text_config` inside a
multimodal wrapper, `mlp_layer_types` for `first_k_dense_replace`); all of them end in one KimiConfig. The keys and
their ranges are in config_keys.py and quantization.py.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from kimi_native.config_keys import (
    ANY_VALUE,
    FAMILY_DEFAULTS,
    GENERATION_PREFIX,
    ONE_VALUE,
    WRAPPER_ANY_VALUE,
    WRAPPERS,
    YarnConfig,
    read_text,
    token_id,
    token_ids,
)
from kimi_native.errors import ConfigError, ModelFormatError
from kimi_native.folder_names import CONFIG_NAME, UNFINISHED_NAME
from kimi_native.json_file import REQUIRED, Section, UnknownKeys, check_depth, read_json
from kimi_native.model_file import find_file
from kimi_native.quantization import QuantizationConfig

__all__ = [
    "LATENT_NORM_EPS",
    "KimiConfig",
    "QuantizationConfig",
    "YarnConfig",
    "load_config",
]

LATENT_NORM_EPS = (
    1e-6  # q_a_layernorm and kv_a_layernorm keep the class default, whatever rms_norm_eps says
)
MAX_CONFIG_BYTES = 16 << 20


@dataclass(frozen=True)
class KimiConfig:
    """The text model, fields spelled as in config.json; made by load_config or from_dict, which check every value.

    n_routed_experts None: every layer is dense. n_group and topk_group are 1 where the routing knows no groups.
    tensor_prefix stands before every text tensor's name in the files.
    """

    model_type: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    moe_intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    q_lora_rank: int | None
    kv_lora_rank: int
    qk_nope_head_dim: int
    qk_rope_head_dim: int
    v_head_dim: int
    n_routed_experts: int | None
    n_shared_experts: int
    num_experts_per_tok: int
    n_group: int
    topk_group: int
    scoring_func: str
    topk_method: str
    norm_topk_prob: bool
    routed_scaling_factor: float
    first_k_dense_replace: int
    moe_layer_freq: int
    mlp_layer_types: tuple[str, ...]
    rms_norm_eps: float
    rope_theta: float
    rope_scaling: YarnConfig | None
    max_position_embeddings: int
    bos_token_id: int | None
    eos_token_ids: tuple[int, ...]
    tie_word_embeddings: bool
    num_nextn_predict_layers: int
    quantization: QuantizationConfig | None
    tensor_prefix: str

    @staticmethod
    def from_dict(
        d: dict, *, source: str = "config.json", ignore_keys: Iterable[str] = ()
    ) -> KimiConfig:
        """Checks a parsed config.json.

        ignore_keys  unknown keys to accept, dotted where nested ("text_config.foo", "quantization_config.bar")

        Raises ConfigError naming the key on an unsupported value, an unknown key, or an ignored one that is known or
        absent; NotImplementedError on a model of the wider family that this package cannot run yet.
        """
        if isinstance(d, dict):
            check_depth(d, source)
        unknown = UnknownKeys(source, ignore_keys)
        config = KimiConfig._read(Section(d, "", unknown))
        unknown.finish()
        return config

    @staticmethod
    def _read(top: Section) -> KimiConfig:
        model_type = top.get("model_type", REQUIRED)
        if not isinstance(model_type, str):
            raise top.fail("model_type", "a string")
        if model_type in ("kimi_vl", "kimi_linear"):
            raise NotImplementedError(f"{top.source}: model_type {model_type} is not supported yet")
        if model_type not in FAMILY_DEFAULTS and model_type not in WRAPPERS:
            known = ", ".join([*FAMILY_DEFAULTS, *WRAPPERS])
            raise top.fail("model_type", f"one of {known}")
        if model_type in WRAPPERS:
            return _read_wrapper(top, model_type)
        values = read_text(top, model_type)
        top.finish(ONE_VALUE, ANY_VALUE)
        return KimiConfig(**values, tensor_prefix="")

    @property
    def latent_width(self) -> int:
        """Values cached per token and layer: the latent and the rope part."""
        return self.kv_lora_rank + self.qk_rope_head_dim

    @property
    def qk_head_dim(self) -> int:
        return self.qk_nope_head_dim + self.qk_rope_head_dim

    def is_moe_layer(self, i: int) -> bool:
        return self.mlp_layer_types[i] == "sparse"

    def rope_inv_freq(self) -> list[float]:
        """Radians per position of each rotated pair [qk_rope_head_dim / 2], YaRN applied at every position.

        Source: YaRN, arXiv 2309.00071, section 3.2, with the published rounding of the ramp's ends.
        """
        dim, base, yarn = self.qk_rope_head_dim, self.rope_theta, self.rope_scaling
        inv = [base ** (-2 * j / dim) for j in range(dim // 2)]
        if yarn is None:
            return inv

        def pair_with(rotations: float) -> float:
            """The (fractional) pair that turns this often over the original context."""
            turns = yarn.original_max_position_embeddings / (2 * math.pi * rotations)
            return dim * math.log(turns) / (2 * math.log(base))

        low = max(math.floor(pair_with(yarn.beta_fast)), 0)
        high: float = min(math.ceil(pair_with(yarn.beta_slow)), dim - 1)
        if low == high:
            high += 0.001
        ramp = [min(max((j - low) / (high - low), 0.0), 1.0) for j in range(dim // 2)]
        return [f / yarn.factor * r + f * (1 - r) for f, r in zip(inv, ramp, strict=True)]

    def rope_magnitude(self) -> float:
        """Factor of cos and sin; 1 for every published model."""
        yarn = self.rope_scaling
        if yarn is None:
            return 1.0
        return _mscale(yarn.factor, yarn.mscale) / _mscale(yarn.factor, yarn.mscale_all_dim)

    def softmax_scale(self) -> float:
        """1 / sqrt(nope + rope), times the YaRN temperature squared: it enters through q and through k."""
        scale = self.qk_head_dim**-0.5
        yarn = self.rope_scaling
        if yarn is not None and yarn.mscale_all_dim:
            scale *= _mscale(yarn.factor, yarn.mscale_all_dim) ** 2
        return scale


def load_config(path: str | Path, *, ignore_keys: Iterable[str] = ()) -> KimiConfig:
    """Reads and checks config.json of a model folder; errors as KimiConfig.from_dict.

    ignore_keys  as of KimiConfig.from_dict; those that begin with "generation_config." are for that file
    Raises ModelFormatError if `kimi-native quantize` has begun the folder and not finished it.
    """
    if (Path(path) / UNFINISHED_NAME).exists():
        raise ModelFormatError(
            f"{path}: kimi-native quantize was interrupted here and the checkpoint is not complete; run it again with "
            f"the same arguments to finish it (got {UNFINISHED_NAME})"
        )
    file = find_file(Path(path), CONFIG_NAME)
    if file is None:
        raise ConfigError(f"{path}: must be a model folder with a config.json (found none)")
    values = read_json(file, max_bytes=MAX_CONFIG_BYTES)
    own = [key for key in ignore_keys if not key.startswith(GENERATION_PREFIX)]
    return KimiConfig.from_dict(values, source=str(file), ignore_keys=own)


def _read_wrapper(top: Section, model_type: str) -> KimiConfig:
    """A multimodal wrapper: the text model sits in text_config, some of its keys are repeated at the top."""
    text = top.section("text_config")
    if text is None:
        raise top.fail("text_config", "an object")
    text_type = text.choice("model_type", ("kimi_k2", "deepseek_v3"))
    if text.get("quantization_config") is None:
        text.values["quantization_config"] = top.get("quantization_config")
    elif top.get("quantization_config") not in (None, text.values["quantization_config"]):
        raise top.fail("quantization_config", "the same as in text_config")
    values = read_text(text, text_type)
    text.finish(ONE_VALUE, ANY_VALUE)
    if "tie_word_embeddings" in top.values:
        top.choice("tie_word_embeddings", (values["tie_word_embeddings"],))
    bos = token_id(top, "bos_token_id")
    if values["bos_token_id"] is None:
        values["bos_token_id"] = bos
    eos = values["eos_token_ids"] + token_ids(top, "eos_token_id", values["vocab_size"])
    values |= {"model_type": model_type, "eos_token_ids": tuple(dict.fromkeys(eos))}
    top.finish(ONE_VALUE, WRAPPER_ANY_VALUE)
    return KimiConfig(**values, tensor_prefix=WRAPPERS[model_type])


def _mscale(factor: float, mscale: float) -> float:
    return 0.1 * mscale * math.log(factor) + 1.0 if factor > 1 else 1.0
