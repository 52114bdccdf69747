"""JSON schemas of tools as grammars over token ids, by llguidance.

A grammar is compiled once per schema and copied per call. What a schema may cost is bounded: its text by
MAX_SCHEMA_BYTES, its compilation and every step by llguidance's fuel. A keyword that cannot be enforced is an error,
not a promise that is quietly broken.
"""

from __future__ import annotations

import json
import re
import threading
from collections import OrderedDict
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import llguidance
import numpy as np

from kimi_native.errors import RequestError

if TYPE_CHECKING:
    from kimi_native.chat.tool import Tool
    from kimi_native.tokenizer import Tokenizer

MAX_SCHEMA_BYTES = 64 << 10  # compiled in about 0.5 s at worst
MAX_CACHED_BYTES = 1 << 20  # of schema text; a compiled one is some ten times as large
FORMATS = frozenset(
    ("date-time", "time", "date", "duration", "email", "hostname", "ipv4", "ipv6", "uri", "uuid")
)
_WAY_OUT = "; constrain_tools=False leaves the arguments to the model"


class GrammarCompiler:
    """Grammars over one tokenizer's ids. Safe to use from several threads.

    vocab_size  of the model's logits: masks have as many entries, those past the tokenizer's own are False
    """

    def __init__(self, tokenizer: Tokenizer, vocab_size: int) -> None:
        self.vocab_size = vocab_size
        self._tokenizer = llguidance.LLTokenizer(llguidance.TokenizerWrapper(_Ids(tokenizer)))
        self._lock = threading.Lock()
        self._compiled: OrderedDict[str, llguidance.LLMatcher] = OrderedDict()
        self._cached_bytes = 0

    def header(self, names: tuple[str, ...], index: int, end_id: int) -> Matcher:
        """Matches `functions.NAME:index` for one of the names, then the id end_id."""
        ids = " | ".join(json.dumps(f"functions.{name}:{index}") for name in names)
        grammar = f"start: ({ids}) <[{end_id}]>"
        return Matcher(llguidance.LLMatcher(self._tokenizer, grammar, log_level=0), self.vocab_size)

    def arguments(self, tool: Tool, end_id: int) -> Matcher:
        """Matches the arguments of a tool, in compact JSON, then the id end_id. Raises RequestError as `check`."""
        schema = _schema_text(tool)
        key = f"{end_id} {schema}"
        with self._lock:
            if key not in self._compiled:
                self._remember(key, self._compile(tool.name, schema, end_id))
            self._compiled.move_to_end(key)
            matcher = self._compiled[key].deep_copy()
        return Matcher(matcher, self.vocab_size)

    def _compile(self, name: str, schema: str, end_id: int) -> llguidance.LLMatcher:
        grammar = f"start: %json {schema} <[{end_id}]>"
        matcher = llguidance.LLMatcher(self._tokenizer, grammar, log_level=0)
        if matcher.is_error():
            raise RequestError(
                f"tool {name}: parameters must be a schema that can be enforced "
                f"(got {_reason(matcher.get_error())}){_WAY_OUT}"
            )
        return matcher

    def _remember(self, key: str, matcher: llguidance.LLMatcher) -> None:
        self._compiled[key] = matcher
        self._cached_bytes += len(key)
        while self._cached_bytes > MAX_CACHED_BYTES:
            oldest, _ = self._compiled.popitem(last=False)
            self._cached_bytes -= len(oldest)


class Matcher:
    """Which ids may come next in one text of a grammar."""

    def __init__(self, matcher: llguidance.LLMatcher, vocab_size: int) -> None:
        self._matcher = matcher
        self._vocab_size = vocab_size

    def allowed(self) -> np.ndarray:
        """[vocab_size] bool. Raises RequestError if the grammar meets a limit of its cost, or allows no id."""
        given = np.unpackbits(self._bits(), bitorder="little")[: self._vocab_size]
        if self._matcher.is_error():
            reason = _reason(self._matcher.get_error())
            raise RequestError(
                f"tool call: the schema must not be too complex (got {reason}){_WAY_OUT}"
            )
        mask = np.zeros(self._vocab_size, dtype=bool)
        mask[: given.size] = given
        if not mask.any():
            raise RequestError(f"tool call: the schema must allow an id (got none){_WAY_OUT}")
        return mask

    def _bits(self) -> np.ndarray:
        return np.frombuffer(self._matcher.compute_bitmask(), dtype=np.uint8)

    def push(self, token_id: int) -> None:
        """Takes an allowed id. Raises ValueError for another."""
        if not self._matcher.consume_token(token_id):
            raise ValueError(f"grammar: the next id must be an allowed one (got {token_id})")


class _Ids:
    """A Tokenizer as llguidance wants it: ids that are not text are special."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.eos_token_id = min(tokenizer.eos_ids)
        self.bos_token_id = None
        self.special_token_ids = sorted(tokenizer.control_ids.values())
        self.tokens = tokenizer.token_bytes
        self._encode = tokenizer.encode

    def __call__(self, text: bytes) -> list[int]:
        return self._encode(text.decode("utf-8", errors="replace"))


# ---- schemas --------------------------------------------------------------------------------------------------------


def _schema_text(tool: Tool) -> str:
    """The schema as one line, of an object, without what JSON schema calls annotations of the whole or of formats."""
    schema = _prepared(tool.parameters or {}, tool.name)
    schema.pop("$schema", None)
    if not {"type", "$ref", "allOf", "anyOf", "oneOf", "enum", "const"} & set(schema):
        schema["type"] = "object"
    if schema.get("type", "object") != "object":
        raise RequestError(
            f"tool {tool.name}: parameters must be the schema of an object (got type {schema['type']!r})"
        )
    schema["x-guidance"] = {"whitespace_flexible": False}
    try:
        text = json.dumps(schema, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise RequestError(f"tool {tool.name}: parameters must be JSON ({error})") from error
    if len(text) > MAX_SCHEMA_BYTES:
        raise RequestError(
            f"tool {tool.name}: parameters must be at most {MAX_SCHEMA_BYTES} bytes of JSON (got {len(text)}){_WAY_OUT}"
        )
    return text


# Beside these, an object's own properties are not all that it may have.
_OPENING = frozenset(("additionalProperties", "patternProperties", "anyOf", "oneOf", "$ref"))
_BY_NAME = frozenset(("properties", "patternProperties", "$defs", "definitions"))
_VALUES = frozenset(("enum", "const", "default", "examples"))


def _prepared(schema: Mapping[str, Any], name: str) -> dict[str, Any]:
    """A copy without unknown formats, which JSON schema leaves to the reader, and with closed objects.

    JSON schema lets an object have properties that were not declared, but no tool wants them: objects with properties
    become closed, unless they are put together of several schemas.
    """
    try:
        return _copy(schema, name, closing="allOf" not in str(schema))
    except RecursionError as error:
        raise RequestError(f"tool {name}: parameters must not be nested so deeply") from error


def _copy(schema: Any, name: str, *, closing: bool) -> Any:
    if not isinstance(schema, Mapping):
        return schema  # True, False, or a mistake that the compiler names
    if "additionalItems" in schema:
        raise RequestError(
            f"tool {name}: parameters must be a schema that can be enforced (got additionalItems){_WAY_OUT}"
        )
    inner = closing and not ("properties" in schema and _OPENING & set(schema))
    copy: dict[str, Any] = {}
    for key, value in schema.items():
        if key == "format" and value not in FORMATS:
            continue
        if key in _BY_NAME and isinstance(value, Mapping):
            copy[key] = {n: _copy(v, name, closing=closing) for n, v in value.items()}
        elif isinstance(value, list | tuple) and key not in _VALUES:
            copy[key] = [_copy(v, name, closing=inner) for v in value]
        else:
            copy[key] = value if key in _VALUES else _copy(value, name, closing=closing)
    names = copy.get("properties")
    required = copy.get("required", [])
    is_listed = isinstance(required, list) and all(n in (names or ()) for n in required)
    if closing and names and is_listed and not _OPENING & set(copy):
        copy["additionalProperties"] = False
    return copy


def _reason(message: str) -> str:
    """The one line of llguidance's message that says what is wrong."""
    text = " ".join(message.split("\n   ")[0].split())
    text = re.sub(r"^at \d+\(\d+\): (failed to compile JSON schema: )?", "", text)
    return text if len(text) <= 200 else text[:197] + "..."
