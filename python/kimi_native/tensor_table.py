"""The tensors that a config promises: names, shapes, dtypes, and the sizes that follow from them; needs no file.

Source of the names and shapes: the published DeepSeek-V3 implementation; all matrices are [out_features, in_features]
(y = x W^T) and there are no biases.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

from kimi_native.config import KimiConfig
from kimi_native.errors import ConfigError
from kimi_native.safetensors_file import DTYPE_BYTES, TensorInfo

INT4_GROUP = 32
FP8_BLOCK = 128
PLAIN_DTYPES = ("BF16", "F16", "F32")  # the first is the published one
# Kinds of a module, in the order of a table; see tensor_kind.
KINDS = (
    "embedding",
    "attention",
    "dense mlp",
    "shared experts",
    "routed experts",
    "router",
    "norms",
    "lm_head",
)
VISION_PREFIXES = ("vision_tower.", "mm_projector.", "multi_modal_projector.")


# The tensors of a matrix, by how it is stored.
FORM_SUFFIXES = {
    "plain": (".weight",),
    "int4": (".weight_packed", ".weight_scale", ".weight_shape"),
    "fp8": (".weight", ".weight_scale_inv"),
}


class Expected(NamedTuple):
    """What a tensor must be: the exact shape, and one of the dtypes (the first is the published one)."""

    shape: tuple[int, ...]
    dtypes: tuple[str, ...]

    @property
    def nbytes(self) -> int:
        return numel_of(self.shape) * DTYPE_BYTES[self.dtypes[0]]


class Matrix(NamedTuple):
    """One Linear module: full name (without ".weight"), shape of the logical matrix [out_features, in_features]."""

    name: str
    out_features: int
    in_features: int


class Matrices(NamedTuple):
    """Linear modules that are alike: a single one, or one projection of all routed experts of a layer."""

    names: list[str]
    out_features: int
    in_features: int


def numel_of(shape: Iterable[int]) -> int:
    product = 1
    for size in shape:
        product *= size
    return product


def expected_matrices(config: KimiConfig) -> Iterator[Matrix]:
    """Every Linear module of the model that a quantization scheme could store, in layer order."""
    for names, out, in_ in expected_groups(config):
        for name in names:
            yield Matrix(name, out, in_)


def expected_groups(config: KimiConfig) -> Iterator[Matrices]:
    """The same, the experts of a layer together: some two thousand groups for K2's 70,000 matrices."""
    c, prefix = config, config.tensor_prefix
    h, heads = c.hidden_size, c.num_attention_heads
    attention = [
        ("kv_a_proj_with_mqa", c.latent_width, h),
        ("kv_b_proj", heads * (c.qk_nope_head_dim + c.v_head_dim), c.kv_lora_rank),
        ("o_proj", h, heads * c.v_head_dim),
    ]
    if c.q_lora_rank is None:
        attention.append(("q_proj", heads * c.qk_head_dim, h))
    else:
        attention.append(("q_a_proj", c.q_lora_rank, h))
        attention.append(("q_b_proj", heads * c.qk_head_dim, c.q_lora_rank))
    for i in range(c.num_hidden_layers):
        layer = f"{prefix}model.layers.{i}."
        for name, out, in_ in attention:
            yield Matrices([f"{layer}self_attn.{name}"], out, in_)
        if not c.is_moe_layer(i):
            yield from _mlps([f"{layer}mlp."], h, c.intermediate_size)
            continue
        if c.n_shared_experts:
            width = c.moe_intermediate_size * c.n_shared_experts
            yield from _mlps([f"{layer}mlp.shared_experts."], h, width)
        experts = [f"{layer}mlp.experts.{e}." for e in range(c.n_routed_experts or 0)]
        yield from _mlps(experts, h, c.moe_intermediate_size)
    if not c.tie_word_embeddings:
        yield Matrices([f"{prefix}lm_head"], c.vocab_size, h)


def _mlps(prefixes: list[str], hidden: int, width: int) -> Iterator[Matrices]:
    yield Matrices([p + "gate_proj" for p in prefixes], width, hidden)
    yield Matrices([p + "up_proj" for p in prefixes], width, hidden)
    yield Matrices([p + "down_proj" for p in prefixes], hidden, width)


def expected_others(config: KimiConfig) -> dict[str, Expected]:
    """The tensors that no scheme quantizes: embedding, norms, router."""
    c, prefix = config, config.tensor_prefix
    hidden = Expected((c.hidden_size,), PLAIN_DTYPES)
    tensors = {
        f"{prefix}model.embed_tokens.weight": Expected((c.vocab_size, c.hidden_size), PLAIN_DTYPES),
        f"{prefix}model.norm.weight": hidden,
    }
    for i in range(c.num_hidden_layers):
        layer = f"{prefix}model.layers.{i}."
        tensors[layer + "input_layernorm.weight"] = hidden
        tensors[layer + "post_attention_layernorm.weight"] = hidden
        latent = Expected((c.kv_lora_rank,), PLAIN_DTYPES)
        tensors[layer + "self_attn.kv_a_layernorm.weight"] = latent
        if c.q_lora_rank is not None:
            query = Expected((c.q_lora_rank,), PLAIN_DTYPES)
            tensors[layer + "self_attn.q_a_layernorm.weight"] = query
        if c.is_moe_layer(i):
            experts = c.n_routed_experts or 0
            router = Expected((experts, c.hidden_size), PLAIN_DTYPES)
            tensors[layer + "mlp.gate.weight"] = router
            if c.topk_method == "noaux_tc":
                # Published in F32 or BF16; selection happens in fp32 either way.
                bias = Expected((experts,), ("F32", "BF16", "F16"))
                tensors[layer + "mlp.gate.e_score_correction_bias"] = bias
    return tensors


def matrix_tensors(matrix: Matrix, form: str) -> list[tuple[str, Expected]]:
    """The tensors that store one matrix, by what their names have after the matrix's.

    form  "plain": weight · "int4": weight_packed, weight_scale, weight_shape · "fp8": weight, weight_scale_inv

    Raises ConfigError if in_features is no multiple of the INT4 group.
    """
    name, out, in_ = matrix
    if form == "plain":
        return [(".weight", Expected((out, in_), PLAIN_DTYPES))]
    if form == "fp8":
        blocks = (-(-out // FP8_BLOCK), -(-in_ // FP8_BLOCK))
        return [
            (".weight", Expected((out, in_), ("F8_E4M3",))),
            (".weight_scale_inv", Expected(blocks, ("F32",))),
        ]
    if in_ % INT4_GROUP:
        raise ConfigError(
            f"{name}: INT4 needs in_features that are a multiple of {INT4_GROUP} (got {in_})"
        )
    return [
        (".weight_packed", Expected((out, in_ // 8), ("I32",))),
        (".weight_scale", Expected((out, in_ // INT4_GROUP), ("BF16",))),
        (".weight_shape", Expected((2,), ("I32", "I64"))),
    ]


def configured_form(config: KimiConfig, module_name: str) -> str:
    """How the config says a matrix is stored: "plain", "int4" or "fp8"."""
    quantization = config.quantization
    if quantization is None or not quantization.is_quantized(module_name):
        return "plain"
    return quantization.kind


def expected_tensors(config: KimiConfig) -> dict[str, Expected]:
    """Every tensor of the checkpoint that config.json describes, by its name in the files; needs no file.

    Raises ConfigError if a matrix cannot be stored as the config says.
    """
    tensors = expected_others(config)
    for names, out, in_ in expected_groups(config):
        parts: dict[str, list[tuple[str, Expected]]] = {}  # the same for each expert
        for name in names:
            form = configured_form(config, name)
            if form not in parts:
                parts[form] = matrix_tensors(Matrix(name, out, in_), form)
            for suffix, expected in parts[form]:
                tensors[name + suffix] = expected
    return tensors


def tensor_kind(name: str) -> str:
    """One of KINDS, from a tensor's name."""
    if "embed_tokens" in name:
        return "embedding"
    if "norm." in name:
        return "norms"
    if ".self_attn." in name:
        return "attention"
    if ".mlp.experts." in name:
        return "routed experts"
    if ".mlp.shared_experts." in name:
        return "shared experts"
    if ".mlp.gate." in name:
        return "router"
    return "dense mlp" if ".mlp." in name else "lm_head"


def is_ignored_tensor(config: KimiConfig, name: str) -> bool:
    """Tensors that published files hold and the text model does not use: MTP layers, frequencies, the vision side."""
    if name.endswith(".rotary_emb.inv_freq"):
        return True
    prefix = config.tensor_prefix
    if prefix and name.startswith(VISION_PREFIXES):
        return True
    layers = prefix + "model.layers."
    if not name.startswith(layers):
        return False
    number = name[len(layers) :].partition(".")[0]
    if not (number.isascii() and number.isdigit() and len(number) < 6):
        return False
    # Only as many as config.json announces: more would mean that num_hidden_layers is not this model's.
    first = config.num_hidden_layers
    return first <= int(number) < first + config.num_nextn_predict_layers


# ---- numbers --------------------------------------------------------------------------------------------------------


def summarize(config: KimiConfig, tensors: dict[str, TensorInfo] | dict[str, Expected]) -> dict:
    """Sizes of a model from a table of its tensors alone: `Checkpoint.tensors`, or `expected_tensors(config)`.

    parameters      logical weights: an INT4 matrix counts its nibbles, no scales; active: with topk of the experts
    bytes           as stored; "bytes_per_decoded_token": each weight a token touches once, one embedding row
    """
    by_kind = dict.fromkeys(KINDS, 0)
    by_dtype: dict[str, int] = {}
    parameters = dict.fromkeys(KINDS, 0)
    for name, tensor in tensors.items():
        dtype = tensor.dtype if isinstance(tensor, TensorInfo) else tensor.dtypes[0]
        kind, numel = tensor_kind(name), numel_of(tensor.shape)
        nbytes = numel * DTYPE_BYTES[dtype]
        by_kind[kind] += nbytes
        by_dtype[dtype] = by_dtype.get(dtype, 0) + nbytes
        if name.endswith(".weight_packed"):
            numel *= 8
        elif name.endswith((".weight_scale", ".weight_scale_inv", ".weight_shape")):
            numel = 0
        parameters[kind] += numel
    total = sum(by_kind.values())
    return {
        "model_type": config.model_type,
        "architecture": _architecture(config),
        "quantization": _scheme(config),
        "max_position_embeddings": config.max_position_embeddings,
        "tensors": len(tensors),
        "parameters": {
            "total": sum(parameters.values()),
            "active_per_token": sum(parameters.values())
            - parameters["routed experts"]
            + share_of_token(config, parameters["routed experts"]),
        },
        "bytes": total,
        "bytes_by_kind": by_kind,
        "bytes_by_dtype": dict(sorted(by_dtype.items())),
        "bytes_per_decoded_token": _decoded_bytes(config, by_kind),
        "cache_bytes_per_token": config.num_hidden_layers * config.latent_width * 2,
    }


def share_of_token(config: KimiConfig, amount: int) -> int:
    """The part of the routed experts that one token uses."""
    return amount * config.num_experts_per_tok // (config.n_routed_experts or 1)


def _decoded_bytes(config: KimiConfig, by_kind: dict[str, int]) -> dict[str, int]:
    row = by_kind["embedding"] // config.vocab_size
    dense = sum(by_kind.values()) - by_kind["routed experts"] - by_kind["embedding"] + row
    if config.tie_word_embeddings:  # the head reads the whole embedding
        dense += by_kind["embedding"] - row
    routed = share_of_token(config, by_kind["routed experts"])
    return {"routed_experts": routed, "dense": dense, "total": routed + dense}


def _scheme(config: KimiConfig) -> str | None:
    if config.quantization is None:
        return None
    return {
        "int4": f"int4, groups of {INT4_GROUP}",
        "fp8": f"fp8, {FP8_BLOCK} x {FP8_BLOCK} blocks",
    }[config.quantization.kind]


def _architecture(config: KimiConfig) -> dict[str, Any]:
    fields = (
        "hidden_size num_hidden_layers num_attention_heads q_lora_rank kv_lora_rank qk_nope_head_dim "
        "qk_rope_head_dim v_head_dim intermediate_size n_routed_experts num_experts_per_tok n_shared_experts "
        "moe_intermediate_size vocab_size scoring_func topk_method"
    )
    moe_layers = config.mlp_layer_types.count("sparse")
    return {f: getattr(config, f) for f in fields.split()} | {"moe_layers": moe_layers}
