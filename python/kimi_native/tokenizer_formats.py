"""The tokenizer files of a checkpoint, read and checked: `tiktoken.model`, or a byte-level `tokenizer.json`.

Whatever is wrong with a file is a TokenizerError that names it, and the line where there is one. Sizes are capped
before anything is read. tiktoken and tokenizers do the merging; no code of the checkpoint runs.
"""

from __future__ import annotations

import base64
import binascii
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import tiktoken

from kimi_native.errors import TokenizerError
from kimi_native.model_file import file_inside, find_file

# The alternatives of the splitting pattern, first match wins; `&&` intersects classes.
_SUFFIX = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
_UPPER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]"
_LOWER = r"[\p{Ll}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]"
PATTERN = "|".join(
    [
        r"[\p{Han}]+",
        rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+{_SUFFIX}",
        rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*{_SUFFIX}",
        r"\p{N}{1,3}",
        r" ?[^\s\p{L}\p{N}]+[\r\n]*",
        r"\s*[\r\n]+",
        r"\s+(?!\S)",
        r"\s+",
    ]
)

DEFAULT_SLOTS = 256  # reserved ids after the ranks: control tokens by name, the rest unused
MAX_SLOTS = 65_536
MAX_FILE_BYTES = 64 << 20
MAX_TOKEN_BYTES = 1024  # the longest token of the published vocabulary has 256

# A chat turn ends with the first, a document with the second; config.json often names only one of them.
FAMILY_END_TOKENS = ("<|im_end|>", "[EOS]")


class TextModel(Protocol):
    """What the two file formats have in common: merging bytes into ids."""

    def encode_ordinary(self, text: str) -> list[int]: ...

    def encode_with_control(self, text: str) -> list[int]: ...


@dataclass(frozen=True)
class TokenizerData:
    """What a tokenizer is made of.

    model        merges text into ids
    token_bytes  id -> bytes, a control token's are its name; None where no token has that id
    control_ids  name -> id of every control token
    special_ids  those of them that are flagged special
    eos_ids      ids that end a generation, as far as the files name them
    slices       whether the published tokenizer cuts long texts before it splits words
    """

    model: TextModel
    token_bytes: Sequence[bytes | None]
    control_ids: dict[str, int]
    special_ids: frozenset[int]
    eos_ids: tuple[int, ...]
    slices: bool


# ---- tiktoken.model ------------------------------------------------------------------------------------------------


class _TiktokenModel:
    def __init__(self, ranks: dict[bytes, int], slots: dict[str, int]) -> None:
        self._encoding = tiktoken.Encoding(
            "kimi", pat_str=PATTERN, mergeable_ranks=ranks, special_tokens=slots
        )

    def encode_ordinary(self, text: str) -> list[int]:
        return self._encoding.encode_ordinary(text)

    def encode_with_control(self, text: str) -> list[int]:
        return self._encoding.encode(text, allowed_special="all")


def read_tiktoken(folder: Path, vocab_size: int | None) -> TokenizerData:
    """tiktoken.model with the slots of tokenizer_config.json after it. Raises TokenizerError."""
    ranks = read_ranks(folder / "tiktoken.model")
    config_file = folder / "tokenizer_config.json"
    config = _read_json_object(config_file)
    if vocab_size is None:
        vocab_size = len(ranks) + DEFAULT_SLOTS
    if not 0 <= vocab_size - len(ranks) <= MAX_SLOTS:
        raise TokenizerError(
            f"{folder / 'tiktoken.model'}: vocab_size minus the number of ranks must be 0 .. {MAX_SLOTS} "
            f"(got vocab_size={vocab_size}, {len(ranks)} ranks)"
        )
    slots, special_ids = _slot_table(config_file, config, len(ranks), vocab_size)
    _check_whole(folder / "tiktoken.model", ranks, config.get("added_tokens_decoder", {}))
    token_bytes: list[bytes | None] = [b""] * vocab_size
    for token, rank in ranks.items():
        token_bytes[rank] = token
    for name, slot in slots.items():
        token_bytes[slot] = name.encode()
    return TokenizerData(
        _TiktokenModel(ranks, slots),
        token_bytes,
        control_ids=slots,
        special_ids=special_ids,
        eos_ids=_eos_ids(config_file, config, slots),
        slices=True,
    )


def read_ranks(path: Path) -> dict[bytes, int]:
    """Token -> rank of a tiktoken.model file: one `base64(token) rank` a line, the ranks 0 .. lines - 1 in any order.

    Raises TokenizerError naming the file and the line.
    """
    ranks: dict[bytes, int] = {}
    line_of_rank: dict[int, int] = {}
    for number, line in enumerate(_read_file(path).splitlines(), start=1):
        if not line:
            continue
        token, rank = _rank_line(path, number, line)
        if token in ranks:
            raise TokenizerError(
                f"{path}: line {number}: a token must occur once (got {line.decode(errors='replace')!r}, "
                f"already on line {line_of_rank[ranks[token]]})"
            )
        if rank in line_of_rank:
            raise TokenizerError(
                f"{path}: line {number}: a rank must occur once (got {rank}, already on line {line_of_rank[rank]})"
            )
        ranks[token] = rank
        line_of_rank[rank] = number
    largest = max(line_of_rank, default=-1)
    if largest >= len(ranks):
        missing = next(r for r in range(largest) if r not in line_of_rank)
        raise TokenizerError(
            f"{path}: line {line_of_rank[largest]}: ranks must run from 0 to {len(ranks) - 1} without a gap "
            f"(got {largest}; {missing} is missing)"
        )
    bytes_missing = [b for b in range(256) if bytes([b]) not in ranks]
    if bytes_missing:
        raise TokenizerError(
            f"{path}: all 256 single bytes must be tokens (got {len(ranks)} ranks; "
            f"{len(bytes_missing)} bytes missing, first 0x{bytes_missing[0]:02x})"
        )
    return ranks


def _rank_line(path: Path, number: int, line: bytes) -> tuple[bytes, int]:
    shown = line[:80].decode(errors="replace")
    fields = line.split(b" ")
    if len(fields) != 2 or not fields[1].isdigit() or len(fields[1]) > 9:
        raise TokenizerError(f"{path}: line {number}: must be `base64(token) rank` (got {shown!r})")
    try:
        token = base64.b64decode(fields[0], validate=True)
    except binascii.Error as error:
        raise TokenizerError(
            f"{path}: line {number}: must start with valid base64 (got {shown!r}: {error})"
        ) from error
    if not 1 <= len(token) <= MAX_TOKEN_BYTES:
        raise TokenizerError(
            f"{path}: line {number}: a token must have 1 .. {MAX_TOKEN_BYTES} bytes (got {len(token)})"
        )
    return token, int(fields[1])


def _slot_table(
    path: Path, config: dict[str, Any], first: int, end: int
) -> tuple[dict[str, int], frozenset[int]]:
    """Names of the slots first .. end - 1 and which of them are flagged special."""
    listed = config.get("added_tokens_decoder", {})
    if not isinstance(listed, dict):
        raise TokenizerError(
            f"{path}: added_tokens_decoder must be an object (got {type(listed).__name__})"
        )
    names = {slot: f"<|reserved_token_{slot}|>" for slot in range(first, end)}
    special = set()
    for key, entry in listed.items():
        # int() would also take "+1", " 1" and other scripts' digits
        slot = int(key) if key.isascii() and key.isdigit() and len(key) <= 9 else -1
        if slot not in names:
            raise TokenizerError(
                f"{path}: added_tokens_decoder ids must be slots {first} .. {end - 1} (got {key!r})"
            )
        name, is_special = _added_token(path, key, entry)
        names[slot] = name
        if is_special:
            special.add(slot)
    slots: dict[str, int] = {}
    for slot, name in names.items():
        if name in slots:
            raise TokenizerError(
                f"{path}: control tokens must have different names (got {name!r} for {slots[name]} and {slot})"
            )
        slots[name] = slot
    return slots, frozenset(special)


def _check_whole(path: Path, ranks: dict[bytes, int], listed: dict[str, Any]) -> None:
    """A file cut at a line's end is well formed; that the first slot ([BOS]) has a name tells where its ranks end."""
    first = min(map(int, listed), default=len(ranks))
    if first != len(ranks):
        raise TokenizerError(
            f"{path}: must hold {first} ranks, one for each id before the first of tokenizer_config.json's "
            f"added_tokens_decoder (got {len(ranks)})"
        )


def _added_token(path: Path, key: str, entry: Any) -> tuple[str, bool]:
    name = entry.get("content") if isinstance(entry, dict) else None
    is_special = entry.get("special", False) if isinstance(entry, dict) else None
    if not isinstance(name, str) or not name or not isinstance(is_special, bool):
        raise TokenizerError(
            f"{path}: added token {key} must have a non-empty string `content` and a boolean `special` (got {entry!r})"
        )
    check_text(name, where=f"{path}: added token {key}")
    return name, is_special


# ---- tokenizer.json ------------------------------------------------------------------------------------------------


class _JsonModel:
    """Two tokenizers of one file: the whole, and one whose vocabulary has no control token in it at all."""

    def __init__(self, path: Path, spec: dict[str, Any], control: set[str]) -> None:
        # Either would silently change the ids of a prompt; neither belongs to the text -> ids mapping.
        spec = {**spec, "truncation": None, "padding": None}
        self._full = _tokenizers_object(path, spec)
        # The library matches added tokens before anything else and can only be told to leave out those flagged special,
        # so ordinary text goes through a copy without them.
        vocab = {token: i for token, i in spec["model"]["vocab"].items() if token not in control}
        model = {**spec["model"], "vocab": vocab}
        text_spec = {**spec, "added_tokens": [], "post_processor": None, "model": model}
        self._text = _tokenizers_object(path, text_spec)

    def encode_ordinary(self, text: str) -> list[int]:
        return self._text.encode(text, add_special_tokens=False).ids

    def encode_with_control(self, text: str) -> list[int]:
        return self._full.encode(text, add_special_tokens=False).ids

    def token_to_id(self, name: str) -> int | None:
        return self._full.token_to_id(name)


def _tokenizers_object(path: Path, spec: dict[str, Any]) -> Any:
    try:
        from tokenizers import Tokenizer as LibraryTokenizer
    except ImportError as error:
        raise TokenizerError(
            f"{path}: tokenizer.json needs the tokenizers library; pip install kimi-native[tokenizers] ({error})"
        ) from error
    try:
        return LibraryTokenizer.from_str(json.dumps(spec))
    except Exception as error:  # the library raises bare Exception for every malformed file
        raise TokenizerError(
            f"{path}: must be a tokenizer the tokenizers library reads ({error})"
        ) from error


def read_json(folder: Path, vocab_size: int | None) -> TokenizerData:
    """A byte-level tokenizer.json; tokenizer_config.json, if there, names the end token. Raises TokenizerError."""
    path = folder / "tokenizer.json"
    spec = _read_json_object(path)
    vocab = _json_vocab(path, spec)
    control, special_ids = _json_added_tokens(path, spec)
    _check_json_ids_differ(path, vocab, control)
    model = _JsonModel(path, spec, set(control))
    _check_library_ids(path, model, control)
    size = 1 + max([*vocab.values(), *control.values()], default=-1)
    if vocab_size is not None and vocab_size < size:
        raise TokenizerError(
            f"{path}: ids must be below config.json's vocab_size (got {size - 1}, vocab_size={vocab_size})"
        )
    token_bytes: list[bytes | None] = [None] * size
    for token, token_id in vocab.items():
        token_bytes[token_id] = _byte_level_bytes(token)
    for name, token_id in control.items():
        token_bytes[token_id] = name.encode()
    config_file = folder / "tokenizer_config.json"
    present = find_file(folder, config_file.name, TokenizerError) is not None
    config = _read_json_object(config_file) if present else {}
    return TokenizerData(
        model,
        token_bytes,
        control_ids=control,
        special_ids=special_ids,
        eos_ids=_eos_ids(config_file, config, control),
        slices=False,
    )


def _json_vocab(path: Path, spec: dict[str, Any]) -> dict[str, int]:
    model, decoder = spec.get("model"), spec.get("decoder")
    kinds = [part.get("type") if isinstance(part, dict) else None for part in (model, decoder)]
    if kinds != ["BPE", "ByteLevel"]:
        raise TokenizerError(
            f"{path}: model and decoder must be BPE and ByteLevel (got {kinds[0]} and {kinds[1]})"
        )
    vocab = model.get("vocab")
    if not isinstance(vocab, dict):
        raise TokenizerError(f"{path}: model.vocab must be an object (got {type(vocab).__name__})")
    for token, token_id in vocab.items():
        _check_json_id(path, token, token_id)
    return vocab


def _check_library_ids(path: Path, model: _JsonModel, control: dict[str, int]) -> None:
    """The library numbers added tokens by itself where the file leaves a gap; then the file's ids mean nothing."""
    for name, token_id in control.items():
        if model.token_to_id(name) != token_id:
            raise TokenizerError(
                f"{path}: added tokens must be numbered as the tokenizers library numbers them "
                f"(got {token_id} for {name!r}, library {model.token_to_id(name)})"
            )


def _json_added_tokens(path: Path, spec: dict[str, Any]) -> tuple[dict[str, int], frozenset[int]]:
    """Every added token is a control token: several families leave their role markers unflagged."""
    added = spec.get("added_tokens") or []
    if not isinstance(added, list):
        raise TokenizerError(f"{path}: added_tokens must be an array (got {type(added).__name__})")
    control: dict[str, int] = {}
    special = set()
    for entry in added:
        token_id = entry.get("id") if isinstance(entry, dict) else None
        name, is_special = _added_token(path, str(token_id), entry)
        if name in control:
            raise TokenizerError(f"{path}: an added token must occur once (got {name!r} twice)")
        control[name] = _check_json_id(path, name, token_id)
        if is_special:
            special.add(token_id)
    return control, frozenset(special)


def _check_json_ids_differ(path: Path, vocab: dict[str, int], control: dict[str, int]) -> None:
    """One id, one token; the file may list an added token in the vocabulary too, under the same id."""
    token_of_id: dict[int, str] = {}
    for token, token_id in [*vocab.items(), *control.items()]:
        if token_of_id.setdefault(token_id, token) != token:
            raise TokenizerError(
                f"{path}: an id must name one token (got {token_id} for {token_of_id[token_id]!r} and {token!r})"
            )
    for name, token_id in control.items():
        if vocab.get(name, token_id) != token_id:
            raise TokenizerError(
                f"{path}: {name!r} must have one id (got {vocab[name]} in the vocabulary, {token_id} among the added)"
            )


def _check_json_id(path: Path, token: str, token_id: Any) -> int:
    limit = MAX_FILE_BYTES // 8  # an entry takes at least eight bytes of the file
    if type(token_id) is not int or not 0 <= token_id < limit:
        raise TokenizerError(
            f"{path}: the id of {token!r} must be an integer in 0 .. {limit - 1} (got {token_id!r})"
        )
    return token_id


def _byte_level_alphabet() -> dict[str, int]:
    """Character -> byte of byte-level BPE (GPT-2): printable bytes stand for themselves, the others for U+0100 on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [b for b in range(256) if b not in printable]
    return {chr(b): b for b in printable} | {chr(0x100 + n): b for n, b in enumerate(others)}


_BYTE_OF_CHAR = _byte_level_alphabet()


def _byte_level_bytes(token: str) -> bytes:
    if all(c in _BYTE_OF_CHAR for c in token):
        return bytes([_BYTE_OF_CHAR[c] for c in token])
    return token.encode(errors="replace")


# ---- files and checks ----------------------------------------------------------------------------------------------


def _eos_ids(path: Path, config: dict[str, Any], control: dict[str, int]) -> tuple[int, ...]:
    named = config.get("eos_token")
    if isinstance(named, dict):
        named = named.get("content")
    if named is not None and named not in control:
        raise TokenizerError(
            f"{path}: eos_token must be the name of a control token (got {named!r})"
        )
    names = [*FAMILY_END_TOKENS, *([named] if named is not None else [])]
    return tuple(sorted({control[name] for name in names if name in control}))


def _read_file(path: Path) -> bytes:
    try:
        with file_inside(path.parent, path.name, TokenizerError).open("rb") as file:
            data = file.read(MAX_FILE_BYTES + 1)
    except OSError as error:
        raise TokenizerError(f"{path}: must be a readable file (got {error.strerror})") from error
    if len(data) > MAX_FILE_BYTES:
        raise TokenizerError(
            f"{path}: must have at most {MAX_FILE_BYTES} bytes (got {path.stat().st_size})"
        )
    return data


def _read_json_object(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(_read_file(path))
    except TokenizerError:
        raise
    except (ValueError, RecursionError) as error:
        raise TokenizerError(f"{path}: must be valid JSON (got {error})") from error
    if not isinstance(value, dict):
        raise TokenizerError(f"{path}: must hold a JSON object (got {type(value).__name__})")
    return value


def check_text(text: str, where: str = "tokenizer") -> None:
    """Raises TypeError unless text is a str, TokenizerError if it holds a lone surrogate."""
    if not isinstance(text, str):
        raise TypeError(f"{where}: text must be a str (got {type(text).__name__})")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise TokenizerError(
            f"{where}: text must hold no lone surrogate (got U+{ord(text[error.start]):04X} at character {error.start})"
        ) from error
