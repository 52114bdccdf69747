"""JSON files of a model folder, read with suspicion: bounded, every key accounted for."""

from __future__ import annotations

import json
import reprlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from kimi_native.errors import ConfigError, KimiNativeError

MAX_JSON_DEPTH = 64  # config.json nests 5 deep; the rest is somebody trying
REQUIRED: Any = object()  # default of a key that must be there
_MAX_LISTED = 20  # unknown keys in one message


def read_json(path: Path, *, max_bytes: int, error: type[KimiNativeError] = ConfigError) -> dict:
    """The JSON object in a file of at most max_bytes; see parse_json."""
    with open(path, "rb") as file:
        data = file.read(max_bytes + 1)
    if len(data) > max_bytes:
        raise error(f"{path}: must be at most {max_bytes} bytes (got more)")
    return parse_json(data, source=str(path), error=error)


def parse_json(data: bytes, *, source: str, error: type[KimiNativeError] = ConfigError) -> dict:
    """The JSON object in `data`. Duplicate keys, NaN and infinities, or no object at the top raise `error`."""

    def pairs(items: list[tuple[str, Any]]) -> dict:
        values = dict(items)
        if len(values) != len(items):
            seen: set[str] = set()
            twice = next(k for k, _ in items if k in seen or seen.add(k))
            raise error(f"{source}: key {reprlib.repr(twice)} must appear once (got twice)")
        return values

    def constant(text: str) -> None:
        raise error(f"{source}: numbers must be finite (got {text})")

    try:
        text = data.decode("utf-8")  # json.loads would also guess UTF-16 and UTF-32
        values = json.loads(text, object_pairs_hook=pairs, parse_constant=constant)
    except error:
        raise
    except RecursionError:
        raise error(f"{source}: JSON nests too deep") from None
    except ValueError as e:
        raise error(f"{source}: must be valid JSON ({e})") from None
    if not isinstance(values, dict):
        raise error(f"{source}: must hold a JSON object (got {type(values).__name__})")
    return values


def check_depth(values: dict, source: str) -> None:
    """Without recursion: what follows may compare and print values."""
    level: list[Any] = [values]
    for _ in range(MAX_JSON_DEPTH):
        inner: list[Any] = []
        for value in level:
            if isinstance(value, dict):
                inner.extend(value.values())
            elif isinstance(value, (list, tuple)):
                inner.extend(value)
        level = [v for v in inner if isinstance(v, (dict, list, tuple))]
        if not level:
            return
    raise ConfigError(f"{source}: JSON must nest at most {MAX_JSON_DEPTH} deep (got more)")


class UnknownKeys:
    """The keys of one file that nobody here knows, and which of them the user asked to ignore.

    ignored  keys to accept unread, dotted where nested: each must be in the file, and be unknown
    prefix   stands before this file's keys in `ignored`
    """

    def __init__(self, source: str, ignored: Iterable[str] = (), prefix: str = "") -> None:
        self.source, self.prefix = source, prefix
        self.ignored = frozenset(ignored)
        self._met: set[str] = set()
        self._refused: list[str] = []  # the first of them
        self._count = 0

    def add(self, path: str, value: Any) -> None:
        """A key of the file that no reader asked for."""
        name = self.prefix + path
        if name in self.ignored:
            self._met.add(name)
            return
        self._count += 1
        if self._count <= _MAX_LISTED:
            self._refused.append(f"{printable(name)} = {short(value)}")

    def check_known(self, path: str) -> None:
        """A key that is read may decide what the model computes, so it cannot be left out."""
        if self.prefix + path in self.ignored:
            raise ConfigError(
                f"{self.source}: ignore_config_keys must name keys that this package does not know "
                f"(got {printable(self.prefix + path)}, which it reads)"
            )

    def finish(self) -> None:
        """To be called when the whole file is read. Raises ConfigError naming every key at once."""
        if self._refused:
            more = self._count - len(self._refused)
            listed = ", ".join(self._refused) + (f" and {more} more" if more else "")
            raise ConfigError(
                f"{self.source}: keys must be known to this package (got {listed}); one that does not change the "
                "model's output can be accepted by its name in ignore_config_keys, or after --ignore-config-key"
            )
        absent = sorted(self.ignored - self._met)
        if absent:
            raise ConfigError(
                f"{self.source}: ignore_config_keys must name keys of the file "
                f"(got {', '.join(map(printable, absent))}, which it does not hold)"
            )


class Section:
    """One JSON object while it is read: checks values, remembers used keys, and finish() hands on the others."""

    def __init__(self, values: Any, path: str, unknown: UnknownKeys) -> None:
        self.source, self.unknown = unknown.source, unknown
        if not isinstance(values, dict):
            raise ConfigError(
                f"{self.source}: {path or 'the top'} must be an object (got {short(values)})"
            )
        self.path = f"{printable(path)}." if path else ""
        self.values = dict(values)
        self.used: set[str] = set()

    def fail(self, key: str, must: str) -> ConfigError:
        got = short(self.values[key]) if key in self.values else "no such key"
        return ConfigError(f"{self.source}: {self.path}{key} must be {must} (got {got})")

    def get(self, key: str, default: Any = None) -> Any:
        self.used.add(key)
        self.unknown.check_known(self.path + key)
        if key not in self.values and default is REQUIRED:
            raise ConfigError(f"{self.source}: {self.path}{key} is missing")
        return self.values.get(key, default)

    def section(self, key: str) -> Section | None:
        value = self.get(key)
        if value is None:
            return None
        return Section(value, self.path + key, self.unknown)

    def integer(self, key: str, limits: tuple[int, int], default: Any = REQUIRED) -> int:
        value = self.get(key, default)
        if type(value) is not int or not limits[0] <= value <= limits[1]:
            raise self.fail(key, f"an integer in {limits[0]} .. {limits[1]}")
        return value

    def number(self, key: str, low: float, high: float, default: Any = REQUIRED) -> float:
        value = self.get(key, default)
        if type(value) not in (int, float) or not low <= value <= high:  # NaN fails the comparison
            raise self.fail(key, f"a number in {low:g} .. {high:g}")
        return float(value)

    def boolean(self, key: str, default: Any = REQUIRED) -> bool:
        value = self.get(key, default)
        if type(value) is not bool:
            raise self.fail(key, "true or false")
        return value

    def choice(self, key: str, allowed: tuple[Any, ...], default: Any = REQUIRED) -> Any:
        value = self.get(key, default)
        if not any(value == a and type(value) in (type(a), int, float) for a in allowed):
            raise self.fail(key, " or ".join(json.dumps(a) for a in allowed))
        return value

    def finish(
        self, one_value: dict[str, tuple] | None = None, any_value: frozenset[str] = frozenset()
    ) -> None:
        """Every key not asked for so far must be in one of the two tables of keys without effect, or is unknown."""
        for key in sorted(set(self.values) - self.used):
            if one_value and key in one_value:
                self.choice(key, one_value[key])
            elif key in any_value:
                self.unknown.check_known(self.path + key)
            else:
                self.unknown.add(self.path + key, self.values[key])


def short(value: Any) -> str:
    """A value in an error message: bounded, whatever it holds."""
    try:
        return reprlib.repr(value)
    except ValueError:  # an int of more digits than the interpreter prints
        return f"a huge {type(value).__name__}"


def printable(name: str) -> str:
    """A name from a file in an error message: ASCII, no control characters, bounded."""
    text = ascii(name)[1:-1]
    return text if len(text) <= 200 else text[:197] + "..."
