"""tokenizer_files: a rank file that tiktoken reads and byte-pair merging reaches, control tokens as published."""

from __future__ import annotations

import base64
import itertools
import json

import pytest

from kimi_native import tokenizer_files
from kimi_native.errors import ConfigError
from made_checkpoints import make_tiny_folders
from tokenizer_files import KIMI_SLOTS


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    return make_tiny_folders(tmp_path_factory.mktemp("tiny"))


# The family's pattern, in its own spelling.
PATTERN = "|".join(
    [
        r"[\p{Han}]+",
        r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]*"
        r"[\p{Ll}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?",
        r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]+"
        r"[\p{Ll}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?",
        r"\p{N}{1,3}",
        r" ?[^\s\p{L}\p{N}]+[\r\n]*",
        r"\s*[\r\n]+",
        r"\s+(?!\S)",
        r"\s+",
    ]
)


def load_encoding(path):
    """tiktoken's Encoding of a folder, with its control tokens."""
    tiktoken = pytest.importorskip("tiktoken", reason="tiktoken is not installed")
    from tiktoken.load import load_tiktoken_bpe

    ranks = load_tiktoken_bpe(str(path / "tiktoken.model"))
    added = json.loads((path / "tokenizer_config.json").read_text())["added_tokens_decoder"]
    special = {entry["content"]: int(i) for i, entry in added.items()}
    return tiktoken.Encoding(
        "made", pat_str=PATTERN, mergeable_ranks=ranks, special_tokens=special
    ), ranks


TEXTS = [
    "",
    "Hello, world! I'll say it once: they've WON'T'd it.",
    "def f(x):\n    return x**2\n\n\n  # done\r\n",
    "1234567 and 3.14159",
    "月之暗面 一丁丂 你好，世界",
    "naïve café 🙂🚀 한국어 日本語テキスト",
    "\x00\x01\x7f \t \u3000\u00a0",
]


@pytest.mark.parametrize("text", TEXTS)
def test_tiktoken_round_trips_text(folders, text):
    encoding, _ = load_encoding(folders["int4"])
    ids = encoding.encode(text)
    assert encoding.decode_bytes(ids) == text.encode()


def test_tokenizer_compresses_text(folders):
    encoding, _ = load_encoding(folders["int4"])
    text = (
        "A router gives every expert a score, and the best eight answer.\n    return x + layer(x)\n"
    )
    assert len(encoding.encode(text)) < len(text) / 3


@pytest.mark.parametrize("vocab", [512, 1024, 2048, 32768, 163840])
def test_rank_file_has_one_line_per_plain_id(vocab):
    lines = tokenizer_files.tokenizer_files(vocab)["tiktoken.model"].decode().splitlines()
    assert len(lines) == vocab - 256
    tokens = [base64.b64decode(line.split()[0], validate=True) for line in lines]
    assert [int(line.split()[1]) for line in lines] == list(range(vocab - 256))
    assert len(set(tokens)) == len(tokens)
    assert {bytes([b]) for b in range(256)} == set(tokens[:256])
    assert max(map(len, tokens)) <= 32


def naive_merge(token: bytes, ranks: dict[bytes, int], below: int) -> list[bytes]:
    """Byte-pair merging of `token` with the ranks before `below` only, lowest rank first."""
    parts = [bytes([b]) for b in token]
    while True:
        best = min(
            (ranks.get(a + b, below), i) for i, (a, b) in enumerate(itertools.pairwise(parts))
        )
        if best[0] >= below:
            return parts
        parts[best[1] : best[1] + 2] = [parts[best[1]] + parts[best[1] + 1]]


def test_every_token_is_the_merge_of_two_earlier_ones():
    tokens = tokenizer_files.ranked_tokens(163840 - 256)
    ranks = {token: rank for rank, token in enumerate(tokens)}
    sample = [*range(256, 6000), *range(6000, len(tokens), 97)]
    for rank in sample:
        assert len(naive_merge(tokens[rank], ranks, rank)) == 2, tokens[rank]


def test_control_tokens_keep_the_published_offsets(folders):
    config = json.loads((folders["int4"] / "tokenizer_config.json").read_text())
    added = {int(i) - 1792: e for i, e in config["added_tokens_decoder"].items()}
    assert {o: (added[o]["content"], added[o]["special"]) for o in KIMI_SLOTS} == KIMI_SLOTS
    assert len({e["content"] for e in added.values()}) == len(added)
    generation = json.loads((folders["int4"] / "generation_config.json").read_text())
    assert generation["bos_token_id"] == 1792
    assert generation["eos_token_id"] == 1794
    encoding, _ = load_encoding(folders["int4"])
    assert encoding.encode("<|im_end|>", allowed_special="all") == [1794]
    assert len(encoding.encode("<|im_end|>", disallowed_special=())) > 1


def test_tokenizer_refuses_vocabularies_it_cannot_fill():
    with pytest.raises(ConfigError, match=r"256 bytes need as many ranks \(got 255\)"):
        tokenizer_files.ranked_tokens(255)
    with pytest.raises(ConfigError, match=r"at most \d+ ranks can be made \(got 2000000\)"):
        tokenizer_files.ranked_tokens(2_000_000)
