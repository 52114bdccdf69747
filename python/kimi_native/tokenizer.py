"""Text to token ids and back, from the files of the checkpoint: `tiktoken.model`, or a byte-level `tokenizer.json`.

The two directions of trust are two methods. `encode` takes anybody's text and can never give a control id, whatever the
text spells; `encode_with_control` recognises every control string and is for trusted templates alone. No code of the
checkpoint runs, nothing is fetched.

Sources: the tokenizer files of the Kimi K2 family (pattern, slots, slicing); tiktoken and tokenizers do the merging.
"""

from __future__ import annotations

import codecs
import operator
import re
from bisect import bisect_left
from collections.abc import Iterable
from itertools import groupby, pairwise
from pathlib import Path

from kimi_native.errors import TokenizerError
from kimi_native.model_file import find_file
from kimi_native.tokenizer_formats import TokenizerData, check_text, read_json, read_tiktoken

# The published tokenizer cuts its input at these lengths before it splits words; a cut can change the ids around it.
SLICE_CHARS = 400_000
RUN_CHARS = 25_000
_RUN = re.compile(r"\s+|\S+")


class Tokenizer:
    """Ids of a text and text of ids; made by load_tokenizer.

    vocab_size   one more than the largest id
    control_ids  dict name -> id of every control token, reserved ones included
    special_ids  the control ids that `decode(skip_control=True)` drops: those flagged special in the checkpoint. The
                 markers of reasoning and tool calls are control ids but not special, as published.
    eos_ids      ids that end a generation, as far as the tokenizer's files name them
    """

    def __init__(self, data: TokenizerData) -> None:
        self._model = data.model
        self._token_bytes = data.token_bytes
        self._slices = data.slices
        self.vocab_size = len(data.token_bytes)
        self.control_ids = data.control_ids
        self.special_ids = data.special_ids
        self.eos_ids = data.eos_ids

    @property
    def token_bytes(self) -> list[bytes]:
        """Bytes of every id; control ids give their names, ids without a token nothing."""
        return [b"" if token is None else token for token in self._token_bytes]

    def encode(self, text: str) -> list[int]:
        """Ids of ordinary text: never a control id, whatever the text spells.

        Raises TypeError if text is not a str, TokenizerError if it holds a lone surrogate.
        """
        check_text(text)
        return self.encode_parts([text])

    def encode_parts(self, parts: Iterable[str | int]) -> list[int]:
        """Ids of a prompt made of ordinary text (str) and ready control ids (int).

        Neighbouring texts are joined first. Texts longer than the slicing lengths are cut where the published tokenizer
        cuts the whole prompt, the names of the control tokens counted in; a cut that would fall inside such a name is
        left out.
        """
        merged: list[str | int] = []
        for is_text, group in groupby(parts, key=lambda part: isinstance(part, str)):
            if is_text:
                merged.append("".join(group))
                check_text(merged[-1])
            else:
                merged += [self._check_id(token_id) for token_id in group]
        ids: list[int] = []
        for piece in self._sliced(merged):
            if isinstance(piece, str):
                ids += self._model.encode_ordinary(piece)
            else:
                ids.append(piece)
        return ids

    def encode_with_control(self, text: str) -> list[int]:
        """Ids of trusted template text: every control string in it becomes its control id.

        Raises TypeError if text is not a str, TokenizerError if it holds a lone surrogate.
        """
        check_text(text)
        ids: list[int] = []
        for piece in self._sliced([text]):
            ids += self._model.encode_with_control(piece)
        return ids

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        """The ids' bytes, one after the other; control ids give their names. Raises TokenizerError on an unknown id."""
        return b"".join([self._token_bytes[self._check_id(i)] for i in ids])

    def decode(self, ids: Iterable[int], *, skip_control: bool = False) -> str:
        """Text of the ids; bytes that are not UTF-8 become U+FFFD. skip_control drops the ids in `special_ids`.

        Raises TokenizerError on an unknown id.
        """
        if skip_control:
            ids = [i for i in map(operator.index, ids) if i not in self.special_ids]
        return self.decode_bytes(ids).decode("utf-8", errors="replace")

    def stream(self, *, skip_control: bool = False) -> StreamDecoder:
        """A decoder that takes one id at a time; its output joined is `decode` of the same ids."""
        return StreamDecoder(self, skip_control=skip_control)

    def _check_id(self, token_id: int) -> int:
        index = operator.index(token_id)
        if not 0 <= index < self.vocab_size or self._token_bytes[index] is None:
            raise TokenizerError(
                f"tokenizer: id must name a token of this vocabulary (got {index}, vocab_size={self.vocab_size})"
            )
        return index

    def _sliced(self, parts: list[str | int]) -> Iterable[str | int]:
        """The parts, with texts cut where the published tokenizer cuts the prompt as a whole."""
        whole = "".join([p if isinstance(p, str) else self.decode([p]) for p in parts])
        if not self._slices or len(whole) <= RUN_CHARS:
            yield from parts
            return
        cuts = slice_starts(whole)
        start = 0
        for part in parts:
            if not isinstance(part, str):
                yield part
                start += len(self.decode([part]))
                continue
            end = start + len(part)
            inner = cuts[bisect_left(cuts, start + 1) : bisect_left(cuts, end)]
            for a, b in pairwise([start, *inner, end]):
                yield whole[a:b]
            start = end


class StreamDecoder:
    """Text of ids that arrive one by one; at most three bytes of an unfinished character are held back."""

    def __init__(self, tokenizer: Tokenizer, *, skip_control: bool = False) -> None:
        self._tokenizer = tokenizer
        self._skipped = tokenizer.special_ids if skip_control else frozenset()
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def push(self, token_id: int) -> str:
        """The text that this id completes, often empty. Raises TokenizerError on an unknown id."""
        if operator.index(token_id) in self._skipped:
            return ""
        return self._decoder.decode(self._tokenizer.decode_bytes([token_id]))

    def flush(self) -> str:
        """What was held back, as U+FFFD; the decoder starts anew."""
        text = self._decoder.decode(b"", final=True)
        self._decoder.reset()
        return text

    @property
    def held_bytes(self) -> bytes:
        """Bytes of the unfinished character."""
        return self._decoder.getstate()[0]


def slice_starts(text: str) -> list[int]:
    """Positions where the published tokenizer starts a new slice of text: every SLICE_CHARS characters, and within
    such a slice every RUN_CHARS characters of a run of whitespace, or of non-whitespace."""
    starts: list[int] = []
    for start in range(0, len(text), SLICE_CHARS):
        starts.append(start)
        for run in _RUN.finditer(text, start, min(start + SLICE_CHARS, len(text))):
            starts.extend(range(run.start() + RUN_CHARS, run.end(), RUN_CHARS))
    return starts


def load_tokenizer(path: str | Path, *, vocab_size: int | None = None) -> Tokenizer:
    """The tokenizer of a checkpoint folder.

    path        folder with tiktoken.model and tokenizer_config.json, or with a byte-level tokenizer.json
    vocab_size  config.json's, if known: the ids from the number of ranks up to it are slots (default 256 of them)

    Raises TokenizerError naming the file, and the line where there is one.
    """
    folder = Path(path)
    if find_file(folder, "tiktoken.model", TokenizerError):
        return Tokenizer(read_tiktoken(folder, vocab_size))
    if find_file(folder, "tokenizer.json", TokenizerError):
        return Tokenizer(read_json(folder, vocab_size))
    raise TokenizerError(
        f"tokenizer: {folder} must hold tiktoken.model or tokenizer.json (got neither)"
    )
