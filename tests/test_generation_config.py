"""generation_config.json on the disk: what others write there, and what would change the answers."""

from __future__ import annotations

import dataclasses
import functools
import json
from pathlib import Path

import pytest

from kimi_native.checkpoint import Checkpoint
from kimi_native.config import load_config
from kimi_native.errors import ConfigError
from kimi_native.generation_config import load_generation_config
from kimi_native.sampling import SamplingParams
from tiny_checkpoint import TINY, write_checkpoint

load = functools.partial(load_generation_config, vocab_size=96)


def write(folder: Path, values: dict) -> Path:
    (folder / "generation_config.json").write_text(json.dumps(values))
    return folder


def refused(folder: Path, values: dict, message: str, **options) -> None:
    with pytest.raises(ConfigError, match=message) as error:
        load(write(folder, values), **options)
    assert str(error.value).startswith(f"{folder}/generation_config.json: ")


def test_generation_config_is_returned_as_it_is(tmp_path):
    assert load(tmp_path) == {}
    values = {"eos_token_id": [1, 2], "temperature": 0.6, "max_length": 131072, "top_k": None}
    assert load(write(tmp_path, values)) == values


BAD_VALUES = {
    "eos_token_id": ["1", [-1], True, 96, [2, 99999999]],
    "bos_token_id": [1.5, -1],
    "pad_token_id": ["0"],
    "max_length": [10**18, -1],
    "do_sample": [1, "no"],
    "temperature": ["hot", -1, 101],
    "top_p": [2, 0, -0.5],
    "top_k": [1.5, -1],
    "min_p": [1.5],
    "repetition_penalty": [[], 50, 0],
    "presence_penalty": [9],
    "frequency_penalty": [-2.5],
}  # fmt: skip


@pytest.mark.parametrize(
    ("key", "value"), [(k, v) for k, values in BAD_VALUES.items() for v in values]
)
def test_generation_config_bad_value_is_an_error_naming_file_and_key(tmp_path, key, value):
    refused(tmp_path, {key: value}, f": {key} must be")


def test_generation_config_bad_length_is_named_as_ours(tmp_path):
    refused(tmp_path, {"max_new_tokens": 0}, r"max_tokens must be .*\(got 0\)")


@pytest.mark.parametrize(
    "values", [{"top_p": 0}, {"repetition_penalty": 50}, {"num_beams": 4}, {"eos_token_id": 96}]
)
def test_generation_config_is_checked_before_the_weights(tmp_path, values):
    folder = write(write_checkpoint(tmp_path / "m", TINY), values)
    with pytest.raises(
        ConfigError, match=rf"{folder}/generation_config\.json: {next(iter(values))}"
    ):
        Checkpoint.open(folder)


MATTERS = {
    "num_beams": 4,
    "no_repeat_ngram_size": 2,
    "bad_words_ids": [[3]],
    "suppress_tokens": [5],
    "begin_suppress_tokens": [5],
    "typical_p": 0.9,
    "stop_strings": ["x"],
    "min_new_tokens": 3,
    "min_length": 3,
    "max_time": 1.5,
    "guidance_scale": 2.0,
    "sequence_bias": {"3": 1.0},
    "penalty_alpha": 0.6,
    "num_return_sequences": 2,
    "cache_implementation": "quantized",
    "token_healing": True,
}


@pytest.mark.parametrize(("key", "value"), MATTERS.items())
def test_generation_config_setting_we_lack_is_refused_where_it_matters(tmp_path, key, value):
    refused(tmp_path, {key: value}, f": {key} must be .*or null|: {key} must be null")
    assert load(write(tmp_path, {key: None})) == {key: None}


def test_generation_config_takes_every_default_of_transformers(tmp_path):
    import transformers

    published = transformers.GenerationConfig()
    written = published.to_dict()
    assert set(MATTERS) <= set(written)
    explicit = written | {
        k: v for k, v in published._get_default_generation_params().items() if k in written
    }
    for values in (written, explicit):
        load(write(tmp_path, values))
    for key, value in MATTERS.items():
        refused(tmp_path, explicit | {key: value}, f": {key} must be")


def test_generation_config_unknown_key_is_refused_and_can_be_ignored(tmp_path):
    values = {"novel": 1, "other": "x", "top_k": 3}
    refused(
        tmp_path,
        values,
        r"keys must be known .*got generation_config.novel = 1, generation_config.other = 'x'\)",
    )
    ignored = ("generation_config.novel", "generation_config.other")
    assert load(tmp_path, ignore_keys=ignored) == values
    refused(
        tmp_path, values, "got generation_config.top_k, which it reads",
        ignore_keys=(*ignored, "generation_config.top_k"),
    )  # fmt: skip
    refused(
        tmp_path, {}, "got generation_config.novel, which it does not hold",
        ignore_keys=ignored[:1],
    )  # fmt: skip


def test_checkpoint_gives_each_file_its_ignored_keys(tmp_path):
    folder = write(write_checkpoint(tmp_path / "m", TINY | {"future": 1}), {"novel": 1})
    keys = ("future", "generation_config.novel")
    assert load_config(folder, ignore_keys=keys).vocab_size == 96
    assert Checkpoint.open(folder, ignore_keys=iter(keys)).generation_config == {"novel": 1}


def test_generation_config_ranges_are_those_of_sampling(tmp_path):
    names = {f.name for f in dataclasses.fields(SamplingParams)}
    for key in names & {*BAD_VALUES}:
        for value in (0, 1e-9, 0.5, 1, 2, 10, 100):
            try:
                expected = SamplingParams.from_generation_config({key: value})
            except ConfigError:
                refused(tmp_path, {key: value}, f": {key} must be")
            else:
                values = load(write(tmp_path, {key: value}))
                assert SamplingParams.from_generation_config(values) == expected
