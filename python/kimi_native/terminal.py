"""What commands print: tables and JSON on stdout, notes on stderr."""

from __future__ import annotations

import dataclasses
import io
import json
import sys
from collections.abc import Iterator, Sequence
from typing import Any

from kimi_native.errors import KimiNativeError
from kimi_native.units import bytes_text

PIPE_WIDTH = (
    160  # a file or pipe has no width of its own: do not wrap what another program will read
)


def print_json(value: Any) -> None:
    """One line. Characters that stdout's encoding lacks are escaped, which JSON readers undo."""
    text = json.dumps(value, ensure_ascii=False)
    try:
        text.encode(sys.stdout.encoding or "utf-8")
    except UnicodeEncodeError:
        text = json.dumps(value)
    print(text)


def event_dict(event: Any) -> dict[str, Any]:
    """An event of an answer for print_json: the name of its class, and its fields."""
    return {"event": type(event).__name__, **dataclasses.asdict(event)}


def print_table(
    title: str, rows: Sequence[tuple[str, ...]], header: Sequence[str] | None = None
) -> None:
    """Two columns under a title, or those of the header, as wide as the terminal."""
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(box=box.SIMPLE, show_header=header is not None)
    for name in header or ("", ""):
        table.add_column(name, overflow="fold")
    for row in rows:
        table.add_row(*map(Text, row))
    print(title)
    if sys.stdout.isatty():
        Console(file=sys.stdout).print(table)
        return
    plain = io.StringIO()
    Console(file=plain, width=PIPE_WIDTH).print(table)
    print("\n".join(line.rstrip() for line in plain.getvalue().splitlines()))


def rows_of(values: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    """Nested dicts as rows "outer: inner" and value; sizes in bytes as a person reads them."""
    for name, value in values.items():
        label = prefix + (name if name.isupper() else name.replace("_", " "))
        if isinstance(value, dict):
            yield from rows_of(value, f"{label}: ")
        elif isinstance(value, list):
            yield label, ", ".join(map(str, value)) or "none"
        elif isinstance(value, int) and not isinstance(value, bool) and "bytes" in label:
            yield label, bytes_text(value)
        elif isinstance(value, bool):
            yield label, "yes" if value else "no"
        else:
            yield (
                label,
                "none" if value is None else f"{value:,}" if type(value) is int else str(value),
            )


def shown(text: str) -> str:
    """Text as it is; on a terminal without control characters, which could rewrite what the user sees."""
    if not sys.stdout.isatty():
        return text
    return "".join(
        c if c in "\n\t" or c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in text
    )


def note(text: str) -> None:
    """One line on stderr."""
    print(f"kimi-native: {' '.join(text.split())}", file=sys.stderr)


def error_text(error: BaseException) -> str:
    """What an error says; one of the system's with the file first, as the package's own have it."""
    named = isinstance(error, OSError) and not isinstance(error, KimiNativeError)
    if named and error.filename is not None and error.strerror:
        return f"{error.filename}: cannot be used (got {error.strerror})"
    return str(error) or type(error).__name__
