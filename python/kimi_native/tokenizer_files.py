"""A small real tokenizer in the family's file format, for random checkpoints.

256 bytes, then merges learned from the text below, then Han: characters (with the two-byte prefix that leads to them)
and pairs of characters, as many as the vocabulary needs. No learned token holds a byte above 0x7F and no token starts
inside a character, so every token is reached by merging, and every whole one but a prefix is readable text.
"""

from __future__ import annotations

import base64
import functools
import itertools
import json
from collections.abc import Iterator, Sequence

from kimi_native.byte_pairs import BYTE_TOKENS, count_pieces, learned_tokens
from kimi_native.errors import ConfigError
from kimi_native.presets import RESERVED_SLOTS

# Control tokens: (offset from the first reserved slot, content, special).
SLOTS = (
    (0, "[BOS]", True),
    (1, "[EOS]", True),
    (2, "<|im_end|>", True),
    (3, "<|im_user|>", True),
    (4, "<|im_assistant|>", True),
    (6, "<|start_header_id|>", True),
    (7, "<|end_header_id|>", True),
    (9, "[EOT]", True),
    (10, "<|im_system|>", True),
    (11, "<|tool_calls_section_begin|>", False),
    (12, "<|tool_calls_section_end|>", False),
    (13, "<|tool_call_begin|>", False),
    (14, "<|tool_call_argument_begin|>", False),
    (15, "<|tool_call_end|>", False),
    (17, "<|im_middle|>", True),
    (22, "<think>", False),
    (23, "</think>", False),
    (254, "[UNK]", True),
    (255, "[PAD]", True),
)

_TEXT = """\
A mixture of experts keeps many small networks in every layer and asks only a few of them for each token. A router reads
the hidden state, gives every expert a score, and the best eight answer. The others cost nothing, so a model can know a
great deal and still think quickly. What they said is added up, each in proportion to its weight, and the next layer
begins.

The weights of the experts are stored as integers of four bits. Thirty two of them share one scale, and a number is the
integer times the scale. Because the model was trained with this rounding in place, it does not mind. Reading a token's
worth of weights from memory is what takes the time, not the arithmetic, and therefore fewer bits mean more tokens in a
second.

Attention looks back at everything that was read before. Instead of keeping a key and a value for every head, the model
keeps one short vector, the latent, and unfolds it when it is needed. Positions are turned into angles: near tokens
differ by a fast rotation, far tokens by a slow one. With a longer context the slow angles are stretched, and the fast
ones stay as they were.

"Should I take an umbrella tomorrow?" she asked. "I don't know yet," he said, "but I'll look it up." First he thought
about the question, then he called a tool, looked at the result, and thought again. It's raining in Paris, it was 12.5
degrees at 9:30, and it won't stop before 18:00. So the answer was: yes, you should. They've been doing this for hours,
and we're not done; I'm sure you'd do the same.

You are a helpful assistant. The user writes a message, the system sets the rules, the assistant answers, and a tool
returns what it found. Please write a short story about the sea. Tell me how this works, step by step. What is the
capital of France? Who was there first, and why? Where do we go from here? Hello, world! Thank you very much. Good
morning, how are you today? Once upon a time there was a small house by the river, and an old man lived there with his
dog.

## Return of functions.get_weather:0
{"type": "function", "function": {"name": "get_weather", "description": "Get weather information for a city.",
"parameters": {"type": "object", "properties": {"city": {"type": "string", "description": "City name"}, "unit":
{"type": "string", "enum": ["celsius", "fahrenheit"]}}, "required": ["city"]}}}
{"city": "Beijing", "temperature": 21, "conditions": "sunny", "ok": true, "error": null}

def expert(x, gate, up, down):
    return down @ (silu(gate @ x) * (up @ x))


def route(scores, topk):
    order = sorted(range(len(scores)), key=lambda i: -scores[i])
    return order[:topk]


for i in range(10):
    if i % 2 == 0:
        print(i, i * i)
    else:
        continue

import numpy as np

class Model:
    def __init__(self, size: int = 256) -> None:
        self.size = size
        self.layers = []

    def forward(self, x):
        for layer in self.layers:
            x = x + layer(x)
        return x

1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 16, 20, 24, 32, 64, 100, 128, 256, 512, 1000, 1024, 2024, 2025, 2026, 4096.
3 + 4 = 7, 17 * 23 = 391, 100 - 42 = 58, 144 / 12 = 12. a = b + c; x == y; n != 0; p <= q && r >= s || !t.
"""


def tokenizer_files(vocab_size: int) -> dict[str, bytes]:
    """File name -> content: tiktoken.model with vocab_size - 256 ranks, and tokenizer_config.json.

    Raises ConfigError if the vocabulary is too small for the bytes or larger than the tokens this generator has.
    """
    return files_of(ranked_tokens(vocab_size - RESERVED_SLOTS))


def files_of(tokens: Sequence[bytes]) -> dict[str, bytes]:
    """File name -> content for the tokens by rank; the control tokens come after them."""
    lines = b"".join(b"%s %d\n" % (base64.b64encode(t), rank) for rank, t in enumerate(tokens))
    config = json.dumps(_tokenizer_config(len(tokens)), indent=2, ensure_ascii=False) + "\n"
    return {"tiktoken.model": lines, "tokenizer_config.json": config.encode()}


def _tokenizer_config(first_slot: int) -> dict:
    plain = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False}
    markers = [content for offset, content, special in SLOTS if special and 2 <= offset < 254]
    return {
        "added_tokens_decoder": {
            str(first_slot + offset): {"content": content, **plain, "special": special}
            for offset, content, special in SLOTS
        },
        "additional_special_tokens": markers,
        "bos_token": "[BOS]",
        "clean_up_tokenization_spaces": False,
        "eos_token": "[EOS]",
        "extra_special_tokens": {},
        "pad_token": "[PAD]",
        "tokenizer_class": "TikTokenTokenizer",
        "unk_token": "[UNK]",
    }


def ranked_tokens(count: int) -> list[bytes]:
    """The first `count` tokens by rank, all different. Raises ConfigError outside what this generator has."""
    if count < 256:
        raise ConfigError(f"tokenizer: 256 bytes need as many ranks (got {count})")
    endless = itertools.chain(BYTE_TOKENS, _text_tokens(), _han_tokens())
    tokens = list(itertools.islice(endless, count))
    if len(tokens) < count:
        raise ConfigError(f"tokenizer: at most {len(tokens)} ranks can be made (got {count})")
    return tokens


@functools.lru_cache(maxsize=1)
def _text_tokens() -> tuple[bytes, ...]:
    return learned_tokens(count_pieces(_TEXT))


# ---- Han -------------------------------------------------------------------------------------------------------------

_HAN = range(0x4E00, 0xA000)  # three bytes each: E4 B8 80 .. E9 BF BF
_PAIRED = 1000  # characters that also occur in pairs: a million tokens, ample for any vocabulary


def _han_tokens() -> Iterator[bytes]:
    """Each two-byte prefix followed by its 64 characters; then pairs of characters."""
    for code in _HAN:
        character = chr(code).encode()
        if code % 64 == 0:
            yield character[:2]
        yield character
    for a, b in itertools.product(_HAN[:_PAIRED], repeat=2):
        yield (chr(a) + chr(b)).encode()
