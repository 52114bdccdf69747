"""The standard streams of a command: closed ones are replaced, and stdout is named in its errors."""

from __future__ import annotations

import contextlib
import io
import os
import sys
from collections.abc import Iterator
from typing import Any


class _Stdout(io.FileIO):
    """Standard output. Its first error is kept, and what comes after it is dropped: so nobody who ignores the error
    hides it, and the interpreter, which flushes at exit, has nothing to complain about."""

    failure: OSError | None = None

    def write(self, data: Any) -> int | None:
        if self.failure is None:
            try:
                return super().write(data)
            except OSError as error:
                self.failure = OSError(error.errno, error.strerror, "stdout")
                raise self.failure from None
        return len(data)


@contextlib.contextmanager
def standard_streams() -> Iterator[None]:
    """While a command runs: a stream that its caller closed is empty or takes everything, and what stdout cannot show
    is replaced, not lost with all that follows.

    Raises OSError, BrokenPipeError too, with "stdout" as the file's name if not all output could be written.
    """
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, mode, encoding="utf-8"))  # noqa: SIM115, for good
    before = sys.stdout
    if type(before) is not io.TextIOWrapper:  # somebody's own
        yield
        before.flush()
        return
    raw = _Stdout(before.fileno(), "w", closefd=False)
    sys.stdout = io.TextIOWrapper(
        io.BufferedWriter(raw),
        encoding=before.encoding,
        errors="replace",
        line_buffering=before.line_buffering or before.write_through,
    )
    try:
        yield
    finally:
        with contextlib.suppress(OSError):  # it is kept
            sys.stdout.flush()
        sys.stdout = before
        if raw.failure is not None:
            raise raw.failure
