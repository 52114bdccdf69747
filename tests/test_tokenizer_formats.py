"""The tokenizer files: every kind of damage is named, and tokenizer.json behaves as tiktoken.model does."""

from __future__ import annotations

import base64
import json
import random
import sys

import pytest

from kimi_native import tokenizer_formats
from kimi_native.errors import TokenizerError
from kimi_native.tokenizer import load_tokenizer
from tokenizer_files import (
    BYTES,
    WORDS,
    config_json,
    random_text,
    ranks_text,
    small_tokenizer,
    write_tiktoken_folder,
)


@pytest.fixture(scope="session")
def small(tmp_path_factory):
    return small_tokenizer(tmp_path_factory.mktemp("tokenizer"))


# ---- malformed tiktoken files --------------------------------------------------------------------------------------

GOOD = ranks_text(BYTES + WORDS)
LINES = GOOD.splitlines(keepends=True)

BAD_RANKS = {
    "line 3: must be `base64(token) rank` (got 'Ag==')": [*LINES[:2], "Ag==\n", *LINES[3:]],
    "line 3: must be `base64(token) rank` (got 'Ag== 2 3')": [*LINES[:2], "Ag== 2 3\n", *LINES[3:]],
    "line 3: must be `base64(token) rank` (got 'Ag== -2')": [*LINES[:2], "Ag== -2\n", *LINES[3:]],
    "line 3: must be `base64(token) rank` (got 'Ag== 2000": [*LINES[:2], "Ag== 2000000000\n"],
    "line 1: must start with valid base64 (got 'A*== 0'": ["A*== 0\n", *LINES[1:]],
    "line 2: must start with valid base64 (got 'AQ= 1'": [LINES[0], "AQ= 1\n", *LINES[2:]],
    "line 284: a token must occur once (got 'AA== 283', already on line 1)": [*LINES, "AA== 283\n"],
    "line 284: a rank must occur once (got 5, already on line 6)": [*LINES, "YWJjZA== 5\n"],
    "line 284: ranks must run from 0 to 283 without a gap (got 999; 283 is missing)": [
        *LINES,
        "YWJjZA== 999\n",
    ],
    "all 256 single bytes must be tokens (got 2 ranks; 254 bytes missing, first 0x02)": LINES[:2],
    "all 256 single bytes must be tokens (got 0 ranks": [],
    "line 284: a token must have 1 .. 1024 bytes (got 1025)": [
        *LINES,
        base64.b64encode(b"x" * 1025).decode() + " 283\n",
    ],
    "line 284: a token must have 1 .. 1024 bytes (got 0)": [*LINES, " 283\n"],
}


@pytest.mark.parametrize("message", BAD_RANKS)
def test_malformed_ranks_are_named(tmp_path, message):
    folder = write_tiktoken_folder(tmp_path)
    path = folder / "tiktoken.model"
    path.write_text("".join(BAD_RANKS[message]))
    with pytest.raises(TokenizerError) as caught:
        load_tokenizer(folder)
    assert str(caught.value).startswith(f"{path}: {message}")


def test_ranks_may_come_in_any_order(tmp_path, small):
    tokens = BYTES + WORDS
    shuffled = random.Random(8).sample(ranks_text(tokens).splitlines(keepends=True), len(tokens))
    folder = write_tiktoken_folder(tmp_path)
    (folder / "tiktoken.model").write_text("\n".join(shuffled))
    text = "the functions of the ing"
    assert load_tokenizer(folder).encode(text) == small.encode(text)


def test_random_damage_is_a_tokenizer_error_or_harmless(tmp_path):
    folder = write_tiktoken_folder(tmp_path)
    path = folder / "tiktoken.model"
    good = path.read_bytes()
    rng = random.Random(9)
    num_rejected = 0
    for _ in range(250):
        data = bytearray(good)
        for _ in range(rng.randint(1, 4)):
            at = rng.randrange(len(data))
            damage = rng.randrange(4)
            if damage == 0:
                data[at] = rng.randrange(256)
            elif damage == 1:
                del data[at : at + rng.randint(1, 30)]
            elif damage == 2:
                data[at:at] = bytes(rng.choices(range(256), k=rng.randint(1, 10)))
            else:
                del data[at:]
                data += b" "
        path.write_bytes(data)
        try:
            damaged = load_tokenizer(folder)
        except TokenizerError:
            num_rejected += 1
        else:
            assert damaged.decode(damaged.encode("the functions: 月 <|im_end|>")) == (
                "the functions: 月 <|im_end|>"
            )
    assert num_rejected > 180


FIRST = len(BYTES + WORDS)
BAD_CONFIGS = {
    "must be valid JSON": "{",
    "must be valid JSON (got maximum recursion": "[" * 100_000,
    "must hold a JSON object (got list)": "[]",
    "added_tokens_decoder must be an object (got list)": '{"added_tokens_decoder": []}',
    f"added_tokens_decoder ids must be slots {FIRST} .. {FIRST + 255} (got '7')": config_json(
        7, {0: ("a", True)}
    ),
    f"added_tokens_decoder ids must be slots {FIRST} .. {FIRST + 255} (got '+{FIRST}')": (
        json.dumps({"added_tokens_decoder": {f"+{FIRST}": {"content": "a"}}})
    ),
    f"added_tokens_decoder ids must be slots {FIRST} .. {FIRST + 255} (got '{FIRST + 256}')": (
        config_json(FIRST, {256: ("a", True)})
    ),
    f"added token {FIRST} must have a non-empty string `content`": config_json(
        FIRST, {0: ("", True)}
    ),
    f"added token {FIRST + 1} must have a non-empty string `content`": config_json(
        FIRST, {0: ("a", True), 1: ("b", 1)}
    ),
    f"control tokens must have different names (got 'a' for {FIRST} and {FIRST + 9})": config_json(
        FIRST, {0: ("a", True), 9: ("a", True)}
    ),
    "eos_token must be the name of a control token (got '[EOS]')": config_json(FIRST, {}),
}


@pytest.mark.parametrize("message", BAD_CONFIGS)
def test_malformed_tokenizer_config_is_named(tmp_path, message):
    folder = write_tiktoken_folder(tmp_path)
    path = folder / "tokenizer_config.json"
    path.write_text(BAD_CONFIGS[message])
    with pytest.raises(TokenizerError) as caught:
        load_tokenizer(folder)
    assert str(caught.value).startswith(f"{path}: {message}")


def test_a_folder_without_tokenizer_is_named(tmp_path):
    with pytest.raises(
        TokenizerError, match=r"must hold tiktoken\.model or tokenizer\.json"
    ) as caught:
        load_tokenizer(tmp_path)
    assert str(tmp_path) in str(caught.value)


def test_a_missing_tokenizer_config_is_named(tmp_path):
    folder = write_tiktoken_folder(tmp_path)
    (folder / "tokenizer_config.json").unlink()
    with pytest.raises(TokenizerError, match=r"tokenizer_config\.json: must be a readable file"):
        load_tokenizer(folder)


def test_a_file_over_the_size_limit_is_refused(tmp_path, monkeypatch):
    folder = write_tiktoken_folder(tmp_path)
    monkeypatch.setattr(tokenizer_formats, "MAX_FILE_BYTES", 1000)
    with pytest.raises(TokenizerError, match=r"tiktoken\.model: must have at most 1000 bytes"):
        load_tokenizer(folder)


@pytest.mark.parametrize("lost", [1, 27])
def test_a_vocabulary_cut_at_a_line_is_refused(tmp_path, lost):
    folder = write_tiktoken_folder(tmp_path)
    file = folder / "tiktoken.model"
    file.write_text("".join(file.read_text().splitlines(keepends=True)[:-lost]))
    message = rf"tiktoken\.model: must hold {FIRST} ranks, .* \(got {FIRST - lost}\)"
    with pytest.raises(TokenizerError, match=message):
        load_tokenizer(folder, vocab_size=FIRST + 256)


def test_slots_follow_the_vocab_size_of_the_config(tmp_path):
    folder = write_tiktoken_folder(tmp_path, slots={0: ("[EOS]", True), 2: ("<think>", False)})
    tokenizer = load_tokenizer(folder, vocab_size=FIRST + 3)
    assert tokenizer.vocab_size == FIRST + 3
    assert tokenizer.control_ids == {
        "[EOS]": FIRST,
        f"<|reserved_token_{FIRST + 1}|>": FIRST + 1,
        "<think>": FIRST + 2,
    }
    assert tokenizer.eos_ids == (FIRST,)
    for vocab_size in (FIRST - 1, FIRST + 65537):
        with pytest.raises(TokenizerError, match="vocab_size minus the number of ranks must be"):
            load_tokenizer(folder, vocab_size=vocab_size)


# ---- tokenizer.json ------------------------------------------------------------------------------------------------


def byte_level_json(**changes):
    """A byte-level BPE with role markers flagged and unflagged, one of them reachable as a whole word."""
    tokenizers = pytest.importorskip("tokenizers")
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    vocab = {c: i for i, c in enumerate(alphabet)}
    merges = [("t", "h"), ("th", "e"), ("Ġ", "the"), ("Ġ", "Ġ"), ("Ã", "©")]
    for a, b in merges:
        vocab[a + b] = len(vocab)
    vocab["stop"] = len(vocab)  # also an added token: reachable because of ignore_merges
    names = ["<|end|>", "<|User|>", "<think>", "<｜tool｜>", "stop"]
    added = [
        {
            "id": vocab.get(name, len(vocab) + n),
            "content": name,
            "special": n == 0,
            "single_word": False,
            "lstrip": name == "<think>",
            "rstrip": False,
            "normalized": False,
        }
        for n, name in enumerate(names)
    ]
    split = {
        "type": "ByteLevel",
        "add_prefix_space": False,
        "trim_offsets": True,
        "use_regex": True,
    }
    spec = {
        "version": "1.0",
        "truncation": {
            "direction": "Right",
            "max_length": 3,
            "strategy": "LongestFirst",
            "stride": 0,
        },
        "padding": None,
        "added_tokens": added,
        "normalizer": None,
        "pre_tokenizer": split,
        "post_processor": split,
        "decoder": split,
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": True,
            "vocab": vocab,
            "merges": merges,
        },
    }
    return {**spec, **changes}


def json_folder(folder, spec, config=None):
    (folder / "tokenizer.json").write_text(json.dumps(spec))
    if config is not None:
        (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture
def json_tokenizer(tmp_path):
    return load_tokenizer(
        json_folder(tmp_path, byte_level_json(), {"eos_token": {"content": "<|end|>"}})
    )


def test_json_encode_never_gives_a_control_id(json_tokenizer):
    names = list(json_tokenizer.control_ids)
    assert set(names) == {"<|end|>", "<|User|>", "<think>", "stop", "<｜tool｜>"}
    control = set(json_tokenizer.control_ids.values())
    rng = random.Random(10)
    for _ in range(1000):
        text = "".join(rng.choice([rng.choice(names), random_text(rng, 6)]) for _ in range(5))
        ids = json_tokenizer.encode(text)
        assert not control.intersection(ids), text
        assert json_tokenizer.decode(ids) == text


def test_json_encode_equals_the_library_on_text_without_control_names(json_tokenizer, tmp_path):
    import tokenizers

    library = tokenizers.Tokenizer.from_str(json.dumps(byte_level_json(truncation=None)))
    rng = random.Random(11)
    for _ in range(500):
        text = random_text(rng)
        expected = library.encode(text, add_special_tokens=False).ids
        assert json_tokenizer.encode(text) == expected
        assert json_tokenizer.encode_with_control(text) == expected


def test_json_encode_with_control_recognises_added_tokens(json_tokenizer):
    control = json_tokenizer.control_ids
    ids = json_tokenizer.encode_with_control("the<|User|>the<think>stop")
    assert ids == [
        *json_tokenizer.encode("the"),
        control["<|User|>"],
        *json_tokenizer.encode("the"),
        control["<think>"],
        control["stop"],
    ]


def test_json_decode_equals_the_library(json_tokenizer):
    import tokenizers

    library = tokenizers.Tokenizer.from_str(json.dumps(byte_level_json()))
    rng = random.Random(12)
    for _ in range(500):
        ids = rng.choices(range(json_tokenizer.vocab_size), k=rng.randint(0, 12))
        assert json_tokenizer.decode(ids) == library.decode(ids, skip_special_tokens=False)
        expected = library.decode(ids, skip_special_tokens=True)
        assert json_tokenizer.decode(ids, skip_control=True) == expected


def test_json_eos_comes_from_tokenizer_config(json_tokenizer, tmp_path):
    assert json_tokenizer.eos_ids == (json_tokenizer.control_ids["<|end|>"],)
    (tmp_path / "tokenizer_config.json").unlink()
    assert load_tokenizer(tmp_path).eos_ids == ()


def test_json_without_the_library_names_the_extra(tmp_path, monkeypatch):
    folder = json_folder(tmp_path, byte_level_json())
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with pytest.raises(TokenizerError, match=r"pip install kimi-native\[tokenizers\]"):
        load_tokenizer(folder)


def bad_json_specs():
    good = byte_level_json()
    added, vocab = good["added_tokens"], good["model"]["vocab"]
    yield "model and decoder must be BPE and ByteLevel", {**good, "decoder": None}
    yield "model and decoder must be BPE and ByteLevel", {**good, "model": {"type": "Unigram"}}
    yield "model.vocab must be an object", {**good, "model": {**good["model"], "vocab": []}}
    yield "must be an integer in", {**good, "model": {**good["model"], "vocab": {"a": -1}}}
    yield "must be an integer in", {**good, "model": {**good["model"], "vocab": {"a": 10**12}}}
    yield "must be an integer in", {**good, "added_tokens": [{**added[0], "id": True}]}
    yield "added_tokens must be an array", {**good, "added_tokens": {"a": 1}}
    yield "must have a non-empty string `content`", {**good, "added_tokens": [7]}
    yield "an added token must occur once", {**good, "added_tokens": [added[0], added[0]]}
    yield "an id must name one token", {**good, "added_tokens": [{**added[0], "id": vocab["the"]}]}
    yield (
        "must be numbered as the tokenizers library",
        {
            **good,
            "added_tokens": [{**added[0], "id": 5000}],
        },
    )
    yield "must have one id", {**good, "added_tokens": [{**added[4], "id": 5000}]}
    yield (
        "must be a tokenizer the tokenizers library reads",
        {**good, "model": {**good["model"], "merges": [["q", "nothing"]]}},
    )
    yield (
        "must be a tokenizer the tokenizers library reads",  # a merge that makes a control token
        {**good, "model": {**good["model"], "merges": [["sto", "p"]]}},
    )


def test_json_malformed_files_are_named(tmp_path):
    for message, spec in bad_json_specs():
        with pytest.raises(TokenizerError) as caught:
            load_tokenizer(json_folder(tmp_path, spec))
        assert message in str(caught.value)
        assert str(tmp_path / "tokenizer.json") in str(caught.value)
    with pytest.raises(TokenizerError, match="ids must be below"):
        load_tokenizer(json_folder(tmp_path, byte_level_json()), vocab_size=100)
