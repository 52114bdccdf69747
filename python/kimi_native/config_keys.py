"""Every key of config.json that this package knows: what it must hold, and what its absence means."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from kimi_native.errors import ConfigError
from kimi_native.json_file import REQUIRED, Section
from kimi_native.quantization import TEXT_PREFIXES, read_quantization

GENERATION_PREFIX = "generation_config."  # before that file's keys in ignore_config_keys
MAX_ROUTED = 4096  # experts of a layer that ops.moe_route takes
MAX_EXPERTS = 100_000  # layers * experts: nine tensors each stay within the index's million entries

_SIZE = (1, 1 << 20)
_POSITIONS = (1, (1 << 31) - 1)
_TOKEN_ID = (0, (1 << 31) - 1)

# What a family's published config class assumes when config.json is silent. Sizes have no default; neither has
# first_k_dense_replace, whose published defaults disagree (0 and 3).
_V3_DEFAULTS = {
    "rms_norm_eps": 1e-6,
    "n_group": 8,
    "topk_group": 4,
    "scoring_func": "sigmoid",
    "topk_method": "noaux_tc",
    "norm_topk_prob": True,
    "routed_scaling_factor": 2.5,
}
FAMILY_DEFAULTS = {
    "kimi_k2": _V3_DEFAULTS,
    "deepseek_v3": _V3_DEFAULTS,
    "deepseek_v2": {
        "rms_norm_eps": 1e-6,
        "n_group": None,
        "topk_group": None,
        "scoring_func": "softmax",
        "topk_method": "greedy",
        "norm_topk_prob": False,
        "routed_scaling_factor": 1.0,
    },
    "glm4_moe_lite": {
        **_V3_DEFAULTS,
        "rms_norm_eps": 1e-5,
        "n_group": 1,
        "topk_group": 1,
        "routed_scaling_factor": 1.8,
    },
}
WRAPPERS = {"kimi_k25": TEXT_PREFIXES[0]}  # model_type -> prefix of the text tensors
_ROUTERS = (("sigmoid", "noaux_tc"), ("softmax", "greedy"), ("softmax", "group_limited_greedy"))

# Keys that change nothing at inference, with the only values under which that is true.
ONE_VALUE: dict[str, tuple[Any, ...]] = {
    "add_cross_attention": (False, None),
    "attention_bias": (False, None),
    "chunk_size_feed_forward": (0, None),
    "cross_attention_hidden_size": (None,),
    "dtype": ("bfloat16", "float16", "float32", None),  # tensors carry their own dtype
    "expert_dtype": (None,),
    "hidden_act": ("silu",),
    "is_decoder": (False, True, None),
    "is_encoder_decoder": (False, None),
    "mlp_bias": (False, None),
    "partial_rotary_factor": (1.0, None),
    "pretraining_tp": (1, None),
    "pruned_heads": ({}, None),
    "rope_interleave": (True, None),
    "sliding_window": (None,),
    "tie_encoder_decoder": (False, None),
    "torch_dtype": ("bfloat16", "float16", "float32", None),
    "use_mla": (True,),
}
# Keys that change nothing at inference whatever they hold: bookkeeping, training, output switches, and the
# generation settings that old library versions copied here (generation_config.json is what counts).
ANY_VALUE = frozenset(
    """
    _attn_implementation _attn_implementation_autoset _commit_hash _name_or_path architectures attention_dropout
    attn_implementation auto_map aux_loss_alpha decoder_start_token_id ep_size finetuning_task id2label
    initializer_range label2id model_type output_attentions output_hidden_states output_router_logits
    output_scores pad_token_id prefix problem_type remove_invalid_values return_dict return_dict_in_generate
    router_aux_loss_coef sep_token_id seq_aux task_specific_params tf_legacy_loss tokenizer_class torchscript
    transformers_version unk_token_id use_bfloat16 use_cache
    bad_words_ids begin_suppress_tokens diversity_penalty do_sample early_stopping encoder_no_repeat_ngram_size
    exponential_decay_length_penalty forced_bos_token_id forced_eos_token_id length_penalty max_length min_length
    no_repeat_ngram_size num_beam_groups num_beams num_return_sequences repetition_penalty suppress_tokens
    temperature top_k top_p typical_p
    """.split()  # noqa: SIM905
)
# Of the multimodal wrapper: the vision side, which text alone does not touch.
WRAPPER_ANY_VALUE = ANY_VALUE | frozenset(
    """
    ignore_index image_token_id media_placeholder_token_id projection_hidden_size projection_layer_norm_eps
    use_unified_vision_chunk video_placeholder video_token_id vision_config vision_end_token_id
    vision_start_token_id
    """.split()  # noqa: SIM905
)


# ---- rotary embedding -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class YarnConfig:
    """Context extension by YaRN (arXiv 2309.00071), fields as in config.json's rope_scaling."""

    factor: float
    original_max_position_embeddings: int
    beta_fast: float
    beta_slow: float
    mscale: float
    mscale_all_dim: float


def _read_rope(section: Section) -> tuple[float, YarnConfig | None]:
    """rope_theta and the scaling, from either spelling; both at once must agree."""
    found = []
    for key in ("rope_parameters", "rope_scaling"):
        rope = section.section(key)
        if rope is not None:
            found.append((rope, _read_rope_section(rope)))
    theta = section.get("rope_theta")
    thetas = set() if theta is None else {section.number("rope_theta", 1.0001, 1e12)}
    for rope, _ in found:
        if rope.get("rope_theta") is not None:
            thetas.add(rope.number("rope_theta", 1.0001, 1e12))
    if len(thetas) > 1 or len({yarn for _, yarn in found}) > 1:
        raise ConfigError(
            f"{section.source}: {section.path}rope_theta, rope_scaling and rope_parameters must agree "
            f"(got rope_theta {sorted(thetas)})"
        )
    # 10000 is the default of every published class of the family
    return (thetas.pop() if thetas else 10000.0), (found[0][1] if found else None)


def _read_rope_section(rope: Section) -> YarnConfig | None:
    types = {rope.choice(k, ("yarn", "default")) for k in ("rope_type", "type") if k in rope.values}
    if len(types) > 1:
        raise rope.fail("rope_type", "the same as type")
    rope.get("rope_theta")
    yarn = None
    if types == {"yarn"}:
        yarn = YarnConfig(
            factor=rope.number("factor", 1, 1e6),
            original_max_position_embeddings=rope.integer(
                "original_max_position_embeddings", _POSITIONS
            ),
            beta_fast=rope.number("beta_fast", 1e-3, 1e6, 32),
            beta_slow=rope.number("beta_slow", 1e-3, 1e6, 1),
            mscale=rope.number("mscale", 1e-3, 100, 1),
            mscale_all_dim=rope.number("mscale_all_dim", 0, 100, 0),
        )
        if yarn.beta_fast < yarn.beta_slow:
            raise rope.fail("beta_fast", f"at least beta_slow = {yarn.beta_slow:g}")
        if ("mscale" not in rope.values) if yarn.mscale_all_dim else (yarn.mscale != 1):
            raise rope.fail(
                "mscale",
                "given together with mscale_all_dim: the published implementations disagree about one alone",
            )
    rope.finish(
        {"attention_factor": (None,), "partial_rotary_factor": (1, None), "truncate": (True, None)}
    )
    return yarn


# ---- the text model ------------------------------------------------------------------------------------------------


def read_text(s: Section, family: str) -> dict[str, Any]:
    """The checked fields of the text model."""
    v: dict[str, Any] = {"model_type": family}
    for key in ("vocab_size", "hidden_size", "intermediate_size", "kv_lora_rank"):
        v[key] = s.integer(key, _SIZE)
    v["num_hidden_layers"] = s.integer("num_hidden_layers", (1, 1024))
    v["num_attention_heads"] = s.integer("num_attention_heads", (1, 4096))
    for key in ("qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim"):
        v[key] = s.integer(key, (1, 4096))
    if v["qk_rope_head_dim"] % 2:
        raise s.fail("qk_rope_head_dim", "even: the rotation turns pairs")
    rank = s.get("q_lora_rank", REQUIRED)
    v["q_lora_rank"] = None if rank is None else s.integer("q_lora_rank", _SIZE)
    v["rms_norm_eps"] = s.number(
        "rms_norm_eps", 1e-12, 0.1, FAMILY_DEFAULTS[family]["rms_norm_eps"]
    )
    v["rope_theta"], v["rope_scaling"] = _read_rope(s)
    v["max_position_embeddings"] = s.integer("max_position_embeddings", _POSITIONS)
    v["bos_token_id"] = token_id(s, "bos_token_id")
    v["eos_token_ids"] = token_ids(s, "eos_token_id", v["vocab_size"])
    v["tie_word_embeddings"] = s.boolean("tie_word_embeddings", False)
    mtp = "num_mtp_layers" if "num_mtp_layers" in s.values else "num_nextn_predict_layers"
    v["num_nextn_predict_layers"] = 0 if s.get(mtp) is None else s.integer(mtp, (0, 1024))
    if mtp == "num_mtp_layers" and "num_nextn_predict_layers" in s.values:
        s.choice("num_nextn_predict_layers", (v["num_nextn_predict_layers"],))
    quantization = s.section("quantization_config")
    v["quantization"] = None if quantization is None else read_quantization(quantization)
    _read_derived(s, v)
    v |= _read_experts(s, family)
    v |= _read_layer_types(s, v["num_hidden_layers"], v["n_routed_experts"])
    return v


def _read_derived(s: Section, v: dict[str, Any]) -> None:
    """Keys that repeat what other keys say."""
    qk_head_dim = v["qk_nope_head_dim"] + v["qk_rope_head_dim"]
    heads = v["num_attention_heads"]
    for key, allowed in (
        ("num_key_value_heads", (heads, None)),
        ("qk_head_dim", (qk_head_dim, None)),
        # library versions differ in which of the head's sizes they call head_dim
        ("head_dim", (v["qk_rope_head_dim"], qk_head_dim, v["hidden_size"] // heads, None)),
    ):
        if key in s.values:
            s.choice(key, allowed)


def token_id(s: Section, key: str) -> int | None:
    """An id that nothing here uses, so it may lie outside the vocabulary."""
    return None if s.get(key) is None else s.integer(key, _TOKEN_ID)


def token_ids(s: Section, key: str, vocab_size: int) -> tuple[int, ...]:
    """Ids that may be generated."""
    value = s.get(key)
    ids = value if isinstance(value, (list, tuple)) else [] if value is None else [value]
    if len(ids) > 256 or not all(type(i) is int and 0 <= i < vocab_size for i in ids):
        raise s.fail(key, f"a token id below vocab_size = {vocab_size}, or a list of them")
    return tuple(dict.fromkeys(ids))


def _read_experts(s: Section, family: str) -> dict[str, Any]:
    """The routed part; with n_routed_experts null every layer is dense and the rest is zero or one."""
    defaults = FAMILY_DEFAULTS[family]
    experts = s.get("n_routed_experts", REQUIRED)
    for alias in ("num_local_experts", "num_experts"):
        if alias in s.values:
            s.choice(alias, (experts,))
    dense = experts is None
    if not dense:
        experts = s.integer("n_routed_experts", (1, MAX_ROUTED))
    v = {"n_routed_experts": experts} | _read_router(s, defaults)
    missing = None if dense else REQUIRED
    shared = s.get("n_shared_experts", missing)
    v["n_shared_experts"] = 0 if shared is None else s.integer("n_shared_experts", (0, 1024))
    topk = s.get("num_experts_per_tok", missing)
    width = s.get("moe_intermediate_size", missing)
    v["num_experts_per_tok"] = (
        0 if dense and topk is None else s.integer("num_experts_per_tok", (1, 4096))
    )
    v["moe_intermediate_size"] = (
        0 if dense and width is None else s.integer("moe_intermediate_size", _SIZE)
    )
    return v | _read_groups(s, experts, v["num_experts_per_tok"], v["topk_method"], defaults)


def _read_router(s: Section, defaults: dict[str, Any]) -> dict[str, Any]:
    """How scores are made, chosen and weighed."""
    scoring = s.choice("scoring_func", ("sigmoid", "softmax"), defaults["scoring_func"])
    methods = ("noaux_tc", "greedy", "group_limited_greedy")
    method = s.choice("topk_method", methods, defaults["topk_method"])
    if (scoring, method) not in _ROUTERS:
        raise s.fail("topk_method", f"one that is published with scoring_func {scoring}")
    norm = s.boolean("norm_topk_prob", defaults["norm_topk_prob"])
    factor = s.number("routed_scaling_factor", 1e-6, 1e6, defaults["routed_scaling_factor"])
    if scoring == "softmax" and norm and factor != 1:
        raise s.fail(
            "routed_scaling_factor",
            "1 with softmax scores and norm_topk_prob: the published implementations disagree about the order",
        )
    return {
        "scoring_func": scoring,
        "topk_method": method,
        "norm_topk_prob": norm,
        "routed_scaling_factor": factor,
    }


def _read_groups(
    s: Section, experts: int | None, topk: int, topk_method: str, defaults: dict[str, Any]
) -> dict[str, int]:
    sizes = {}
    for key in ("n_group", "topk_group"):
        value = s.get(key, defaults[key])
        sizes[key] = 1 if value is None else s.integer(key, (1, 1 << 16), defaults[key])
    if experts is None or topk_method == "greedy":  # without groups, whatever the keys say
        sizes = {"n_group": 1, "topk_group": 1}
    n_group, topk_group = sizes["n_group"], sizes["topk_group"]
    if experts is not None and topk > experts:
        raise s.fail("num_experts_per_tok", f"at most n_routed_experts = {experts}")
    if experts is not None and experts % n_group:
        raise s.fail("n_group", f"a divisor of n_routed_experts = {experts}")
    if topk_method == "noaux_tc" and n_group > 1 and experts // n_group < 2:
        raise s.fail(
            "n_group", "at most half of n_routed_experts: a group is scored by its best two"
        )
    if topk_group > n_group:
        raise s.fail("topk_group", f"at most n_group = {n_group}")
    if experts is not None and topk > topk_group * (experts // n_group):
        raise s.fail(
            "num_experts_per_tok", f"at most the experts of topk_group = {topk_group} groups"
        )
    return sizes


def _read_layer_types(s: Section, layers: int, experts: int | None) -> dict[str, Any]:
    """Which layers are dense: first_k_dense_replace and moe_layer_freq, or a list with one entry per layer."""
    listed = s.get("mlp_layer_types")
    freq = s.integer("moe_layer_freq", (1, 1024), 1)
    if listed is not None and (
        not isinstance(listed, (list, tuple))
        or len(listed) != layers
        or not all(isinstance(t, str) and t in ("dense", "sparse") for t in listed)
    ):
        raise s.fail("mlp_layer_types", f'a list of {layers} times "dense" or "sparse"')
    if listed is not None and "first_k_dense_replace" not in s.values:
        first = listed.index("sparse") if "sparse" in listed else layers
    else:
        dense = experts is None and "first_k_dense_replace" not in s.values
        first = layers if dense else s.integer("first_k_dense_replace", (0, 1024))
    types = [
        "sparse" if i >= first and i % freq == 0 and experts else "dense" for i in range(layers)
    ]
    if listed is not None:
        known = "first_k_dense_replace" in s.values or "moe_layer_freq" in s.values or not experts
        if known and types != list(listed):
            raise s.fail(
                "mlp_layer_types", "in agreement with first_k_dense_replace and moe_layer_freq"
            )
        types = list(listed)
    if types.count("sparse") * (experts or 0) > MAX_EXPERTS:
        raise s.fail("n_routed_experts", f"at most {MAX_EXPERTS} over all layers")
    return {
        "first_k_dense_replace": first,
        "moe_layer_freq": freq,
        "mlp_layer_types": tuple(types),
    }
