"""Files that a command line names, - for standard input: text, JSON, or a list in JSON."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from kimi_native.errors import RequestError

STDIN = "-"


def read_text(path: str) -> str:
    """The UTF-8 text of a file. Raises RequestError, OSError."""
    data = sys.stdin.buffer.read() if path == STDIN else Path(path).read_bytes()
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise RequestError(f"{shown_name(path)}: must be UTF-8 text ({error})") from None


def parse_json(where: str, text: str) -> Any:
    """The value of a JSON text without NaN or infinities. Raises RequestError that starts with `where`."""

    def constant(name: str) -> None:
        raise RequestError(f"{where}: numbers must be finite (got {name})")

    try:
        return json.loads(text, parse_constant=constant)
    except RequestError:
        raise
    except RecursionError:
        raise RequestError(f"{where}: JSON nests too deep") from None
    except ValueError as error:
        raise RequestError(f"{where}: must be valid JSON ({error})") from None


def read_list(path: str, what: str) -> list[Any]:
    """The JSON list of a file. Raises RequestError, which calls it `what`, OSError."""
    value = parse_json(shown_name(path), read_text(path))
    if not isinstance(value, list):
        raise RequestError(
            f"{shown_name(path)}: {what} must be a JSON list (got {type(value).__name__})"
        )
    return value


def shown_name(path: str) -> str:
    """The path as messages name it."""
    return "stdin" if path == STDIN else path
