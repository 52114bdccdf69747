"""The vocabulary of kimi-nano: byte pairs learned from its own conversations, in the family's file format.

256 bytes, 515 merges and the labels of steps, then the family's 256 slots for control tokens. No merge joins digits: a
number is read and written digit by digit, so that copying and checking the last digit look alike for every number.
"""

from __future__ import annotations

import collections
import re
from pathlib import Path

from kimi_native.byte_pairs import BYTE_TOKENS, count_pieces, learned_tokens
from kimi_native.chat.template import render_text
from kimi_native.folder_names import NANO_FOLDER
from kimi_native.nano.conversations import Recipe, make_conversation
from kimi_native.nano.dice import Dice
from kimi_native.nano.problems import LABELS
from kimi_native.nano.small_talk import WORDINGS
from kimi_native.tokenizer import Tokenizer, load_tokenizer
from kimi_native.tokenizer_files import SLOTS, files_of

NUM_MERGES = 515
NUM_CONVERSATIONS = 1500

_CONTROL = re.compile("|".join(re.escape(name) for _, name, _ in SLOTS))
_OTHER = (  # what users may write besides
    "1, 2, 3, 4, 5. What is 17 * 23? 12 + 30 - 5 = 37. (yes) [no] {ok} x = y; a/b 50 % "
    "\"quoted\" it's don't I'm you're: see, then. \n\n  - one\n  - two\n"
)


def vocabulary_files() -> dict[str, bytes]:
    """tiktoken.model and tokenizer_config.json, made anew; the same bytes on every machine."""
    learned = learned_tokens(_pieces(), NUM_MERGES)
    labels = [label.encode() for label in LABELS if label.encode() not in learned]
    return files_of([*BYTE_TOKENS, *learned, *labels])


def _pieces() -> collections.Counter[str]:
    """Pieces of the corpus that may be merged: of the conversations, the small talk, and a little else."""
    # Pieces as they were when the vocabulary was made: longer ones say nothing new, but would rank it differently.
    recipe = Recipe(drills=0, windows=0.3, window_calls=(2, 36))
    texts = [_OTHER] * 20
    for index in range(NUM_CONVERSATIONS):
        conversation = make_conversation(Dice("vocabulary", index), "train", recipe)
        texts += _CONTROL.split(
            render_text(
                conversation.messages,
                format="k2-thinking",
                tools=conversation.tools,
                add_generation_prompt=False,
                keep_thinking="all",
            )
        )
    texts += [wording for wordings in WORDINGS.values() for wording in wordings]
    counts: collections.Counter[str] = collections.Counter()
    for text in texts:
        counts.update(count_pieces(text))
    return collections.Counter(
        {p: n for p, n in counts.items() if not p[0].isdigit() and p not in LABELS}
    )


def nano_tokenizer() -> Tokenizer:
    """kimi-nano's tokenizer, from the package. Raises TokenizerError if its files are missing."""
    return load_tokenizer(NANO_FOLDER)


def write_vocabulary(folder: Path = NANO_FOLDER) -> None:
    """Writes vocabulary_files into the folder, which is made if it is missing."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in vocabulary_files().items():
        (folder / name).write_bytes(content)
