"""Messages of a chat as they are typed or piped in."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator

from kimi_native.errors import RequestError

PROMPT, MORE = "> ", ". "
_FENCE = '"""'


def enable_editing() -> None:
    """Lets input() edit its line and remember earlier ones, where Python was built with readline."""
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401


def read_message() -> str:
    """One message from the terminal: a line; lines that end in a backslash and the one after them; or the lines
    between two lines of three double quotes.

    Raises EOFError for Ctrl-D, KeyboardInterrupt for Ctrl-C, RequestError for bytes that are no text.
    """
    line = _read_line(PROMPT)
    if line.strip() == _FENCE:
        lines = []
        while (line := _read_line(MORE)).strip() != _FENCE:
            lines.append(line)
        return "\n".join(lines)
    lines = [line]
    while lines[-1].endswith("\\"):
        lines[-1] = lines[-1][:-1]
        lines.append(_read_line(MORE))
    return "\n".join(lines)


def ask(question: str) -> str:
    """The answer to a question, which is not remembered among the messages. Raises as read_message."""
    with _no_history():
        return _read_line(question)


def piped_messages(*, whole: bool) -> Iterator[str]:
    """The messages of standard input: each line that is not empty, or the whole of it.

    Raises RequestError if there is none, or for bytes that are no text.
    """
    found = False
    for text in _piped_texts(whole):
        if text.strip():
            found = True
            yield _checked(text.removesuffix("\n"))
    if not found:
        raise RequestError("chat: stdin must hold a message (got none)")


def _piped_texts(whole: bool) -> Iterator[str]:
    try:
        if whole:
            yield sys.stdin.read()
        else:
            yield from sys.stdin
    except UnicodeDecodeError as error:
        raise RequestError(f"chat: stdin must be UTF-8 text ({error})") from None


def _read_line(prompt: str) -> str:
    try:
        return _checked(input(prompt))
    except UnicodeDecodeError as error:
        raise RequestError(f"chat: a message must be UTF-8 text ({error})") from None


def _checked(text: str) -> str:
    # Python hands over bytes that are no text in its encoding as these code points.
    bad = next((c for c in text if "\udc80" <= c <= "\udcff"), None)
    if bad is not None:
        raise RequestError(
            f"chat: a message must be UTF-8 text (got byte 0x{ord(bad) - 0xDC00:02x})"
        )
    return text


@contextlib.contextmanager
def _no_history() -> Iterator[None]:
    readline = sys.modules.get("readline")
    if readline is None:
        yield
        return
    readline.set_auto_history(False)
    try:
        yield
    finally:
        readline.set_auto_history(True)
