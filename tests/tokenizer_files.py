"""Tokenizer folders for tests: the published one, if it is there, and small ones written on the spot."""

from __future__ import annotations

import base64
import json
import os
import random
from pathlib import Path

import pytest

from kimi_native.tokenizer import Tokenizer, load_tokenizer

# offset from the first slot: name, flagged special
KIMI_SLOTS = {
    0: ("[BOS]", True),
    1: ("[EOS]", True),
    2: ("<|im_end|>", True),
    3: ("<|im_user|>", True),
    4: ("<|im_assistant|>", True),
    10: ("<|im_system|>", True),
    11: ("<|tool_calls_section_begin|>", False),
    12: ("<|tool_calls_section_end|>", False),
    13: ("<|tool_call_begin|>", False),
    14: ("<|tool_call_argument_begin|>", False),
    15: ("<|tool_call_end|>", False),
    17: ("<|im_middle|>", True),
    22: ("<think>", False),
    23: ("</think>", False),
    254: ("[UNK]", True),
    255: ("[PAD]", True),
}
SLOTS_WITHOUT_THINK = {k: v for k, v in KIMI_SLOTS.items() if "think" not in v[0]}

BYTES = [bytes([b]) for b in range(256)]
WORDS = [
    *(b"th", b"he", b"in", b"er", b"an", b"the", b" t", b" a", b"  ", b"    ", b"00", b"\n\n"),
    *(b"ing", b"func", b"tions", b"functions", b" the", b"|>", b"<|", b'": ', b'{"', b'"}'),
    *(b"\xe6\x9c", b"\xe6\x9c\x88", b"\xf0\x9f", b"\xf0\x9f\x99\x82", b"\xc3\xa9"),
]


def published_folder() -> Path:
    """The published Kimi K2 tokenizer; skips the test, by name, where it is missing."""
    default = Path(__file__).resolve().parent.parent.parent / "shared" / "data"
    folder = Path(os.environ.get("KIMI_NATIVE_TEST_DATA", default)) / "kimi-k2-tokenizer"
    if not (folder / "tiktoken.model").exists():
        pytest.skip(f"{folder / 'tiktoken.model'} is missing (set KIMI_NATIVE_TEST_DATA)")
    return folder


def ranks_text(tokens: list[bytes]) -> str:
    return "".join(f"{base64.b64encode(t).decode()} {rank}\n" for rank, t in enumerate(tokens))


def config_json(first: int, slots: dict[int, tuple[str, bool]]) -> str:
    listed = {
        str(first + k): {"content": name, "special": special}
        for k, (name, special) in slots.items()
    }
    return json.dumps({"added_tokens_decoder": listed, "eos_token": "[EOS]"})


def write_tiktoken_folder(
    folder: Path, slots: dict[int, tuple[str, bool]] = KIMI_SLOTS, tokens: list[bytes] | None = None
) -> Path:
    """A small tiktoken.model: the 256 bytes, a few words, and the family's slots after them."""
    tokens = BYTES + WORDS if tokens is None else tokens
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "tiktoken.model").write_text(ranks_text(tokens))
    (folder / "tokenizer_config.json").write_text(config_json(len(tokens), slots))
    return folder


def small_tokenizer(folder: Path, slots: dict[int, tuple[str, bool]] = KIMI_SLOTS) -> Tokenizer:
    return load_tokenizer(write_tiktoken_folder(folder, slots))


ALPHABETS = [
    "abcdefghij XYZ'’sStTlLdD",
    "0123456789.,:;!?()[]{}\"'-_/\\<>|@#$%^&*+=~`",
    " \t\r\n\u00a0\u2003\u3000\u1680",
    "月之暗面日本語漢字々〇〻〆カタカナひらがなー한국어ㄅ",
    "éïüÑßǅʰªº\u0301\u0308ñ",
    "🙂🚀👨‍👩‍👧🏽\U00020000\u0600\u200d\ufeff\u0000",
    "абвгдאבגדابجدกขคदेवना",
]


def random_text(rng: random.Random, longest: int = 40) -> str:
    pieces = []
    while sum(map(len, pieces)) < longest and rng.random() < 0.85:
        pieces.append("".join(rng.choices(rng.choice(ALPHABETS), k=rng.randint(1, 8))))
    return "".join(pieces)
