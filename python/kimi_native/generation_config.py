"""generation_config.json: how a checkpoint's authors would choose tokens, every key accounted for as in config.json."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from kimi_native.config import MAX_CONFIG_BYTES
from kimi_native.config_keys import GENERATION_PREFIX, token_id, token_ids
from kimi_native.json_file import Section, UnknownKeys, check_depth, read_json
from kimi_native.model_file import find_file
from kimi_native.sampling import GENERATION_FIELDS, SamplingParams

GENERATION_CONFIG_NAME = "generation_config.json"

# Settings that this package does not have, with the only values under which they choose nothing.
_ONE_VALUE: dict[str, tuple[Any, ...]] = {
    "assistant_ensemble_weight": (None,),
    "bad_words_ids": (None, []),
    "begin_suppress_tokens": (None, []),
    "cache_implementation": (None, "dynamic", "static", "offloaded", "offloaded_static"),
    "constraints": (None, []),
    "diversity_penalty": (0, None),
    "dola_layers": (None,),
    "encoder_no_repeat_ngram_size": (0, None),
    "encoder_repetition_penalty": (1, None),
    "epsilon_cutoff": (0, None),
    "eta_cutoff": (0, None),
    "exponential_decay_length_penalty": (None,),
    "force_words_ids": (None, []),
    "forced_bos_token_id": (None,),
    "forced_eos_token_id": (None,),
    "generation_kwargs": (None, {}),
    "guidance_scale": (1, None),
    "max_time": (None,),
    "min_length": (0, None),
    "min_new_tokens": (0, None),
    "no_repeat_ngram_size": (0, None),
    "num_beam_groups": (1, None),
    "num_beams": (1, None),
    "num_return_sequences": (1, None),
    "penalty_alpha": (0, None),
    "sequence_bias": (None, {}, []),
    "stop_strings": (None, []),
    "suppress_tokens": (None, []),
    "token_healing": (False, None),
    "top_h": (None,),
    "typical_p": (1, None),
    "watermarking_config": (None,),
}
# Bookkeeping, output switches, what only beams or an assistant model read, and how others go about computing.
_ANY_VALUE = frozenset(
    """
    _commit_hash _from_model_config _name_or_path assistant_confidence_threshold assistant_early_exit
    assistant_lookbehind cache_config compile_config continuous_batching_config decoder_start_token_id disable_compile
    early_stopping is_assistant length_penalty low_memory max_cache_len max_matching_ngram_size num_assistant_tokens
    num_assistant_tokens_schedule output_attentions output_hidden_states output_logits output_scores
    prefill_chunk_size prompt_lookup_num_tokens remove_invalid_values renormalize_logits return_dict_in_generate
    return_legacy_cache speculation_type target_lookbehind transformers_version use_cache use_mtp
    """.split()  # noqa: SIM905
)


def load_generation_config(
    path: str | Path, *, vocab_size: int, ignore_keys: Iterable[str] = ()
) -> dict[str, Any]:
    """generation_config.json of a model folder as it is, {} if there is none.

    vocab_size   of the model: every end token lies below it
    ignore_keys  as of load_config; those that begin with "generation_config." count here

    Raises ConfigError on malformed JSON, an end token outside the vocabulary, a sampling value that SamplingParams
    refuses, a setting that this package does not have at a value that would matter, or an unknown key.
    """
    file = find_file(Path(path), GENERATION_CONFIG_NAME)
    source = str(file or Path(path) / GENERATION_CONFIG_NAME)
    ignored = [key for key in ignore_keys if key.startswith(GENERATION_PREFIX)]
    unknown = UnknownKeys(source, ignored, GENERATION_PREFIX)
    values = {} if file is None else read_json(file, max_bytes=MAX_CONFIG_BYTES)
    check_depth(values, source)
    _read(Section(values, "", unknown), vocab_size)
    unknown.finish()
    SamplingParams.from_generation_config(values, source)
    return values


def _read(section: Section, vocab_size: int) -> None:
    token_ids(section, "eos_token_id", vocab_size)
    for key in ("bos_token_id", "pad_token_id"):
        token_id(section, key)
    if section.get("max_length") is not None:  # the context, which config.json tells
        section.integer("max_length", (0, (1 << 31) - 1))
    for key in ("do_sample", *GENERATION_FIELDS):
        section.get(key)
    section.finish(_ONE_VALUE, _ANY_VALUE)
